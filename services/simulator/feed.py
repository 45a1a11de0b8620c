"""Where ticks come from: the protocol of the three modes, and the feed that follows the clock."""

import asyncio
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from fleet.model import WriteBatch
from runtime import telemetry
from runtime.clock import Clock
from runtime.tasks import run_forever
from services.simulator.delivery import MAX_WAITING_TICKS, Delivery, parcel_of
from services.simulator.schedule import Schedule

TICK_SPAN: Final = "simulator.tick"
"""Covers a tick from its making to its acknowledgement; the writer's spans are its children."""

tracer = telemetry.tracer("simulator")


class Mode(Enum):
    """``SIMULATOR_MODE``."""

    SYNTHETIC = "synthetic"
    REPLAY = "replay"
    HOST = "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a recording was played.

    Attributes:
        rows: rows that were handed to the delivery; in the simulator's status, those that were acknowledged.
        total_rows: rows of the recording; 0 while it is not read.
    """

    rows: int = 0
    total_rows: int = 0
    bad_lines: int = 0


class Feed(Protocol):
    """Makes ticks and hands them to the delivery."""

    @property
    def server_count(self) -> int:
        """Servers that report; 0 while that is not known."""

    @property
    def metric_count(self) -> int:
        """Metrics of each server; 0 while that is not known."""

    @property
    def interval_s(self) -> float:
        """Distance of two ticks, seconds; 0 while that is not known."""

    @property
    def progress(self) -> Progress:
        """How far a recording was played; empty for the other modes."""

    async def run(self, delivery: Delivery) -> None:
        """Makes ticks until cancelled or, with a recording, until its end. May be called again to go on."""


class TickSource(Protocol):
    """Makes what is reported at a tick."""

    @property
    def catches_up(self) -> bool:
        """Whether a tick whose time is over can still be made; a measurement cannot."""

    @property
    def server_count(self) -> int:
        """Servers that report."""

    @property
    def metric_count(self) -> int:
        """Metrics of each server."""

    async def batches(self, tick: int, time_ms: int) -> list[WriteBatch]:
        """Returns the batches of a tick; ticks are asked for in order."""


class TickFeed:
    """Makes a tick whenever one is due."""

    def __init__(self, source: TickSource, clock: Clock, *, interval_ms: int) -> None:
        self._source = source
        self._clock = clock
        self._interval_ms = interval_ms

    @property
    def server_count(self) -> int:
        return self._source.server_count

    @property
    def metric_count(self) -> int:
        return self._source.metric_count

    @property
    def interval_s(self) -> float:
        return self._interval_ms / 1000.0

    @property
    def progress(self) -> Progress:
        return Progress()

    async def run(self, delivery: Delivery) -> None:
        most_late = MAX_WAITING_TICKS if self._source.catches_up else 0
        schedule = Schedule(self._clock, interval_ms=self._interval_ms, most_late=most_late)
        await run_forever("simulator-ticks", lambda: self._follow(schedule, delivery), clock=self._clock)

    async def _follow(self, schedule: Schedule, delivery: Delivery) -> None:
        while True:
            due = await schedule.next()
            if due.skipped:
                delivery.skipped(due.skipped)
            attributes = {"simulator.tick": due.tick, "simulator.late_ms": self._clock.now_ms() - due.time_ms}
            span = tracer.start_span(TICK_SPAN, attributes=attributes)
            try:
                batches = await self._source.batches(due.tick, due.time_ms)
                await delivery.put(parcel_of(due.time_ms, batches, span))
            except BaseException as error:
                span.record_exception(error)
                span.end()
                raise
            await asyncio.sleep(0)  # a long catch-up lets the writer work in between
