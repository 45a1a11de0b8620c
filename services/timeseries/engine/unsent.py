"""Rows by their sequence out of blocks: what a follower lacks after the journal had to let it go.

At its limit the journal no longer waits for a follower that is behind (`Store.sweep`). Its rows are in blocks by then,
each with the sequence that it was given, so it goes on from there and then from the journal.

What must stay true: every row of `(after, through]` that no day's end has taken comes, with the descriptor that was
valid at its sequence; rows of one server come in the order of their sequences, and what follows in the journal is
shipped later. Days and servers come one by one, so memory is bounded by a server's rows of a partition.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from fleet.model import MetricSet, Rows, ServerDescriptor
from services.timeseries.engine.journal_reader import JournalReader
from services.timeseries.engine.partition import PartitionGoneError, UnusablePartitionError
from services.timeseries.engine.rows import stored_rows
from services.timeseries.engine.settings import DAY_MS, MAX_TIME_MS
from services.timeseries.engine.store import Store

Place = tuple[int, str]
"""A partition, by its first day, and a server: in this order rows come."""
START: Final[Place] = (0, "")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unsent:
    """Rows of one server and set; `descriptors[i]` is what was valid of the server at row i's sequence."""

    place: Place
    rows: Rows
    metric_set: MetricSet
    descriptors: tuple[ServerDescriptor | None, ...]


def unsent(store: Store, after: int, through: int, begin: Place, check: Callable[[], None]) -> Iterator[Unsent]:
    """The rows with sequences in `(after, through]`, from a place on. `check` is called between blocks and may raise to
    stop."""
    partitions = store.partitions
    for day in partitions.days(begin[0], MAX_TIME_MS // DAY_MS):
        try:
            with partitions.lend(day) as partition:
                cohort_ids = partition.cohorts_between(after, through)
        except (PartitionGoneError, UnusablePartitionError):
            continue  # gone meanwhile, which is counted where it goes; or set aside, which is counted too
        with store.lock:
            named = store.catalog.cohorts_by_id  # but for those that a damaged journal has lost
            server_ids = sorted({named[cohort_id].server_id for cohort_id in cohort_ids if cohort_id in named})
        end_day = day + partitions.span_of(day)
        for server_id in server_ids:
            if (day, server_id) >= begin:
                yield from _of_server(store, (day, server_id), end_day * DAY_MS, (after, through), check)


def _of_server(
    store: Store, place: Place, end_ms: int, between: tuple[int, int], check: Callable[[], None]
) -> Iterator[Unsent]:
    day, server_id = place
    with closing(JournalReader(store.journal_path)) as journal:  # a kept one would hold the log if its reader went away
        told = journal.told(server_id).get(server_id)
    for found in stored_rows(store, server_id, day * DAY_MS, end_ms, check):
        wanted = (found.sequences > between[0]) & (found.sequences <= between[1])
        count = int(wanted.sum())
        if count:
            rows = Rows(
                metric_set_id=found.metric_set.id,
                server_ids=(server_id,) * count,
                times_ms=found.times_ms[wanted],
                values=found.values[wanted],
            )
            descriptors, _ = told.at(found.sequences[wanted]) if told else ((None,) * count, None)
            yield Unsent(place=place, rows=rows, metric_set=found.metric_set, descriptors=descriptors)
