"""Makes matrices of single points: for a server the series that share their times become rows of one metric set.

A sender's set, 511 metrics at one time, comes back as the 511 columns it was, though a file lists its points one by
one and series by series. What must stay true:

* a point is in exactly one matrix of its buffer; of points of one series and time the last one is taken;
* at least half of the cells of a matrix hold a point, and at least half of the rows each of its series, so that
  series with times of their own, or few points, cost what they hold;
* equal sets of metrics make the same set on every server and in every buffer, and a metric that is missing for a
  while makes no new one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleet.model import Metric, MetricSet
from services.timeseries.parquet.reading import Points, Series

BUFFER_ROWS: Final = 5_000_000
"""Points held at once, 140 MB: a server's day of 511 metrics every 10 s is 4.4 million."""
MAX_COLUMNS: Final = 20_000
"""Metrics of one set; more are cut."""
MAX_SETS: Final = 1_000
"""Sets remembered, so that they are used again; of 511 metrics one takes 40 KB."""
_SPARSE: Final = 2
"""So many times as many cells as points there may be."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Matrix:
    """Rows of one server: times_ms (int64, n, ascending, distinct), values (float64, n x metrics), and for each row
    the place of one of its points."""

    server_id: str
    metric_set: MetricSet
    times_ms: NDArray[np.int64]
    values: NDArray[np.float64]
    places: NDArray[np.int64]

    def part(self, start: int, end: int) -> "Matrix":
        """Some rows."""
        rows = slice(start, end)
        return replace(self, times_ms=self.times_ms[rows], values=self.values[rows], places=self.places[rows])


class Buffer:
    """Points that wait to become matrices."""

    def __init__(self, rows: int) -> None:
        self._series = np.empty(rows, np.int32)
        self._times = np.empty(rows, np.int64)
        self._values = np.empty(rows, np.float64)
        self._rows = np.empty(rows, np.int64)
        self.size = 0

    def has_room(self, count: int) -> bool:
        """Whether so many more fit."""
        return self.size + count <= len(self._series)

    def add(self, points: Points) -> None:
        """Takes points, for which there must be room."""
        place = slice(self.size, self.size + len(points.series))
        self._series[place], self._times[place] = points.series, points.times_ms
        self._values[place], self._rows[place] = points.values, points.rows
        self.size = place.stop

    def keep_from(self, start: int) -> None:
        """Drops what is before a place."""
        kept = slice(start, self.size)
        for column in (self._series, self._times, self._values, self._rows):
            column[: self.size - start] = column[kept].copy()
        self.size -= start

    def unfinished(self, series: Sequence[Series]) -> int:
        """Where the last server begins whose points may go on, or its last series if it is the only one; 0 if that
        is the only one too. What is before it is as complete as a sorted file can make it."""
        numbers = self._series[: self.size]
        used = np.flatnonzero(np.bincount(numbers, minlength=len(series)))
        last = series[numbers[-1]].server_id
        same_server = np.zeros(len(series), np.bool_)
        same_server[[number for number in used.tolist() if series[number].server_id == last]] = True
        return _tail(same_server[numbers]) or _tail(numbers == numbers[-1])

    def matrices(self, end: int, series: Sequence[Series], sets: "Sets") -> Iterator[Matrix]:
        """The points before `end`, server by server."""
        numbers = self._series[:end]
        counts = np.bincount(numbers, minlength=len(series))
        used = sorted(
            np.flatnonzero(counts).tolist(), key=lambda number: (series[number].server_id, series[number].metric.key)
        )
        rank = np.zeros(len(series), np.int32)
        rank[used] = np.arange(len(used))
        ranks = rank[numbers]
        columns = self._times[:end], self._values[:end], self._rows[:end]
        if not (ranks[1:] >= ranks[:-1]).all():
            order = np.argsort(ranks, kind="stable")
            columns = columns[0][order], columns[1][order], columns[2][order]
        bounds = np.concatenate(([0], np.cumsum(counts[used])))
        first = 0
        while first < len(used):
            server_id, last = series[used[first]].server_id, first
            while last < len(used) and series[used[last]].server_id == server_id:
                last += 1
            metrics = [series[number].metric for number in used[first:last]]
            inside = slice(bounds[first], bounds[last])
            of_server = _Server(server_id, metrics, bounds[first : last + 1] - bounds[first], sets)
            yield from of_server.matrices(columns[0][inside], columns[1][inside], columns[2][inside])
            first = last


def _tail(same: NDArray[np.bool_]) -> int:
    """Where the run of trues at the end begins."""
    others = ~same[::-1]
    return len(same) - int(np.argmax(others)) if others.any() else 0


class Sets:
    """Finds the set for some metrics of a server: one that it had before, if they are most of it."""

    def __init__(self) -> None:
        self._by_metrics: dict[tuple[Metric, ...], MetricSet] = {}
        self._of_server: dict[str, list[MetricSet]] = {}

    def find(self, server_id: str, metrics: Sequence[Metric]) -> MetricSet:
        """A set with all of the metrics and at most as many others."""
        wanted = tuple(metrics)
        had = self._of_server.setdefault(server_id, [])
        for metric_set in had:
            if metric_set.metrics == wanted:
                return metric_set
        for metric_set in had:
            if len(wanted) < len(metric_set) <= _SPARSE * len(wanted) and set(wanted) <= set(metric_set.metrics):
                return metric_set
        if len(self._by_metrics) >= MAX_SETS:
            self._by_metrics.clear()
            self._of_server = {server_id: (had := [])}
        found = self._by_metrics.setdefault(wanted, MetricSet(wanted))
        had.append(found)
        return found


@dataclass(slots=True)
class _Group:
    """Series that share times: their places, and the rows and points they have together."""

    members: list[int]
    rows: int
    points: int


class _Server:
    """The series of one server: the i-th has the points `bounds[i]` to `bounds[i + 1]`."""

    def __init__(self, server_id: str, metrics: Sequence[Metric], bounds: NDArray[np.int64], sets: Sets) -> None:
        self._server_id = server_id
        self._metrics = metrics
        self._slices = [slice(start, end) for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
        self._sets = sets

    def matrices(
        self, times: NDArray[np.int64], values: NDArray[np.float64], places: NDArray[np.int64]
    ) -> Iterator[Matrix]:
        """Arrays of all points, series after series."""
        rows = self._slices[0].stop
        if len(self._metrics) <= MAX_COLUMNS and all(one.stop - one.start == rows for one in self._slices):
            by_series = times.reshape(-1, rows)
            if (by_series == by_series[0]).all() and (by_series[0, 1:] > by_series[0, :-1]).all():
                yield self._matrix(self._metrics, by_series[0], values.reshape(-1, rows).T, places[:rows])
                return
        distinct, at = np.unique(times, return_inverse=True)
        for group in self._groups(at, len(distinct)):
            held = np.zeros(len(distinct), np.bool_)
            for member in group.members:
                held[at[self._slices[member]]] = True
            chosen = np.flatnonzero(held)
            row_of = np.zeros(len(distinct), np.int64)
            row_of[chosen] = np.arange(len(chosen))
            matrix = np.full((len(chosen), len(group.members)), np.nan)
            found = np.zeros(len(chosen), np.int64)
            for column, member in enumerate(group.members):
                inside = self._slices[member]
                row = row_of[at[inside]]
                matrix[row, column] = values[inside]  # of equal ones the last is kept
                found[row] = places[inside]
            yield self._matrix([self._metrics[member] for member in group.members], distinct[chosen], matrix, found)

    def _matrix(
        self,
        metrics: Sequence[Metric],
        times: NDArray[np.int64],
        values: NDArray[np.float64],
        places: NDArray[np.int64],
    ) -> Matrix:
        metric_set = self._sets.find(self._server_id, metrics)
        if len(metric_set) > len(metrics):
            columns = {metric: column for column, metric in enumerate(metric_set.metrics)}
            wider = np.full((len(times), len(metric_set)), np.nan)
            wider[:, [columns[metric] for metric in metrics]] = values
            values = wider
        return Matrix(server_id=self._server_id, metric_set=metric_set, times_ms=times, values=values, places=places)

    def _groups(self, at: NDArray[np.intp], distinct: int) -> list[_Group]:
        """Series that share most of their times, the longest first; `at`: the number of each point's time.

        A series is held against the group to which most of its times belong. A time belongs to the group that came
        last, so short series at some times of long ones find their own.
        """
        owner = np.full(distinct, -1, np.int32)
        groups: list[_Group] = []
        lengths = [one.stop - one.start for one in self._slices]
        for member in sorted(range(len(lengths)), key=lambda member: -lengths[member]):
            here = at[self._slices[member]]
            owners = owner[here]
            owned = owners[owners >= 0]
            best = int(np.bincount(owned).argmax()) if len(owned) else -1
            if best >= 0 and self._joins(groups[best], lengths[member], new := int((owners != best).sum())):
                groups[best].members.append(member)
                groups[best].rows += new
                groups[best].points += lengths[member]
            else:
                best = len(groups)
                groups.append(_Group(members=[member], rows=lengths[member], points=lengths[member]))
            owner[here] = best
        for group in groups:
            group.members.sort()
        return groups

    @staticmethod
    def _joins(group: _Group, length: int, new: int) -> bool:
        rows, cells = group.rows + new, (group.rows + new) * (len(group.members) + 1)
        fits = len(group.members) < MAX_COLUMNS and 2 * new <= length
        return fits and rows <= _SPARSE * length and cells <= _SPARSE * (group.points + length)
