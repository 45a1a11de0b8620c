"""Answers range queries and last values: which series, in which groups, within which limits.

What must stay true: the result is in order of server id and metric key; a limit that is reached raises an error that
names it, nothing is cut silently; work stops soon after `cancel` is set. Runs in worker threads.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleet.model import Metric, MetricKind
from runtime.errors import Cancelled, InvalidArgument, ResourceExhausted
from services.timeseries.engine.aggregate import (
    NEEDED,
    Aggregation,
    Shared,
    Windows,
    bucket_windows,
    lookback_ms,
    of_points,
)
from services.timeseries.engine.catalog import Cohort, said_gauge
from services.timeseries.engine.frozen import frozen_starts
from services.timeseries.engine.rollup import FIELDS
from services.timeseries.engine.scan import Frame, Sources, all_sources, bucket_points, frames, points, sources
from services.timeseries.engine.settings import DAY_MS, MAX_TIME_MS, MIN_TIME_MS
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import RAW, TIERS, Ranges, Segment, coarsest, plan, unsettled_ranges, without

SERVERS_TOGETHER: Final = 64
CELLS_TOGETHER: Final = 500_000
"""Servers whose rows are looked for, and cells (4 MB) that are read, before the first result of them is handed over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What to read.

    Attributes:
        metrics: selectors: an exact key, or a name, which matches every set of labels of it; None: all.
        start_ms: first instant, inclusive.
        end_ms: the end, exclusive.
        step_ms: width of a window; 0: the points as they were written.
        aggregation: how a window becomes a value; ignored without a step.
        server_ids: None: all.
    """

    metrics: tuple[str, ...] | None
    start_ms: int
    end_ms: int
    step_ms: int = 0
    aggregation: Aggregation = Aggregation.AVG
    server_ids: tuple[str, ...] | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class SeriesResult:
    """One series: times_ms (int64, ascending; of the points, or of the windows' starts) and as many values.

    `resolution_ms` is the width of the coarsest roll-ups that it was made of; 0: of points alone. Not frozen, for
    many are made: 0.5 us.
    """

    server_id: str
    metric_key: str
    unit: str
    kind: MetricKind
    times_ms: NDArray[np.int64]
    values: NDArray[np.float64]
    resolution_ms: int = 0


Columns = dict[str, list[tuple[Cohort, int]]]


class Selection:
    """The series that a query is about, found at once so that its limits are known before anything is read."""

    def __init__(self, store: Store, server_ids: tuple[str, ...] | None, metrics: tuple[str, ...] | None) -> None:
        limit = store.settings.max_series
        self.servers: list[tuple[str, Columns]] = []
        with store.lock:
            catalog = store.catalog
            keys = None if metrics is None else catalog.match(metrics)
            self.count = 0
            for server_id in sorted(catalog.cohorts_of if server_ids is None else set(server_ids)):
                if columns := catalog.columns(server_id, keys):
                    self.servers.append((server_id, columns))
                    self.count += len(columns)
                if self.count > limit:
                    raise ResourceExhausted(f"more than max_series = {limit} series", reason="MAX_SERIES")
            self.metrics: dict[str, Metric] = {
                key: catalog.metrics[key] for _, columns in self.servers for key in columns
            }


def check_query(query: Query) -> None:
    """Raises InvalidArgument for a query that makes no sense whatever is stored."""
    if query.start_ms > query.end_ms:
        raise InvalidArgument("the range starts after its end", field="start_time")
    if query.step_ms < 0:
        raise InvalidArgument("the step is negative", field="step")


class Scan:
    """One query as it runs: `results()` yields; `cancel` stops it between two blocks."""

    def __init__(self, store: Store, query: Query) -> None:
        check_query(query)
        self._store = store
        self._query = query
        self._scanned = 0
        self._returned = 0
        self._windows = Windows(max(query.start_ms, MIN_TIME_MS), query.step_ms, query.aggregation)
        self.cancel = threading.Event()

    def _check(self) -> None:
        if self.cancel.is_set():
            raise Cancelled("the reader went away")

    def results(self) -> Iterator[SeriesResult]:
        """The series that have points in the range."""
        query = self._query
        start_ms = max(query.start_ms, MIN_TIME_MS)
        end_ms = min(query.end_ms, MAX_TIME_MS + 1)
        selection = Selection(self._store, query.server_ids, query.metrics)
        self._check_rate(selection)
        if start_ms >= end_ms:
            return
        level = coarsest(query.step_ms)
        width = TIERS[level].width_ms or 1
        read_from = max(MIN_TIME_MS, start_ms - lookback_ms(query.aggregation, query.step_ms)) // width * width
        if level == RAW:
            yield from self._of_points(selection, read_from, end_ms)
            return
        rate = query.aggregation is Aggregation.RATE
        for server_id, columns in selection.servers:
            cohorts = {cohort.id: cohort for holders in columns.values() for cohort, _ in holders}
            as_points = [(read_from, end_ms)] if rate and any(map(said_gauge, columns.values())) else []
            unsettled = self._unsettled(server_id, cohorts, level, as_points)
            segments = plan((read_from, start_ms, end_ms), level, unsettled)  # no bucket lies across start_ms
            found = self._found(cohorts, segments)
            rows = sum(part.rows for _, of_cohorts in found for part in of_cohorts.values())
            for keys in self._groups(sorted(columns), rows, self._store.settings.scan_cells):
                parts = [(segment, self._frames(of_cohorts, columns, keys)) for segment, of_cohorts in found]
                for key in keys:
                    metric = selection.metrics[key]
                    if result := self._result(server_id, metric, key, self._series(parts, columns[key]), start_ms):
                        yield result

    def _of_points(self, selection: Selection, read_from: int, end_ms: int) -> Iterator[SeriesResult]:
        """The results where points are all there is: read and put into windows for many servers at once."""
        limit = min(CELLS_TOGETHER, self._store.settings.scan_cells)
        for at in range(0, len(selection.servers), SERVERS_TOGETHER):
            wanted: list[_Wanted] = []
            cells = 0
            for server_id, columns, found in self._sources(
                selection.servers[at : at + SERVERS_TOGETHER], read_from, end_ms
            ):
                rows = sum([part.rows for part in found.values()])
                for keys in self._groups(sorted(columns), rows, limit):
                    if wanted and cells + rows * len(keys) > limit:
                        yield from self._windowed(selection, wanted)
                        wanted, cells = [], 0
                    wanted.append(_Wanted(server_id, columns, keys, found))
                    cells += rows * len(keys)
            yield from self._windowed(selection, wanted)

    def _sources(
        self, servers: list[tuple[str, Columns]], start_ms: int, end_ms: int
    ) -> Iterator[tuple[str, Columns, dict[int, Sources]]]:
        """Each server with where its points of a range are, by cohort."""
        cohorts_of = [
            list({cohort.id: cohort for holders in columns.values() for cohort, _ in holders}.values())
            for _, columns in servers
        ]
        found = iter(all_sources(self._store, [one for cohorts in cohorts_of for one in cohorts], start_ms, end_ms))
        for (server_id, columns), cohorts in zip(servers, cohorts_of, strict=True):
            yield server_id, columns, {cohort.id: source for cohort, source in zip(cohorts, found, strict=False)}

    def _windowed(self, selection: Selection, wanted: list["_Wanted"]) -> Iterator[SeriesResult]:
        """Reads all of it and makes its windows, of many series together where that saves something."""
        places = self._read([(one.found, one.columns, one.keys) for one in wanted])
        query = self._query
        single = len(wanted) == 1 and len(wanted[0].keys) == 1
        together = not single and query.step_ms and query.aggregation is not Aggregation.RATE
        for server_id, key, times, values in (
            self._together(wanted, places) if together else self._alone(wanted, places)
        ):
            if len(times):
                yield self._checked(server_id, selection.metrics[key], key, times, values, 0)

    def _alone(self, wanted: list["_Wanted"], places: list["_Places"]) -> Iterator["_Made"]:
        for one, at in zip(wanted, places, strict=True):
            for key in one.keys:
                times, values = points([at[cohort.id, column] for cohort, column in one.columns[key]])
                if len(times) and self._query.step_ms:
                    times, values = self._windows.of(times, values)
                yield one.server_id, key, times, values

    def _together(self, wanted: list["_Wanted"], places: list["_Places"]) -> Iterator["_Made"]:
        names: list[tuple[str, str]] = []
        shared: list[Shared] = []
        for one, at in zip(wanted, places, strict=True):
            for key in one.keys:
                holders = [at[cohort.id, column] for cohort, column in one.columns[key]]
                rows, place = holders[0]
                times, pieces = rows.times_ms, rows.pieces[place]
                if len(holders) > 1 or not rows.distinct:
                    times, values = points(holders)
                    pieces = [values]
                if not len(times):
                    continue
                names.append((one.server_id, key))
                if shared and shared[-1].times_ms is times:
                    shared[-1].columns.append(pieces)
                else:
                    shared.append(Shared(times, [pieces]))
        if shared:
            for name, made in zip(names, self._windows.of_all(shared), strict=True):
                yield *name, *made

    def _unsettled(self, server_id: str, cohorts: dict[int, Cohort], level: int, as_points: Ranges) -> list[Ranges]:
        """For each level the ranges that it has no right buckets for; heads and marks are looked at in one moment.

        Those of all cohorts of the server: while one has rows of a bucket in a head, it is made of none (`upkeep.py`).
        What they span may hold buckets whose points are gone: those are right, and nothing else has them.
        """
        if level == RAW:
            return []
        store = self._store
        with store.lock:
            of_all = store.catalog.cohorts_of[server_id]
            by_day = [store.heads.snapshot(cohort, 0, MAX_TIME_MS // DAY_MS) for cohort in of_all]
            chunks = [chunk for days in by_day for of_day in days.values() for chunk in of_day]
            gone = store.gone_before_finer()
            found = unsettled_ranges(chunks, store.tiers, [cohort.id for cohort in of_all], as_points, gone)
        of_server = list(cohorts.values())
        for number, ranges in enumerate(found):
            if number > RAW and store.ended[number - 1]:
                frozen = [frozen_starts(store, of_server, number, start, end) for start, end in ranges]
                if any(map(len, frozen)):
                    found[number] = without(ranges, np.concatenate(frozen), TIERS[number].width_ms)
        return found

    def _found(self, cohorts: dict[int, Cohort], segments: list[Segment]) -> list[tuple[Segment, dict[int, Sources]]]:
        return [
            (
                segment,
                {
                    number: sources(self._store, cohort, segment.start_ms, segment.end_ms, segment.level)
                    for number, cohort in cohorts.items()
                },
            )
            for segment in segments
        ]

    def _check_rate(self, selection: Selection) -> None:
        if self._query.aggregation is Aggregation.RATE and self._query.step_ms:
            for key, metric in selection.metrics.items():
                if metric.kind is MetricKind.GAUGE:
                    raise InvalidArgument(f"RATE wants a counter, {key} is a gauge", field="aggregation")

    def _groups(self, keys: list[str], rows: int, cells: int) -> list[list[str]]:
        """Cuts the keys so that the columns of a group fit into so many cells."""
        size = max(1, cells // max(rows, 1))
        return [keys[at : at + size] for at in range(0, len(keys), size)]

    def _frames(self, found: dict[int, Sources], columns: Columns, keys: list[str]) -> "_Places":
        """Reads the columns of some keys."""
        return self._read([(found, columns, keys)])[0]

    def _read(self, wanted: list[tuple[dict[int, Sources], Columns, list[str]]]) -> list["_Places"]:
        """Reads the columns of some keys of each server."""
        limit = self._store.settings.max_scanned_points
        reads: list[tuple[Sources, list[int]]] = []
        read_of: list[list[tuple[int, list[int], int]]] = []
        for found, columns, keys in wanted:
            metrics_of: dict[int, list[int]] = {}
            for key in keys:
                for cohort, column in columns[key]:
                    metrics_of.setdefault(cohort.id, []).append(column)
            for number, metrics in metrics_of.items():
                metrics.sort()
                source = found[number]
                fields = [0] if source.level == RAW else sorted(NEEDED[self._query.aggregation])
                read = metrics if source.level == RAW else [m * FIELDS + f for m in metrics for f in fields]
                self._scanned += source.rows * len(read)
                if self._scanned > limit:
                    raise ResourceExhausted(
                        f"the query reads more than max_scanned_points = {limit} points", reason="MAX_SCANNED_POINTS"
                    )
                reads.append((source, read))
            read_of.append([(number, metrics, len(fields)) for number, metrics in metrics_of.items()])
        rows = iter(frames(self._store, reads, self._check))
        return [
            {
                (number, column): (of_cohort, place * width)
                for (number, metrics, width), of_cohort in zip(of_server, rows, strict=False)
                for place, column in enumerate(metrics)
            }
            for of_server in read_of
        ]

    def _series(
        self,
        parts: list[tuple[Segment, "_Places"]],
        holders: list[tuple[Cohort, int]],
    ) -> "_Series":
        """One series out of the frames of each segment: points where those are all there is, else buckets."""
        aggregation = self._query.aggregation
        names = [(cohort.id, column) for cohort, column in holders]
        if all(segment.level == RAW for segment, _ in parts):
            ((_, places),) = parts
            times, values = points([places[name] for name in names])
            return _Series(times, [values], 0, rolled=False)
        starts, fields, resolution = [], [], 0
        needed = NEEDED[aggregation]
        stored = {field: at for at, field in enumerate(sorted(needed))}
        for segment, places in parts:
            if segment.level == RAW:
                times, values = points([places[name] for name in names])
                found = of_points(times, values, aggregation)
            else:
                held = [(places[name][0], [places[name][1] + stored[field] for field in needed]) for name in names]
                times, found = bucket_points(held)
            if len(times):
                starts.append(times)
                fields.append(found)
                resolution = max(resolution, TIERS[segment.level].width_ms)
        if not starts:
            return _Series(np.empty(0, np.int64), [np.empty(0)], 0, rolled=False)
        joined = [np.concatenate(arrays) for arrays in zip(*fields, strict=True)]
        return _Series(np.concatenate(starts), joined, resolution, rolled=True)

    def _result(
        self, server_id: str, metric: Metric, key: str, series: "_Series", start_ms: int
    ) -> SeriesResult | None:
        query, times, values = self._query, series.times_ms, series.fields[0]
        if len(times) and series.rolled:
            times, values = bucket_windows(times, series.fields, start_ms, query.step_ms, query.aggregation)
        elif len(times) and query.step_ms:
            times, values = self._windows.of(times, values)
        if not len(times):
            return None
        return self._checked(server_id, metric, key, times, values, series.resolution_ms)

    def _checked(
        self,
        server_id: str,
        metric: Metric,
        key: str,
        times: NDArray[np.int64],
        values: NDArray[np.float64],
        resolution_ms: int,
    ) -> SeriesResult:
        self._returned += len(times)
        if self._returned > self._store.settings.max_points:
            limit = self._store.settings.max_points
            raise ResourceExhausted(f"the answer has more than max_points = {limit} points", reason="MAX_POINTS")
        return SeriesResult(
            server_id=server_id,
            metric_key=key,
            unit=metric.unit,
            kind=metric.kind,
            times_ms=times,
            values=values,
            resolution_ms=resolution_ms,
        )


_Made = tuple[str, str, NDArray[np.int64], NDArray[np.float64]]
"""A server, a key, times and values."""

_Places = dict[tuple[int, int], tuple[Frame, int]]
"""For (cohort id, column) the frame and the place in it, in roll-ups of the first needed field."""


class _Wanted(NamedTuple):
    """Some series of a server, and where their rows are, by cohort."""

    server_id: str
    columns: Columns
    keys: list[str]
    found: dict[int, Sources]


class _Series(NamedTuple):
    """What was read of a series: values at times, or, `rolled`, the needed fields of buckets at their starts."""

    times_ms: NDArray[np.int64]
    fields: list[NDArray[np.float64]]
    resolution_ms: int
    rolled: bool
