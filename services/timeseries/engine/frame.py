"""The payload of a short block: few rows of many columns, compressed a group of columns at a time.

pcodec costs some us a call, so 24 rows of 511 columns are 4.7 M values/s in a block. Here a column becomes integers
(`value == integer / 10**digits`, checked bit by bit; else its bits), these the steps from row to row, these as many of
their low bytes as the column needs, and the bytes of some columns (`group_columns`) one call of deflate. Drawn in
docs/formats/block.md. What must stay true is what block.py says of its columns, and:

* a column is read with the directory and its group alone; a damaged group loses its columns and no others;
* an integer is taken for a value only if the division that a reader does gives every bit of it back.

The encodings that were tried, all in one run, processor time of one thread, 24 rows of the simulator's 511 metrics:

    encoding                                           M values/s   bytes a value
    pcodec, a call a column, left to try                      1.5   3.2
    blosc2: previous row XORed out, shuffle, zstd 1            25   3.9
    XOR, shuffle; zstd 1, -1, -3; igzip 0, 1    43, 57, 69; 62, 45   3.3, 3.4, 3.6; 3.9, 3.3
    difference of the bits, shuffle, zstd 1                    43   3.1
    decimals; zstd 1, -1, -3                           27, 32, 34   1.41, 1.47, 1.51
    decimals; igzip 0, 1 (this one)                        32, 25   1.66, 1.39
    decimals; zlib 1 of the standard library                   16   1.40
    decimals; bits packed by numpy; pcodec a group         13, 33   1.48, 2.08

igzip is isal's, a wheel of 0.3 MB; zstandard's has 5.6 MB, blosc2's 6.7 MB and a dozen packages behind it. zstd is as
good, but of backports.zstd (0.5 MB, in the standard library from Python 3.14 on) a reader needs 25 us a group, of igzip
16, and what igzip writes the standard library of every Python reads too. It lets go of the interpreter while it works,
a quarter of the time; the rest is numpy.

Against a block of pcodec, told what to try (block.py), 511 metrics of the bench's mix, encoding of frames and blocks as
they are written (without transposing and sorting), processor time of one thread, the best of 15:

    rows                                      24     48     96    192    360    720
    bytes a value, frame                    1.38   1.28   1.24   1.22   1.19   1.17
                   block                    2.68   1.86   1.46   1.26   1.15   1.09
    encode, M values/s, frame                 43     59     73     82     87     84
                        block                4.7    8.8     15     24     35     49
    decode, M values/s, frame                 42     46     53     69     79     76
                        block                6.6     13     26     47     79    129
    read one metric, us, frame                82     86     75     74     85    106
                         block                 4      4      4      5      5      5

So a block wins by what it costs to read one metric of many, and by size from some 250 rows on; it never wins by what
it costs to write. Other data: bitbrains (real machines, 96 rows) 1.1 bytes a value, full doubles 7.3; 24 rows of
roll-ups, 8 fields of 511 metrics in windows of 30 ticks, 1.15: a column of sums 84 bytes, of minima, maxima, first and
last values 21 to 23, of times that are the same for all metrics 4 to 7, of equal counts 0.2. Sums are the only ones
that are no decimals: rounded to the digits of their metric they cost 53.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from services.timeseries.engine.payload import CorruptBlockError, Opened, assemble, checked, read_directory

FRAME_VERSION: Final = 2
GROUP_CELLS: Final = 12_288
"""A group has as many columns as make so many cells, but `FEWEST_COLUMNS` to `MOST_COLUMNS`: a call of deflate is dear
for few bytes, and reading one column inflates its whole group."""
FEWEST_COLUMNS, MOST_COLUMNS = 8, 512
_FEW: Final = 4
"""Columns that are taken out of a group one by one where they are at most one in so many of it."""
_KEYS: Final = 2  # the times and the sequences: columns of a group of their own
_KEYS_GROUP: Final = 0

BITS, GAPPY = 0x7F, 0x80  # other kinds are the count of decimal digits
_SCALES: Final = np.array([float(10**digits) for digits in range(23)])  # the powers of ten that a double holds exactly
_TRIED_DIGITS: Final = np.array((1, 2, 3, 4, 5, 6, 9), np.uint8)  # after 0; beyond microseconds there are nanoseconds
_TRIED_SCALES: Final = _SCALES[_TRIED_DIGITS]
_WIDTH_LIMITS: Final = np.uint64(1) << np.arange(0, 64, 8, dtype=np.uint64)
_BYTES: Final = np.arange(8)
_DEFLATE_LEVEL: Final = 1
_RAW_DEFLATE: Final = -15  # no header, no checksum of its own
_DEFLATE_ERROR: type[Exception] = isal_zlib.error  # type: ignore[assignment]  # its stub makes an instance of it

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Small = NDArray[np.uint8]


def encode_frame(times_ms: Integers, sequences: Integers, values: Floats, cohort_id: int) -> bytes:
    """The payload of one or more rows, sorted as in a block; `values` is (rows x metrics), NaN where absent."""
    rows, metrics = values.shape
    numbers = np.empty((rows, _KEYS + metrics), np.int64)
    numbers[:, 0] = times_ms
    numbers[:, 1] = sequences
    kinds = np.zeros(_KEYS + metrics, np.uint8)
    edges = np.array(_edges(metrics, group_columns(rows)))
    bitmaps = _set_numbers(values, numbers[:, _KEYS:], kinds[_KEYS:], edges[1:] - _KEYS)
    steps = numbers.copy()
    steps[1:] -= numbers[:-1]
    zigzag = steps << 1
    zigzag ^= steps >> 63
    first_widths, first = _shuffled(zigzag[:1], edges)
    later_widths, later = _shuffled(zigzag[1:], edges)
    described = np.stack((kinds, first_widths, later_widths))
    parts = []
    for group, (start, end) in enumerate(pairwise(edges.tolist())):
        raw = b"".join((described[:, start:end].tobytes(), bitmaps[group], first[group], later[group]))
        parts.append(isal_zlib.compress(raw, _DEFLATE_LEVEL, _RAW_DEFLATE))
    return assemble(FRAME_VERSION, cohort_id, rows, _KEYS + metrics, parts)


def group_columns(rows: int) -> int:
    """How many metrics a group of a frame of so many rows has; the last group may have fewer."""
    return min(max(FEWEST_COLUMNS, GROUP_CELLS // max(1, rows)), MOST_COLUMNS)


def _edges(metrics: int, of_group: int) -> list[int]:
    """Where groups of columns begin, and the end."""
    return [0, *range(_KEYS, _KEYS + metrics, of_group), _KEYS + metrics]


def _set_numbers(values: Floats, numbers: Integers, kinds: Small, edges: NDArray[np.int64]) -> list[bytes]:
    """Sets the integers and kinds of all metrics; returns for each group, the keys' first, the bitmaps of gaps."""
    bitmaps = [b""] * len(edges)
    absent = np.isnan(values)
    if absent.any():
        gaps = np.flatnonzero(np.logical_or.reduce(absent, axis=0))
        present = ~absent[:, gaps]
        values = values.copy()
        values[:, gaps] = _filled(values[:, gaps], present)
        kinds[gaps] = GAPPY
        packed = np.packbits(present, axis=0, bitorder="little").T
        ends = np.searchsorted(gaps, edges).tolist()
        bitmaps[1:] = [packed[start:end].tobytes() for start, end in pairwise(ends)]
    with np.errstate(invalid="ignore", over="ignore"):  # what does not fit an integer is found by comparing
        _set_integers(np.ascontiguousarray(values), numbers, kinds)
    return bitmaps


def _filled(values: Floats, present: NDArray[np.bool_]) -> Floats:
    """Gaps take the value before them, or else the first one, so that they cost their bits in the bitmap only."""
    rows = np.arange(len(values))[:, None]
    taken = np.maximum.accumulate(np.where(present, rows, present.argmax(axis=0)), axis=0)
    filled = np.take_along_axis(values, taken, axis=0)
    filled[:, ~np.logical_or.reduce(present, axis=0)] = 0.0
    return filled


def _set_integers(values: Floats, numbers: Integers, kinds: Small) -> None:
    """Finds for each column the fewest decimal digits that give back every bit; bits where there are none."""
    bits = values.view(np.int64)
    numbers[...] = values
    unlike = np.logical_or.reduce(numbers.astype(np.float64).view(np.int64) != bits, axis=0)
    left = np.flatnonzero(unlike)
    if not len(left):
        return
    part = values[:, left]
    # the last row is a guess: how many digits may do, and whether trying is in vain
    _, fit = _scaled(part[-1], _TRIED_SCALES[:, None])
    tried = np.where(np.logical_or.reduce(fit, axis=0), fit.argmax(axis=0), len(_TRIED_DIGITS))
    while len(left := left[hope := tried < len(_TRIED_DIGITS)]):
        part, tried = part[:, hope], tried[hope]
        scaled, fit = _scaled(part, _TRIED_SCALES[tried])
        fit = np.logical_and.reduce(fit, axis=0)
        done = left[fit]
        numbers[:, done] = scaled[:, fit]
        kinds[done] |= _TRIED_DIGITS[tried[fit]]
        unlike[done] = False
        left, part, tried = left[~fit], part[:, ~fit], tried[~fit] + 1
    raw = np.flatnonzero(unlike)
    numbers[:, raw] = bits[:, raw]
    kinds[raw] |= BITS


def _scaled(values: Floats, scale: Floats) -> tuple[Integers, NDArray[np.bool_]]:
    """Integers, and which of them give the value back: by the very division that a reader does."""
    scaled = np.rint(values * scale).astype(np.int64)
    return scaled, (scaled / scale).view(np.int64) == values.view(np.int64)


def _shuffled(zigzag: Integers, edges: NDArray[np.int64]) -> tuple[Small, list[bytes]]:
    """How many low bytes each column needs, and for each group these: a column's lowest of all rows, then its next."""
    rows, columns = zigzag.shape
    used: Integers = np.bitwise_or.reduce(zigzag, axis=0)
    widths = np.searchsorted(_WIDTH_LIMITS, used.view(np.uint64), side="right")
    kept = np.flatnonzero(widths[:, None] > _BYTES)
    data = zigzag.astype("<i8", copy=False).view(np.uint8).reshape(rows, columns * 8)[:, kept].T.tobytes()
    ends = (np.searchsorted(kept, edges * 8) * rows).tolist()
    return widths.astype(np.uint8), [data[start:end] for start, end in pairwise(ends)]


class FrameReader:
    """Reads columns of one payload through `read(offset, length)`, which may come from memory or from a file."""

    def __init__(
        self, read: Callable[[int, int], bytes], cohort_id: int, metrics: int, opened: Opened | None = None
    ) -> None:
        """`opened`: what `open` returned for this payload before; it is not read again then."""
        self._read = read
        self._metrics = metrics
        if opened is None:
            self.rows, self._offsets = read_directory(
                read, FRAME_VERSION, cohort_id, _KEYS + metrics, lambda rows: 1 + -(-metrics // group_columns(rows))
            )
        else:
            self.rows, self._offsets = opened.rows, opened.offsets
        self._of_group = group_columns(self.rows)

    def keys(self) -> tuple[Integers, Integers]:
        """The times and the sequences of the rows."""
        start, end = self._offsets[:2]
        numbers, _, _ = self._decode(_KEYS_GROUP, self._read(start, end - start), range(_KEYS))
        return numbers[:, 0].copy(), numbers[:, 1].copy()

    def open(self) -> Opened:
        """The directory, the times and the sequences."""
        times, sequences = self.keys()
        return Opened(
            version=FRAME_VERSION,
            rows=self.rows,
            offsets=self._offsets,
            times_ms=times,
            distinct=bool((times[1:] > times[:-1]).all()),
            sequences=lambda: sequences,
            key_bytes=sequences.nbytes,
        )

    def values(self, metrics: Sequence[int]) -> tuple[list[Floats], int]:
        """The columns of metrics (ascending) and how many were damaged; a damaged one comes back as all absent."""
        found: list[Floats] = []
        damaged = 0
        for run in self._runs(metrics):
            base = self._offsets[run[0][0]]
            data = memoryview(self._read(base, self._offsets[run[-1][0] + 1] - base))
            for group, wanted in run:
                part = data[self._offsets[group] - base : self._offsets[group + 1] - base]
                try:
                    found.extend(np.ascontiguousarray(_floats(*self._decode(group, part, wanted)).T))
                except CorruptBlockError:
                    damaged += len(wanted)
                    found.extend(np.full((len(wanted), self.rows), np.nan))
        return found, damaged

    def _runs(self, metrics: Sequence[int]) -> list[list[tuple[int, list[int]]]]:
        """Which columns of which groups; groups that follow each other are read at once."""
        runs: list[list[tuple[int, list[int]]]] = []
        at, of_group = 0, self._of_group
        while at < len(metrics):
            group = 1 + metrics[at] // of_group
            first = (group - 1) * of_group
            end = bisect_left(metrics, first + of_group, at)
            wanted = [metric - first for metric in metrics[at:end]]
            if runs and runs[-1][-1][0] == group - 1:
                runs[-1].append((group, wanted))
            else:
                runs.append([(group, wanted)])
            at = end
        return runs

    def _decode(
        self, group: int, part: bytes | memoryview, wanted: Sequence[int]
    ) -> tuple[Integers, Small, NDArray[np.bool_] | None]:
        body = checked(part, group)
        columns = min(self._of_group, self._metrics - (group - 1) * self._of_group) if group else _KEYS
        try:
            raw = np.frombuffer(isal_zlib.decompress(body, _RAW_DEFLATE), np.uint8)
            if _FEW * len(wanted) <= columns:
                return _decoded_few(raw, self.rows, columns, wanted)
            return _decoded(raw, self.rows, columns, slice(None) if len(wanted) == columns else list(wanted))
        except (_DEFLATE_ERROR, ValueError, IndexError) as error:
            raise CorruptBlockError(f"group {group} is not encoded as it should be") from error


def _decoded(
    raw: Small, rows: int, columns: int, wanted: list[int] | slice
) -> tuple[Integers, Small, NDArray[np.bool_] | None]:
    """Of the wanted columns of a group: the integers (rows x columns), the kinds, and what is absent if anything is."""
    kinds, first_widths, later_widths = raw[: 3 * columns].reshape(3, columns)
    at = 3 * columns
    absent = None
    gaps = np.flatnonzero(kinds & GAPPY)
    if len(gaps):
        end = at + len(gaps) * ((rows + 7) // 8)
        bitmaps = raw[at:end].reshape(len(gaps), -1)
        present = np.ones((rows, columns), np.bool_)
        present[:, gaps] = np.unpackbits(bitmaps, axis=1, count=rows, bitorder="little").T
        absent, at = ~present[:, wanted], end
    zigzag = np.zeros((rows, columns * 8), np.uint8)
    at = _unshuffle(raw, at, first_widths, zigzag[:1])
    if _unshuffle(raw, at, later_widths, zigzag[1:]) != len(raw):
        raise ValueError("there is more than the columns need")
    return _summed(zigzag.view("<u8")[:, wanted]), kinds[wanted], absent


def _summed(steps: NDArray[np.uint64]) -> Integers:
    """The integers of zigzag steps, of which the first row's is the integer itself."""
    sign = steps & 1
    steps >>= 1
    steps ^= np.negative(sign, out=sign)
    return np.add.accumulate(steps.view(np.int64), axis=0)


def _decoded_few(
    raw: Small, rows: int, columns: int, wanted: Sequence[int]
) -> tuple[Integers, Small, NDArray[np.bool_] | None]:
    """As `_decoded`, touching the bytes of the wanted columns alone."""
    kinds, first_widths, later_widths = raw[: 3 * columns].reshape(3, columns)
    gappy = (kinds & GAPPY) != 0
    bitmap_bytes = (rows + 7) // 8
    bitmaps_at = 3 * columns
    firsts_at = bitmaps_at + int(np.count_nonzero(gappy)) * bitmap_bytes
    laters_at = firsts_at + int(first_widths.sum(dtype=np.int64))
    if laters_at + (rows - 1) * int(later_widths.sum(dtype=np.int64)) != len(raw):
        raise ValueError("the columns need another number of bytes")
    zigzag = np.zeros((len(wanted), rows, 8), np.uint8)
    absent = np.zeros((rows, len(wanted)), np.bool_)
    for place, column in enumerate(wanted):
        width, at = int(first_widths[column]), firsts_at + int(first_widths[:column].sum(dtype=np.int64))
        zigzag[place, 0, :width] = raw[at : at + width]
        width = int(later_widths[column])
        at = laters_at + (rows - 1) * int(later_widths[:column].sum(dtype=np.int64))
        for number in range(width):
            zigzag[place, 1:, number] = raw[at + number * (rows - 1) : at + (number + 1) * (rows - 1)]
        if gappy[column]:
            at = bitmaps_at + bitmap_bytes * int(np.count_nonzero(gappy[:column]))
            absent[:, place] = np.unpackbits(raw[at : at + bitmap_bytes], count=rows, bitorder="little") == 0
    taken = np.array(wanted)
    return _summed(zigzag.view("<u8")[:, :, 0].T), kinds[taken], absent if gappy[taken].any() else None


def _unshuffle(raw: Small, start: int, widths: Small, zigzag: Small) -> int:
    """Puts the bytes of some rows where they belong; returns where they end."""
    kept = np.flatnonzero(widths[:, None] > _BYTES)
    end = start + len(zigzag) * len(kept)
    zigzag[:, kept] = raw[start:end].reshape(len(kept), len(zigzag)).T
    return end


def _floats(numbers: Integers, kinds: Small, absent: NDArray[np.bool_] | None) -> Floats:
    digits = kinds & ~np.uint8(GAPPY)
    as_bits = digits == BITS
    values: Floats = numbers / _SCALES[np.where(as_bits, 0, digits)]
    if as_bits.any():
        values[:, as_bits] = numbers[:, as_bits].view(np.float64)
    if absent is not None:
        values[absent] = np.nan
    return values
