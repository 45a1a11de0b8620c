"""Medians and their kind over many series at once, with gaps: the only statistics the forecasts are made of.

Own code because numpy's nan-functions are slow (nanmedian of 512 x 56 x 24 takes ten times as long as `median`) and
scipy, which has Theil-Sen and Mann-Kendall, weighs 215 MB.

What must stay true: NaN means "not measured" and is never counted; a row without any value gives NaN, never a warning;
every function is equivariant to scale and shift as its textbook form is.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

MAX_NOISE_CORRELATION: Final = 1.0
"""Correlations are summed up to the first under this many standard errors, 1 / sqrt(points): further ones are noise."""
DEVIATIONS_PER_MAD: Final = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""
MEDIAN_PER_MEAN_ERROR: Final = 1.2533
"""Standard error of a median over that of a mean, for a normal distribution."""


def median(values: Floats, axis: int = -1) -> Floats:
    """The median along an axis, of what is there; NaN where nothing is."""
    return quantile(values, 0.5, axis)


def quantile(values: Floats, share: float, axis: int = -1) -> Floats:
    """The quantile along an axis, of what is there, linear between two; NaN where nothing is."""
    ordered = np.sort(np.moveaxis(values, axis, -1), axis=-1)  # NaN goes last
    return quantile_of_sorted(ordered, np.count_nonzero(~np.isnan(ordered), axis=-1), share)


def quantile_of_sorted(ordered: Floats, count: Integers, share: float) -> Floats:
    """As `quantile`, along the last axis of sorted values with `count` of them there."""
    if not ordered.shape[-1]:
        return np.full(ordered.shape[:-1], np.nan)
    place = np.maximum(count - 1, 0) * share
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, np.maximum(count - 1, 0))
    low = np.take_along_axis(ordered, below[..., None], -1)[..., 0]
    high = np.take_along_axis(ordered, above[..., None], -1)[..., 0]
    between: Floats = low + (place - below) * (high - low)
    return between


def mean(values: Floats, axis: int | tuple[int, ...] = -1) -> Floats:
    """The mean along axes, of what is there; NaN where nothing is."""
    there = ~np.isnan(values)
    count = np.count_nonzero(there, axis=axis)
    total = np.where(there, values, 0.0).sum(axis=axis)
    result: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return result


def deviation(values: Floats, axis: int = -1) -> Floats:
    """The standard deviation by the median absolute deviation."""
    centre = np.expand_dims(median(values, axis), axis)
    return DEVIATIONS_PER_MAD * median(np.abs(values - centre), axis)


def robust_size(values: Floats, trimmed_share: float = 0.9) -> float:
    """The deviation from 0 of one row without NaN, by its median. Whole percents stand still for days, so that the
    median is 0: then what moves at all, but for the largest, is what noise there is."""
    if not len(values):
        return 0.0
    sizes = np.sort(np.abs(values))
    trimmed = float(sizes[: max(1, int(trimmed_share * len(sizes)))].mean())
    return max(DEVIATIONS_PER_MAD * float(np.median(sizes)), trimmed)


def or_else(values: Floats, other: Floats | float) -> Floats:
    """The values, and the other ones where they are NaN."""
    result: Floats = np.where(np.isnan(values), other, values)
    return result


def slopes(values: Floats) -> Floats:
    """Theil-Sen: for each row of (series, points one apart) the median slope of all pairs; NaN under two points.

    Pairs, so 56 points cost 1,540 slopes a series, 365 cost 66,430 (3 ms).
    """
    first, second = np.triu_indices(values.shape[-1], 1)
    if not len(first):
        return np.full(values.shape[:-1], np.nan)
    return median((values[..., second] - values[..., first]) / (second - first))


def slopes_with_interval(values: Floats, share: float = 0.95) -> tuple[float, float, float]:
    """Theil-Sen slope of one row, and its interval by Sen's method, widened for autocorrelation.

    Returns:
        slope, low, high per point; NaN where there are under three points.
    """
    first, second = np.triu_indices(len(values), 1)
    pairs = (values[second] - values[first]) / (second - first)
    pairs = np.sort(pairs[~np.isnan(pairs)])
    if len(pairs) < 3:
        return math.nan, math.nan, math.nan
    slope = float(np.median(pairs))
    half = normal_quantile(0.5 + share / 2) * math.sqrt(_kendall_variance(values, slope))
    places = np.clip(np.array([(len(pairs) - half) / 2, (len(pairs) + half) / 2]), 0, len(pairs) - 1)
    low, high = np.interp(places, np.arange(len(pairs)), pairs)
    return slope, float(low), float(high)


def mann_kendall(values: Floats) -> float:
    """How many standard deviations a row's Kendall sum is from that of a row without trend; 0 under four points."""
    first, second = np.triu_indices(len(values), 1)
    differences = values[second] - values[first]
    there = ~np.isnan(differences)
    if np.count_nonzero(there) < 6:
        return 0.0
    total = float(np.sign(differences[there]).sum())
    slope = float(np.median(differences[there] / (second - first)[there]))
    variance = _kendall_variance(values, slope)
    return (total - math.copysign(1.0, total)) / math.sqrt(variance) if total and variance > 0 else 0.0


def _kendall_variance(values: Floats, slope: float) -> float:
    """Variance of Kendall's sum without trend, larger where neighbours are alike (Hamed and Rao 1998).

    The autocorrelation is that of the ranks of what the slope leaves. Only positive ones count: a variance that shrinks
    because neighbours alternate would find trends in saw-teeth.
    """
    there = ~np.isnan(values)
    count = int(np.count_nonzero(there))
    plain = count * (count - 1) * (2 * count + 5) / 18
    left = (values - slope * np.arange(len(values)))[there]
    ranks = np.argsort(np.argsort(left, kind="stable"), kind="stable") - (count - 1) / 2
    total = float((ranks**2).sum())
    if total <= 0 or count < 8 or float(np.ptp(left)) == 0.0:
        return plain
    lags = np.arange(1, count // 3)
    alike = np.array([float((ranks[lag:] * ranks[:-lag]).sum()) for lag in lags]) / total
    negative = np.flatnonzero(alike <= MAX_NOISE_CORRELATION / math.sqrt(count))
    alike[negative[0] if len(negative) else len(alike) :] = 0.0
    weight = (count - lags) * (count - lags - 1) * (count - lags - 2)
    return plain * (1 + 2 / (count * (count - 1) * (count - 2)) * float((weight * alike).sum()))


def normal_quantile(share: float) -> float:
    """The standard normal quantile, by bisection of erf: scipy's is 215 MB away."""
    low, high = -10.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < share else (low, middle)
    return (low + high) / 2
