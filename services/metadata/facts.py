"""Append-only facts: kept on our own disk first, then given to PostgreSQL, and again when another one answers.

A fact is acknowledged once it is in the journal (`journal.py`), whether PostgreSQL is there or not; recordings that
come at once share one sync. One task ships what waits, in order, and is the only one that notes what was inserted. What
must stay true:

* a fact is noted as inserted only into the database that the journal names: each batch asks its own connection which
  one it leads to, first, and another one makes everything of the last 24 hours wait again;
* a fact that PostgreSQL refuses does not hold up those behind it, and is kept for a person to see;
* what is not about a fact (no right, a missing table, a full disk) refuses none: all wait.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from runtime import tasks
from runtime.clock import Clock
from runtime.errors import FailedPrecondition, OpenManagerError, ResourceExhausted, Unavailable
from runtime.local_file import FileThread
from runtime.tasks import Backoff, run_forever
from services.metadata import erasing
from services.metadata.driver_errors import ABORTED, DISK_FULL, UNAVAILABLE, describe, is_refusal
from services.metadata.journal import BUNDLE, FILE_NAME, Backlog, Fact, Journal, Waiting
from services.metadata.kinds import KINDS, FactKind
from services.metadata.line import MARK, UNSAID, Position
from services.metadata.store_connection import Database

MAX_UNCOMMITTED_BYTES: Final = 64 << 20
"""Facts in memory that wait for the sync; 2 MB each at most."""
BATCH_FACTS: Final = 500
BATCH_BYTES: Final = 4 << 20
INSERT_TIMEOUT_S: Final = 20.0
"""For sending a batch over a slow line; how long the server may work on it is its statement_timeout."""
SHIP_BACKOFF: Final = Backoff(initial_s=0.2, max_s=2.0)
SWEEP_INTERVAL_S: Final = 60.0
IN_FLIGHT_FACTS: Final = 4 * BATCH_FACTS
"""Of so many a listing asks whether PostgreSQL has them already."""
MAX_NOTED_BETWEEN: Final = IN_FLIGHT_FACTS - BATCH_FACTS
"""More than that noted as inserted between the two questions of a listing, and it cannot tell: it asks again."""
LATE_S: Final = 10.0
"""A fact that waits longer although PostgreSQL answers makes the store degraded."""

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class _Outcome:
    """What PostgreSQL said of a batch so far."""

    inserted: list[int] = field(default_factory=list)
    refused: list[tuple[Waiting, str]] = field(default_factory=list)


class Facts:
    """The journal and the way from it to PostgreSQL, entered for as long as the service runs."""

    def __init__(
        self,
        folder: Path,
        database: Database,
        *,
        clock: Clock,
        limit_bytes: int,
        kinds: Mapping[str, FactKind] = KINDS,
    ) -> None:
        """Prepares it.

        Args:
            folder: the service's own; facts.db is in it.
            database: where facts go.
            clock: of notes and pauses.
            limit_bytes: size of the journal at which facts are refused.
            kinds: how each kind is inserted.
        """
        self._path = folder / FILE_NAME
        self._database = database
        self._clock = clock
        self._limit_bytes = limit_bytes
        self._kinds = kinds
        self._write_thread, self._read_thread = FileThread("facts-write"), FileThread("facts-read")
        self._writer: Journal
        self._reader: Journal
        self._identity: str | None = None
        self._looked = False  # since the start, whether the database is the one that the journal names
        self._group: list[tuple[Fact, asyncio.Future[Fact]]] = []
        self._group_bytes = 0
        self._arrived, self._wake, self._shipped = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._batch_facts = BATCH_FACTS
        self._fault = ""
        self.noted = 0
        """How many facts PostgreSQL was given since the start."""
        self._tasks: list[asyncio.Task[None]] = []
        database.on_return(self._wake.set)

    async def __aenter__(self) -> Self:
        """Opens the journal; raises as `Journal` does, and what `FileThread.run` raises."""
        self._writer = await self._write_thread.run(Journal, self._path)
        self._reader = await self._read_thread.run(Journal, self._path)
        self._identity = await self._write_thread.run(lambda: self._writer.identity)
        position, journal = await self._write_thread.run(lambda: (self._writer.position, self._writer.id))
        self._database.lineage.remember(self._identity, position, journal)
        self._wake.set()
        for name, work in (("commit", self._commit_all), ("ship", self._ship_all), ("sweep", self._sweep_all)):
            guarded = run_forever(f"facts-{name}", work, SHIP_BACKOFF, clock=self._clock)
            self._tasks.append(tasks.start(f"facts-{name}", guarded))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await tasks.cancel(*self._tasks)
        self._answer_group([Unavailable("the service is stopping", reason="CLOSING")] * len(self._group))
        for thread, journal in ((self._read_thread, self._reader), (self._write_thread, self._writer)):
            await thread.run(journal.close)
            thread.close()

    async def record(self, fact: Fact) -> Fact:
        """Stores a fact durably, once; returns what is stored under its id, which may be an earlier one.

        Raises:
            ResourceExhausted: JOURNAL_FULL, DISK_FULL, TOO_MANY_WAITING; nothing was kept.
            Unavailable: STORAGE_FAILED, CLOSING; nothing is known.
        """
        (stored,) = await self.record_all([fact])
        return stored

    async def record_all(self, facts: Sequence[Fact]) -> list[Fact]:
        """Stores facts as `record` does, with one sync, and in the order in which this is called; where it raises,
        some of them may be kept."""
        size = sum(fact.bytes for fact in facts)
        if self._group_bytes + size > MAX_UNCOMMITTED_BYTES:
            raise ResourceExhausted("too many facts wait for the disk", reason="TOO_MANY_WAITING", retry_after_s=1.0)
        loop = asyncio.get_running_loop()
        waiting: list[tuple[Fact, asyncio.Future[Fact]]] = [(fact, loop.create_future()) for fact in facts]
        self._group += waiting
        self._group_bytes += size
        self._arrived.set()
        return await asyncio.gather(*(done for _, done in waiting))

    async def find(self, kind: str, fact_id: str, *, unwritten: bool = False) -> Fact | None:
        """The fact with an id, if the journal has it; `unwritten`: only if PostgreSQL does not."""
        return await self.read(lambda journal: journal.find(kind, fact_id, unwritten=unwritten))

    async def read(self, work: Callable[[Journal], T]) -> T:
        """Has the journal read; all that `work` reads is of one moment."""
        distrusted = not self._is_met

        def read() -> T:
            self._reader.distrusted = distrusted
            with self._reader.snapshot():
                return work(self._reader)

        return await self._read_thread.run(read)

    @property
    def _is_met(self) -> bool:
        """Whether the database is the one that the journal names, as far as is known, so that it has what is noted."""
        return self._identity is None or (self._looked and self._database.identity in {None, self._identity})

    async def erase(self, kinds: Sequence[str], subject: str, instead: Callable[[list[str]], Fact]) -> int:
        """Deletes all facts about a subject for good; what PostgreSQL has of them, `instead` tells it to delete.

        Also of what is just on its way: `instead` comes after it. Returns how many of the first kind it did not have.
        """
        ids = await self._write_thread.run(erasing.erase, self._writer.db, kinds, subject, instead)
        self._wake.set()
        return len(ids)

    async def forget(self, kinds: Sequence[str], before_us: int) -> None:
        """Deletes what PostgreSQL has and what happened before a time, before its 24 hours are over."""
        await self._write_thread.run(erasing.forget, self._writer.db, kinds, before_us)

    async def settled(self, kind: str, within_s: float) -> bool:
        """Waits until PostgreSQL has been given what is recorded of a kind now; False: not in time."""
        waits: int | None = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not self._is_met and self._database.usable:
                    self._shipped.clear()
                    await self._shipped.wait()
                waits = await self.read(lambda journal: journal.last_waiting(kind))
                while waits is not None and self._database.usable:
                    self._shipped.clear()
                    first = await self.read(lambda journal: journal.first_waiting(kind))
                    if first is None or first > waits:
                        return True
                    await self._shipped.wait()
        return waits is None

    async def unwritten(self, kind: str) -> list[Fact]:
        """All of a kind that PostgreSQL does not have, in the order in which they came."""
        return await self.read(lambda journal: journal.unwritten(kind))

    async def last_of_subjects(self, kind: str, number: str) -> list[Fact]:
        """Of each subject the fact of a kind with the highest number under a name in its payload."""
        return await self._read_thread.run(self._reader.last_of_subjects, kind, number)

    async def backlog(self) -> Backlog:
        """What PostgreSQL lacks. Has the shipping look too: the command line may have put facts back."""
        backlog = await self._read_thread.run(self._reader.backlog)
        if backlog.waiting:
            self._wake.set()
        return backlog

    def degraded(self, backlog: Backlog) -> str:
        """Why PostgreSQL does not have all facts although it answers; empty when it does or soon will."""
        late_s = 0.0 if backlog.oldest_us is None else self._clock.now_ms() / 1e3 - backlog.oldest_us / 1e6
        if late_s > LATE_S and self._fault:
            return f"{backlog.waiting} facts wait since {late_s:.0f} s: {self._fault}"
        if backlog.refused:
            facts = "1 fact" if backlog.refused == 1 else f"{backlog.refused} facts"
            return f"PostgreSQL refused {facts}: see `python -m services.metadata dead-letters list`"
        return ""

    async def _commit_all(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            group, self._group, self._group_bytes = self._group, [], 0
            answers: Sequence[Fact | OpenManagerError]
            try:
                answers = await self._write_thread.run(
                    self._writer.append, [fact for fact, _ in group], self._limit_bytes
                )
            except OpenManagerError as error:
                log.warning("%d facts could not be stored: %s", len(group), error.message)
                answers = [error] * len(group)
            except BaseException:
                _answer(group, [Unavailable("the service is stopping", reason="CLOSING")] * len(group))
                raise
            _answer(group, answers)
            self._wake.set()

    def _answer_group(self, answers: Sequence[Fact | OpenManagerError]) -> None:
        group, self._group, self._group_bytes = self._group, [], 0
        _answer(group, answers)

    async def _ship_all(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._database.usable and await self._ship_batch():
                    self._batch_facts = min(2 * self._batch_facts, BATCH_FACTS)
                if self._database.usable:
                    self._fault = ""
        except OpenManagerError as error:
            self._batch_facts = max(1, self._batch_facts // 2)  # a slow line may carry fewer in time
            self._fault = error.message
            self._wake.set()
            raise

    async def _ship_batch(self) -> bool:
        """Gives PostgreSQL what waits first; False when nothing does and the database is the one we know."""
        batch = await self._read_thread.run(self._reader.waiting, self._batch_facts, BATCH_BYTES)
        if not batch and self._looked and self._database.identity in {None, self._identity}:
            return False
        outcome, position = _Outcome(), UNSAID
        try:
            async with self._database.connection(detailed=True) as connection:
                identity = await self._database.identity_of(connection)
                position = self._database.lineage.position
                self._looked = True
                is_known = identity in {None, self._identity}
                for name, run in groupby(batch if is_known else (), key=lambda waiting: waiting.fact.kind):
                    await self._insert(connection, self._kinds.get(name), list(run), outcome)
                if outcome.inserted:  # where it is with them, which a copy of before them is not
                    await connection.execute(MARK, self._database.lineage.journal)
                    await self._database.identity_of(connection)
                    position = self._database.lineage.position
        finally:  # without the connection: a failure of our disk says nothing of the database
            await self._note(outcome, position)
        if identity is None or is_known:
            return bool(batch)
        again = 0
        while self._identity is not None and (part := await self._write_thread.run(self._writer.wait_again, BUNDLE)):
            again += part
        again += await self._write_thread.run(self._writer.begin_identity, identity, position)
        if self._identity is None:
            log.info("facts go to %s", identity)
        else:
            log.warning("facts go to %s, before to %s: %d are sent again", identity, self._identity, again)
        self._identity = identity
        self._shipped.set()
        return True

    async def _insert(
        self, connection: Any, kind: FactKind | None, batch: Sequence[Waiting], outcome: _Outcome
    ) -> None:
        """Inserts facts of one kind; where one is refused, halves are tried until it stands alone."""
        if kind is None:
            reason = f"this version knows no facts of the kind {batch[0].fact.kind}"
            outcome.refused += [(waiting, reason) for waiting in batch]
            return
        payloads = f"[{','.join(waiting.fact.payload for waiting in batch)}]"
        try:
            while kind.some and await connection.fetchval(kind.some, payloads, timeout=INSERT_TIMEOUT_S):
                pass
            await connection.execute(kind.insert, payloads, timeout=INSERT_TIMEOUT_S)
        except Exception as error:
            if isinstance(error, (*UNAVAILABLE, *ABORTED)) and not isinstance(error, DISK_FULL):
                raise
            if not is_refusal(error):
                raise FailedPrecondition(f"PostgreSQL takes no facts: {describe(error)}") from error
            if len(batch) == 1:
                outcome.refused.append((batch[0], describe(error)))
                return
            middle = len(batch) // 2
            for half in (batch[:middle], batch[middle:]):
                await self._insert(connection, kind, half, outcome)
        else:
            outcome.inserted += [waiting.sequence for waiting in batch]

    async def _note(self, outcome: _Outcome, position: Position) -> None:
        now_ms = self._clock.now_ms()
        if outcome.inserted:
            await self._write_thread.run(self._writer.note_inserted, outcome.inserted, now_ms, position)
            self.noted += len(outcome.inserted)
        for waiting, reason in outcome.refused:
            log.error("PostgreSQL refused the %s %s: %s", waiting.fact.kind, waiting.fact.id, reason)
            await self._write_thread.run(self._writer.note_refused, waiting.sequence, reason, now_ms)
        self._shipped.set()

    async def _sweep_all(self) -> None:
        while True:
            while await self._write_thread.run(self._writer.sweep, self._clock.now_ms(), BUNDLE) == BUNDLE:
                pass  # recordings that came meanwhile are stored before the next ones go
            await self._clock.sleep(SWEEP_INTERVAL_S)


def _answer(group: Sequence[tuple[Fact, "asyncio.Future[Fact]"]], answers: Sequence[Fact | OpenManagerError]) -> None:
    for (_, done), answer in zip(group, answers, strict=True):
        if done.done():  # the caller went away
            continue
        if isinstance(answer, OpenManagerError):
            done.set_exception(answer)
        else:
            done.set_result(answer)
