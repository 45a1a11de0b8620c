"""A metric as one value a day: its daily peak, without its week and without its jumps.

The days are the last 24 hours, the 24 before those and so on: no calendar and no time zone, and the newest day is
always whole.

What must stay true: a day with too few measurements is a gap; what is taken away is kept, so that days + week + heaps
is the series of peaks again.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from services.analytics.forecasting.profiles import DAY, days_of
from services.analytics.forecasting.robust import (
    DEVIATIONS_PER_MAD,
    MEDIAN_PER_MEAN_ERROR,
    Floats,
    deviation,
    mean,
    median,
    or_else,
    quantile,
    robust_size,
)

PEAK: Final = 0.98
"""A day's peak is this quantile of it: the maximum is one measurement's noise, and a disk is full at its peak."""
SHAPE_DAYS: Final = 28
"""Days that the usual shape of a day is taken from."""
SHAPE_NOISE: Final = 2.0
"""Standard errors by which it is shrunk: the highest of 24 hours of nothing but noise is no peak."""
MIN_DAY_SHARE: Final = 0.25
"""A day with under this part of the usual number of measurements is a gap."""
MIN_WEEKS: Final = 3
WEEK_NOISE: Final = 1.0
"""Standard errors by which a weekday's departure is shrunk."""
JUMP: Final = 6.0
"""Deviations of the daily steps beyond which a step is a jump."""
LOCAL_JUMP: Final = 3.0
"""So many deviations of the steps around it must it be, too: where growth bends, steps differ from one another, most of
all at the ends. Without, a cache that fills up to 80 % and stays there was taken to grow by jumps, and to be full in a
week."""
NEW_STEPS: Final = 2
"""Steps that are a jump all the same: too little is known behind them, and a leak that began two days ago is to have a
date."""
STEPS_AROUND: Final = 7
JUMP_SIDE_DAYS: Final = 3
"""A jump's size is the median of so many days after it less that before it: what comes back at once is an outlier."""

_NORMAL: Final = np.random.default_rng(0).standard_normal((200, 24))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Days:
    """One value a day, the newest last.

    Attributes:
        peaks: shape (days,), NaN for gaps.
        wobble: how far a peak may lie from what is reached without noise.
        shape_height: how much the usual day's highest hour is above its lowest.
        peak_age_days: how long before its day's end a peak usually is, 0 to 1.
    """

    peaks: Floats
    wobble: float
    shape_height: float
    peak_age_days: float


def daily_peaks(hours: Floats) -> Days:
    """The peaks of the days before the end of one series of hourly means, NaN where nothing was measured.

    A peak is the day's quantile PEAK, moved by how far the usual shape's highest hour is from that quantile of the
    shape with noise: among 24 noisy hours it is 1.9 deviations up when the shape is flat, and a little low when it is
    sharp.
    """
    days = days_of(hours[None])[0]
    peaks = quantile(days, PEAK)
    sizes = np.count_nonzero(~np.isnan(days), axis=1)
    if sizes.any():
        peaks[sizes < MIN_DAY_SHARE * np.median(sizes[sizes > 0])] = np.nan
    recent = days[-SHAPE_DAYS:]
    left = recent - median(recent)[:, None]
    shape = or_else(median(left, 0), 0.0)
    noise = float(or_else(deviation((left - shape).ravel()), 0.0))
    count = np.maximum(np.count_nonzero(~np.isnan(left), axis=0), 1)
    threshold = SHAPE_NOISE * MEDIAN_PER_MEAN_ERROR * noise / np.sqrt(count)
    shape = np.sign(shape) * np.maximum(np.abs(shape) - threshold, 0.0)
    usual = float(quantile(shape + noise * _NORMAL, PEAK).mean())
    above = np.where(days[-SHAPE_DAYS:] >= peaks[-SHAPE_DAYS:, None], DAY - 1 - np.arange(DAY), np.nan)
    age = float(or_else(median(mean(above)), 0.0))
    highest = float(shape.max())
    return Days(
        peaks=peaks + highest - usual,
        wobble=abs(usual - highest),
        shape_height=highest - float(shape.min()),
        peak_age_days=age / DAY,
    )


def week_of(peaks: Floats) -> Floats:
    """What each day of the week adds, shape (7,) from the day after the last; zeros under three weeks.

    Departures from the mean of the seven days around (which holds each weekday once, so that neither a line nor a week
    is left in it), their median over the weeks, less its noise.
    """
    weeks = (len(peaks) - 6) // 7
    if weeks < MIN_WEEKS:
        return np.zeros(7)
    around = np.lib.stride_tricks.sliding_window_view(peaks, 7).mean(axis=1)
    away = (peaks[3:-3] - around)[-weeks * 7 :].reshape(weeks, 7)
    departure = median(away, 0)
    there = np.count_nonzero(~np.isnan(away), axis=0)
    noise = DEVIATIONS_PER_MAD * median(np.abs(away - departure), 0)
    threshold = WEEK_NOISE * MEDIAN_PER_MEAN_ERROR * noise / np.sqrt(np.maximum(there, 1))
    shrunk = np.sign(departure) * np.maximum(np.abs(departure) - threshold, 0.0)
    shrunk = np.where(there >= MIN_WEEKS, shrunk, 0.0)
    return np.roll(shrunk - shrunk.mean(), 4)  # the last of these days is the fourth-last of all


def repeated(week: Floats, days: int) -> Floats:
    """A week repeated over the last `days` days, as `week_of` gives it."""
    return np.resize(np.roll(week, days), days)


def jumps_of(peaks: Floats) -> Floats:
    """The size of the jump into each day, 0 for nearly all; shape (days,).

    A jump is a step unlike those around it (so that a change of rate is none) that stays (so that an outlier is none).
    """
    count = len(peaks)
    jumps = np.zeros(count)
    steps = np.diff(peaks)
    if np.count_nonzero(~np.isnan(steps)) < STEPS_AROUND:
        return jumps
    side = STEPS_AROUND // 2
    around = np.lib.stride_tricks.sliding_window_view(np.pad(steps, side, constant_values=np.nan), STEPS_AROUND)
    usual = median(around)
    away = np.abs(steps - usual)
    spread = robust_size(away[~np.isnan(away)], 0.8)
    local = DEVIATIONS_PER_MAD * median(np.abs(around - usual[:, None]))
    local[-NEW_STEPS:] = 0.0
    for day in (np.flatnonzero((away > JUMP * spread) & (away > LOCAL_JUMP * local)) + 1).tolist():
        slope = float(usual[day - 1])
        before = peaks[max(0, day - JUMP_SIDE_DAYS) : day][::-1]
        after = peaks[day : day + JUMP_SIDE_DAYS]
        size = _level(after, -slope) - _level(before, slope) - slope
        step = float(steps[day - 1]) - slope
        if abs(size) > JUMP / 2 * spread and abs(size) > 0.5 * abs(step) and size * step > 0:
            jumps[day] = size
    return jumps


def _level(days: Floats, slope: float) -> float:
    """The level at the first of the days, which move by -slope each."""
    return float(median(days + slope * np.arange(len(days))))
