"""The simulator's core: a feed that makes ticks, a delivery that writes them, and somebody who starts and stops.

What must stay true: it is either running or stopped, and both commands are harmless when repeated; stopping ends the
making of ticks while what is made already is still delivered; a feed that fails is told in the status, never silent.
"""

import asyncio
import logging
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, Self

from runtime.clock import Clock
from runtime.errors import FailedPrecondition
from runtime.tasks import run_forever
from services.simulator.delivery import Delivery, DeliveryCounters, Writer
from services.simulator.feed import Feed, Mode, Progress
from services.simulator.scenarios import Injection
from services.simulator.synthetic import SyntheticSource

DEFAULT_SCENARIO_S: Final = 300.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the simulator does and how well.

    Attributes:
        interval_s: distance of two ticks; 0 while a recording is not read yet.
        injections: scenarios that are played now.
        last_error_time_ms: milliseconds since the Unix epoch, 0 for never.
    """

    mode: Mode
    running: bool
    servers: int
    metrics: int
    interval_s: float
    waiting_ticks: int
    counters: DeliveryCounters
    injections: tuple[Injection, ...]
    progress: Progress
    last_error: str
    last_error_time_ms: int


class Simulator:
    """Plays for as long as it is entered; enters stopped."""

    def __init__(
        self, feed: Feed, writer: Writer, clock: Clock, *, mode: Mode, synthetic: SyntheticSource | None = None
    ) -> None:
        """Joins the parts.

        Args:
            feed: makes the ticks.
            writer: takes them.
            clock: the time.
            mode: what to say in the status.
            synthetic: where scenarios are played; None in the other modes.
        """
        self._feed = feed
        self._clock = clock
        self._mode = mode
        self._synthetic = synthetic
        self._delivery = Delivery(writer, clock)
        self._delivering: asyncio.Task[None] | None = None
        self._feeding: asyncio.Task[None] | None = None
        self._wanted = False
        self._feed_error = ""
        self._feed_error_time_ms = 0

    async def __aenter__(self) -> Self:
        work = run_forever("simulator-delivery", self._delivery.run, clock=self._clock)
        self._delivering = asyncio.create_task(work, name="simulator-delivery")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        if self._delivering is not None:
            self._delivering.cancel()
            await asyncio.gather(self._delivering, return_exceptions=True)
        if self._delivery.waiting_ticks:
            _log.warning("ended with ticks not acknowledged", extra={"ticks": self._delivery.waiting_ticks})
        self._delivery.discard()

    @property
    def running(self) -> bool:
        """Whether ticks are made."""
        return self._feeding is not None and not self._feeding.done()

    def start(self) -> None:
        """Starts making ticks; does nothing when it does already. While it is being stopped it starts after that."""
        self._wanted = True
        if not self.running:
            self._feed_error = ""
            self._feeding = asyncio.create_task(self._run_feed(), name="simulator-feed")

    async def stop(self) -> None:
        """Stops making ticks; does nothing when it has already. What was made is still delivered."""
        self._wanted = False
        feeding = self._feeding
        if feeding is not None:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            if self._feeding is feeding:  # else it was started again meanwhile
                self._feeding = None
                if self._wanted:
                    self.start()

    async def _run_feed(self) -> None:
        try:
            await self._feed.run(self._delivery)
        except Exception as error:
            _log.exception("the simulator stopped")
            self._feed_error = str(error)
            self._feed_error_time_ms = self._clock.now_ms()

    def inject(self, server_id: str, scenario: str, duration_s: float = DEFAULT_SCENARIO_S) -> Injection:
        """Plays a scenario on a server from now on.

        Raises:
            FailedPrecondition: SCENARIOS_NEED_SYNTHETIC in the other modes.
            InvalidArgument, NotFound, ResourceExhausted: as ``SyntheticSource.inject``.
        """
        return self._playable().inject(server_id, scenario, duration_s, self._clock.now_ms())

    def clear(self, server_id: str = "", scenario: str = "") -> tuple[Injection, ...]:
        """Ends scenarios and returns them; empty means all. Raises as ``inject``."""
        return self._playable().clear(server_id, scenario, self._clock.now_ms())

    def _playable(self) -> SyntheticSource:
        if self._synthetic is None:
            message = f"scenarios are played in SIMULATOR_MODE=synthetic only; this is {self._mode.value}"
            raise FailedPrecondition(message, reason="SCENARIOS_NEED_SYNTHETIC")
        return self._synthetic

    def status(self) -> Status:
        """Returns what the simulator does and how well."""
        counters = self._delivery.counters
        newest_is_feed = bool(self._feed_error) and self._feed_error_time_ms >= counters.last_error_time_ms
        now_ms = self._clock.now_ms()
        injections = self._synthetic.injections if self._synthetic else ()
        progress = self._feed.progress
        if progress.total_rows:  # what waits is not sent yet
            progress = replace(progress, rows=max(0, progress.rows - self._delivery.waiting_rows))
        return Status(
            mode=self._mode,
            running=self.running,
            servers=self._feed.server_count,
            metrics=self._feed.metric_count,
            interval_s=self._feed.interval_s,
            waiting_ticks=self._delivery.waiting_ticks,
            counters=counters,
            injections=tuple(injection for injection in injections if injection.active(now_ms)),
            progress=progress,
            last_error=self._feed_error if newest_is_feed else counters.last_error,
            last_error_time_ms=self._feed_error_time_ms if newest_is_feed else counters.last_error_time_ms,
        )
