"""Rows by their sequence out of blocks: what a follower lacks after the journal had to let it go.

At its limit the journal no longer waits for a follower that is behind (`Store.sweep`). Its rows are in blocks by then,
each with the sequence that it was given, so it goes on from there and then from the journal.

What must stay true: every row of `(after, through]` that no day's end has taken comes once, with the descriptor that
was valid at its sequence; of rows of one series and time the newest of them counts, and newer ones that follow in the
journal are shipped later. Days and cohorts come one by one, so memory is bounded by a cohort's rows of a partition.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleet.model import MetricSet, Rows, ServerDescriptor
from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.journal import JournalReader
from services.timeseries.engine.partition import PartitionGoneError, UnusablePartitionError
from services.timeseries.engine.scan import frame, sources
from services.timeseries.engine.settings import DAY_MS, MAX_TIME_MS
from services.timeseries.engine.store import Store


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredRows:
    """Rows of one server and set, by time; `descriptors[i]` is what was valid of the server at row i's sequence."""

    rows: Rows
    metric_set: MetricSet
    descriptors: tuple[ServerDescriptor | None, ...]


def stored(store: Store, after: int, through: int, check: Callable[[], None]) -> Iterator[StoredRows]:
    """The rows with sequences in `(after, through]`. `check` is called between blocks and may raise to stop."""
    partitions = store.partitions
    for day in partitions.days(0, MAX_TIME_MS // DAY_MS):
        try:
            with partitions.lend(day) as partition:
                cohort_ids = partition.cohorts_between(after, through)
        except (PartitionGoneError, UnusablePartitionError):
            continue  # gone meanwhile, which is counted where it goes; or set aside, which is counted too
        days = range(day, day + partitions.span_of(day))
        for cohort_id in cohort_ids:
            with store.lock:
                cohort = store.catalog.cohorts_by_id[cohort_id]
            if found := _of_cohort(store, cohort, days, (after, through), check):
                yield found


def _of_cohort(
    store: Store,
    cohort: Cohort,
    days: range,
    between: tuple[int, int],
    check: Callable[[], None],
) -> StoredRows | None:
    metric_set = cohort.stored_set.metric_set
    found = sources(store, cohort, days.start * DAY_MS, days.stop * DAY_MS)
    read = frame(store, found, range(len(metric_set)), check)
    sequences = read.sequences
    wanted = (sequences > between[0]) & (sequences <= between[1])
    if not wanted.any():
        return None
    times, sequences = read.times_ms[wanted], sequences[wanted]
    values = np.stack([read.column(place)[wanted] for place in range(len(metric_set))], axis=1)
    newest = _newest(times, values)
    times, sequences, values = times[newest], sequences[newest], values[newest]
    with closing(JournalReader(store.journal_path)) as journal:  # 0.2 ms; a connection kept by a reader that went
        told = journal.descriptors_of(store.catalog.servers[cohort.server_id])  # away would keep the log from ending
    since = np.array([sequence for sequence, _ in told], np.int64)
    valid = (since.searchsorted(sequences, side="right") - 1).tolist()
    return StoredRows(
        rows=Rows(
            metric_set_id=metric_set.id,
            server_ids=(cohort.server_id,) * len(times),
            times_ms=times,
            values=values,
        ),
        metric_set=metric_set,
        descriptors=tuple(told[place][1] if place >= 0 else None for place in valid),
    )


def _newest(times: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The last row of each time, which takes from those before it what it has no value for (in `values`)."""
    again = np.append(times[1:] == times[:-1], False)
    for place in np.flatnonzero(again).tolist():
        absent = np.isnan(values[place + 1])
        values[place + 1, absent] = values[place, absent]
    return ~again
