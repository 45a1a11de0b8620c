"""Rows as they were appended, out of blocks and heads, with the sequences at which they came.

For who ships history again from the beginning: what must stay true is that rows come in the order of their times, since
some stores take no others, and those of one time whole and in the order of their sequences, so that whoever takes them
one after the other ends where the engine is. A row of which each value was written anew is no longer in a block.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleet.model import MetricSet
from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.scan import Sources, all_sources, frames
from services.timeseries.engine.store import Store

CELLS_AT_ONCE: Final = 8_000_000
"""Cells read at once, 64 MB, if they are not in one block."""


class StoredRows(NamedTuple):
    """Rows of one set on one server: times_ms and sequences (int64, n), values (float64, n x m, NaN where absent)."""

    metric_set: MetricSet
    times_ms: NDArray[np.int64]
    sequences: NDArray[np.int64]
    values: NDArray[np.float64]


def stored_rows(
    store: Store, server_id: str, start_ms: int, end_ms: int, check: Callable[[], None]
) -> Iterator[StoredRows]:
    """The rows of a server in `[start, end)`, by time and sequence; `check` is called between blocks, to stop."""
    with store.lock:
        cohorts = list(store.catalog.cohorts_of.get(server_id, ()))
    yield from _stored_rows(store, cohorts, start_ms, end_ms, 1 << 62, check)


def _stored_rows(
    store: Store, cohorts: list[Cohort], start_ms: int, end_ms: int, cells_before: int, check: Callable[[], None]
) -> Iterator[StoredRows]:
    """Cuts the range until its rows fit, or do not get fewer."""
    found = [one for one in all_sources(store, cohorts, start_ms, end_ms) if one.rows]
    cells = sum(one.rows * one.columns for one in found)
    if CELLS_AT_ONCE < cells < cells_before and end_ms - start_ms > 1:
        middle = (start_ms + end_ms) // 2
        yield from _stored_rows(store, cohorts, start_ms, middle, cells, check)
        yield from _stored_rows(store, cohorts, middle, end_ms, cells, check)
    elif found:
        yield from _in_order(store, found, check)


def _in_order(store: Store, found: list[Sources], check: Callable[[], None]) -> Iterator[StoredRows]:
    """Each cohort's rows are in order already; those of several are put into one another."""
    read = [
        _once(source.cohort.stored_set.metric_set, one.times_ms, one.sequences, np.column_stack(one.columns))
        for source, one in zip(
            found, frames(store, [(source, range(source.columns)) for source in found], check), strict=True
        )
    ]
    if len(read) == 1:
        yield read[0]
        return
    owner = np.repeat(np.arange(len(read)), [len(one.times_ms) for one in read])
    times, sequences = (np.concatenate([one[column] for one in read]) for column in (1, 2))
    at = [0] * len(read)
    for place, run in groupby(owner[np.lexsort((sequences, times))].tolist()):
        one, start = read[place], at[place]
        at[place] = end = start + sum(1 for _ in run)
        yield StoredRows(one.metric_set, one.times_ms[start:end], one.sequences[start:end], one.values[start:end])


def _once(
    metric_set: MetricSet, times: NDArray[np.int64], sequences: NDArray[np.int64], values: NDArray[np.float64]
) -> StoredRows:
    """Rows without those that were found in a head and in the block that it was just becoming."""
    again = np.flatnonzero((times[1:] == times[:-1]) & (sequences[1:] == sequences[:-1])) + 1
    again = again[[values[place].tobytes() == values[place - 1].tobytes() for place in again.tolist()]]
    if len(again):
        times, sequences = np.delete(times, again), np.delete(sequences, again)
        values = np.delete(values, again, axis=0)
    return StoredRows(metric_set, times, sequences, values)
