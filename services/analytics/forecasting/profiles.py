"""What a series does in a day and in a week, and on which level it is: the parts every forecast is put together from.

A history is an array (series, hours) that ends where the forecast begins; hours are told apart by their distance from
that end, so no calendar is needed: column -168 and the first hour of the forecast are the same hour of the week.

What must stay true: parts are made of what the history holds and nothing else; a series without enough days has a
profile of zeros, not a guess; profiles have median 0, so that level and profile do not compete.

Measured on hourly CPU and memory of 20 real machines, 7 days ahead, MASE over all origins (seasonal naive .94): day
profile .71, plain hour-of-week medians .71, the day's profile plus what of the week stands out from the noise .69.
Smoothing profiles over neighbouring hours costs 4 to 14 % (jobs start on the hour), means instead of medians 3 to 39 %.
"""

from typing import Final

import numpy as np

from services.analytics.forecasting.robust import (
    DEVIATIONS_PER_MAD,
    MEDIAN_PER_MEAN_ERROR,
    Floats,
    median,
    or_else,
)

DAY: Final = 24
WEEK: Final = 168
PROFILE_DAYS: Final = 56
"""Days that profiles are made of; four weeks gave 2 % more error, noise of the medians."""
LEVEL_DAYS: Final = 7
"""The level that a day's shape is taken from is the median of so many days around it."""
MIN_PROFILE_DAYS: Final = 2
MIN_PROFILE_WEEKS: Final = 3
"""With fewer the departure of an hour of the week from that of the day cannot be told from noise."""
WEEK_NOISE: Final = 1.0
"""Standard errors by which departures of the week are shrunk: .5, 1 and 2 gave .70, .69 and .70."""


def daily_medians(history: Floats) -> Floats:
    """The median of each whole day, counted from the end; shape (series, days)."""
    return median(days_of(history))


def days_of(history: Floats) -> Floats:
    """The whole days of a history, counted from the end; shape (series, days, 24)."""
    days = history.shape[1] // DAY
    return history[:, history.shape[1] - days * DAY :].reshape(len(history), days, DAY)


def season_profiles(history: Floats) -> tuple[Floats, Floats]:
    """The daily and the weekly profile; each (series, 168) from the first hour of the forecast on."""
    series = len(history)
    days = days_of(history[:, -PROFILE_DAYS * DAY :])
    count = days.shape[1]
    if count < MIN_PROFILE_DAYS:
        nothing = np.zeros((series, WEEK))
        return nothing, nothing
    shape = days - _levels_around(median(days))[..., None]
    daily = _filled(median(shape, 1), np.count_nonzero(~np.isnan(shape), axis=1) >= MIN_PROFILE_DAYS)
    by_day = np.tile(_centred(daily), (1, WEEK // DAY))
    weeks = count // 7
    if weeks < MIN_PROFILE_WEEKS:
        return by_day, by_day
    left = (shape - daily[:, None])[:, count - weeks * 7 :].reshape(series, weeks, WEEK)
    departure = median(left, 1)
    there = np.count_nonzero(~np.isnan(left), axis=1)
    noise = DEVIATIONS_PER_MAD * median(np.abs(left - departure[:, None]), 1)
    threshold = WEEK_NOISE * MEDIAN_PER_MEAN_ERROR * noise / np.sqrt(np.maximum(there, 1))
    shrunk = np.sign(departure) * np.maximum(np.abs(departure) - threshold, 0.0)
    shrunk = np.where(there >= MIN_PROFILE_WEEKS, shrunk, 0.0)
    return by_day, _centred(np.tile(daily, (1, WEEK // DAY)) + shrunk)


def has_profile(history: Floats) -> bool:
    """Whether any hour of the day was measured on as many days as the daily profile of some series takes: else it is
    zeros, which say nothing."""
    days = days_of(history[:, -PROFILE_DAYS * DAY :])
    return bool((np.count_nonzero(~np.isnan(days), axis=1) >= MIN_PROFILE_DAYS).any())


def _levels_around(medians: Floats) -> Floats:
    """For each day the median of the daily medians around it."""
    side = LEVEL_DAYS // 2
    padded = np.pad(medians, ((0, 0), (side, side)), constant_values=np.nan)
    return median(np.lib.stride_tricks.sliding_window_view(padded, LEVEL_DAYS, axis=1))


def _filled(profile: Floats, enough: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Floats:
    """A daily profile without holes: hours that have too few days are drawn between their neighbours around the clock;
    a series sampled every six hours has most of them."""
    profile = np.where(enough, profile, np.nan)
    for row in np.flatnonzero(np.isnan(profile).any(axis=1)).tolist():
        known = np.flatnonzero(~np.isnan(profile[row]))
        profile[row] = np.interp(np.arange(DAY), known, profile[row, known], period=DAY) if len(known) else 0.0
    return profile


def _centred(profile: Floats) -> Floats:
    centred: Floats = profile - np.median(profile, axis=1, keepdims=True)
    return centred


def along(profile: Floats, hours: int) -> Floats:
    """A profile repeated over the last `hours` of the history; shape (series, hours)."""
    return np.tile(profile, (1, hours // WEEK + 1))[:, -hours:] if hours else profile[:, :0]


def ahead(profile: Floats, hours: int) -> Floats:
    """A profile repeated over the first `hours` of the forecast; shape (series, hours)."""
    return np.tile(profile, (1, -(-hours // WEEK)))[:, :hours]


def level_of(history: Floats, profile: Floats, hours: int, otherwise: Floats) -> Floats:
    """The median of what the profile leaves of the last hours; `otherwise` where nothing was measured in them."""
    hours = min(hours, history.shape[1])
    return or_else(median(history[:, history.shape[1] - hours :] - along(profile, hours)), otherwise)
