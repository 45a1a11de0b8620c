"""Signs a checkpoint every minute, proves the log when asked to, and lets go of months that are too old.

What must stay true: a checkpoint names only ends whose events are durable, and is on our disk once; each that is there
gets on its way to the database before there is another one; while something is wrong with the log no month of it is
dropped, nor while a legal hold is on; verifying and dropping never run at once; nothing is found of a log that nobody
altered, whatever is written and signed while it is read.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import orjson

from fleet.audit.event import draft
from fleet.audit.log import AuditLog
from runtime import tasks
from runtime.clock import Clock
from runtime.errors import OpenManagerError
from runtime.tasks import Backoff, run_forever
from services.metadata.audit.chains import Chain, Chains, Row
from services.metadata.audit.checkpoint import NOTHING, Checkpoint, CheckpointFile, Dropped, Said, Signer, last_of
from services.metadata.audit.findings import Finding, Findings
from services.metadata.audit.proofs import Proofs, judge, judge_months
from services.metadata.audit.sink import Sink, event_of, month_of
from services.metadata.audit.store import AuditStore, month_end, month_start, months_before, row_of_event
from services.metadata.facts import Facts
from services.metadata.journal import Fact
from services.metadata.kinds import AUDIT_CHECKPOINT, AUDIT_EVENT
from services.metadata.queries import instant_of

CHECKPOINT_INTERVAL_S: Final = 60.0
QUIET_INTERVAL_S: Final = 3_600.0
"""While nothing happens one in an hour is enough: it would prove what the last one does."""
RETENTION_INTERVAL_S: Final = 3_600.0
KEEPER_BACKOFF: Final = Backoff(initial_s=1.0, max_s=30.0)
DROPPED_ACTION: Final = "openmanager.metadata.DropAuditMonth"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What came of verifying.

    Attributes:
        events: that were read.
        checkpoints: that are right.
        findings, total: what was found, the first of them, and how many.
        chains: what there is.
        last: the last right checkpoint; None: there is none.
        public_key: that signatures were checked with.
    """

    events: int
    checkpoints: int
    findings: Sequence[Finding]
    total: int
    chains: Sequence[Chain]
    last: Said | None
    public_key: str

    @property
    def unproved_events(self) -> int:
        """How many came after the last checkpoint."""
        return sum(max(0, chain.last_seq - max(chain.proved_seq, chain.first_seq - 1)) for chain in self.chains)


class Keeper:
    """Entered for as long as the service runs, after the facts are."""

    def __init__(
        self,
        folder: Path,
        store: AuditStore,
        facts: Facts,
        *,
        clock: Clock,
        retention_s: float,
        legal_hold: bool,
    ) -> None:
        """Prepares it.

        Args:
            folder: the service's own; key and checkpoints are in it.
            store: the log.
            facts: what is on its way there.
            clock: of checkpoints and ages.
            retention_s: how old a month gets.
            legal_hold: nothing is dropped.
        """
        self._folder = folder
        self._file = CheckpointFile(folder)
        self._signer: Signer
        self._store = store
        self._facts = facts
        self._clock = clock
        self._retention_s = retention_s
        self._legal_hold = legal_hold
        self.sink = Sink(facts, store)
        self.log: AuditLog | None = None
        """The service's own, where it has one: dropping a month is an event."""
        self._last: Checkpoint | None = None
        self._last_said: Said | None = None
        self._is_last_known = False  # no number is given before that is sure
        self._unsent: Checkpoint | None = None  # the last one, until the journal has it: it may be full
        self._last_at_s = 0.0
        self._signing, self._alone = asyncio.Lock(), asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Reads key and checkpoints; raises DataLoss where the key is none, OSError where the disk failed."""
        self._signer = await asyncio.to_thread(Signer, self._folder)
        self._take_last(last_of(await asyncio.to_thread(self._file.read)))
        self._is_last_known = self._last is not None
        await self.sink.recover(self._last_said)
        self._unsent = self._last  # a death may have come between our disk and the journal
        try:
            await self._find_last()
        except OpenManagerError as failure:
            log.warning("nothing is signed until the audit log's checkpoints are known: %s", failure.message)
        try:
            await self._send()
        except OpenManagerError as failure:  # no reason not to serve
            log.warning("the last checkpoint of the audit log waits: %s", failure.message)
        for name, work in (("checkpoints", self._sign_all), ("retention", self._drop_all)):
            guarded = run_forever(f"audit-{name}", work, KEEPER_BACKOFF, clock=self._clock)
            self._tasks.append(tasks.start(f"audit-{name}", guarded))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await tasks.cancel(*self._tasks)
        try:
            await self.sign()  # an orderly stop leaves no window
        except (OpenManagerError, OSError) as failure:
            log.warning("no checkpoint of the audit log at the stop: %s", failure)

    def _take_last(self, last: Checkpoint | None) -> None:
        self._last, self._last_said = last, None if last is None else last.said()

    async def _find_last(self) -> None:
        """Finds the last checkpoint in the database where DATA_DIR has none: it was lost, or is a new one. Until then
        a number might be given that the database knows.

        Raises:
            Unavailable: the database is away.
        """
        if not self._is_last_known:
            self._take_last(last_of(await self._store.checkpoints()))
            self.sink.learn(self._last_said)
            self._is_last_known = True

    async def sign(self) -> bool:
        """Signs the ends of all chains; False: the last checkpoint has them.

        Raises:
            Unavailable: DATA_DIR has no checkpoint, and the database is away.
        """
        async with self._signing:
            await self._find_last()
            await self._send()
            ends, months = dict(self.sink.ends), tuple(sorted(self.sink.months))
            last = self._last_said
            is_same = last is not None and (dict(last.chains), last.months) == (ends, months)
            if not ends or (is_same and self._clock.monotonic() - self._last_at_s < QUIET_INTERVAL_S):
                return False
            await self._signed(())
        return True

    async def _signed(self, dropped: Sequence[Dropped]) -> Checkpoint:
        """The next checkpoint, on our disk and on its way to the database, as the one before it is."""
        await self._send()
        gone = {one.month for one in dropped}
        last = self._last
        said = Said(
            number=1 if last is None else last.number + 1,
            time_us=self._clock.now_ms() * 1_000,
            previous=NOTHING if last is None else last.hash,
            chains=dict(self.sink.ends),
            months=tuple(sorted(self.sink.months - gone)),
            dropped=tuple(dropped),
        )
        checkpoint = self._signer.sign(said)
        await self._keep(checkpoint, said)
        await self._send()
        return checkpoint

    async def _keep(self, checkpoint: Checkpoint, said: Said) -> None:
        """Puts it on our disk, to the end, whoever is cancelled meanwhile: else its number would be given again."""
        writing = asyncio.ensure_future(asyncio.to_thread(self._file.append, checkpoint))
        cancelled: asyncio.CancelledError | None = None
        while not writing.done():
            try:
                await asyncio.wait([writing])
            except asyncio.CancelledError as error:
                cancelled = error
        writing.result()
        self._last = self._unsent = checkpoint
        self._last_said, self._last_at_s = said, self._clock.monotonic()
        if cancelled is not None:
            raise cancelled

    async def _send(self) -> None:
        """Gives the last checkpoint to the journal, if it was not yet; raises as `Facts.record`."""
        if self._unsent is not None:
            await self._facts.record(_fact(self._unsent, self._clock.now_ms() * 1_000))
            self._unsent = None

    async def _sign_all(self) -> None:
        while True:
            await self._clock.sleep(CHECKPOINT_INTERVAL_S)
            await self.sign()

    async def verify(self, told: Callable[[int], None] = lambda _events: None) -> Proof:
        """Reads the whole log and holds it to its hashes and checkpoints.

        Args:
            told: is told now and then how many events were read.

        Raises:
            Unavailable: the database is away.
        """
        async with self._alone:
            return await self._verify(told)

    async def _verify(self, told: Callable[[int], None]) -> Proof:
        findings = Findings()
        # A checkpoint that is signed meanwhile would be in one place and not yet in another, and may name events that
        # are neither among those that wait now nor in the database when it is read.
        async with self._signing:
            await self._find_last()
            ends = dict(self.sink.ends)
            # The journal before the database: what is inserted in between is then in both and not in none.
            waiting = await self._facts.unwritten(AUDIT_EVENT.name)
            marked = await self._facts.unwritten(AUDIT_CHECKPOINT.name)
            ours = await asyncio.to_thread(self._file.read)
            theirs = await self._store.checkpoints()
            unsent = self._unsent
        on_the_way = {int(fact.subject) for fact in marked} | ({unsent.number} if unsent is not None else set())
        proofs: Proofs = await asyncio.to_thread(judge, ours, theirs, on_the_way, self._signer.public_key, findings)
        months = {month_of(fact.created_us) for fact in waiting}
        judge_months(proofs, await self._store.months(), months, findings)
        chains = Chains(proofs, ends, self.sink.begun, findings)
        local = _Waiting([row_of_event(event_of(fact)) for fact in waiting])
        async with aclosing(self._store.rows()) as pages:
            async for rows in pages:
                await asyncio.to_thread(chains.feed, list(local.merged(rows)))
                told(chains.events)
        await asyncio.to_thread(chains.feed, local.rest())
        chains.finish()
        return Proof(
            events=chains.events,
            checkpoints=proofs.number,
            findings=findings.told,
            total=findings.total,
            chains=chains.chains,
            last=proofs.last,
            public_key=self._signer.public_key,
        )

    async def _drop_all(self) -> None:
        await self._clock.sleep(CHECKPOINT_INTERVAL_S)  # the database has been reached by then, as a rule
        while True:
            await self.drop_old()
            await self._clock.sleep(RETENTION_INTERVAL_S)

    async def drop_old(self) -> list[str]:
        """Drops the months that are older than the retention; returns them."""
        if self._legal_hold:
            return []
        edge = instant_of(self._clock.now_ms() * 1_000) - timedelta(seconds=self._retention_s)
        dropped: list[str] = []
        if not months_before([*await self._store.months()], edge):
            return dropped
        async with self._alone:
            proof = await self._verify(lambda _events: None)
            if proof.total:
                log.error("no month of the audit log is dropped while verifying it finds %d faults", proof.total)
                return dropped
            waiting = {month_of(fact.created_us) for fact in await self._facts.unwritten(AUDIT_EVENT.name)}
            for month in months_before([*await self._store.months()], edge):
                if month not in waiting:
                    await self._drop(month)
                    dropped.append(month)
        return dropped

    async def _drop(self, month: str) -> None:
        runs = _Runs(month)
        async with aclosing(self._store.rows(month_start(month), month_end(month))) as pages:
            async for rows in pages:
                await asyncio.to_thread(runs.add, rows)
        async with self._signing:
            checkpoint = await self._signed(runs.found)
            await self._store.drop_month(month, checkpoint)
            self.sink.months.discard(month)
        events = sum(run.last_seq - run.first_seq + 1 for run in runs.found)
        log.info("the audit log of %s went by age: %d events", month, events)
        if self.log is not None:
            said = draft(
                time_us=self._clock.now_ms() * 1_000,
                actor="metadata",
                action=DROPPED_ACTION,
                target=month,
                after={"events": events, "checkpoint": checkpoint.number},
            )
            await self.log.append(said)


class _Waiting:
    """Events on their way to the database, sorted, to be put between its rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = sorted(rows, key=lambda row: (row.writer_id, row.seq))
        self._next = 0

    def merged(self, rows: Sequence[Row]) -> Iterator[Row]:
        """A page of the database with what belongs between its rows; what is in both is there once."""
        for row in rows:
            while self._next < len(self._rows):
                waiting = self._rows[self._next]
                if (waiting.writer_id, waiting.seq) > (row.writer_id, row.seq):
                    break
                self._next += 1
                if (waiting.writer_id, waiting.seq, waiting.hash) != (row.writer_id, row.seq, row.hash):
                    yield waiting
            yield row

    def rest(self) -> list[Row]:
        """What comes behind all pages."""
        return self._rows[self._next :]


class _Runs:
    """The runs of numbers without a gap of each chain that a month holds."""

    def __init__(self, month: str) -> None:
        self._month = month
        self.found: list[Dropped] = []

    def add(self, rows: Sequence[Row]) -> None:
        """The next rows, by writer and number."""
        for row in rows:
            last = self.found[-1] if self.found else None
            goes_on = last is not None and (last.writer_id, last.last_seq + 1) == (row.writer_id, row.seq)
            first, before = (last.first_seq, last.before) if goes_on and last else (row.seq, row.prev_hash.hex())
            run = Dropped(
                month=self._month,
                writer_id=row.writer_id,
                first_seq=first,
                last_seq=row.seq,
                before=before,
                after=row.hash.hex(),
            )
            if goes_on:
                self.found[-1] = run
            else:
                self.found.append(run)


def _fact(checkpoint: Checkpoint, now_us: int) -> Fact:
    row = {"number": checkpoint.number, "body": checkpoint.body, "signature": checkpoint.signature.hex()}
    number = str(checkpoint.number)
    return Fact(
        kind=AUDIT_CHECKPOINT.name, id=number, subject=number, created_us=now_us, payload=orjson.dumps(row).decode()
    )
