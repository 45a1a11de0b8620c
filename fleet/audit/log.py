"""A writer's audit log: whoever changed something waits until that is on disk; shipping goes on behind.

    log = AuditLog(folder / FILE_NAME, "gateway", clock=clock, limit_bytes=..., ship=send)
    async with log:
        log.check()                     # before the change: is there anything to write it down in?
        await log.append(draft(...))    # after it: one sync, shared with all who wait at that moment
        log.count(draft(...))           # a refused call: waits for nothing

What must stay true: `append` returns after the sync or raises; events are shipped in the order of their numbers, one
batch at a time, and forgotten only after the shipping of all before them was acknowledged; what `count` was told is in
the file within COUNT_INTERVAL_S and can fill only its own share of it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from fleet.audit.event import Draft, Event
from fleet.audit.journal import AuditJournal
from fleet.audit.refusals import MINUTE_US, Refusals
from runtime import tasks
from runtime.clock import Clock
from runtime.errors import FailedPrecondition, OpenManagerError, ResourceExhausted, Unavailable
from runtime.local_file import FileThread
from runtime.tasks import Backoff, run_forever

FILE_NAME: Final = "audit.db"
BATCH_EVENTS: Final = 500
BATCH_BYTES: Final = 4 << 20
"""A message holds 16 MiB; an event has at most some 70 KiB."""
MAX_WAITING_EVENTS: Final = 10_000
"""In memory, for the sync."""
COUNT_INTERVAL_S: Final = 1.0
COUNTED_SHARE: Final = 8
"""Aggregated events may take an eighth of the limit, besides."""
SHIP_BACKOFF: Final = Backoff(initial_s=0.2, max_s=2.0)
CHAIN_BROKEN_REASON: Final = "AUDIT_CHAIN_BROKEN"
"""What the sink says of events that do not follow what it has of their chain."""
UNAVAILABLE_REASON: Final = "AUDIT_UNAVAILABLE"

Ship = Callable[[Sequence[Event]], Awaitable[None]]
"""Takes events in order; returns once all of them are durable elsewhere, or raises OpenManagerError."""

log = logging.getLogger(__name__)


class Lag(NamedTuple):
    """What is not shipped: events, the time of the first of them, and the last fault."""

    events: int
    oldest_us: int | None
    fault: str


class AuditLog:
    """The journal and the way from it, entered for as long as the process runs."""

    def __init__(self, path: Path, name: str, *, clock: Clock, limit_bytes: int, ship: Ship) -> None:
        """Prepares it.

        Args:
            path: of the journal's file; its folder is there.
            name: of the process; a new writer's id begins with it.
            clock: of minutes and pauses.
            limit_bytes: size of the events that wait at which changes are refused.
            ship: where events go.
        """
        self._path = path
        self._name = name
        self._clock = clock
        self._limit_bytes = limit_bytes
        self._ship = ship
        self._thread = FileThread(f"audit-{name}")
        self._journal: AuditJournal
        self._refusals = Refusals()
        self._group: list[tuple[Draft, asyncio.Future[Event]]] = []
        self._arrived, self._wake = asyncio.Event(), asyncio.Event()
        self._fault: OpenManagerError | None = None
        self._ship_fault = ""
        self._shipped_through = 0
        self._batch_events = BATCH_EVENTS
        self._oldest_us: int | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Opens the journal; raises as `AuditJournal` does, and what `FileThread.run` raises."""
        self._journal = await self._thread.run(AuditJournal, self._path, self._name)
        for name, work in (("commit", self._commit_all), ("count", self._count_all), ("ship", self._ship_all)):
            guarded = run_forever(f"audit-{name}", work, SHIP_BACKOFF, clock=self._clock)
            self._tasks.append(tasks.start(f"audit-{name}", guarded))
        self._wake.set()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await tasks.cancel(*self._tasks)
        for _, done in self._group:
            if not done.done():
                done.set_exception(Unavailable("the process is stopping", reason="CLOSING"))
        with contextlib.suppress(OpenManagerError):
            await self._count(before_us=self._clock.now_ms() * 1_000 + MINUTE_US)
        await self._thread.run(self._journal.close)
        self._thread.close()

    @property
    def writer_id(self) -> str:
        """Of the chain; it changes with the file."""
        return self._journal.writer_id

    @property
    def lag(self) -> Lag:
        """How far shipping is behind."""
        events = self._journal.end.seq - self._shipped_through
        return Lag(events, self._oldest_us if events else None, self._ship_fault)

    def check(self) -> None:
        """Whether an event could be kept now, for who is about to change something.

        Raises:
            ResourceExhausted: AUDIT_JOURNAL_FULL, DISK_FULL.
            Unavailable: the disk failed.
        """
        if self._fault is not None:
            raise _refused(self._fault)
        if self._journal.waiting_bytes >= self._limit_bytes:
            raise ResourceExhausted(
                "the journal of audit events is full (AUDIT_JOURNAL_LIMIT): changes are refused until metadata takes"
                " them",
                reason="AUDIT_JOURNAL_FULL",
                retry_after_s=5.0,
            )

    async def append(self, said: Draft) -> Event:
        """Stores an event durably and returns it with its place.

        Raises:
            ResourceExhausted: AUDIT_JOURNAL_FULL, DISK_FULL, TOO_MANY_WAITING; it was not kept.
            Unavailable: CLOSING, or the disk failed; whether it was kept is not known.
        """
        if len(self._group) >= MAX_WAITING_EVENTS:
            raise ResourceExhausted("too many events wait for the disk", reason="TOO_MANY_WAITING", retry_after_s=1.0)
        done: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._group.append((said, done))
        self._arrived.set()
        return await done

    def count(self, said: Draft) -> None:
        """Counts a call that becomes an event together with its like, when the minute is over."""
        self._refusals.add(said)

    async def noted(self, key: str) -> str:
        """What was noted in the file under a name; empty: nothing."""
        return await self._thread.run(self._journal.noted, key)

    async def note(self, key: str, text: str) -> None:
        """Notes something in the file, beside the events."""
        await self._thread.run(self._journal.note, key, text)

    async def _commit_all(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            group, self._group = self._group, []
            answers: Sequence[Event | OpenManagerError]
            try:
                drafts = [said for said, _ in group]
                answers = await self._thread.run(self._journal.append, drafts, self._limit_bytes, self._shipped_through)
                self._fault = None
            except OpenManagerError as error:
                log.exception("%d audit events could not be stored: %s", len(group), error.message)
                self._fault = error
                answers = [error] * len(group)
            except BaseException:
                _answer(group, [Unavailable("the process is stopping", reason="CLOSING")] * len(group))
                raise
            _answer(group, answers)
            self._wake.set()

    async def _count_all(self) -> None:
        while True:
            await self._clock.sleep(COUNT_INTERVAL_S)
            await self._count(before_us=self._clock.now_ms() * 1_000 // MINUTE_US * MINUTE_US)

    async def _count(self, *, before_us: int) -> None:
        """Writes down what was counted, makes events of minutes that are over; tries a disk that failed."""
        taken = self._refusals.take()
        try:
            share = self._limit_bytes // COUNTED_SHARE
            lost = await self._thread.run(self._journal.count, taken, before_us, share, self._shipped_through)
            if self._fault is not None or self._journal.forgotten_through < self._shipped_through:
                await self._thread.run(self._journal.tidy, self._shipped_through)
            self._fault = None
        except OpenManagerError as error:
            self._fault = error
            self._refusals.put_back(taken)
            return
        except BaseException:
            self._refusals.put_back(taken)
            raise
        if lost:
            log.warning("%d refused calls leave no audit event: the journal's share for them is full", lost)
        self._wake.set()

    async def _ship_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while await self._ship_batch():
                    pass
            except OpenManagerError as error:
                self._ship_fault = error.message
                self._wake.set()
                raise
            self._ship_fault, self._oldest_us = "", None

    async def _ship_batch(self) -> bool:
        batch, end = await self._thread.run(
            self._journal.waiting, self._shipped_through, self._batch_events, BATCH_BYTES
        )
        if not batch:
            self._shipped_through, self._batch_events = end, BATCH_EVENTS
            return False
        self._oldest_us = batch[0].time_us
        try:
            await self._ship(batch)
        except FailedPrecondition as error:
            if error.reason != CHAIN_BROKEN_REASON:
                raise
            if len(batch) > 1:  # the first of them may have been taken before: one by one, for they begin no new chain
                self._batch_events = 1
                return True
            log.exception("the audit chain of %s is broken; what waits begins a new one", self.writer_id)
            await self._thread.run(self._journal.begin_anew, self._shipped_through)
            self._shipped_through, self._batch_events = 0, BATCH_EVENTS
            return True
        self._shipped_through = batch[-1].seq
        return True


def _refused(fault: OpenManagerError) -> OpenManagerError:
    message = f"nothing is changed that cannot be recorded: {fault.message}"
    if isinstance(fault, ResourceExhausted):
        return ResourceExhausted(message, reason=fault.reason, retry_after_s=1.0)
    return Unavailable(message, reason=UNAVAILABLE_REASON, retry_after_s=1.0)


def _answer(
    group: Sequence[tuple[Draft, "asyncio.Future[Event]"]], answers: Sequence[Event | OpenManagerError]
) -> None:
    for (_, done), answer in zip(group, answers, strict=True):
        if done.done():  # the caller went away
            continue
        if isinstance(answer, OpenManagerError):
            done.set_exception(answer)
        else:
            done.set_result(answer)
