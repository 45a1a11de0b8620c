"""What a roll-up holds of the points of a bucket, and how it is made: pure functions of numpy arrays.

A bucket is the points of a series in an epoch-aligned range of time. Of each metric it keeps nine fields, out of which
every aggregation of any window of whole buckets follows: FIRST and LAST with their times, so that a RATE can step from
one bucket into the next and knows how far apart two samples are.

What must stay true: COUNT, MIN, MAX, FIRST, LAST and their times are exact; a bucket depends on its own points only,
so that a late point changes one bucket of each tier; a coarser bucket made of finer ones is what the points would make
it. INCREASE is the sum of the steps between samples within the bucket, a fall being a reset (the counter began at
zero); the step into the bucket is the reader's, who has the LAST of the bucket before. SUM of decimals is the nearest
decimal.
"""

from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.timeseries.engine.decimals import places, rounded

GENERATION_SHIFT: Final = 20
"""How often buckets can be made, each time anew, between two batches: a million times."""

Times = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Field(IntEnum):
    """The columns of one metric in a roll-up's block, in their order."""

    COUNT = 0
    SUM = 1
    MIN = 2
    MAX = 3
    FIRST = 4
    LAST = 5
    FIRST_AT = 6  # milliseconds since the bucket's start, as LAST_AT
    LAST_AT = 7
    INCREASE = 8  # not of gauges


FIELDS: Final = len(Field)


class Buckets(NamedTuple):
    """Buckets of some metrics: starts_ms (b, ascending), fields (b x m x FIELDS, NaN where a metric has no point)."""

    starts_ms: Times
    fields: Floats

    @property
    def columns(self) -> Floats:
        """As the values of a block: metric by metric, its fields side by side."""
        return self.fields.reshape(len(self.starts_ms), -1)


def next_generation(last_sequence: int, before: int) -> int:
    """What the rows of roll-ups that are made from now on have as their sequence: above `before`, that of all made so
    far, for a bucket is often made twice without a batch in between, and the later one is right."""
    return max(max(last_sequence, 1) << GENERATION_SHIFT, before + 1)


def step(before: Floats, after: Floats) -> Floats:
    """How much a counter grew between two samples; one that fell began at zero in between."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(after < before, after, after - before)


def from_points(times_ms: Times, values: Floats, counters: Bools, width_ms: int) -> Buckets:
    """The buckets of points.

    Args:
        times_ms: ascending without equals (n).
        values: (n x m), NaN where absent.
        counters: which metrics are none that are said to be gauges (m).
        width_ms: of a bucket.
    """
    if not len(times_ms):
        return Buckets(times_ms, np.empty((0, values.shape[1], FIELDS)))
    starts, firsts = _grouped(times_ms, width_ms)
    present = ~np.isnan(values)
    reducer = _Reducer(present, firsts)
    fields = np.empty((len(starts), values.shape[1], FIELDS))
    fields[:, :, Field.COUNT] = reducer.counts
    with np.errstate(invalid="ignore", over="ignore"):
        sums = np.add.reduceat(values if reducer.full else np.where(present, values, 0.0), firsts, axis=0)
    fields[:, :, Field.SUM] = rounded(sums, places(np.ascontiguousarray(values.T)))
    fields[:, :, Field.MIN] = np.fmin.reduceat(values, firsts, axis=0)
    fields[:, :, Field.MAX] = np.fmax.reduceat(values, firsts, axis=0)
    fields[:, :, Field.FIRST] = reducer.pick(values, reducer.first_rows)
    fields[:, :, Field.LAST] = reducer.pick(values, reducer.last_rows)
    fields[:, :, Field.FIRST_AT] = times_ms[reducer.first_rows] - starts[:, None]
    fields[:, :, Field.LAST_AT] = times_ms[reducer.last_rows] - starts[:, None]
    grown = np.zeros_like(values[:, counters])
    fields[:, :, Field.INCREASE] = np.nan
    fields[:, counters, Field.INCREASE] = reducer.increase(
        grown, values[:, counters], values[:, counters], present[:, counters]
    )
    return _blanked(starts, fields)


def from_buckets(finer: Buckets, counters: Bools, width_ms: int) -> Buckets:
    """The buckets of finer ones, whose width divides `width_ms`; their starts ascend without equals."""
    if not len(finer.starts_ms):
        return finer
    starts, firsts = _grouped(finer.starts_ms, width_ms)
    of = finer.fields
    present = ~np.isnan(of[:, :, Field.COUNT])
    reducer = _Reducer(present, firsts)
    fields = np.empty((len(starts), *of.shape[1:]))
    with np.errstate(invalid="ignore", over="ignore"):
        for added in (Field.COUNT, Field.SUM):
            numbers = of[:, :, added]
            fields[:, :, added] = np.add.reduceat(
                numbers if reducer.full else np.where(present, numbers, 0.0), firsts, axis=0
            )
    fields[:, :, Field.SUM] = rounded(fields[:, :, Field.SUM], places(np.ascontiguousarray(of[:, :, Field.SUM].T)))
    fields[:, :, Field.MIN] = np.fmin.reduceat(of[:, :, Field.MIN], firsts, axis=0)
    fields[:, :, Field.MAX] = np.fmax.reduceat(of[:, :, Field.MAX], firsts, axis=0)
    fields[:, :, Field.FIRST] = reducer.pick(of[:, :, Field.FIRST], reducer.first_rows)
    fields[:, :, Field.LAST] = reducer.pick(of[:, :, Field.LAST], reducer.last_rows)
    for offset, rows in ((Field.FIRST_AT, reducer.first_rows), (Field.LAST_AT, reducer.last_rows)):
        fields[:, :, offset] = reducer.pick(of[:, :, offset], rows) + (finer.starts_ms[rows] - starts[:, None])
    fields[:, :, Field.INCREASE] = np.nan
    fields[:, counters, Field.INCREASE] = reducer.increase(
        of[:, counters, Field.INCREASE],
        of[:, counters, Field.FIRST],
        of[:, counters, Field.LAST],
        present[:, counters],
    )
    return _blanked(starts, fields)


def _grouped(times_ms: Times, width_ms: int) -> tuple[Times, NDArray[np.intp]]:
    """The starts of the buckets, and where in the rows each begins."""
    numbers = times_ms // width_ms
    firsts = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1]))
    return numbers[firsts] * width_ms, firsts


def _blanked(starts: Times, fields: Floats) -> Buckets:
    """Without the fields of metrics that have no point in a bucket, and without buckets that have none at all."""
    fields[fields[:, :, Field.COUNT] == 0] = np.nan
    some = ~np.isnan(fields[:, :, Field.COUNT]).all(axis=1)
    return Buckets(starts[some], fields[some])


class _Reducer:
    """Rows grouped into buckets: which cells there are, and which are each metric's first and last of a bucket."""

    def __init__(self, present: Bools, firsts: NDArray[np.intp]) -> None:
        rows = len(present)
        ends = np.append(firsts[1:], rows)
        self._present, self._firsts = present, firsts
        self.full = bool(present.all())
        if self.full:
            shape = (len(firsts), present.shape[1])
            self.counts = np.broadcast_to((ends - firsts)[:, None], shape)
            self.first_rows = np.broadcast_to(firsts[:, None], shape)
            self.last_rows = np.broadcast_to((ends - 1)[:, None], shape)
        else:
            number = np.arange(rows)[:, None]
            self.counts = np.add.reduceat(present, firsts, axis=0, dtype=np.int64)
            self.first_rows = np.minimum.reduceat(np.where(present, number, rows - 1), firsts, axis=0)
            self.last_rows = np.maximum.reduceat(np.where(present, number, 0), firsts, axis=0)

    def pick(self, values: Floats, rows: NDArray[np.intp]) -> Floats:
        return values[rows, np.arange(values.shape[1])]

    @np.errstate(invalid="ignore", over="ignore")  # infinities may cancel
    def increase(self, within: Floats, first: Floats, last: Floats, present: Bools) -> Floats:
        """The growth within each bucket: of the rows themselves, and from one row's last to the next row's first."""
        if self.full or bool(present.all()):
            grown = within.copy()
            grown[1:] += step(last[:-1], first[1:])
            grown[self._firsts] = within[self._firsts]
            return np.add.reduceat(grown, self._firsts, axis=0)
        found = np.zeros((len(self._firsts), within.shape[1]))
        group = np.repeat(np.arange(len(self._firsts)), np.diff(np.append(self._firsts, len(present))))
        for column in range(within.shape[1]):
            rows = np.flatnonzero(present[:, column])
            if len(rows):
                grown = within[rows, column]
                same = group[rows[1:]] == group[rows[:-1]]
                grown[1:] += np.where(same, step(last[rows[:-1], column], first[rows[1:], column]), 0.0)
                np.add.at(found[:, column], group[rows], grown)
        return found
