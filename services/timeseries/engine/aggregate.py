"""From the points of one series, or its roll-ups, to one value for each window: pure functions of numpy arrays.

Windows are multiples of `step` since the epoch, labelled by their start and clipped to `[start, end)`; a window
without points is absent. What must stay true: MIN, MAX, COUNT, FIRST and LAST are exact; a value that comes out as
NaN (infinities that cancel) is absent, as NaN is everywhere; points and the buckets made of them give the same.
"""

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from services.timeseries.engine.rollup import Field, step

Times = NDArray[np.int64]
Values = NDArray[np.float64]

RATE_LOOKBACK_MS: Final = 300_000
"""How far before a window RATE looks for the sample to step from, if the step itself is not longer."""


class Aggregation(IntEnum):
    """How the points of a window become one value; the numbers are those of ``openmanager.fleet.v1.Aggregation``."""

    AVG = 1
    MIN = 2
    MAX = 3
    SUM = 4
    COUNT = 5
    LAST = 6
    RATE = 7
    FIRST = 8


def lookback_ms(aggregation: Aggregation, step_ms: int) -> int:
    """How far before the range an aggregation wants points."""
    return max(step_ms, RATE_LOOKBACK_MS) if aggregation is Aggregation.RATE and step_ms else 0


class _Edges(NamedTuple):
    """What follows from the times of a series alone; arrays have one cell a window.

    Attributes:
        before: how many points lie before the range.
        firsts: where each window begins among the others.
        counts: how many points it has.
        labels: its start.
    """

    before: int
    firsts: NDArray[np.intp]
    counts: NDArray[np.intp]
    labels: Times


class Shared(NamedTuple):
    """Series of the same times; a series is the arrays that follow each other in it."""

    times_ms: Times
    columns: list[list[Values]]


class _AllEdges(NamedTuple):
    """The windows of many series that follow each other in one array of points.

    Attributes:
        places: where each window begins.
        bounds: where the windows of each series begin among those, with the end as last.
        labels: for each group the windows' starts, and how many series it has.
    """

    places: NDArray[np.intp]
    bounds: NDArray[np.intp]
    labels: list[tuple[Times, int]]


class Windows:
    """The windows of the series of one query. A series of the same times as the one before it, as have the metrics of a
    server and the servers of a fleet that is asked all at once, shares its edges: 10 us of 15 for 720 points."""

    def __init__(self, start_ms: int, step_ms: int, aggregation: Aggregation) -> None:
        """`start_ms` is the start of the range, `step_ms` the width of a window, positive."""
        self._start_ms = start_ms
        self._step_ms = step_ms
        self._aggregation = aggregation
        self._times: Times | None = None
        self._edges: _Edges | None = None

    def of(self, times: Times, values: Values) -> tuple[Times, Values]:
        """The windows of a series.

        Args:
            times: ascending without equals, before the end of the range; for RATE they begin `lookback_ms` earlier.
            values: as many, without NaN.

        Returns:
            The windows' starts and values; the starts may be shared.
        """
        if times is not self._times and not self._known(times):
            self._times, self._edges = times, _edges(times, self._start_ms, self._step_ms)
        edges, aggregation = self._edges, self._aggregation
        if edges is None:
            return times[:0], values[:0]
        if aggregation is Aggregation.COUNT:
            return edges.labels, edges.counts.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            if aggregation is Aggregation.RATE:
                begins = np.maximum(edges.labels, self._start_ms)
                found = _rate(
                    times, values, edges.firsts + edges.before, begins, lookback_ms(aggregation, self._step_ms)
                )
            else:
                found = _REDUCE[aggregation](values[edges.before :], edges.firsts)
                if aggregation is Aggregation.AVG:
                    found /= edges.counts
        there = found == found  # noqa: PLR0124  false where NaN
        if np.count_nonzero(there) == len(found):
            return edges.labels, found
        return edges.labels[there], found[there]

    def of_all(self, groups: "Sequence[Shared]") -> Iterator[tuple[Times, Values]]:
        """The windows of many series in a few passes over all of them. 720 points each: 20 servers 7 us a series, one
        by one 8 where their times are the same, else 13; 511 metrics of a server 2.3, one by one 5.0.

        For every aggregation but RATE, which looks at points before the window.

        Args:
            groups: series by the times that they share. Times as for `of`, and not before the range; a NaN is absent.

        Yields:
            What `of` returns, series by series; the starts may be shared.
        """
        flat = _joined([part for group in groups for column in group.columns for part in column])
        edges = _all_edges(groups, self._step_ms)
        places, bounds, labels = edges.places, edges.bounds, None
        counts = _counts(places, len(flat))
        present = flat == flat  # noqa: PLR0124  false where NaN
        if np.count_nonzero(present) != len(flat):
            ends = np.append(0, np.cumsum(present))
            flat, places = flat[present], ends[places]
            counts = _counts(places, len(flat))
            labels = np.concatenate([one for one, series in edges.labels for _ in range(series)])
            places, counts, labels, bounds = _only(counts > 0, bounds, places, counts, labels)
        found = self._reduced(flat, places, counts)
        there = found == found  # noqa: PLR0124  false where NaN: infinities that cancel
        if np.count_nonzero(there) != len(found):
            if labels is None:
                labels = np.concatenate([one for one, series in edges.labels for _ in range(series)])
            found, labels, bounds = _only(there, bounds, found, labels)
        ends_of = bounds.tolist()
        if labels is not None:
            for start, end in pairwise(ends_of):
                yield labels[start:end], found[start:end]
            return
        shared = (one for one, series in edges.labels for _ in range(series))
        for one, (start, end) in zip(shared, pairwise(ends_of), strict=True):
            yield one, found[start:end]

    def _reduced(self, values: Values, firsts: NDArray[np.intp], counts: NDArray[np.intp]) -> Values:
        """One value a window; each window reaches to where the next one begins."""
        if self._aggregation is Aggregation.COUNT:
            return counts.astype(np.float64)
        if not len(firsts):
            return np.empty(0)
        with np.errstate(invalid="ignore", over="ignore"):
            found = _REDUCE[self._aggregation](values, firsts)
            if self._aggregation is Aggregation.AVG:
                found /= counts
        return found

    def _known(self, times: Times) -> bool:
        """Whether the times are those of the series before."""
        known = self._times
        if known is None or len(times) != len(known) or not len(times) or times[0] != known[0]:
            return False
        return bool(np.count_nonzero(times == known) == len(times))


def _edges(times: Times, start_ms: int, step_ms: int) -> _Edges | None:
    """The windows of some times; None when none lies in the range."""
    before = int(times.searchsorted(start_ms))
    inside = times[before:]
    if not len(inside):
        return None
    numbers = inside // step_ms
    lasts = (numbers[1:] != numbers[:-1]).nonzero()[0]
    bounds = np.empty(len(lasts) + 2, np.intp)
    bounds[0], bounds[-1] = 0, len(inside)
    np.add(lasts, 1, out=bounds[1:-1])
    firsts = bounds[:-1]
    return _Edges(before, firsts, bounds[1:] - firsts, numbers[firsts] * step_ms)


def _all_edges(groups: Sequence[Shared], step_ms: int) -> _AllEdges:
    """The windows of all groups in one pass over their times; to look whether those are the same saves nothing."""
    times = _joined([group.times_ms for group in groups])
    numbers = times // step_ms
    new = np.empty(len(times), np.bool_)
    np.not_equal(numbers[1:], numbers[:-1], out=new[1:])
    starts = [0, *accumulate(len(group.times_ms) for group in groups)]
    new[starts[:-1]] = True
    firsts = new.nonzero()[0]
    all_labels = numbers[firsts] * step_ms
    cuts = firsts.searchsorted(starts).tolist()
    places, bounds, labels, at = [], [0], [], 0
    for group, begin, end, start in zip(groups, cuts, cuts[1:], starts, strict=False):
        series, rows = len(group.columns), len(group.times_ms)
        moved = firsts[begin:end] + (at - start)
        places.append(moved if series == 1 else np.add.outer(np.arange(series) * rows, moved).ravel())
        bounds += range(bounds[-1] + end - begin, bounds[-1] + (end - begin) * series + 1, end - begin)
        labels.append((all_labels[begin:end], series))
        at += series * rows
    return _AllEdges(_joined(places), np.array(bounds), labels)


_Array = TypeVar("_Array", bound=NDArray[Any])


def _joined(parts: list[_Array]) -> _Array:
    return parts[0] if len(parts) == 1 else cast("_Array", np.concatenate(parts))


def _counts(places: NDArray[np.intp], end: int) -> NDArray[np.intp]:
    """How far it is from each place to the next one, or the end; np.diff takes 8 us for that."""
    counts = np.empty_like(places)
    np.subtract(places[1:], places[:-1], out=counts[:-1])
    counts[-1:] = end - places[-1:]
    return counts


def _only(keep: NDArray[np.bool_], bounds: NDArray[np.intp], *arrays: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Some of the windows: of each array, and at last where those of each series begin."""
    return *(array[keep] for array in arrays), np.append(0, np.cumsum(keep))[bounds]


def _rate(times: Times, values: Values, firsts: NDArray[np.intp], starts: Times, lookback: int) -> Values:
    """Increase over time of each window; the step into it counts where the sample before is not too old.

    A value below its predecessor is a reset: the counter began at zero, so the value itself is the increase.
    """
    lasts = np.append(firsts[1:], len(times)) - 1
    befores = np.maximum(firsts - 1, 0)
    joined = (firsts > 0) & (starts - times[befores] <= lookback)
    steps = np.empty_like(values)
    steps[0] = 0.0
    np.subtract(values[1:], values[:-1], out=steps[1:])
    resets = np.flatnonzero(values[1:] < values[:-1]) + 1
    steps[resets] = values[resets]
    steps[firsts[~joined]] = 0.0
    increase = np.add.reduceat(steps, firsts)
    seconds = (times[lasts] - times[np.where(joined, befores, firsts)]) / 1_000.0
    rate: Values = np.full(len(firsts), np.nan)
    np.divide(increase, seconds, out=rate, where=seconds > 0)
    return rate


_REDUCE: Final[dict[Aggregation, Callable[[Values, NDArray[np.intp]], Values]]] = {
    Aggregation.AVG: np.add.reduceat,  # what it divides by follows from the times
    Aggregation.MIN: np.minimum.reduceat,
    Aggregation.MAX: np.maximum.reduceat,
    Aggregation.SUM: np.add.reduceat,
    Aggregation.LAST: lambda values, firsts: values[np.append(firsts[1:], len(values)) - 1],
    Aggregation.FIRST: lambda values, firsts: values[firsts],
}


NEEDED: Final[dict[Aggregation, tuple[Field, ...]]] = {
    Aggregation.AVG: (Field.COUNT, Field.SUM),
    Aggregation.MIN: (Field.MIN,),
    Aggregation.MAX: (Field.MAX,),
    Aggregation.SUM: (Field.COUNT, Field.SUM),
    Aggregation.COUNT: (Field.COUNT,),
    Aggregation.LAST: (Field.LAST,),
    Aggregation.FIRST: (Field.FIRST,),
    Aggregation.RATE: (Field.FIRST, Field.LAST, Field.FIRST_AT, Field.LAST_AT, Field.INCREASE),
}
"""The fields of a bucket that an aggregation is made of; the first is absent only where the bucket has no point."""


def of_points(times: Times, values: Values, aggregation: Aggregation) -> list[Values]:
    """The needed fields of points, each a bucket of its own that begins at its time."""
    made = {
        Field.COUNT: lambda: np.ones(len(times)),
        Field.FIRST_AT: lambda: np.zeros(len(times)),
        Field.LAST_AT: lambda: np.zeros(len(times)),
        Field.INCREASE: lambda: np.zeros(len(times)),
    }
    return [made[field]() if field in made else values for field in NEEDED[aggregation]]


def bucket_windows(
    starts: Times, fields: list[Values], start_ms: int, step_ms: int, aggregation: Aggregation
) -> tuple[Times, Values]:
    """The windows of a series of buckets, as `windows` makes them of points.

    Args:
        starts: of the buckets, ascending without equals; none reaches over the edge of a window or of the range.
        fields: those that `NEEDED` names, as many values each.
        start_ms: the start of the range.
        step_ms: the width of a window.
        aggregation: what to compute.
    """
    before = int(np.searchsorted(starts, start_ms))
    inside = starts[before:]
    if not len(inside):
        return inside, np.empty(0)
    numbers = inside // step_ms
    firsts = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1]))
    labels = numbers[firsts] * step_ms
    with np.errstate(invalid="ignore", over="ignore"):
        if aggregation is Aggregation.RATE:
            begins = np.maximum(labels, start_ms)
            found = _bucket_rate(starts, fields, firsts + before, begins, lookback_ms(aggregation, step_ms))
        elif aggregation in (Aggregation.AVG, Aggregation.SUM):
            counts, sums = (np.add.reduceat(field[before:], firsts) for field in fields)
            found = sums / counts if aggregation is Aggregation.AVG else sums
        elif aggregation is Aggregation.COUNT:
            found = np.add.reduceat(fields[0][before:], firsts)
        else:
            found = _REDUCE[aggregation](fields[0][before:], firsts)
    there = ~np.isnan(found)
    return labels[there], found[there]


def _bucket_rate(starts: Times, fields: list[Values], firsts: NDArray[np.intp], begins: Times, lookback: int) -> Values:
    """As `_rate`: the growth within each bucket, and from one bucket's last sample to the next one's first."""
    first, last, first_at, last_at, within = fields
    first_ms, last_ms = starts + first_at, starts + last_at
    lasts = np.append(firsts[1:], len(starts)) - 1
    befores = np.maximum(firsts - 1, 0)
    joined = (firsts > 0) & (begins - last_ms[befores] <= lookback)
    grown = within.copy()
    steps = step(last[:-1], first[1:])
    grown[1:] += steps
    alone = firsts[~joined]
    grown[alone] = within[alone]
    increase = np.add.reduceat(grown, firsts)
    seconds = (last_ms[lasts] - np.where(joined, last_ms[befores], first_ms[firsts])) / 1_000.0
    rate: Values = np.full(len(firsts), np.nan)
    np.divide(increase, seconds, out=rate, where=seconds > 0)
    return rate
