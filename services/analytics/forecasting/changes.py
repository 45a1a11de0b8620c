"""Where a series of days changed its level or its rate.

The best cut of the days into straight pieces: the sum of squares around the pieces' own lines plus a penalty for each
piece is least. It is found exactly, by dynamic programming over all last pieces at once (365 days: 8 ms); pruning as in
PELT would save nothing at this size. Squares are made robust beforehand: a day far from the days around it is drawn to
them, so that one outlier is not a piece. The penalty is the noise's long-run variance, autocorrelation included, times
the logarithm of the number of days: correlated noise wanders, and wandering is no change.

What must stay true: scale, shift and an added line move the pieces' lines and not the cuts; noise alone is not cut (see
PENALTY; a random walk is: nothing tells its wandering from changes); gaps are no changes.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from services.analytics.forecasting.robust import DEVIATIONS_PER_MAD, Floats, Integers, median, or_else, robust_size

MIN_PIECE_DAYS: Final = 5
PENALTY: Final = 6.0
"""Times the long-run variance times log(days). 3, 6, 8 cut .03, 0, 0 of white series of 30 to 90 days, .24, .11, .07 of
those with correlation .6 from day to day; 8 loses changes of rate (mean error of the date .11, .13, .17)."""
MAX_ALIKE: Final = 0.9
"""Correlation from day to day that is taken at most; a random walk has none of its own level to return to."""
OUTLIER: Final = 4.0
"""Deviations from the median of five days beyond which a day is drawn to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """What is left of a series of days without its slow movement.

    Attributes:
        deviation: standard deviation of a day.
        alike: correlation from day to day, 0 to MAX_ALIKE.
    """

    deviation: float
    alike: float

    @property
    def long_run_variance(self) -> float:
        """Variance of a mean of many days, times their number."""
        return self.deviation**2 * (1 + self.alike) / (1 - self.alike)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Days `[start, end)` along one line.

    Attributes:
        level: the line at its last day.
        slope: per day.
        spread: sum of the squared distances of its days from their mean: the variance of the slope is that of the
        noise,
            in the long run, over it.
    """

    start: int
    end: int
    level: float
    slope: float
    spread: float

    @property
    def first_level(self) -> float:
        """The line at its first day."""
        return self.level - self.slope * (self.end - 1 - self.start)


def noise_of(days: Floats) -> Noise:
    """The noise of one series of days, from its second differences: these see neither levels nor slopes.

    Over one day they have the variance s2 (6 - 8 a + 2 a^2), over two s2 (6 - 8 a^2 + 2 a^4), where a is the
    correlation from day to day; so their ratio tells a, and a tells s2.
    """
    one, two = _bend_deviation(days, 1), _bend_deviation(days, 2)
    if one <= 0:
        return Noise(deviation=0.0, alike=0.0)
    alike = float(np.interp((two / one) ** 2, _RATIOS, _ALIKE))
    return Noise(deviation=one / float(np.sqrt(6 - 8 * alike + 2 * alike**2)), alike=alike)


_ALIKE: Final = np.linspace(0.0, MAX_ALIKE, 91)
_RATIOS: Final = (1 + _ALIKE) * (3 - _ALIKE**2) / (3 - _ALIKE)


def _bend_deviation(days: Floats, lag: int) -> float:
    if len(days) <= 2 * lag:
        return 0.0
    bends = days[2 * lag :] - 2 * days[lag:-lag] + days[: -2 * lag]
    return robust_size(bends[~np.isnan(bends)])


def noise_around(days: Floats, pieces: list[Piece]) -> Noise:
    """The noise around the lines of pieces; a line takes two parameters from each."""
    left = np.full(len(days), np.nan)
    for piece in pieces:
        part = np.arange(piece.start, piece.end)
        left[part] = days[part] - piece.level - piece.slope * (part - piece.end + 1)
    there = left[~np.isnan(left)]
    free = max(len(there) - 2 * len(pieces), 1)
    size = robust_size(there) * float(np.sqrt(len(there) / free))
    if size <= 0:
        return Noise(deviation=0.0, alike=0.0)
    capped = np.clip(left, -3 * size, 3 * size)
    products = capped[1:] * capped[:-1]
    known = ~np.isnan(products)
    alike = float(products[known].mean() / (capped[~np.isnan(capped)] ** 2).mean()) if known.any() else 0.0
    alike += (1 + 4 * max(alike, 0.0)) / max(len(there), 1) * len(pieces)  # what lines take away looks like alternation
    return Noise(deviation=size, alike=float(np.clip(alike, 0.0, MAX_ALIKE)))


def without_outliers(days: Floats) -> Floats:
    """The days, with single ones far from their neighbours drawn to them."""
    if len(days) < 5:
        return days
    around = median(np.lib.stride_tricks.sliding_window_view(np.pad(days, 2, constant_values=np.nan), 5))
    away = days - around
    limit = OUTLIER * DEVIATIONS_PER_MAD * float(or_else(median(np.abs(away)), 0.0))
    edge = np.zeros(len(days), bool)
    edge[:2] = edge[-2:] = True  # there the median is not of both sides, and a slope looks like an outlier
    return np.where((np.abs(away) > limit) & ~edge & (limit > 0), around, days)


def pieces_of(days: Floats, noise: Noise | None = None) -> list[Piece]:
    """Cuts one series of days, NaN where nothing was measured, into straight pieces."""
    noise = noise or noise_of(days)
    smooth = without_outliers(days)
    there = ~np.isnan(smooth)
    count = len(smooth)
    if not there.any():
        return []
    centre, size = float(np.median(smooth[there])), float(np.ptp(smooth[there]))
    values = np.where(there, smooth - centre, 0.0)
    place = np.arange(count) - count / 2
    sums = [
        _running(part) for part in (there * 1.0, there * place, values, there * place**2, place * values, values**2)
    ]
    variance = max(noise.long_run_variance, (1e-6 * size) ** 2, 1e-300)
    penalty = PENALTY * variance * np.log(max(count, 2))
    best, previous = np.full(count + 1, np.inf), np.zeros(count + 1, np.int64)
    best[0] = -penalty
    for end in range(1, count + 1):
        starts = np.arange(max(1, end - MIN_PIECE_DAYS + 1))
        costs = best[starts] + _squares(sums, starts, end) + penalty
        previous[end] = int(np.argmin(costs))
        best[end] = costs[previous[end]] if end >= min(MIN_PIECE_DAYS, count) else np.inf
    cuts = [count]
    while cuts[-1] > 0:
        cuts.append(int(previous[cuts[-1]]))
    cuts.reverse()
    return [_piece(smooth, start, end) for start, end in pairwise(cuts) if there[start:end].any()]


def _running(values: NDArray[Any]) -> Floats:
    return np.concatenate(([0.0], np.cumsum(values)))


def _squares(sums: list[Floats], starts: Integers, end: int) -> Floats:
    """Sum of squares around the line of each piece `[start, end)`."""
    number, place, value, place2, both, value2 = (part[end] - part[starts] for part in sums)
    number = np.maximum(number, 1.0)
    spread = place2 - place**2 / number
    along = both - place * value / number
    square = value2 - value**2 / number
    with np.errstate(invalid="ignore", divide="ignore"):
        explained = np.where(spread > 1e-9, along**2 / np.maximum(spread, 1e-9), 0.0)
    left: Floats = np.maximum(square - explained, 0.0)
    return left


def _piece(days: Floats, start: int, end: int) -> Piece:
    there = np.flatnonzero(~np.isnan(days[start:end]))
    values = days[start:end][there]
    spread = float(((there - there.mean()) ** 2).sum())
    slope = float(((there - there.mean()) * values).sum() / spread) if spread > 0 else 0.0
    level = float(values.mean() + slope * (end - 1 - start - there.mean()))
    return Piece(start=start, end=end, level=level, slope=slope, spread=max(spread, 1e-12))
