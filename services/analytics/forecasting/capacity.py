"""When a metric reaches a limit: "disk_usage passes 90 % on DATE, between LOW and HIGH", or why that cannot be said.

What must stay true: a date is given only for growth that noise does not show (measured: see SIGNIFICANT); LOW <= DATE
<= HIGH; where there is no date there is a reason; scale and shift of metric and limit together change nothing; the
answer carries how good such answers were on the series' own last weeks.

Measured on synthetic disks (bench/analytics/disks.py: 30 to 90 days of history, 10 to 200 to go, noise .02,
.2 and 1 % of the disk, 120 of each), median relative error of the time left, and of the median slope of 7, 14 and 28
days on the same disks: linear .002 (.004), saw-tooth .006 (.011), weekly clean-up .001 (.15), jumps that go on .32
(.51; .19 for who knows their rate), jumps that are over .07 (.01), change of rate .008 (.015). Flat: no date in 900.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from services.analytics.forecasting.daily import Days, daily_peaks
from services.analytics.forecasting.grid import HOUR_MS, hourly
from services.analytics.forecasting.growth import Growth, growth_of
from services.analytics.forecasting.odds import odds_of_passing
from services.analytics.forecasting.robust import Floats, Integers, normal_quantile

DAY_MS: Final = 24 * HOUR_MS
MIN_DAYS: Final = 7
MAX_DAYS_AHEAD: Final = 730
HISTORY_DAYS: Final = 400
"""Older days are passed over: growth a year ago says nothing about a disk today."""
SIGNIFICANT: Final = 6.0
"""Standard errors that a rate must be from 0, correlated noise considered."""
SIGNIFICANT_JUMPS: Final = 2.0
"""The same for a rate made by jumps, whose standard error counts each of them as an accident."""
SHARE: Final = 0.8
"""LOW and HIGH are to hold the date in so many of 100 cases."""
OUTRUN: Final = 2.0
"""Where a day's shape is this many times higher than the step to the next day, the limit is reached at a day's peak."""
RESOLUTION_DAYS: Final = 0.5
"""LOW and HIGH are at least so far from DATE: days are what it is counted in."""
DRAWS: Final = 400
MAX_WIDTH: Final = 3.0
"""An interval wider than so many times the time left is too uncertain to be honest: "in 30 days, between 10 and 100" is
no answer that anybody could act on."""
TRIAL_AGES: Final = (7, 14, 21, 28)
"""Back-tests: what would have been said so many days ago."""
SOON_DAYS: Final = (30, 90)


class Reason(StrEnum):
    """Why there is no date."""

    NO_DATA = "no data"
    TOO_YOUNG = "under 7 days of data"
    PAST = "already past the limit"
    FLAT = "flat"
    FALLING_AWAY = "falling away from the limit"
    TOO_FAR = "more than 2 years away"
    TOO_UNCERTAIN = "too uncertain to be honest"


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityBacktest:
    """What the same method said 7, 14, 21 and 28 days ago about the days since then; NaN without trials.

    Attributes:
        trials: how many of these the history is long enough for.
        error: mean absolute error of the daily peaks it forecast, in the metric's unit.
        coverage: share of these peaks inside the 80 % interval it had for them.
    """

    trials: int
    error: float
    coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhaustion:
    """An answer; times are milliseconds since the Unix epoch.

    Attributes:
        date_ms, low_ms, high_ms: when the limit is reached, and between when; None when there is no date.
        reason: why there is none; None when there is one.
        level: the daily peak now, in the metric's unit; NaN without data.
        rate_per_day: how fast it grows now, in the metric's unit, before "what if"; NaN when it cannot be said.
        changes_ms: when its rate changed.
        within_30_days, within_90_days: probability that the limit is passed by then; NaN under 7 days of data, and
            where the newest weeks have none.
        backtest: see there.
    """

    date_ms: int | None
    low_ms: int | None
    high_ms: int | None
    reason: Reason | None
    level: float
    rate_per_day: float
    changes_ms: tuple[int, ...]
    within_30_days: float
    within_90_days: float
    backtest: CapacityBacktest


_NO_BACKTEST: Final = CapacityBacktest(trials=0, error=math.nan, coverage=math.nan)


def exhaust(
    times_ms: Integers, values: Floats, limit: float, *, falling: bool = False, growth: float = 0.0
) -> Exhaustion:
    """When the daily peak of a metric reaches a limit.

    Args:
        times_ms: shape (rows,), increasing.
        values: shape (rows,); NaN where nothing was measured.
        limit: in the metric's unit.
        falling: the limit is reached from above (free space); peaks are then the day's lows.
        growth: what if it grew faster: 0.2 for 20 % more a day than it does.
    """
    sign = -1.0 if falling else 1.0
    if not np.isfinite(values).any():
        return _answer(Reason.NO_DATA)
    hours = hourly(times_ms, sign * values[:, None])
    usual = daily_peaks(hours.values[0][-HISTORY_DAYS * 24 :])
    peaks, bound = usual.peaks, sign * limit
    count = int(np.count_nonzero(~np.isnan(peaks)))
    level = float(peaks[~np.isnan(peaks)][-1]) if count else math.nan
    if count and level >= bound:
        return _answer(Reason.PAST, level=sign * level, soon=(1.0, 1.0))
    if count < MIN_DAYS:
        return _answer(Reason.TOO_YOUNG, level=sign * level)
    fitted = growth_of(peaks)
    found = _Found(
        level=sign * level,
        rate_per_day=sign * fitted.rate,
        changes_ms=tuple(hours.end_ms - (len(peaks) - day) * DAY_MS for day in fitted.changes),
        backtest=backtest_of(peaks),
    )
    doubt = _doubt(fitted)
    if doubt is not None:
        soon, later = (odds_of_passing(peaks, bound, days) for days in SOON_DAYS)
        return _answer(doubt, found, soon=(soon, later))
    return _dated(fitted, usual, bound, 1 + growth, found, hours.end_ms)


def _doubt(fitted: Growth) -> Reason | None:
    """Why growth leads to no date; None when it does."""
    if not is_significant(fitted):
        return Reason.FLAT
    if fitted.rate <= 0:
        return Reason.FALLING_AWAY
    return Reason.TOO_UNCERTAIN if fitted.is_taken_back else None


def _dated(fitted: Growth, usual: Days, bound: float, factor: float, found: "_Found", now_ms: int) -> Exhaustion:
    """The answer for growth, `factor` times as fast as it is."""
    left, draws = _days_left(fitted, usual, bound, factor)
    soon = (float(np.mean(draws <= SOON_DAYS[0])), float(np.mean(draws <= SOON_DAYS[1])))
    if left > MAX_DAYS_AHEAD:
        return _answer(Reason.TOO_FAR, found, soon=soon)
    low, high = np.quantile(draws, [(1 - SHARE) / 2, (1 + SHARE) / 2], method="nearest").tolist()
    low, high = max(min(low, left - RESOLUTION_DAYS), 0.0), max(high, left + RESOLUTION_DAYS)
    if high - low > MAX_WIDTH * max(left, 1.0):
        return _answer(Reason.TOO_UNCERTAIN, found, soon=soon)
    return _answer(None, found, soon=soon, when=tuple(now_ms + round(day * DAY_MS) for day in (left, low, high)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What is known whether there is a date or not."""

    level: float
    rate_per_day: float
    changes_ms: tuple[int, ...]
    backtest: CapacityBacktest


def _answer(
    reason: Reason | None,
    found: _Found | None = None,
    *,
    level: float = math.nan,
    soon: tuple[float, float] = (math.nan, math.nan),
    when: tuple[int, ...] = (),
) -> Exhaustion:
    date_ms, low_ms, high_ms = when or (None, None, None)
    return Exhaustion(
        date_ms=date_ms,
        low_ms=low_ms,
        high_ms=high_ms,
        reason=reason,
        level=found.level if found else level,
        rate_per_day=found.rate_per_day if found else math.nan,
        changes_ms=found.changes_ms if found else (),
        within_30_days=soon[0],
        within_90_days=soon[1],
        backtest=found.backtest if found else _NO_BACKTEST,
    )


def is_significant(fitted: Growth) -> bool:
    """Whether growth, or decline, is more than noise."""
    return abs(fitted.significance) >= (SIGNIFICANT_JUMPS if fitted.is_habit else SIGNIFICANT)


def _days_left(fitted: Growth, days: Days, bound: float, factor: float) -> tuple[float, Floats]:
    """Days until the limit, and draws of them from the errors of level and rate; infinite beyond MAX_DAYS_AHEAD."""
    shocks = np.random.default_rng(0).standard_normal((3, DRAWS))
    rate = fitted.rate * factor
    left = float(_crossing(fitted, days, bound, np.array([fitted.level]), np.array([rate]))[0])
    jumps = math.sqrt(fitted.step_variance / max(min(left, MAX_DAYS_AHEAD), 1.0))
    levels = fitted.level + math.hypot(fitted.level_error, days.wobble / 2) * shocks[0]
    rates = rate + factor * fitted.rate_error * shocks[1] + jumps * shocks[2]
    return left, _crossing(fitted, days, bound, levels, rates)


def _crossing(fitted: Growth, days: Days, bound: float, levels: Floats, rates: Floats) -> Floats:
    """Days until each line, with its week, reaches the limit.

    Where the day has a shape that growth does not outrun, it is reached at the peak of a day, elsewhere in between.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(rates > 0, (bound - fitted.week.max() - levels) / rates, np.inf)
    first = np.minimum(first, MAX_DAYS_AHEAD + 1)  # days that are no whole numbers any more are as far as too far
    ahead = np.maximum(np.floor(first), 1.0)[:, None] + np.arange(-1, _DAYS_TRIED)  # the first is before it is reached
    ahead = np.where(np.isfinite(ahead), ahead, MAX_DAYS_AHEAD + 1)
    season = fitted.week[(ahead.astype(np.int64) - 1) % 7]
    path = levels[:, None] + rates[:, None] * ahead + season - bound
    rows, day = np.arange(len(levels)), 1 + (path[:, 1:] >= 0).argmax(axis=1)
    reached, over = ahead[rows, day], path[rows, day]
    step = np.maximum(over - path[rows, day - 1], 1e-300)
    with np.errstate(over="ignore"):  # so far away a day's step is lost in rounding
        exact = reached - np.clip(over / step, 0.0, 1.0)
    when = np.where(days.shape_height > OUTRUN * step, reached, exact) - days.peak_age_days
    sure = (over >= 0) & (rates > 0) & (reached <= MAX_DAYS_AHEAD)
    return np.where(sure, np.maximum(when, 0.0), np.inf)


_DAYS_TRIED: Final = 60
"""A week whose peak rises less than the week falls needs several weeks from the first day that might be the one."""


def backtest_of(peaks: Floats) -> CapacityBacktest:
    """Forecasts of the last weeks' daily peaks from those before."""
    errors, inside = [], []
    trials = 0
    for age in TRIAL_AGES:
        known = peaks[:-age]
        if np.count_nonzero(~np.isnan(known)) < 2 * MIN_DAYS:
            continue
        trials += 1
        fitted = growth_of(known)
        rate = fitted.rate if is_significant(fitted) else 0.0
        ahead = np.arange(1, age + 1)
        error = peaks[-age:] - (fitted.level + rate * ahead + fitted.week[(ahead - 1) % 7])
        deviation = np.sqrt(
            fitted.level_error**2
            + (fitted.rate_error * ahead) ** 2
            + fitted.step_variance * ahead
            + fitted.noise.deviation**2
        )
        there = ~np.isnan(error)
        errors.append(np.abs(error[there]))
        inside.append(np.abs(error[there]) <= normal_quantile((1 + SHARE) / 2) * deviation[there])
    if not errors or not len(np.concatenate(errors)):
        return _NO_BACKTEST
    return CapacityBacktest(
        trials=trials, error=float(np.concatenate(errors).mean()), coverage=float(np.concatenate(inside).mean())
    )
