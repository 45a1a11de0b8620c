"""The newest point of each series, found from the newest day backwards.

What must stay true: the answer is what a query of everything would end with: the latest time, of equal times the
highest sequence; a partition's days are final only when their heads and its blocks were both looked at, heads first.
Nothing is made for a single series: the points of a server are arrays, and servers of equal sets share their list of
metrics, so that 20 x 511 points take 1.6 ms from heads (from blocks 120, most of it decompression).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleet.model import Metric
from runtime.errors import ResourceExhausted
from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.head import Chunk
from services.timeseries.engine.scan import Part, Sources, block_infos, read_blocks
from services.timeseries.engine.settings import DAY_MS, MAX_TIME_MS, MIN_TIME_MS
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import RAW

_LAST_DAY = MAX_TIME_MS // DAY_MS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Names:
    """Metrics in order of their keys; one object for all servers that have the same."""

    keys: tuple[str, ...]
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LastValues:
    """The newest points of one server, as many as names; a value of NaN (at time -1) where there is none."""

    server_id: str
    names: Names
    times_ms: NDArray[np.int64]
    values: NDArray[np.float64]


class _Held(NamedTuple):
    """Column `columns[i]` of a cohort is the metric in place `at[i]` of its server's names."""

    cohort: Cohort
    columns: NDArray[np.intp]
    at: NDArray[np.intp]


class _Server(NamedTuple):
    server_id: str
    names: Names
    held: tuple[_Held, ...]


def last_values(
    store: Store, server_ids: tuple[str, ...] | None, metrics: tuple[str, ...] | None, check: Callable[[], None]
) -> list[LastValues]:
    """The newest points, in order of server id; at most `last_lookback_days` behind a server's newest row.

    Raises:
        ResourceExhausted: MAX_SERIES.
    """
    found = []
    for server in _servers(store, server_ids, metrics):
        newest = _of_server(store, server, check)
        if (newest.times >= 0).any():
            found.append(
                LastValues(server_id=server.server_id, names=server.names, times_ms=newest.times, values=newest.values)
            )
    return found


def _servers(store: Store, server_ids: tuple[str, ...] | None, metrics: tuple[str, ...] | None) -> list[_Server]:
    """Which series of which cohorts are meant."""
    limit = store.settings.max_series
    with store.lock:
        catalog = store.catalog
        wanted = None if metrics is None else catalog.match(metrics)
        chosen = sorted(catalog.cohorts_of if server_ids is None else set(server_ids))
        cohorts_of = {server_id: tuple(catalog.cohorts_of.get(server_id, ())) for server_id in chosen}
    made: dict[tuple[int, ...], tuple[Names, list[tuple[NDArray[np.intp], NDArray[np.intp]]]]] = {}
    found, series = [], 0
    for server_id, cohorts in cohorts_of.items():
        kind = tuple(cohort.stored_set.id for cohort in cohorts)
        names, columns = made.get(kind) or made.setdefault(kind, _names(cohorts, wanted))
        series += len(names.keys)
        if series > limit:
            raise ResourceExhausted(f"more than max_series = {limit} series", reason="MAX_SERIES")
        if names.keys:
            held = (_Held(cohort, *places) for cohort, places in zip(cohorts, columns, strict=True) if len(places[0]))
            found.append(_Server(server_id, names, tuple(held)))
    return found


def _names(
    cohorts: Sequence[Cohort], wanted: set[str] | None
) -> tuple[Names, list[tuple[NDArray[np.intp], NDArray[np.intp]]]]:
    """The wanted metrics of sets together, and for each set the columns that hold them and their places."""
    metric_of: dict[str, Metric] = {}
    for cohort in cohorts:
        metric_set = cohort.stored_set.metric_set
        metric_of.update(zip(metric_set.keys, metric_set.metrics, strict=True))
    keys = tuple(sorted(metric_of if wanted is None else wanted & metric_of.keys()))
    columns = []
    for cohort in cohorts:
        column_of = cohort.stored_set.columns
        at = [place for place, key in enumerate(keys) if key in column_of]
        columns.append((np.array([column_of[keys[place]] for place in at], np.intp), np.array(at, np.intp)))
    return Names(keys=keys, metrics=tuple(metric_of[key] for key in keys)), columns


class _Newest:
    """The newest known points of one server; a time of -1 says none."""

    def __init__(self, count: int) -> None:
        self.times: NDArray[np.int64] = np.full(count, -1, np.int64)
        self.sequences: NDArray[np.int64] = np.zeros(count, np.int64)
        self.values: NDArray[np.float64] = np.full(count, np.nan)

    def offer_chunk(self, chunk: Chunk, columns: NDArray[np.intp], at: NDArray[np.intp]) -> None:
        """Takes what is newer of a head's rows, which are ordered by sequence; column `columns[i]` belongs to place
        `at[i]`."""
        row = len(chunk.times_ms) - 1 - int(chunk.times_ms[::-1].argmax())  # of the latest times the highest sequence
        missing = self._take_row(int(chunk.times_ms[row]), int(chunk.sequences[row]), chunk.values[row][columns], at)
        if len(missing):
            order = np.lexsort((chunk.sequences, chunk.times_ms))
            rows = chunk.values[:, columns[missing]][order]
            self._take(chunk.times_ms[order], chunk.sequences[order], rows, at[missing])

    def offer_block(self, part: Part, at: NDArray[np.intp]) -> None:
        """Takes what is newer of a block's rows, which are sorted; column i belongs to place `at[i]`."""
        times, sequences = part.times_ms, part.sequences()
        row = np.array([column[-1] for column in part.columns])
        missing = self._take_row(int(times[-1]), int(sequences[-1]), row, at)
        if len(missing):
            rows = np.column_stack([part.columns[place] for place in missing.tolist()])
            self._take(times, sequences, rows, at[missing])

    def _take_row(self, time: int, sequence: int, row: NDArray[np.float64], at: NDArray[np.intp]) -> NDArray[np.intp]:
        """Takes what is newer of one row. Returns where it has no value although an older row's might be newer."""
        times = self.times[at]
        present = row == row  # noqa: PLR0124  false where NaN
        newer = present & ((times < time) | ((times == time) & (self.sequences[at] < sequence)))
        better = at[newer]
        self.times[better], self.sequences[better], self.values[better] = time, sequence, row[newer]
        missing: NDArray[np.intp] = (~present & (times <= time)).nonzero()[0]
        return missing

    def _take(
        self,
        times: NDArray[np.int64],
        sequences: NDArray[np.int64],
        values: NDArray[np.float64],
        at: NDArray[np.intp],
    ) -> None:
        """Takes what is newer of sorted rows (rows x places)."""
        present = ~np.isnan(values)
        rows = len(times) - 1 - np.argmax(present[::-1], axis=0)
        newer = (self.times[at] < times[rows]) | (
            (self.times[at] == times[rows]) & (self.sequences[at] < sequences[rows])
        )
        better = np.flatnonzero(present.any(axis=0) & newer)
        self.times[at[better]] = times[rows[better]]
        self.sequences[at[better]] = sequences[rows[better]]
        self.values[at[better]] = values[rows[better], better]


def _of_server(store: Store, server: _Server, check: Callable[[], None]) -> _Newest:
    newest = _Newest(len(server.names.keys))
    with store.lock:
        heads = [store.heads.snapshot(held.cohort, 0, _LAST_DAY) for held in server.held]
    by_file = [_by_partition(store, chunks) for chunks in heads]
    starts = set(store.partitions.days(0, _LAST_DAY)).union(*by_file)
    oldest = 0
    for start in sorted(starts, reverse=True):
        if start + store.partitions.span_of(start) <= oldest or newest.times.min() >= 0:
            break
        for held, of_head in zip(server.held, by_file, strict=True):
            for chunk in reversed(of_head.get(start, [])):
                newest.offer_chunk(chunk, held.columns, held.at)
            _offer_blocks(store, newest, held, start, check)
        if not oldest and newest.times.max() >= 0:
            oldest = int(newest.times.max()) // DAY_MS - store.settings.last_lookback_days
    return newest


def _by_partition(store: Store, by_day: dict[int, list[Chunk]]) -> dict[int, list[Chunk]]:
    """The chunks of heads under the first days of the partitions that they belong to, older sequences first."""
    found: dict[int, list[Chunk]] = {}
    for day, chunks in by_day.items():
        found.setdefault(store.partitions.start_of(day), []).extend(chunks)
    return found


def _offer_blocks(store: Store, newest: _Newest, held: _Held, day: int, check: Callable[[], None]) -> None:
    partitions = store.partitions
    infos = block_infos(store, partitions, day, held.cohort, MIN_TIME_MS, MAX_TIME_MS + 1)
    place = Sources(
        cohort=held.cohort,
        level=RAW,
        partitions=partitions,
        columns=len(held.cohort.stored_set.metric_set),
        start_ms=MIN_TIME_MS,
        end_ms=MAX_TIME_MS + 1,
        chunks=[],
        blocks=[],
    )
    for info in sorted(infos, key=lambda info: info.last_ms, reverse=True):
        chosen = (newest.times[held.at] <= info.last_ms).nonzero()[0]
        if not len(chosen):
            return
        ascending = chosen[held.columns[chosen].argsort()]
        metrics = held.columns[ascending].tolist()
        for part in read_blocks(store, day, [info], place, metrics, check):
            newest.offer_block(part, held.at[ascending])
