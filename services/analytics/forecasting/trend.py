"""What a metric has done in the long run: its slope, its day and week, its changes, and the year before.

What must stay true: the slope is of daily medians, so that a day's peak or a night without measurements does not bend
it; its interval and its significance consider that days are like the days before; times are UTC; a year of hourly
values takes under 50 ms (measured: 28).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from services.analytics.forecasting.changes import noise_of, pieces_of
from services.analytics.forecasting.daily import repeated, week_of
from services.analytics.forecasting.grid import HOUR_MS, hourly
from services.analytics.forecasting.profiles import DAY, WEEK, daily_medians, has_profile, season_profiles
from services.analytics.forecasting.robust import Floats, Integers, mann_kendall, mean, median, slopes_with_interval

MAX_POINTS: Final = 400
"""Points a slope is taken through; more days are put together, as pairs grow with the square."""
MIN_DAYS: Final = 3
SURE: Final = 1.96
"""Mann-Kendall's statistic from which a trend is one: 1 series in 20 without has one."""
YEAR_DAYS: Final = 364
"""A year of whole weeks: Mondays are compared with Mondays."""
COMPARED_DAYS: Final = 28
MONDAY_HOURS: Final = 72
"""Hours from a Monday to the epoch, which was a Thursday."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of level or rate.

    Attributes:
        time_ms: the beginning of the first day after it.
        before, after: the level just before and after.
        slope_before, slope_after: per day.
    """

    time_ms: int
    before: float
    after: float
    slope_before: float
    slope_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class YearOverYear:
    """The newest four weeks and the same weeks a year (52 weeks) before.

    Attributes:
        now, then: mean of the daily medians.
        change: now less then.
        share: the change over then, 0.1 for 10 % more; NaN where then is 0.
    """

    now: float
    then: float
    change: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trend:
    """The long run of a metric.

    Attributes:
        start_ms, end_ms: the first and the end of the last hour it is made of.
        days: days with measurements.
        level: the median of the last seven days.
        slope, slope_low, slope_high: per day, with its 95 % interval; NaN under three days.
        significance: Mann-Kendall's statistic in standard deviations, autocorrelation considered.
        daily: shape (24,), what each hour of the day (UTC) is away from the day's median.
        weekly: shape (168,), the same for the hours of the week from Monday 00:00 UTC.
        has_profile: whether there was enough for these two; else they are zeros.
        changes: where level or rate changed, oldest first.
        year: None without measurements of both years.
    """

    start_ms: int
    end_ms: int
    days: int
    level: float
    slope: float
    slope_low: float
    slope_high: float
    significance: float
    daily: Floats
    weekly: Floats
    has_profile: bool
    changes: tuple[Change, ...]
    year: YearOverYear | None

    @property
    def direction(self) -> int:
        """1 for a rise, -1 for a fall, 0 for neither."""
        return 0 if abs(self.significance) < SURE else int(math.copysign(1, self.significance))


def trend(times_ms: Integers, values: Floats) -> Trend:
    """The trend of measurements.

    Args:
        times_ms: shape (rows,), increasing; at least one.
        values: shape (rows,), by minute, hour or day; NaN where nothing was measured.
    """
    hours = hourly(times_ms, values[:, None])
    history = hours.values
    medians = daily_medians(history)[0] if history.shape[1] >= DAY else median(history)
    slope, low, high, significance = _slope(medians)
    daily, weekly = season_profiles(history)
    first_hour = int(hours.end_ms // HOUR_MS)
    return Trend(
        start_ms=hours.end_ms - history.shape[1] * HOUR_MS,
        end_ms=hours.end_ms,
        days=int(np.count_nonzero(~np.isnan(medians))),
        level=float(median(medians[-7:])),
        slope=slope,
        slope_low=low,
        slope_high=high,
        significance=significance,
        daily=np.roll(daily[0, :DAY], first_hour % DAY),
        weekly=np.roll(weekly[0], (first_hour + MONDAY_HOURS) % WEEK),
        has_profile=has_profile(history),
        changes=_changes(medians, hours.end_ms) if len(medians) >= MIN_DAYS else (),
        year=_year(medians),
    )


def year_over_year(times_ms: Integers, values: Floats) -> YearOverYear | None:
    """What `Trend.year` is, of measurements that may begin before those of the trend; the arguments are as there."""
    history = hourly(times_ms, values[:, None]).values
    return _year(daily_medians(history)[0]) if history.shape[1] >= DAY else None


def _slope(medians: Floats) -> tuple[float, float, float, float]:
    """Slope per day, its interval and its significance."""
    together = -(-len(medians) // MAX_POINTS)
    count = len(medians) // together
    points = median(medians[len(medians) - count * together :].reshape(count, together))
    if np.count_nonzero(~np.isnan(points)) < MIN_DAYS:
        return math.nan, math.nan, math.nan, 0.0
    slope, low, high = (value / together for value in slopes_with_interval(points))
    return slope, low, high, mann_kendall(points)


def _changes(medians: Floats, end_ms: int) -> tuple[Change, ...]:
    days = medians - repeated(week_of(medians), len(medians))
    pieces = pieces_of(days, noise_of(days))
    return tuple(
        Change(
            time_ms=end_ms - (len(medians) - later.start) * DAY * HOUR_MS,
            before=earlier.level,
            after=later.first_level,
            slope_before=earlier.slope,
            slope_after=later.slope,
        )
        for earlier, later in pairwise(pieces)
    )


def _year(medians: Floats) -> YearOverYear | None:
    if len(medians) < YEAR_DAYS + COMPARED_DAYS:
        return None
    pair = np.stack((medians[-COMPARED_DAYS:], medians[-COMPARED_DAYS - YEAR_DAYS : -YEAR_DAYS]))
    pair = pair[:, ~np.isnan(pair).any(axis=0)]
    if pair.shape[1] < COMPARED_DAYS // 2:
        return None
    now, then = mean(pair).tolist()
    return YearOverYear(now=now, then=then, change=now - then, share=(now - then) / abs(then) if then else math.nan)
