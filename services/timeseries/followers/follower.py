"""Ships the journal to an external store, in order, whatever that store does. Knows no store: see `Backend`.

A follower has a durable cursor in the engine: the last sequence that the store has wholly acknowledged. It reads the
journal from there on, tags each row with the descriptor valid at its sequence, ships bounded batches and moves the
cursor only afterwards. So a crash on either side repeats some rows, with the same tags, and loses none; a store must
take a repeated row as the same row.

What must stay true: an append never waits for a follower; what is held in memory is bounded however long the store is
away (the rest waits in the journal); a row that the store refuses for good is counted and does not stop those behind
it; what left the journal before it was shipped comes from blocks; what retention took before that is counted and told.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Final, NamedTuple, Self

from fleet.model import ServerDescriptor
from fleet.status import Refusal, StoreProbe
from runtime.clock import Clock
from runtime.errors import InvalidArgument, OpenManagerError, Unavailable
from runtime.tasks import Backoff, run_forever
from services.timeseries.engine import Engine, TailBatch
from services.timeseries.followers.backend import (
    Backend,
    BackendInfo,
    Portion,
    Receipt,
    TaggedRows,
    halves,
    is_silence,
    parts,
)
from services.timeseries.followers.position import Position

SHIP_INTERVAL_S: Final = 0.25
"""The least time from one batch to the next while there is less than a full one: a cursor costs the journal a sync."""
MAX_LAG_S: Final = 5.0
"""Behind by more than this the store shows as degraded."""
MAX_RETRY_AFTER_S: Final = 60.0
"""A store that asks for a longer pause is asked again after this."""
EVICTED: Final = "EVICTED_UNSHIPPED"
"""The reason of points that went with their day before the store took them."""
PROBE_TIMEOUT_S: Final = 1.3
"""Less than a StoreMonitor waits, so that a store of which nothing ends in time, be it its name, its certificate or
many addresses, still shows how far it is behind."""
SENT_AGAIN: Final = "SENT_AGAIN"
"""The reason of points that were refused when they were sent again after an outage: the store has them, unless it lost
them; had it refused them before, they were counted then."""
ACKNOWLEDGE_TIMEOUT_S: Final = 8.0
"""How long a batch waits for the store where that is wanted; less than callers wait (10 s)."""
IDLE_S: Final = 60.0
"""While there is nothing to ship it is looked so often whether something is to be shipped again."""
RETRY: Final = Backoff(initial_s=0.1, max_s=5.0)

_log = logging.getLogger(__name__)


class Lag(NamedTuple):
    """What the store does not have yet; `spool_bytes` is its share of the journal's file."""

    points: int
    seconds: float
    spool_bytes: int
    batches_in_blocks: int = 0
    """Batches that left the journal before they were shipped; their points are in blocks."""


class Follower:
    """Ships for as long as it is entered; then it closes its backend."""

    def __init__(self, engine: Engine, backend: Backend, clock: Clock, rng: random.Random) -> None:
        self._engine = engine
        self._backend = backend
        self._clock = clock
        self._rng = rng
        self._descriptors: dict[str, ServerDescriptor] = {}
        self._position = Position(engine, backend, clock)
        self._is_again = False  # whether the store has acknowledged before what is shipped now
        self._failures = 0
        self._silences = 0  # of the failures those with which a store may have died
        self._silent_probes = 0  # in a row, with nothing shipped meanwhile
        self._last_error = ""
        self._tell: Callable[[str], None] = lambda _text: None
        self._task: asyncio.Task[None] | None = None
        self.shipped_points = 0
        self.resent_points = 0
        self.refusals: dict[str, Refusal] = {}

    async def __aenter__(self) -> Self:
        name = f"{self._backend.name} follower"
        work = run_forever(name, self._run, RETRY, clock=self._clock, rng=self._rng)
        self._task = asyncio.create_task(work, name=name)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._backend.close()

    def tell_errors(self, tell: Callable[[str], None]) -> None:
        """Has every outage, refusal and gap told to `tell`."""
        self._tell = tell

    async def shipped(self, sequence: int) -> None:
        """Returns once the store has acknowledged everything up to a sequence of the journal.

        Raises:
            Unavailable: NOT_REPLICATED: it did not within ACKNOWLEDGE_TIMEOUT_S. It is on our disk and will be shipped;
                sending it again does no harm.
        """
        try:
            async with asyncio.timeout(ACKNOWLEDGE_TIMEOUT_S):
                await self._position.wait_for(sequence)
        except TimeoutError:
            why = self._last_error or "it is behind"
            raise Unavailable(
                f"{self._backend.name} has not acknowledged the batch within {ACKNOWLEDGE_TIMEOUT_S:g} s ({why}); "
                "TIMESERIES_ACK=follower wants that: send it again",
                reason="NOT_REPLICATED",
            ) from None

    async def probe(self) -> StoreProbe:
        """How the store is, and how far behind even when it could not take rows now."""
        started_s = self._clock.monotonic()
        try:
            found = await self._probed()
        except OpenManagerError as error:
            await self._note_silence(error)
            behind = await self.lag()
            return StoreProbe(
                address=self._backend.address,
                lag_points=behind.points,
                lag_seconds=behind.seconds,
                spool_bytes=behind.spool_bytes,
                down=error.message,
                refusals=tuple(self.refusals.values()),
            )
        self._silent_probes = 0
        latency_ms = (self._clock.monotonic() - started_s) * 1_000
        is_owed = self._position.is_owed  # first: then the lag has it, or this does
        behind = await self.lag()
        degraded = self._last_error if self._failures else ""
        if not degraded and is_owed:
            degraded = "it was away and may lack what it took before; that is shipped again within a minute"
        if not degraded and behind.batches_in_blocks:
            degraded = f"{behind.batches_in_blocks} batches behind the journal, catching up from blocks"
        if not degraded and behind.seconds > MAX_LAG_S:
            degraded = f"{behind.seconds:.1f} s behind"
        return StoreProbe(
            address=self._backend.address,
            server_version=found.version,
            latency_ms=latency_ms,
            lag_points=behind.points,
            lag_seconds=behind.seconds,
            spool_bytes=behind.spool_bytes,
            degraded=degraded,
            note=found.note,
            refusals=tuple(self.refusals.values()),
        )

    async def _probed(self) -> BackendInfo:
        limit = asyncio.timeout(PROBE_TIMEOUT_S)
        try:
            async with limit:
                return await self._backend.probe()
        except TimeoutError:
            if not limit.expired():
                raise
            text = f"{self._backend.address} does not answer within {PROBE_TIMEOUT_S:g} s"
            raise Unavailable(text, reason="STORE_UNAVAILABLE") from None

    async def lag(self) -> Lag:
        """What the store does not have yet, by the durable cursor; also counts what can never be there any more."""
        status = await self._engine.status()
        evicted = status.evicted_unshipped.get(self._backend.name, 0)
        known = self.refusals.get(EVICTED)
        self._refuse(EVICTED, evicted - (known.points if known else 0))
        for follower in status.followers:
            if follower.name == self._backend.name:
                kept = status.last_sequence - status.first_sequence + 1
                waited_ms = 0 if follower.oldest_ms is None else self._clock.now_ms() - follower.oldest_ms
                return Lag(
                    points=follower.points,
                    seconds=max(0.0, waited_ms / 1_000),
                    spool_bytes=status.journal_bytes * follower.batches // max(kept, follower.batches, 1),
                    batches_in_blocks=max(0, status.first_sequence - 1 - follower.cursor),
                )
        return Lag(points=0, seconds=0.0, spool_bytes=0)

    async def _run(self) -> None:
        try:
            await self._follow()
        except Exception as error:  # told here, logged and started again, from the cursor, by run_forever
            self._failures += 1
            self._last_error = error.message if isinstance(error, OpenManagerError) else f"shipping failed: {error!r}"
            self._tell(self._last_error)
            raise

    async def _follow(self) -> None:
        await self._position.register()
        while True:
            await self._position.go_on()
            if self._position.cursor + 1 < self._engine.first_sequence:
                await self._go_on_from_blocks(self._engine.first_sequence)
            else:
                await self._follow_from(self._position.cursor + 1)

    async def _follow_from(self, sequence: int) -> None:
        """Ships what the journal has from a sequence on; returns when an outage has taken the cursor back, or when
        nothing came for a while."""
        self._descriptors.clear()  # the first batch of a tail brings all that are valid before it
        pending = Portion()
        async with aclosing(self._engine.tail(sequence)) as tail:  # type: ignore[type-var]  # an async generator
            while True:
                try:
                    async with asyncio.timeout(IDLE_S):
                        batch = await anext(tail)
                except (TimeoutError, StopAsyncIteration):
                    return
                await self._ship_before(batch, pending)
                was_full = False
                for rows in self._tagged(batch):
                    if pending.rows and not pending.fits(rows):
                        await self._flush(pending)
                        was_full = True
                    pending.add(rows)
                pending.through = batch.sequence
                if batch.sequence >= self._engine.last_sequence:
                    started_s = self._clock.monotonic()
                    await self._flush(pending)
                    if not was_full:
                        await self._clock.sleep_until(started_s + SHIP_INTERVAL_S)
                if self._position.has_gone_back:
                    return

    async def _ship_before(self, batch: TailBatch, pending: Portion) -> None:
        """Ships what the journal let go before a batch, and what is collected if its refusals count otherwise."""
        if batch.missed and self._position.cursor + 1 < batch.sequence:
            await self._flush(pending)  # before what is newer
            await self._go_on_from_blocks(batch.sequence)
        is_again = self._position.is_again(batch.sequence)
        if is_again != self._is_again and pending.rows:
            await self._flush(pending)
        self._is_again = is_again

    async def _go_on_from_blocks(self, first: int) -> None:
        """Ships what left the journal before it was shipped; the batch `first` is the oldest that it has."""
        run = self._position.run_before(first)
        after, through = run.after, run.through
        text = f"{through - after} batches left the journal before they were shipped: going on from blocks"
        _log.warning("%s: %s", self._backend.name, text)
        self._tell(text)
        pending = Portion()
        self._is_again = self._position.is_again(through)
        async with aclosing(self._engine.cursors.unsent(after, through, run.begin)) as found:
            async for stored in found:
                everything = TaggedRows(metric_set=stored.metric_set, rows=stored.rows, descriptors=stored.descriptors)
                for rows in parts(everything):
                    if pending.rows and not pending.fits(rows):
                        await self._flush(pending)
                        if self._position.has_gone_back:
                            return
                        run.reached(stored.place, self._clock.monotonic())
                    pending.add(rows)
                    self.resent_points += rows.rows.points
        pending.through = through  # as a whole: blocks are not in the order of sequences
        await self._flush(pending)

    def _tagged(self, batch: TailBatch) -> Iterator[TaggedRows]:
        """The rows of a batch in parts that keep the bounds, with what was valid at its sequence."""
        self._descriptors.update((descriptor.server_id, descriptor) for descriptor in batch.descriptors)
        if batch.rows is None or batch.metric_set is None:
            return
        told = tuple(map(self._descriptors.get, batch.rows.server_ids))
        yield from parts(TaggedRows(metric_set=batch.metric_set, rows=batch.rows, descriptors=told))

    async def _flush(self, pending: Portion) -> None:
        """Ships what is collected, however long that takes, then moves the cursor; not what comes after a cursor that
        has gone back: a store may take nothing that is older than what it has, and that is to come first."""
        waiting = [pending.rows] if pending.rows else []
        while waiting and not self._position.has_gone_back:
            part = waiting.pop()
            try:
                receipt = await self._acknowledged(part)
            except InvalidArgument as error:
                if smaller := halves(part):
                    waiting += reversed(smaller)
                else:
                    reason = SENT_AGAIN if self._is_again else error.reason
                    self._refuse(reason, sum(rows.rows.points for rows in part), error.message)
            else:
                if receipt is None:
                    break
                self._position.has_taken()
                self._silent_probes = 0
                self.shipped_points += receipt.shipped
                for reason, points in receipt.refused.items():
                    self._refuse(SENT_AGAIN if self._is_again else reason, points)
        pending.clear()
        if self._position.has_gone_back:
            return
        await self._position.advance(pending.through)
        self._recovered()
        await self._position.pay_back()

    async def _acknowledged(self, part: Sequence[TaggedRows]) -> Receipt | None:
        """What the store did with it, however long that takes; None: the cursor has gone back."""
        while True:
            try:
                return await self._backend.ship(part)
            except Unavailable as error:
                if not self._failures:
                    _log.warning("%s is away, the journal keeps its rows: %s", self._backend.name, error.message)
                if is_silence(error):
                    self._silences += 1
                    if self._silences == 2:  # more than a lost connection
                        await self._position.owe()
                await self._position.pay_back()  # also what could not be paid at once, however long this takes
                self._last_error = error.message
                self._tell(error.message)
                pause_s = RETRY.delay_s(self._failures, self._rng)
                self._failures += 1
                await self._clock.sleep(max(pause_s, min(error.retry_after_s or 0.0, MAX_RETRY_AFTER_S)))
                if self._position.has_gone_back:
                    return None

    async def _note_silence(self, error: OpenManagerError) -> None:
        """A store that died and came back while there was nothing to ship, or while whoever ships waited as it had
        asked, is only seen by its probes."""
        if isinstance(error, Unavailable) and is_silence(error):
            self._silent_probes += 1
            if self._silent_probes == 2 and self._silences < 2:  # else whoever ships has seen it, too
                await self._position.owe()

    def _recovered(self) -> None:
        if self._failures:
            _log.info("%s takes rows again", self._backend.name)
        self._failures = self._silences = 0
        self._last_error = ""

    def _refuse(self, reason: str, points: int, message: str = "") -> None:
        if not points:
            return
        now_ms = self._clock.now_ms()
        known = self.refusals.get(reason)
        if known is None:
            text = f"points are refused, {reason}" + (f": {message}" if message else "")
            _log.warning("%s: %s; further ones are only counted", self._backend.name, text)
            self._tell(text)
            known = self.refusals[reason] = Refusal(reason=reason, points=0, first_ms=now_ms, last_ms=now_ms)
        known.points += points
        known.last_ms = now_ms


async def forget_others(engine: Engine, names: Collection[str]) -> None:
    """Drops every follower but these, so that the journal no longer waits for a store that was taken away."""
    for follower in (await engine.status()).followers:
        if follower.name not in names:
            _log.warning("%s is no longer set up: its %d unshipped points are dropped", follower.name, follower.points)
            await engine.cursors.forget(follower.name)
