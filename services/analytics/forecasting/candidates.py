"""The simple forecasts that compete for a series, and the two that win by their errors in the recent past.

A candidate is a level, a slope and a profile: `level + slope * hour + profile[hour of the week]`. Nine are three levels
times three profiles, two follow a straight line. Each is fitted again at every back-test, on what was known then.

What must stay true: a fit sees its history only; every candidate can be fitted to every series, however short; the same
numbers scaled or shifted give the same choice.

Measured (MASE over all origins, 20 real machines' CPU and memory / their disks and networks; seasonal naive .94 / .87):
the default alone .69 / .56, the best by back-test .70 / .56, the mean of the best two with the default preferred
.69 / .56, the best in hindsight .65 / .54. So the choice is worth little there; it is what adapts to series unlike
these (growing disks: mean error .17 where the default has 4.6 and the day before 3.7).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from services.analytics.forecasting.profiles import DAY, WEEK, ahead, along, daily_medians, level_of, season_profiles
from services.analytics.forecasting.robust import Floats, Integers, mean, median, or_else, slopes

NO_SEASON, DAILY, WEEKLY = 0, 1, 2
DRIFT_DAYS: Final = (14, 28)
"""Days a straight line is drawn through; with fewer than half of them there is none."""
DRIFT_LEVEL_HOURS: Final = 72

NAMES: Final = (
    *(
        f"{level}, {season}"
        for season in ("no season", "daily", "weekly")
        for level in ("last day", "last week", "4 weeks")
    ),
    *(f"line through {days} d, weekly" for days in DRIFT_DAYS),
)
"""What each candidate is called, in order; the middle level is the median of the levels of 1, 3 and 7 days."""
_PROFILES: Final = np.array([*(season for season in (NO_SEASON, DAILY, WEEKLY) for _ in range(3)), WEEKLY, WEEKLY])
DEFAULT: Final = NAMES.index("last week, weekly")
DEFAULT_BONUS: Final = 0.9
"""The default wins unless another one's errors are smaller than this part of its: six back-tests are a small sample."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """All candidates fitted to histories.

    Attributes:
        levels, slopes: shape (series, candidates); slopes are per hour.
        profiles: shape (3, series, 168): none, daily, weekly.
    """

    levels: Floats
    slopes: Floats
    profiles: Floats

    def ahead(self, candidate: int, hours: int) -> Floats:
        """The forecast of one candidate; shape (series, hours)."""
        return self._one(np.full(len(self.levels), candidate), hours)

    def chosen_ahead(self, chosen: Integers, hours: int) -> Floats:
        """The mean of each series' chosen candidates, shape (series, chosen ones); shape (series, hours)."""
        total: Floats = np.sum([self._one(candidates, hours) for candidates in chosen.T], axis=0)
        mean_of_chosen: Floats = total / chosen.shape[1]
        return mean_of_chosen

    def _one(self, candidates: Integers, hours: int) -> Floats:
        """Each series' candidate, shape (series,)."""
        rows = np.arange(len(candidates))
        line: Floats = self.slopes[rows, candidates, None] * _stairs(1, hours + 1)
        line += self.levels[rows, candidates, None]
        line += ahead(self.profiles[_PROFILES[candidates], rows], hours)
        return line


def _stairs(start: int, end: int) -> Floats:
    """Hours `[start, end)` from the end of the history, each as the middle of its day: what a slope adds within a day
    is in the profile already, as part of the day's shape."""
    days = (np.arange(start, end) - 1) // DAY
    return days.astype(np.float64) * DAY + (DAY + 1) / 2


def fit(history: Floats) -> Fit:
    """Fits all candidates to histories, shape (series, hours)."""
    series = len(history)
    overall = or_else(median(history), 0.0)
    daily, weekly = season_profiles(history)
    profiles = np.stack((np.zeros((series, WEEK)), daily, weekly))
    levels = []
    for profile in profiles:
        month = level_of(history, profile, 4 * WEEK, overall)
        week = level_of(history, profile, WEEK, month)  # what was not measured lately is where it was before
        three = level_of(history, profile, 3 * DAY, week)
        day = level_of(history, profile, DAY, three)
        levels += [day, np.median((day, three, week), axis=0), month]
    rates = [np.zeros(series)] * len(levels)
    medians = daily_medians(history)
    for days in DRIFT_DAYS:
        rate = or_else(slopes(medians[:, -days:]), 0.0) / DAY if medians.shape[1] >= days // 2 else np.zeros(series)
        hours = min(DRIFT_LEVEL_HOURS, history.shape[1])
        line = rate[:, None] * _stairs(-hours + 1, 1)
        left = history[:, history.shape[1] - hours :] - line - along(weekly, hours)
        levels.append(or_else(median(left), overall))
        rates.append(rate)
    return Fit(levels=np.stack(levels, 1), slopes=np.stack(rates, 1), profiles=profiles)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trials:
    """What the candidates would have said in the past.

    Attributes:
        chosen: shape (series, 2), the winners, best first.
        errors: measured less forecast by the winners' mean; shape (series, trials, hours ahead), NaN where nothing was
            measured or the time had not come yet.
        ages: hours between each trial's origin and the end of the history.
    """

    chosen: Integers
    errors: Floats
    ages: tuple[int, ...]


def try_out(history: Floats, ages: tuple[int, ...], hours: int, fit_hours: int) -> Trials:
    """Forecasts `hours` ahead from each of the origins, on the `fit_hours` before it, and chooses by the errors."""
    fits, truths, losses = [], [], []
    for age in ages:
        origin = history.shape[1] - age
        fitted = fit(history[:, max(0, origin - fit_hours) : origin])
        truth = np.full((len(history), hours), np.nan)
        measured = history[:, origin : origin + hours]
        truth[:, : measured.shape[1]] = measured
        fits.append(fitted)
        truths.append(truth)
        losses.append([mean(np.abs(truth - fitted.ahead(candidate, hours))) for candidate in range(len(NAMES))])
    if not ages:
        chosen = np.full((len(history), 2), DEFAULT)
        return Trials(chosen=chosen, errors=np.full((len(history), 0, hours), np.nan), ages=ages)
    loss = mean(np.array(losses), 0).T  # series x candidates, each trial weighs the same
    loss = np.where(np.isnan(loss), np.inf, loss)
    loss[:, DEFAULT] *= DEFAULT_BONUS
    chosen = np.argsort(loss, axis=1, kind="stable")[:, :2]
    chosen = np.where(np.isinf(loss.min(axis=1))[:, None], DEFAULT, chosen)
    errors = np.stack(
        [truth - fitted.chosen_ahead(chosen, hours) for fitted, truth in zip(fits, truths, strict=True)], 1
    )
    return Trials(chosen=chosen, errors=errors, ages=ages)
