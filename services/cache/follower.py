"""Keeps a store up to date with the live state, whatever the store does.

Each changed server has one slot, its id; what is written is its state at that moment. So an outage of any length costs
one slot a server, and afterwards everything current is written, not everything that happened.

What must stay true: `mark` never waits and never fails; after a failed write, and when the store has lost what it held,
every server is written again; what is in the store does not expire while this runs.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from opentelemetry import trace
from opentelemetry.instrumentation.utils import suppress_instrumentation

from fleet.status import StoreProbe
from runtime import telemetry
from runtime.clock import Clock
from runtime.errors import OpenManagerError
from runtime.tasks import Backoff, run_forever
from services.cache.state import LiveState
from services.cache.store import StateStore

REFRESH_INTERVAL_S: Final = 20.0
"""What is known of all servers is written at least this often; it expires after 60 s."""
REWRITE_AGE_S: Final = 120.0
"""A server that does not change is written again once it is older than this; it expires after 300 s."""
FLUSH_INTERVAL_S: Final = 0.25
"""The least time from one write to the next. A change after a longer pause is written at once."""
MAX_FLUSH_SHARE: Final = 0.2
"""The largest share of the time that is spent writing: a large fleet is written less often, not a fleet at a time."""
MAX_FLUSH_PAUSE_S: Final = 5.0
FLUSH_TIMEOUT_S: Final = 10.0
FLUSH_TIMEOUT_PER_SERVER_S: Final = 0.002
STOP_TIMEOUT_S: Final = 1.0
MAX_LAG_S: Final = 5.0
"""Behind by more than this the store shows as degraded."""
PROBE_TIMEOUT_S: Final = 1.0
"""Less than a StoreMonitor waits, so that a hanging store still shows how far it is behind."""
MAX_CAUSES: Final = 32
"""Updates that one write's span names."""
RETRY: Final = Backoff(initial_s=0.1, max_s=2.0)

_log = logging.getLogger(__name__)
_tracer = telemetry.tracer("services.cache")


class Follower:
    """Writes what was marked, for as long as it is entered."""

    def __init__(self, store: StateStore, live: LiveState, clock: Clock, rng: random.Random) -> None:
        self._store = store
        self._live = live
        self._clock = clock
        self._rng = rng
        self._dirty: dict[str, float] = {}  # id -> since when, monotonic; the oldest first
        self._writing: dict[str, float] = {}
        self._written_at: dict[str, float] = {}
        self._everything = False
        self._life = ""
        self._failures = 0
        self._last_error = ""
        self._refresh_at = clock.monotonic()
        self._wake = asyncio.Event()
        self._causes: list[trace.SpanContext] = []
        self._task: asyncio.Task[None] | None = None
        self._tell: Callable[[str], None] = lambda _text: None

    async def __aenter__(self) -> Self:
        work = run_forever("cache-follower", self._run, RETRY, clock=self._clock, rng=self._rng)
        self._task = asyncio.create_task(work, name="cache-follower")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._dirty and not self._failures:
            await self._flush(STOP_TIMEOUT_S)  # the next process starts from it

    def tell_errors(self, tell: Callable[[str], None]) -> None:
        """Has every failed write's error told to `tell`."""
        self._tell = tell

    def mark(self, server_ids: Iterable[str]) -> None:
        """Says that these servers changed, came or went."""
        now_s = self._clock.monotonic()
        for server_id in server_ids:
            self._dirty.setdefault(server_id, now_s)
        cause = trace.get_current_span().get_span_context()
        if cause.is_valid and len(self._causes) < MAX_CAUSES:
            self._causes.append(cause)
        self._wake.set()

    def mark_everything(self) -> None:
        """Says that nothing is known of what the store holds."""
        self._everything = True
        self._wake.set()

    def tick(self) -> None:
        """Once a second: starts the refresh when it is due."""
        now_s = self._clock.monotonic()
        if now_s < self._refresh_at:
            return
        self._refresh_at = now_s + REFRESH_INTERVAL_S
        written_before_s = now_s - REWRITE_AGE_S
        for server_id, written_s in self._written_at.items():
            if written_s <= written_before_s and server_id not in self._writing:
                self._dirty.setdefault(server_id, now_s)
        self._wake.set()

    async def probe(self) -> StoreProbe:
        """How the store is, and how far it is behind even when it does not answer."""
        started_s = self._clock.monotonic()
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                with suppress_instrumentation():
                    identity = await self._store.ping()
        except (TimeoutError, OpenManagerError) as error:
            reason = error.message if isinstance(error, OpenManagerError) else f"no answer within {PROBE_TIMEOUT_S} s"
            lag_points, lag_s = self.lag()
            return StoreProbe(address=self._store.address, lag_points=lag_points, lag_seconds=lag_s, down=reason)
        now_s = self._clock.monotonic()
        if self._life not in ("", identity.life):
            _log.info("%s was started again: everything is written again", identity.version)
            self.mark_everything()
        self._life = identity.life
        lag_points, lag_s = self.lag()
        degraded = self._last_error if self._failures else ""
        if not degraded and lag_s > MAX_LAG_S:
            degraded = f"{lag_s:.1f} s behind"
        return StoreProbe(
            address=self._store.address,
            server_version=identity.version,
            latency_ms=(now_s - started_s) * 1_000,
            lag_points=lag_points,
            lag_seconds=lag_s,
            degraded=degraded,
        )

    def lag(self) -> tuple[int, float]:
        """Values that the store does not have yet (absent ones counted), and how long the oldest has waited, in s."""
        waiting = self._writing | self._dirty
        if not waiting:
            return 0, 0.0
        states = (self._live.get(server_id) for server_id in waiting)
        oldest_s = min(next(iter(part.values())) for part in (self._writing, self._dirty) if part)
        return sum(state.cells for state in states if state is not None), self._clock.monotonic() - oldest_s

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            started_s = self._clock.monotonic()
            if await self._flush(FLUSH_TIMEOUT_S + FLUSH_TIMEOUT_PER_SERVER_S * len(self._live)):
                took_s = self._clock.monotonic() - started_s
                pause_s = max(FLUSH_INTERVAL_S, min(MAX_FLUSH_PAUSE_S, took_s / MAX_FLUSH_SHARE))
                await self._clock.sleep_until(started_s + pause_s)
            else:
                await self._clock.sleep(RETRY.delay_s(self._failures, self._rng))
                self._wake.set()

    async def _flush(self, timeout_s: float) -> bool:
        """Writes everything that waits; False when that failed, and it all waits again."""
        causes, self._causes = self._causes, []
        self._writing, self._dirty = self._dirty, {}
        everything, self._everything = self._everything, False
        try:
            async with asyncio.timeout(timeout_s):
                with _span(causes, len(self._writing)):
                    await self._write(everything)
        except (OpenManagerError, TimeoutError) as error:
            self._failed(error.message if isinstance(error, OpenManagerError) else f"no answer within {timeout_s:g} s")
            return False
        except BaseException:
            self._wait_again()
            raise
        if self._failures:
            _log.info("the store is back: everything current was written", extra={"store": self._store.address})
        self._writing, self._failures = {}, 0
        return True

    async def _write(self, everything: bool) -> None:
        ids = dict.fromkeys(self._live.ids()) | self._writing if everything else self._writing
        states, removed = [], []
        for server_id in ids:
            state = self._live.get(server_id)
            if state is None:
                removed.append(server_id)
            else:
                states.append(state)
        now_s = self._clock.monotonic()
        self._refresh_at = now_s + REFRESH_INTERVAL_S
        intact = await self._store.write(states, removed, self._live.fleet())
        if not intact and not everything:
            _log.info("the store has lost what it held: everything is written again")
            self.mark_everything()
        self._written_at.update((state.server_id, now_s) for state in states)
        for server_id in removed:
            self._written_at.pop(server_id, None)

    def _failed(self, text: str) -> None:
        self._wait_again()
        self._failures += 1
        self._last_error = text
        self._tell(text)
        if self._failures == 1:
            _log.warning("the store is away, memory goes on: %s", text, extra={"store": self._store.address})

    def _wait_again(self) -> None:
        later = {server_id: since for server_id, since in self._dirty.items() if server_id not in self._writing}
        self._dirty, self._writing = self._writing | later, {}
        self._everything = True


@contextmanager
def _span(causes: list[trace.SpanContext], servers: int) -> Iterator[None]:
    """A child of the first update that caused the write, linked to the others; no span when nobody asked."""
    if not causes:
        with suppress_instrumentation():
            yield
        return
    parent = trace.set_span_in_context(trace.NonRecordingSpan(causes[0]))
    links = [trace.Link(cause) for cause in causes[1:]]
    attributes = {"openmanager.servers": servers}
    with _tracer.start_as_current_span("cache.follow", context=parent, links=links, attributes=attributes):
        yield
