"""Numbers that were rounded to some decimals, as almost everything that is measured was, as integers.

12.34 is no multiple of a power of two, so its bits look like noise; 1234 with two places does not. Measured on the mix
of `bench` (8,640 rows a column, pcodec level 4): 0.99 bytes a value against 1.06 for the floats themselves; on recorded
machines (279 rows) 1.06 against 1.46. What must stay true: the integers over the power of ten are the same floats
again, bit for bit, or the column is not taken as decimals.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

MAX_PLACES: Final = 6
_LIMIT: Final = float(1 << 53)  # integers up to here are floats without loss
_TRIED: Final = 16  # values of a column that are looked at before all of them are
_AT_ONCE: Final = 1 << 15  # cells that stay in a core's cache, 256 KB: 1.9 ms for 368,000 of them instead of 5.6
_NEGATIVE_ZERO: Final = np.iinfo(np.int64).min  # its bits, and no double's are less


def places(columns: NDArray[np.float64]) -> NDArray[np.int8]:
    """The fewest decimals, 0 to 6, that say every value of a column; -1 where there are none that do.

    Args:
        columns: (m x n), n > 0, each contiguous; NaN says no value.

    Returns:
        int8 (m). A column of NaN alone has 0.
    """
    return _judged(columns, None)


def split(columns: NDArray[np.float64]) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """As `places`, and the integers (m x n) that `floats` turns back; they mean nothing for a column that has none, or
    that has a NaN."""
    whole = np.empty(columns.shape, np.int64)
    return _judged(columns, whole), whole


@np.errstate(invalid="ignore", over="ignore")
def _judged(columns: NDArray[np.float64], whole: NDArray[np.int64] | None) -> NDArray[np.int8]:
    found = np.full(len(columns), -1, np.int8)
    guessed = _guessed(columns[:, :: max(1, columns.shape[1] // _TRIED)])
    guessed[columns.view(np.int64).min(axis=1) == _NEGATIVE_ZERO] = MAX_PLACES + 1  # a negative zero has no integer
    at_once = max(1, _AT_ONCE // columns.shape[1])
    for decimals in range(MAX_PLACES + 1):
        group = np.flatnonzero(guessed == decimals)
        for start in range(0, len(group), at_once):
            some = group[start : start + at_once]
            scaled, fits = _scaled(columns[some], decimals)
            found[some[fits]] = decimals
            guessed[some[~fits]] += 1
            if whole is not None:
                whole[some] = scaled
    return found


def _guessed(columns: NDArray[np.float64]) -> NDArray[np.int8]:
    """The fewest decimals of some values of each column, one more than `MAX_PLACES` where those are too few."""
    found = np.full(len(columns), MAX_PLACES + 1, np.int8)
    rest = np.arange(len(columns))
    for decimals in range(MAX_PLACES + 1):
        _, fits = _scaled(columns[rest], decimals)
        found[rest[fits]] = decimals
        rest = rest[~fits]
    return found


def _scaled(columns: NDArray[np.float64], decimals: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The values times the power of ten, rounded, and for which columns that over the power is every value again."""
    scale = 10.0**decimals
    whole = columns * scale if decimals else columns.copy()
    np.rint(whole, out=whole)
    same = (whole / scale if decimals else whole) == columns
    fits = same.all(axis=1) & (whole.max(axis=1) < _LIMIT) & (whole.min(axis=1) > -_LIMIT)
    gappy = np.flatnonzero(~fits)
    gappy = gappy[np.isnan(columns[gappy]).any(axis=1)]
    if len(gappy):
        fits[gappy] = ((same[gappy] & (np.abs(whole[gappy]) < _LIMIT)) | np.isnan(columns[gappy])).all(axis=1)
    return whole, fits


def integers(numbers: NDArray[np.float64], decimals: int) -> NDArray[np.int64]:
    """What `floats` turns back; for numbers of which `places` said so, without NaN."""
    return np.rint(numbers * 10.0**decimals).astype(np.int64)


def floats(whole: NDArray[np.int64], decimals: int) -> NDArray[np.float64]:
    """The numbers that `integers` was given."""
    return whole / 10.0**decimals if decimals else whole.astype(np.float64)


def rounded(sums: NDArray[np.float64], decimals: NDArray[np.int8]) -> NDArray[np.float64]:
    """Sums of decimals (n x m) with the places of their columns (m): the nearest such decimal, which is the true sum as
    long as the error of adding is under half a unit; columns of -1 stay as they are."""
    scale = np.where(decimals >= 0, 10.0 ** np.maximum(decimals, 0), 1.0)
    with np.errstate(invalid="ignore", over="ignore"):
        whole = np.rint(sums * scale)
        exact = (decimals >= 0) & (np.abs(whole) < _LIMIT)
        return np.where(exact, whole / scale, sums)
