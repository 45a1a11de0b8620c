"""The journal read in order: acknowledged batches from a sequence on, then those to come.

What must stay true: a reader owns no queue: it reads from the journal when it has handed out what it had, so a slow
one costs nothing and a fast one is woken by the next commit; what was swept before it was read is said, never skipped
silently.
"""

import threading
from collections import deque
from dataclasses import dataclass

import apsw

from fleet.model import MetricSet, Rows, ServerDescriptor
from services.timeseries.engine.backlog import Backlog
from services.timeseries.engine.database import storage_error
from services.timeseries.engine.journal_reader import JournalReader, JournalRow
from services.timeseries.engine.store import Store
from services.timeseries.engine.told import Told


@dataclass(frozen=True, slots=True, kw_only=True)
class TailBatch:
    """One journaled batch.

    Attributes:
        sequence: its place in the journal.
        received_ms: when it was journaled, UTC epoch milliseconds.
        rows: its rows; None when it only carries descriptors, or is damaged (counted in the status).
        metric_set: the set of the rows.
        descriptors: what servers said with it and with those missed before it; with the first batch of a tail also
            what was valid before.
        missed: how many sequences before this one were wanted and are swept.
    """

    sequence: int
    received_ms: int
    rows: Rows | None
    metric_set: MetricSet | None
    descriptors: tuple[ServerDescriptor, ...]
    missed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowerStatus:
    """A follower and what it has not shipped; `oldest_ms` is when the oldest of that was received. Only `batches` is of
    the journal alone."""

    name: str
    cursor: int
    batches: int
    points: int
    oldest_ms: int | None


class TailSource:
    """Reads for all tails, in worker threads, one at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._reader = JournalReader(store.journal_path)
        self._backlogs: dict[str, Backlog] = {}

    def read(self, wanted: int, bytes_limit: int, *, first: bool) -> list[TailBatch]:
        """The acknowledged batches from `wanted` on, a run bounded in bytes; empty when there is none yet."""
        through = self._store.last_sequence
        try:
            with self._lock:
                rows = self._reader.read(wanted, through, bytes_limit)
                if not rows:
                    return []
                told = self._reader.descriptors(rows[0].sequence if first else wanted, rows[-1].sequence)
                before = self._reader.descriptors_at(rows[0].sequence) if first else []
        except apsw.Error as error:
            raise storage_error(error) from error
        batches, said = [], before
        waiting = deque(told)
        for row in rows:
            while waiting and waiting[0][0] <= row.sequence:  # also what was said with batches that are missed
                said.append(waiting.popleft()[1])
            batches.append(self._batch(row, said, row.sequence - wanted))
            wanted, said = row.sequence + 1, []
        return batches

    def _batch(self, row: JournalRow, descriptors: list[ServerDescriptor], missed: int) -> TailBatch:
        rows, metric_set = None, None
        decoded = self._store.decode(row) if row.row_count else None
        if decoded is not None and row.metric_set is not None:
            cohorts, arrays = decoded
            metric_set = self._store.catalog.sets_by_id[row.metric_set].metric_set
            rows = Rows(
                metric_set_id=metric_set.id,
                server_ids=tuple(cohort.server_id for cohort in cohorts),
                times_ms=arrays.times_ms,
                values=arrays.values,
            )
        return TailBatch(
            sequence=row.sequence,
            received_ms=row.received_ms,
            rows=rows,
            metric_set=metric_set,
            descriptors=tuple(descriptors),
            missed=missed,
        )

    def told(self, server_id: str | None) -> dict[str, Told]:
        """What servers said of themselves in the course of time."""
        try:
            with self._lock:
                return self._reader.told(server_id)
        except apsw.Error as error:
            raise storage_error(error) from error

    def followers(self) -> tuple[FollowerStatus, ...]:
        """How far each follower is."""
        last = self._store.last_sequence  # first: all of it is there at the moment that is looked at
        try:
            with self._lock, self._reader.at_one_moment():
                cursors = self._reader.followers()
                self._backlogs = {name: self._backlogs.get(name) or Backlog(name) for name in sorted(cursors)}
                return tuple(
                    FollowerStatus(
                        name=name,
                        cursor=cursors[name],
                        **backlog.behind(self._reader, cursors[name], last)._asdict(),
                    )
                    for name, backlog in self._backlogs.items()
                )
        except apsw.Error as error:
            raise storage_error(error) from error

    def close(self) -> None:
        with self._lock:
            self._reader.close()
