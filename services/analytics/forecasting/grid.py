"""Measurements at any times become means of hours, counters become rates.

What must stay true: an hour without a measurement is NaN, never a zero; an hour is `[start, start + 1 h)` and its mean
is of what was measured in it, however irregularly; nothing is interpolated.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from services.analytics.forecasting.robust import Floats, Integers
from services.analytics.scoring.series import MAX_MAGNITUDE

HOUR_MS: Final = 3_600_000
COARSE_SHARE: Final = 0.75
"""Measurements at least this part of an hour apart are taken for one an hour or fewer."""
MAX_HOURS: Final = 5 * 366 * 24
"""Older measurements are passed over: five years are 44,000 hours."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hours:
    """Means of consecutive hours.

    Attributes:
        end_ms: the end of the last hour, which is when a forecast begins.
        values: shape (series, hours).
    """

    end_ms: int
    values: Floats


def measurable(values: Floats) -> Floats:
    """The values, NaN where one is too large for a measurement, as the detector takes it: forecasts were infinite."""
    there: Floats = np.where(np.abs(values) <= MAX_MAGNITUDE, values, np.nan)
    return there


def hourly(times_ms: Integers, values: Floats) -> Hours:
    """Means of hours.

    Where there are several measurements an hour, hours are those of the clock (UTC) and the forecast begins with the
    one after the newest measurement. Where there is one or fewer, hours begin when the newest was taken, so that a
    measurement at 22:03:24 every hour is continued at 22:03:24.

    Args:
        times_ms: shape (rows,), increasing; at least one.
        values: shape (rows, series); NaN and infinity mean nothing was measured.
    """
    apart = float(np.median(np.diff(times_ms))) if len(times_ms) > 1 else float(HOUR_MS)
    newest = int(times_ms[-1])
    phase = newest % HOUR_MS if apart >= COARSE_SHARE * HOUR_MS else 0
    jitter = HOUR_MS // 4 if phase else 0  # a measurement a little early or late belongs to its own hour
    hours = (times_ms - phase + jitter) // HOUR_MS
    last = int(hours[-1])
    first = max(int(hours[0]), last - MAX_HOURS + 1)
    recent = hours >= first
    place = (hours[recent] - first).astype(np.int64)
    count = last - first + 1
    table = np.full((values.shape[1], count), np.nan)
    for series, column in enumerate(values[recent].T):
        there = np.isfinite(column)
        sizes = np.bincount(place[there], minlength=count)
        totals = np.bincount(place[there], column[there], minlength=count)
        table[series] = np.where(sizes > 0, totals / np.maximum(sizes, 1), np.nan)
    return Hours(end_ms=(last + 1) * HOUR_MS + phase, values=table)


def rates(times_ms: Integers, counts: Floats) -> Floats:
    """The rate per second of a counter, at each measurement since the one before; shape as `counts`, (rows,).

    A counter that is less than before has begun again at 0, so that its value is what was counted since. The first
    measurement and one that follows nothing has no rate.
    """
    rate = np.full(len(counts), np.nan)
    there = np.flatnonzero(np.isfinite(counts))
    if len(there) < 2:
        return rate
    grown = np.diff(counts[there])
    grown = np.where(grown < 0, counts[there][1:], grown)
    rate[there[1:]] = grown / (np.diff(times_ms[there]) / 1000.0)
    return rate
