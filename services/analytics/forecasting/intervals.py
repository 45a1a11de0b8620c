"""How far off a forecast may be, from how far off it was in its back-tests.

Errors differ with the hour of the day (a nightly job is early or late by a lot, the afternoon never) and grow with the
distance. Both are divided out, the quantiles of what is left are taken over all back-tests, and both are put back.

What must stay true: a wider share gives a wider interval; an interval holds the forecast; without back-tests there is
no interval (NaN), not a narrow one.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from services.analytics.forecasting.profiles import DAY
from services.analytics.forecasting.robust import Floats, mean, or_else, quantile, quantile_of_sorted

SHARES: Final = (0.8, 0.95)
GROWTH: Final = 0.15
"""Errors grow with the days ahead to this power: measured coverage of the 1st and 7th day was .86 and .76 without."""
GROWTH_OF_DAYS: Final = 0.35
"""The same for means of a day, in which the level's wandering is not drowned by the hours' noise."""
GROWTH_BEYOND: Final = 0.5
"""Beyond the days that back-tests reach they are taken to grow as a random walk's do."""
WIDENING: Final = 1.05
WIDENING_PER_TRIAL: Final = 0.5
"""Intervals are widened by the first, and by the second over the number of trials: few of them have not seen the worst.
Six give 1.13, two 1.30: so 80 % held .81, .85, .87 and .84 on four sets of real machines."""
INDEPENDENT_HOURS: Final = 84
"""Trials count as many as there are half weeks since the first of them: those of a young series overlap (of two weeks'
history the 95 % interval held .885 without)."""
MIN_ERRORS: Final = 5
"""Under so many errors there is no interval."""
LARGEST: Final = 0.98
"""Where an hour's spread is taken, errors beyond this quantile count as it: one outlier is no habit of the hour."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spread:
    """How wide errors are, by hour of the day, and their quantiles in that measure.

    Attributes:
        hours: shape (series, 24), from the first hour of the forecast; 1 on average.
        low, high: for each of SHARES, shape (series,); low <= 0 <= high, NaN when there are too few errors.
        tested: how many steps ahead errors are known.
        step_hours: hours of a step.
    """

    hours: Floats
    low: tuple[Floats, ...]
    high: tuple[Floats, ...]
    tested: int
    step_hours: int

    def bounds(self, steps: int, shift: int = 0) -> list[tuple[Floats, Floats]]:
        """What is added to the forecast for the low and the high end of each share; shapes (series, steps).

        Args:
            steps: how many steps ahead.
            shift: hours by which the first step lies before that of the forecast.
        """
        scale = _scale(self.hours, steps, self.step_hours, shift) * _growth(steps, self.step_hours, self.tested)
        return [(low[:, None] * scale, high[:, None] * scale) for low, high in zip(self.low, self.high, strict=True)]


def spread_of(errors: Floats, ages: tuple[int, ...], step_hours: int = 1) -> Spread:
    """The spread of errors, shape (series, trials, steps ahead); `ages`: hours from each origin to the forecast."""
    series, trials, steps = errors.shape
    by_hour = _hourly_spread(errors, ages, step_hours)
    scale = np.ones((series, trials, steps))
    for trial, age in enumerate(ages):
        scale[:, trial] = _scale(by_hour, steps, step_hours, age) * _growth(steps, step_hours, steps)
    relative = (errors / scale).reshape(series, -1)
    independent = min(trials, max(ages, default=0) / INDEPENDENT_HOURS)
    low, high = _quantiles(relative, max(independent, 1.0))
    return Spread(hours=by_hour, low=low, high=high, tested=steps, step_hours=step_hours)


def _growth(steps: int, step_hours: int, tested: int) -> Floats:
    days = np.arange(steps) * step_hours // DAY + 1.0
    known = max(tested * step_hours / DAY, 1.0)
    power = GROWTH + (GROWTH_OF_DAYS - GROWTH) * min(math.log(step_hours) / math.log(DAY), 1.0)
    growth: Floats = days**power * np.maximum(days / known, 1.0) ** (GROWTH_BEYOND - power)
    return growth


def _scale(by_hour: Floats, steps: int, step_hours: int, shift: int) -> Floats:
    """The spread of each step, the first of which lies `shift` hours before the forecast's; shape (series, steps)."""
    hours = (np.arange(steps) * step_hours - shift) % DAY
    scale: Floats = by_hour[:, hours]
    return scale


def _hourly_spread(errors: Floats, ages: tuple[int, ...], step_hours: int) -> Floats:
    """How wide errors are by the hour of the day in which their step begins; shape (series, 24), 1 on average."""
    series, _, steps = errors.shape
    limit = or_else(quantile(np.abs(errors).reshape(series, -1), LARGEST), 0.0)[:, None, None]
    size = np.minimum(np.abs(errors), limit)
    there = ~np.isnan(size)
    size = np.where(there, size, 0.0)
    total, count = np.zeros((series, DAY)), np.zeros((series, DAY))
    period = DAY // math.gcd(DAY, step_hours)  # steps so far apart begin at the same hour
    for trial, age in enumerate(ages):
        for first in range(min(period, steps)):
            hour = (first * step_hours - age) % DAY
            total[:, hour] += size[:, trial, first::period].sum(axis=1)
            count[:, hour] += there[:, trial, first::period].sum(axis=1)
    spread = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    overall = mean(spread)[:, None]
    spread = or_else(spread, overall)
    spread = 0.25 * np.roll(spread, 1, axis=1) + 0.5 * spread + 0.25 * np.roll(spread, -1, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.maximum(spread / overall, MIN_HOUR)
    return or_else(relative, 1.0)


MIN_HOUR: Final = 0.2
"""No hour's errors are taken to be under this part of the average hour's."""


def _quantiles(relative: Floats, trials: float) -> tuple[tuple[Floats, ...], tuple[Floats, ...]]:
    """Half of each end is the errors' own quantile, half that of their size: errors of a few weeks lean to one side
    more than those to come (.80 in the 80 % interval so, .77 without, at a better interval score)."""
    widening = WIDENING + WIDENING_PER_TRIAL / trials
    count = np.count_nonzero(~np.isnan(relative), axis=1)
    ordered, sizes = np.sort(relative, axis=1), np.sort(np.abs(relative), axis=1)
    low, high = [], []
    for share in SHARES:
        size = quantile_of_sorted(sizes, count, share)
        below = quantile_of_sorted(ordered, count, (1 - share) / 2)
        above = quantile_of_sorted(ordered, count, (1 + share) / 2)
        enough = count >= MIN_ERRORS
        low.append(np.where(enough, np.minimum(widening * 0.5 * (below - size), 0.0), np.nan))
        high.append(np.where(enough, np.maximum(widening * 0.5 * (above + size), 0.0), np.nan))
    return tuple(low), tuple(high)
