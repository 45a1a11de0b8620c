"""Forecasts of many series at once: hourly histories in, values with intervals and their back-test out.

What must stay true:

* a forecast is a function of the history and nothing else, whatever else is forecast beside it: no clock, no chance;
* the unit does not matter: history times a plus b gives forecast times a plus b (inside the bounds);
* what was never negative is not forecast negative; what says it is a percentage stays within [0, 100];
* the back-test is told with the forecast, and its coverage is of errors that the interval was not made from.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from services.analytics.forecasting.candidates import NAMES, fit, try_out
from services.analytics.forecasting.daylight import aligned
from services.analytics.forecasting.intervals import SHARES, spread_of
from services.analytics.forecasting.profiles import DAY, PROFILE_DAYS, WEEK
from services.analytics.forecasting.robust import Flags, Floats, Integers, mean, median, or_else

TRIAL_STEP: Final = WEEK // 2
"""The unit of the ages of back-tests, in hours, for a horizon of up to a week."""
TRIAL_AGES: Final = (2 / 7, 6 / 7, 10 / 7, 2, 3, 4, 5, 6)
"""How old back-tests are, in TRIAL_STEP: 1, 3, 5 and 7 days, then half weeks up to three weeks, so that newest errors
count most and both halves of a week begin one. Against six half weeks 1 % less error; two trials cover .65 of what they
should at 28 days (FORESIGHT)."""
TRIAL_SHARE: Final = 0.6
"""At most this part of the history is spent on back-tests; the rest is what the first of them knows."""
MIN_AGE_HOURS: Final = 5
"""A younger series has no back-test and no interval."""
BATCH_VALUES: Final = 2_000_000
"""Series are forecast in batches of so many values of history and horizon: 16 MB an array."""
MAPE_FLOOR: Final = 0.1
"""A mean absolute percentage error is given where the least |value| is over this part of the median: elsewhere it says
how near to zero the series comes, not how good the forecast is."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Backtest:
    """How good the same method was on the last weeks; all of shape (series,), NaN where it cannot be said.

    Attributes:
        trials: how many origins.
        hours: how far ahead each looked.
        mase: mean absolute error over that of "as 24 hours before" on the history; under 1 is better.
        mape: mean absolute error over the value, 0.1 for 10 %.
        cover80, cover95: share of the measurements inside the interval made from the other trials' errors.
    """

    trials: Integers
    hours: int
    mase: Floats
    mape: Floats
    cover80: Floats
    cover95: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forecasts:
    """Forecasts of the steps after the history.

    Attributes:
        value, low80, high80, low95, high95: shape (series, steps); NaN for a series without any value; the bounds
            also for one with too little to know its errors.
        floor, ceiling: shape (series,), what they were kept within; infinite where there is no such bound.
        methods: for each series what its forecast is the mean of.
        backtest: see there.
    """

    value: Floats
    low80: Floats
    high80: Floats
    low95: Floats
    high95: Floats
    floor: Floats
    ceiling: Floats
    methods: tuple[tuple[str, ...], ...]
    backtest: Backtest


def forecast(history: Floats, steps: int, *, step_hours: int = 1, percent: Flags | None = None) -> Forecasts:
    """Forecasts hourly histories.

    Args:
        history: shape (series, hours), means of hours in order, the last one just before the forecast; NaN where
            nothing was measured. More than is needed is passed over.
        steps: how many steps ahead.
        step_hours: hours a step is the mean of.
        percent: shape (series,), true where 100 is the most there can be. None asks the history: a series that has
            been at 100 and never over.
    """
    hours = steps * step_hours
    tested = min(hours, max(WEEK, history.shape[1] // 3))
    longest = PROFILE_DAYS * DAY + TRIAL_AGES[-1] * max(TRIAL_STEP, tested // 2)
    history = history[:, -longest:]
    series = len(history)
    ages = _ages(history)
    steps_of = np.array([_trial_step(int(age), tested) for age in ages], np.int64)
    parts = Parts(series, steps)
    for trial_step in np.unique(steps_of).tolist():
        rows = np.flatnonzero(steps_of == trial_step)
        size = max(1, BATCH_VALUES // (history.shape[1] + hours + len(NAMES) * tested))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            known = int(ages[part].max(initial=0))
            _forecast_part(history[part, history.shape[1] - known :], part, parts, trial_step, tested, step_hours)
    return parts.bounded(history, percent)


def _ages(history: Floats) -> Integers:
    """Hours since each series began; 0 for one without any value."""
    there = ~np.isnan(history)
    return np.where(there.any(axis=1), history.shape[1] - there.argmax(axis=1), 0).astype(np.int64)


def _trial_step(age: int, tested: int) -> int:
    """Hours between a series' back-tests; 0 when it is too young for any."""
    step = min(int(TRIAL_SHARE * age) // TRIAL_AGES[-1], max(TRIAL_STEP, tested // 2))
    return max(step, 1) if age >= MIN_AGE_HOURS else 0


def _trial_ages(trial_step: int, known: int) -> tuple[int, ...]:
    """How many hours before the end the back-tests begin, each before the last one of `known` hours."""
    ages = {max(1, round(trial_step * age)) for age in TRIAL_AGES} if trial_step else set()
    return tuple(sorted(age for age in ages if age < known))


class Parts:
    """Forecasts being put together from batches."""

    def __init__(self, series: int, steps: int) -> None:
        self.value = np.full((series, steps), np.nan)
        self.bounds = np.full((len(SHARES), 2, series, steps), np.nan)
        self.methods: list[tuple[str, ...]] = [()] * series
        self.scores = np.full((4, series), np.nan)  # mase, mape, cover80, cover95
        self.trials = np.zeros(series, np.int64)
        self.tested = 0

    def bounded(self, history: Floats, percent: Flags | None) -> Forecasts:
        """The forecasts, kept within what the histories say is possible."""
        least = np.where(np.isnan(history), np.inf, history).min(axis=1, initial=np.inf)
        most = np.where(np.isnan(history), -np.inf, history).max(axis=1, initial=-np.inf)
        full = most == 100.0 if percent is None else percent & (most <= 100.0)
        floor = np.where(least >= 0, 0.0, -np.inf)[:, None]
        ceiling = np.where(full & (least >= 0), 100.0, np.inf)[:, None]
        value = np.clip(self.value, floor, ceiling)
        (low80, high80), (low95, high95) = np.clip(self.value + self.bounds, floor, ceiling)
        mase, mape, cover80, cover95 = self.scores
        return Forecasts(
            value=value,
            low80=low80,
            high80=high80,
            low95=low95,
            high95=high95,
            floor=floor[:, 0],
            ceiling=ceiling[:, 0],
            methods=tuple(self.methods),
            backtest=Backtest(
                trials=self.trials, hours=self.tested, mase=mase, mape=mape, cover80=cover80, cover95=cover95
            ),
        )


def _forecast_part(
    history: Floats, rows: Integers, parts: Parts, trial_step: int, tested: int, step_hours: int
) -> None:
    if not history.shape[1]:
        return
    steps = parts.value.shape[1]
    history = aligned(history)
    ages = _trial_ages(trial_step, history.shape[1])
    trials = try_out(history, ages, tested, PROFILE_DAYS * DAY)
    fitted = fit(history[:, -PROFILE_DAYS * DAY :])
    value = fitted.chosen_ahead(trials.chosen, steps * step_hours)
    errors = _by_step(trials.errors, step_hours)
    parts.value[rows] = value.reshape(len(rows), steps, step_hours).mean(axis=2)
    if step_hours > 1:  # hours are forecast by medians, and the mean of medians is not that of the hours
        bias = or_else(median(errors.reshape(len(rows), -1)), 0.0)
        parts.value[rows] += bias[:, None]
        errors = errors - bias[:, None, None]
    parts.tested = tested
    parts.trials[rows] = np.count_nonzero((~np.isnan(errors)).any(axis=2), axis=1)
    for share, (low, high) in enumerate(spread_of(errors, ages, step_hours).bounds(steps)):
        parts.bounds[share, 0, rows], parts.bounds[share, 1, rows] = low, high
    parts.scores[:, rows] = _scores(history, trials.errors, errors, ages, step_hours)
    for row, pair in zip(rows.tolist(), trials.chosen.tolist(), strict=True):
        parts.methods[row] = tuple(NAMES[candidate] for candidate in pair)


def _by_step(errors: Floats, step_hours: int) -> Floats:
    """Errors of the means of steps; the hours after the last whole step are left out."""
    if step_hours == 1:
        return errors
    series, trials, hours = errors.shape
    whole = hours // step_hours
    return mean(errors[:, :, : whole * step_hours].reshape(series, trials, whole, step_hours))


def _scores(history: Floats, hourly: Floats, errors: Floats, ages: tuple[int, ...], step_hours: int) -> Floats:
    """The back-test's four numbers, shape (4, series)."""
    series, trials, _ = errors.shape
    loss = mean(np.abs(hourly), (1, 2))
    naive = mean(np.abs(history[:, DAY:] - history[:, :-DAY])) if history.shape[1] > DAY else np.full(series, np.nan)
    size = np.abs(history)
    typical = median(size)
    least = np.where(np.isnan(size), np.inf, size).min(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mase = np.where(naive > 0, loss / naive, np.nan)
        mape = np.where(least > MAPE_FLOOR * typical, loss / typical, np.nan)
    covers = np.full((2, series), np.nan)
    if trials > 1:
        inside = np.full((2, *errors.shape), np.nan)
        for trial in range(trials):
            others = [other for other in range(trials) if other != trial]
            spread = spread_of(errors[:, others], tuple(ages[other] for other in others), step_hours)
            error = errors[:, trial]
            for share, (low, high) in enumerate(spread.bounds(errors.shape[2], shift=ages[trial])):
                known = ~np.isnan(error) & ~np.isnan(low)
                inside[share, :, trial] = np.where(known, (error >= low) & (error <= high), np.nan)
        covers = mean(inside, (2, 3))
    return np.stack((mase, mape, *covers))
