"""Group commit: one thread takes every waiting batch into one transaction, syncs, applies, and then acknowledges.

What must stay true: the order commit, apply, acknowledge; a batch that cannot be taken fails alone; a commit that
fails fails every batch in it and leaves nothing behind, and the next one is tried as if nothing had been; the thread
never ends by an error.
"""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import apsw
import numpy as np

from fleet.model import MetricSet, Rows, ServerDescriptor
from runtime.errors import Internal, InvalidArgument, OpenManagerError, Unavailable
from services.timeseries.engine import batch as batch_codec
from services.timeseries.engine.catalog import Additions
from services.timeseries.engine.database import storage_error
from services.timeseries.engine.journal_reader import JournalRow
from services.timeseries.engine.roster import Roster, Rosters
from services.timeseries.engine.settings import MAX_TIME_MS, MIN_TIME_MS
from services.timeseries.engine.store import Store

_log = logging.getLogger(__name__)
_ROW_OVERHEAD_BYTES = 64


def _promise() -> "asyncio.Future[int]":
    return asyncio.get_running_loop().create_future()


@dataclass(frozen=True, kw_only=True, eq=False)
class Append:
    """A batch that waits to be committed, made in an event loop; `done` gets its sequence or the reason why not.

    `rows` is None when only sets and servers are told. `endings`: how many partitions had gone when the rows were
    found to be in time; None: nobody looked.
    """

    rows: Rows | None
    metric_sets: Sequence[MetricSet]
    servers: Sequence[ServerDescriptor]
    endings: int | None = None
    done: "asyncio.Future[int]" = field(default_factory=_promise)

    @cached_property
    def bytes(self) -> int:
        """What it counts for while it waits."""
        described = sum(len(metric_set) for metric_set in self.metric_sets) + len(self.servers)
        if self.rows is None:
            return _ROW_OVERHEAD_BYTES * (1 + described)
        return self.rows.values.nbytes + _ROW_OVERHEAD_BYTES * (1 + len(self.rows.server_ids) + described)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Job:
    run: Callable[[], Any]
    done: "Future[Any]"


class _Staged(NamedTuple):
    append: Append
    row: JournalRow
    roster: Roster | None


def check_rows(rows: Rows) -> None:
    """Refuses rows that no column of the engine can hold; raises InvalidArgument."""
    n = len(rows.server_ids)
    if rows.times_ms.shape != (n,) or rows.values.ndim != 2 or len(rows.values) != n:
        shapes = f"{n} servers, {rows.times_ms.shape} times, {rows.values.shape} values"
        raise InvalidArgument(f"rows do not fit together: {shapes}", field="values")
    if rows.times_ms.dtype != np.int64 or rows.values.dtype != np.float64:
        raise InvalidArgument("times must be int64 and values float64", field="values")
    if n and not (rows.span_ms[0] >= MIN_TIME_MS and rows.span_ms[1] <= MAX_TIME_MS):
        raise InvalidArgument("a row's time is before 1970 or after 2262-04-11", field="rows.time")
    if "" in rows.server_ids:
        raise InvalidArgument("a row has no server id", field="rows.server_id")


class Writer:
    """The thread that owns the journal's connection."""

    def __init__(self, store: Store, on_progress: Callable[[bool], None]) -> None:
        """`on_progress` is called in the writer's thread after each group, stored or refused; its argument: heads
        want closing."""
        self._store = store
        self._on_progress = on_progress
        self._broken = False
        self.refusing = ""
        """Why the last batches were not stored, for the status; empty when they were."""
        self._full = False
        self._taken_bytes = 0
        self.waiting_bytes = 0
        self._rosters = Rosters()
        self._aged = (0, MIN_TIME_MS)  # of so many endings; rows before this instant may be of a day that went
        self._wake = threading.Condition()
        self._appends: deque[Append] = deque()
        self._jobs: deque[_Job] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="timeseries-journal", daemon=True)
        self._thread.start()

    @property
    def is_broken(self) -> bool:
        """Whether only a restart, which replays the journal, makes it work again."""
        return self._broken

    def submit(self, append: Append) -> None:
        """Puts a batch in line; the caller keeps the bound."""
        with self._wake:
            if self._stopping:
                raise Unavailable("the engine is closing", reason="CLOSING")
            self._appends.append(append)
            self.waiting_bytes += append.bytes
            self._wake.notify()

    def call(self, run: Callable[[], Any]) -> "Future[Any]":
        """Runs something with the journal in the writer's thread, between two commits."""
        job = _Job(run=run, done=Future())
        with self._wake:
            if self._stopping:
                raise Unavailable("the engine is closing", reason="CLOSING")
            self._jobs.append(job)
            self._wake.notify()
        return job.done

    def stop(self) -> None:
        """Commits what waits and ends the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._appends or self._jobs or self._stopping):
                    self._wake.wait()
                appends, self._appends = list(self._appends), deque()
                jobs, self._jobs = list(self._jobs), deque()
                if not appends and not jobs:
                    return
            if appends:
                self._taken_bytes = sum(append.bytes for append in appends)
                self._guarded(partial(self._commit, appends), partial(_answer_all, appends))
                self._on_progress(self._full)
            for job in jobs:
                self._guarded(partial(self._do, job), partial(_fail, job.done))

    def _do(self, job: _Job) -> None:
        if self._broken:
            raise Unavailable("rows could not be applied; restart to replay them", reason="RESTART_NEEDED")
        _settle(job.done, job.run())

    def _guarded(self, run: Callable[[], None], fail: Callable[[OpenManagerError], None]) -> None:
        """Runs a step and hands whatever it raises to those who wait, so that the thread lives on."""
        error: OpenManagerError
        try:
            run()
        except OpenManagerError as refused:
            error = refused
        except apsw.Error as failed:
            error = storage_error(failed)
            if self._taken_bytes:  # it was batches, and no job between two commits
                self.refusing = error.message
            self._store.faults.note(f"the journal failed: {failed}")
            _log.warning("the journal failed: %s", failed)
        except Exception as fault:
            error = Internal(f"the journal's writer failed: {fault!r}")
            self._store.faults.note(error.message)
            _log.exception("the journal's writer failed")
        else:
            return
        self._release()
        fail(error)

    def _release(self) -> None:
        """Makes room for others: before the answers, so that whoever has one finds the room."""
        with self._wake:
            self.waiting_bytes -= self._taken_bytes
            self._taken_bytes = 0

    def _commit(self, appends: list[Append]) -> None:
        self._full = False
        if self._broken:
            raise Unavailable("rows could not be applied; restart to replay them", reason="RESTART_NEEDED")
        additions = Additions(self._store.catalog)
        received_ms = self._store.clock.now_ms()
        staged: list[_Staged] = []
        for append in appends:
            try:
                staged.append(self._stage(append, self._store.last_sequence + len(staged) + 1, received_ms, additions))
            except OpenManagerError as refused:
                _answer([(append, refused)])
            except UnicodeEncodeError as bad:
                _answer([(append, InvalidArgument(f"a name is not Unicode text: {bad}", field="name"))])
        if staged:
            self._store.journal.commit(additions, [row for _, row, _ in staged])
            self._broken = True  # what is durable and not applied must neither be answered nor swept, only replayed
            self._full = self._apply(additions, staged)
            self._broken, self.refusing = False, ""
        self._release()
        _answer([(append, row.sequence) for append, row, _ in staged])

    def _stage(self, append: Append, sequence: int, received_ms: int, additions: Additions) -> _Staged:
        if append.endings not in (None, self._store.endings) and self._may_be_gone(append.rows):
            raise Unavailable("days went while the batch was checked: send it again", reason="EVICTED_MEANWHILE")
        for metric_set in append.metric_sets:
            additions.add_set(metric_set)
        rows, roster, set_id, payload, points = append.rows, None, None, b"", 0
        if rows is not None and rows.server_ids:
            stored = additions.stored_set(rows.metric_set_id)
            if rows.values.shape[1] != len(stored.metric_set):
                given = f"{rows.values.shape[1]} values a row for {len(stored.metric_set)} metrics"
                raise InvalidArgument(given, field="values")
            roster = self._rosters.of(rows.server_ids, stored, additions)
            payload = batch_codec.encode(batch_codec.Batch(roster.servers, rows.times_ms, rows.values))
            set_id, points = stored.id, rows.points
        for descriptor in append.servers:
            additions.describe(sequence, descriptor)
        row = JournalRow(
            sequence=sequence,
            received_ms=received_ms,
            metric_set=set_id,
            row_count=len(roster.cohorts) if roster is not None else 0,
            points=points,
            payload=payload,
        )
        return _Staged(append, row, roster)

    def _may_be_gone(self, rows: Rows | None) -> bool:
        """Whether some rows are of a day whose points or roll-ups went, or of one before it."""
        store = self._store
        if self._aged[0] != store.endings:
            self._aged = store.endings, store.ended_ms
        return rows is not None and bool(rows.server_ids) and rows.span_ms[0] < self._aged[1]

    def _apply(self, additions: Additions, staged: list[_Staged]) -> bool:
        full, heads, now = False, self._store.heads, self._store.clock.monotonic()
        with self._store.lock:
            additions.publish()
            for append, row, roster in staged:
                if append.rows is not None and roster is not None:
                    full |= heads.apply(
                        roster.cohorts,
                        append.rows.times_ms,
                        append.rows.values,
                        row.sequence,
                        now,
                        points=row.points,
                        distinct=roster.distinct,
                    )
            self._store.last_sequence = staged[-1].row.sequence
            pressed = heads.bytes > self._store.settings.head_bytes_limit // 2
        return full or pressed


def _answer(answers: Sequence[tuple[Append, int | OpenManagerError]]) -> None:
    """Hands answers to the event loop that waits for them: together, for each time it is woken costs 10 us."""
    if answers:
        with contextlib.suppress(RuntimeError):  # the loop is closed, nobody waits
            answers[0][0].done.get_loop().call_soon_threadsafe(_give, answers)


def _answer_all(appends: Sequence[Append], error: OpenManagerError) -> None:
    _answer([(append, error) for append in appends])


def _give(answers: Sequence[tuple[Append, int | OpenManagerError]]) -> None:
    """In the event loop; who has an answer already, or has gone, gets none."""
    for append, answer in answers:
        if append.done.done():
            continue
        if isinstance(answer, OpenManagerError):
            append.done.set_exception(answer)
        else:
            append.done.set_result(answer)


def _settle(future: "Future[Any]", value: object) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(value)


def _fail(future: "Future[Any]", error: OpenManagerError) -> None:
    if not future.done() and future.set_running_or_notify_cancel():
        future.set_exception(error)
