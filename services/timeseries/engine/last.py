"""The newest point of each series, found from the newest day backwards.

What must stay true: the answer is what a query of everything would end with: the latest time, of equal times the
highest sequence; a day is final only when its heads and its blocks were both looked at, heads first.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleet.model import MetricKind
from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.query import Columns, Selection
from services.timeseries.engine.scan import Sources, block_infos, read_blocks
from services.timeseries.engine.settings import DAY_MS, MAX_TIME_MS
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import RAW


@dataclass(frozen=True, slots=True, kw_only=True)
class LastValue:
    """The newest point of a series."""

    server_id: str
    metric_key: str
    unit: str
    kind: MetricKind
    time_ms: int
    value: float


class _Newest:
    """The newest known point of some columns of one cohort; a time of -1 says none."""

    def __init__(self, cohort: Cohort, metrics: list[int]) -> None:
        self.cohort = cohort
        self.metrics = metrics
        self.times: NDArray[np.int64] = np.full(len(metrics), -1, np.int64)
        self.sequences: NDArray[np.int64] = np.zeros(len(metrics), np.int64)
        self.values: NDArray[np.float64] = np.full(len(metrics), np.nan)

    def offer(
        self, times: NDArray[np.int64], sequences: NDArray[np.int64], values: NDArray[np.float64], at: NDArray[np.intp]
    ) -> None:
        """Takes what is newer of rows; column i of `values` (rows x columns) is the metric in place `at[i]`."""
        order = np.lexsort((sequences, times))
        self._take(times[order[-1:]], sequences[order[-1:]], values[order[-1]][None, :], at)
        missing = np.flatnonzero(np.isnan(values[order[-1]]) & (self.times[at] <= times[order[-1]]))
        if len(missing):
            self._take(times[order], sequences[order], values[:, missing][order], at[missing])

    def _take(
        self, times: NDArray[np.int64], sequences: NDArray[np.int64], values: NDArray[np.float64], at: NDArray[np.intp]
    ) -> None:
        present = ~np.isnan(values)
        rows = len(times) - 1 - np.argmax(present[::-1], axis=0)
        newer = (self.times[at] < times[rows]) | (
            (self.times[at] == times[rows]) & (self.sequences[at] < sequences[rows])
        )
        better = np.flatnonzero(present.any(axis=0) & newer)
        self.times[at[better]] = times[rows[better]]
        self.sequences[at[better]] = sequences[rows[better]]
        self.values[at[better]] = values[rows[better], better]


def last_values(
    store: Store, server_ids: tuple[str, ...] | None, metrics: tuple[str, ...] | None, check: Callable[[], None]
) -> list[LastValue]:
    """The newest points, in order of server id and metric key; at most `last_lookback_days` behind the newest row."""
    selection = Selection(store, server_ids, metrics)
    found = []
    for server_id, columns in selection.servers:
        newest = _of_server(store, columns, check)
        for key in sorted(columns):
            candidates = [newest[cohort.id, column] for cohort, column in columns[key]]
            time, _, value = max(candidates)
            if time >= 0:
                metric = selection.metrics[key]
                found.append(
                    LastValue(
                        server_id=server_id,
                        metric_key=key,
                        unit=metric.unit,
                        kind=metric.kind,
                        time_ms=time,
                        value=value,
                    )
                )
    return found


def _of_server(
    store: Store, columns: Columns, check: Callable[[], None]
) -> dict[tuple[int, int], tuple[int, int, float]]:
    """For (cohort id, column) the newest (time, sequence, value)."""
    wanted: dict[int, tuple[Cohort, set[int]]] = {}
    for holders in columns.values():
        for cohort, column in holders:
            wanted.setdefault(cohort.id, (cohort, set()))[1].add(column)
    states = [_Newest(cohort, sorted(metrics)) for cohort, metrics in wanted.values()]
    with store.lock:
        heads = [store.heads.snapshot(state.cohort, 0, MAX_TIME_MS // DAY_MS) for state in states]
    days = set(store.partitions.days(0, MAX_TIME_MS // DAY_MS)).union(*heads)
    oldest = 0
    for day in sorted(days, reverse=True):
        if day < oldest or all((state.times >= 0).all() for state in states):
            break
        for state, by_day in zip(states, heads, strict=True):
            for chunk in reversed(by_day.get(day, [])):
                everything = np.arange(len(state.metrics))
                state.offer(chunk.times_ms, chunk.sequences, chunk.values[:, state.metrics], everything)
            _offer_blocks(store, state, day, check)
        if not oldest and any((state.times >= 0).any() for state in states):
            oldest = day - store.settings.last_lookback_days
    return {
        (state.cohort.id, metric): (int(state.times[at]), int(state.sequences[at]), float(state.values[at]))
        for state in states
        for at, metric in enumerate(state.metrics)
    }


def _offer_blocks(store: Store, state: _Newest, day: int, check: Callable[[], None]) -> None:
    start, end = day * DAY_MS, (day + 1) * DAY_MS
    partitions = store.partitions
    infos = block_infos(store, partitions, day, state.cohort, start, end)
    columns = len(state.cohort.stored_set.metric_set)
    place = Sources(
        cohort=state.cohort,
        level=RAW,
        partitions=partitions,
        columns=columns,
        start_ms=start,
        end_ms=end,
        chunks=[],
        blocks=[],
    )
    for info in sorted(infos, key=lambda info: info.last_ms, reverse=True):
        at = np.flatnonzero(state.times <= info.last_ms)
        if not len(at):
            return
        metrics = [state.metrics[place_of] for place_of in at.tolist()]
        for times, sequences, values in read_blocks(store, day, [info], place, metrics, check):
            state.offer(times, sequences, np.column_stack(values), at)
