"""Answers range queries and last values: which series, in which groups, within which limits.

What must stay true: the result is in order of server id and metric key; a limit that is reached raises an error that
names it, nothing is cut silently; work stops soon after `cancel` is set. Runs in worker threads.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleet.model import Metric, MetricKind
from runtime.errors import Cancelled, InvalidArgument, ResourceExhausted
from services.timeseries.engine.aggregate import (
    NEEDED,
    Aggregation,
    Windows,
    bucket_windows,
    lookback_ms,
    of_points,
)
from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.rollup import FIELDS
from services.timeseries.engine.scan import Frame, Sources, bucket_points, frame, points, sources
from services.timeseries.engine.settings import DAY_MS, MAX_TIME_MS, MIN_TIME_MS
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import RAW, TIERS, Ranges, Segment, coarsest, plan, unsettled_ranges


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SeriesResult:
    """One series: times_ms (int64, ascending; of the points, or of the windows' starts) and as many values.

    `resolution_ms` is the width of the coarsest roll-ups that it was made of; 0: of points alone.
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
        for server_id, columns in selection.servers:
            cohorts = {cohort.id: cohort for holders in columns.values() for cohort, _ in holders}
            unsettled = self._unsettled(cohorts, level)
            segments = plan((read_from, start_ms, end_ms), level, unsettled)  # no bucket lies across start_ms
            found = self._found(cohorts, segments)
            rows = sum(part.rows for _, of_cohorts in found for part in of_cohorts.values())
            for keys in self._groups(sorted(columns), rows):
                parts = [(segment, self._frames(of_cohorts, columns, keys)) for segment, of_cohorts in found]
                for key in keys:
                    metric = selection.metrics[key]
                    if result := self._result(server_id, metric, key, self._series(parts, columns[key]), start_ms):
                        yield result

    def _unsettled(self, cohorts: dict[int, Cohort], level: int) -> list[Ranges]:
        """For each level the ranges that it has no right buckets for; heads and marks are looked at in one moment."""
        if level == RAW:
            return []
        store = self._store
        with store.lock:
            by_day = [store.heads.snapshot(cohort, 0, MAX_TIME_MS // DAY_MS) for cohort in cohorts.values()]
            chunks = [chunk for days in by_day for of_day in days.values() for chunk in of_day]
            return unsettled_ranges(chunks, store.tiers, cohorts)

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

    def _groups(self, keys: list[str], rows: int) -> list[list[str]]:
        """Cuts the keys so that the columns of a group fit into `scan_cells`."""
        size = max(1, self._store.settings.scan_cells // max(rows, 1))
        return [keys[at : at + size] for at in range(0, len(keys), size)]

    def _frames(
        self, found: dict[int, Sources], columns: Columns, keys: list[str]
    ) -> dict[tuple[int, int], tuple[Frame, int]]:
        """Reads the columns of some keys; for (cohort id, column) gives the frame and the place in it, in roll-ups of
        the first needed field."""
        wanted: dict[int, list[int]] = {}
        for key in keys:
            for cohort, column in columns[key]:
                wanted.setdefault(cohort.id, []).append(column)
        places = {}
        limit = self._store.settings.max_scanned_points
        for number, metrics in wanted.items():
            metrics.sort()
            source = found[number]
            fields = [0] if source.level == RAW else NEEDED[self._query.aggregation]
            read = metrics if source.level == RAW else [m * FIELDS + f for m in metrics for f in sorted(fields)]
            self._scanned += source.rows * len(read)
            if self._scanned > limit:
                raise ResourceExhausted(
                    f"the query reads more than max_scanned_points = {limit} points", reason="MAX_SCANNED_POINTS"
                )
            rows = frame(self._store, source, read, self._check)
            places.update({(number, column): (rows, place * len(fields)) for place, column in enumerate(metrics)})
        return places

    def _series(
        self,
        parts: list[tuple[Segment, dict[tuple[int, int], tuple[Frame, int]]]],
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
            resolution_ms=series.resolution_ms,
        )


class _Series(NamedTuple):
    """What was read of a series: values at times, or, `rolled`, the needed fields of buckets at their starts."""

    times_ms: NDArray[np.int64]
    fields: list[NDArray[np.float64]]
    resolution_ms: int
    rolled: bool
