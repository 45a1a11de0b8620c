"""Between making a tick and its acknowledgement: a bounded queue, written in order, retried until it is durable.

What must stay true: ticks are written in the order of their times, and the very same batches again after a failure, so
that an outage of timeseries that is shorter than the queue loses nothing. What does not fit is the oldest tick, and is
counted. A batch that timeseries says is wrong can never succeed: it is given up, counted and logged.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from opentelemetry import trace
from opentelemetry.trace import Span, StatusCode

from fleet.model import WriteBatch
from fleet.writer import WriteResult
from runtime.clock import Clock
from runtime.errors import InvalidArgument, OpenManagerError
from runtime.tasks import Backoff

MAX_WAITING_TICKS: Final = 60
"""Ten minutes at the default interval."""
MAX_WAITING_BYTES: Final = 512 * 1024 * 1024
"""Values of all waiting ticks together; a fleet of 20,000 servers keeps six ticks."""

_BACKOFF: Final = Backoff(initial_s=0.2, max_s=5.0)
_log = logging.getLogger(__name__)


class Writer(Protocol):
    """What the simulator needs of ``fleet.writer.FleetWriter``."""

    async def write(self, batch: WriteBatch) -> WriteResult:
        """Returns once the batch is durable; raises an OpenManagerError otherwise."""


@dataclass(slots=True, kw_only=True, eq=False)
class Parcel:
    """A tick to be written.

    Attributes:
        time_ms: its time, or that of its last row, milliseconds since the Unix epoch.
        batches: what is left to write of it, in order.
        span: covers the tick from its making to its acknowledgement.
        rows: how many rows it has in all.
        refused: whether some of it was given up, since timeseries said that it is wrong.
    """

    time_ms: int
    batches: deque[WriteBatch]
    span: Span
    rows: int
    refused: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of the values that are left."""
        return sum(batch.rows.values.nbytes for batch in self.batches)


@dataclass(slots=True, kw_only=True)
class DeliveryCounters:
    """What happened since the process started; times in milliseconds since the Unix epoch, 0 for never."""

    acknowledged_ticks: int = 0
    acknowledged_points: int = 0
    acknowledged_rows: int = 0
    rejected_points: int = 0
    refused_batches: int = 0
    dropped_ticks: int = 0
    failed_writes: int = 0
    last_error: str = ""
    last_error_time_ms: int = 0
    last_tick_time_ms: int = 0
    rejected_reasons: set[str] = field(default_factory=set)


class Delivery:
    """Keeps ticks until they are acknowledged."""

    def __init__(self, writer: Writer, clock: Clock, *, rng: random.Random | None = None) -> None:
        self._writer = writer
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 (jitter of the back-off, no secret)
        self._waiting: deque[Parcel] = deque()
        self._writing: Parcel | None = None
        self._changed = asyncio.Condition()
        self.counters = DeliveryCounters()

    @property
    def waiting_ticks(self) -> int:
        """Ticks that are made and not acknowledged."""
        return len(self._waiting)

    @property
    def waiting_rows(self) -> int:
        """Rows of the ticks that are made and not acknowledged."""
        return sum(parcel.rows for parcel in self._waiting)

    async def put(self, parcel: Parcel) -> None:
        """Queues a tick; where there is no room, the oldest that is not just being written is given up."""
        async with self._changed:
            while self._waiting and not self._fits(parcel):
                oldest = 1 if self._waiting[0] is self._writing else 0
                if oldest == len(self._waiting):
                    break  # one enormous tick is being written: hold this one beside it
                self._drop(oldest)
            self._waiting.append(parcel)
            self._changed.notify_all()

    async def put_when_room(self, parcel: Parcel) -> None:
        """Queues a tick once there is room: for recordings, which can wait."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._waiting or self._fits(parcel))
            self._waiting.append(parcel)
            self._changed.notify_all()

    async def drained(self) -> None:
        """Returns once everything that was queued is acknowledged or given up."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._waiting)

    def skipped(self, ticks: int) -> None:
        """Counts ticks that were never made because their time was too long ago."""
        self.counters.dropped_ticks += ticks
        _log.warning("ticks given up: too late", extra={"ticks": ticks})

    def discard(self) -> None:
        """Ends the spans of what is still waiting; the process is about to end."""
        for parcel in self._waiting:
            parcel.span.end()
        self._waiting.clear()

    def _fits(self, parcel: Parcel) -> bool:
        waiting_bytes = sum(other.size_bytes for other in self._waiting)
        return len(self._waiting) < MAX_WAITING_TICKS and waiting_bytes + parcel.size_bytes <= MAX_WAITING_BYTES

    def _drop(self, index: int) -> None:
        parcel = self._waiting[index]
        del self._waiting[index]
        parcel.span.set_status(StatusCode.ERROR, "given up: too many ticks wait")
        parcel.span.end()
        if self.counters.dropped_ticks % MAX_WAITING_TICKS == 0:  # said once a queue's length, not every tick
            _log.warning("a tick is given up: too many wait", extra={"tick_time_ms": parcel.time_ms})
        self.counters.dropped_ticks += 1

    async def run(self) -> None:
        """Writes what is queued, for ever."""
        failures = 0
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: bool(self._waiting))
                parcel = self._writing = self._waiting[0]
            try:
                done = await self._write(parcel)
                if done:
                    await self._finish(parcel)
            finally:
                self._writing = None
            if done:
                failures = 0
            else:
                delay_s = _BACKOFF.delay_s(failures, self._rng)
                failures += 1
                await self._clock.sleep(delay_s)

    async def _write(self, parcel: Parcel) -> bool:
        """Writes what is left of a tick; False when timeseries is away."""
        with trace.use_span(parcel.span, end_on_exit=False):
            while parcel.batches:
                try:
                    result = await self._writer.write(parcel.batches[0])
                except InvalidArgument as error:
                    self._failed(error)
                    self.counters.refused_batches += 1
                    parcel.refused = True
                    _log.error("a batch is given up: it was refused", extra={"error": str(error)})
                except OpenManagerError as error:
                    self._failed(error)
                    parcel.span.add_event("simulator.retry", {"error": str(error)})
                    return False
                else:
                    self._accepted(result)
                parcel.batches.popleft()
        return True

    async def _finish(self, parcel: Parcel) -> None:
        async with self._changed:
            finished = self._waiting.popleft()
            assert finished is parcel, "a tick being written was given up"
            self._changed.notify_all()
        if not parcel.refused:
            self.counters.acknowledged_ticks += 1
            self.counters.acknowledged_rows += parcel.rows
            self.counters.last_tick_time_ms = parcel.time_ms
        parcel.span.end()

    def _accepted(self, result: WriteResult) -> None:
        self.counters.acknowledged_points += result.accepted_points
        self.counters.rejected_points += result.rejected_points
        for error in result.errors:
            if error.reason not in self.counters.rejected_reasons:  # the first of each kind, not every row
                self.counters.rejected_reasons.add(error.reason)
                _log.warning("rows were rejected", extra={"reason": error.reason, "error": error.message})

    def _failed(self, error: OpenManagerError) -> None:
        if not self.counters.failed_writes or str(error) != self.counters.last_error:
            _log.warning("writing failed, will be tried again", extra={"error": str(error)})
        self.counters.failed_writes += 1
        self.counters.last_error = str(error)
        self.counters.last_error_time_ms = self._clock.now_ms()


def parcel_of(time_ms: int, batches: Sequence[WriteBatch], span: Span) -> Parcel:
    """Returns the parcel of a tick."""
    rows = sum(len(batch.rows.server_ids) for batch in batches)
    return Parcel(time_ms=time_ms, batches=deque(batches), span=span, rows=rows)
