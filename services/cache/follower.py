"""Keeps a store up to date with the live state, whatever the store does.

Each changed server has one slot, its id; what is written is its state at that moment. So an outage of any length costs
one slot a server, and afterwards everything current is written, not everything that happened.

What must stay true: `mark` never waits and never fails; after a failed write, and when the store has lost what it held,
every server is written again; what is in the store does not expire while this runs; what the store has and we have not
seen is taken in and never overwritten; nothing is written about the whole fleet while others may not have been heard.
"""

import asyncio
import contextlib
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
from runtime.circuit import Circuit, is_open_error
from runtime.clock import Clock
from runtime.errors import OpenManagerError
from runtime.tasks import Backoff, cancel, run_forever
from services.cache.model import Fleet, Stored
from services.cache.peers import Peers
from services.cache.state import LiveState
from services.cache.store import StateStore, Written

REFRESH_INTERVAL_S: Final = 20.0
"""What is known of all servers is written at least this often; it expires after 60 s."""
REWRITE_AGE_S: Final = 120.0
"""A server that does not change is written again once it is older than this; it expires after 300 s."""
FLUSH_INTERVAL_S: Final = 0.25
"""The least time from one write to the next. A change after a longer pause is written at once."""
MAX_FLUSH_SHARE: Final = 0.5
"""The largest share of the time that is spent writing, where that asks for no pause over a second: each change costs
the same whenever it is written, so longer ones would only make data older."""
MAX_FLUSH_PAUSE_S: Final = 1.0
PART_SERVERS: Final = 100
"""Servers that are written together, before other work gets its turn; 10 ms of JSON."""
PART_TIMEOUT_S: Final = 5.0
SPREAD_OVER_SERVERS: Final = 2_000
SPREAD_PAUSE_S: Final = 0.032
MAX_SPREAD_S: Final = 8.0
"""A write of more servers than that goes out as a part each 32 ms, 20,000 servers in 6.4 s, so that a large fleet whose
rows come all at once does not stop other work; it takes no longer than 8 s, less than a tick."""
LIST_SERVERS_PER_S: Final = 4_000
MAX_LIST_PAUSE_S: Final = 5.0
"""What is known of all servers is written at most once for each 4,000 servers and second: twice a second for 2,000."""
MAX_REFUSED_S: Final = 2.0
"""So long a fleet that was not heard of may stand in the way; what was told takes milliseconds."""
STOP_TIMEOUT_S: Final = 1.0
MAX_LAG_S: Final = 5.0
"""Behind by more than this, or by two spreads where writes are spread, the store shows as degraded."""
PROBE_TIMEOUT_S: Final = 1.0
"""Less than a StoreMonitor waits, so that a hanging store still shows how far it is behind."""
MAX_CAUSES: Final = 32
"""Updates that one write's span names."""
RETRY: Final = Backoff(initial_s=0.1, max_s=2.0)

_log = logging.getLogger(__name__)
_tracer = telemetry.tracer("services.cache")


class Follower:
    """Writes what was marked, for as long as it is entered."""

    def __init__(
        self,
        store: StateStore,
        live: LiveState,
        circuit: Circuit,
        peers: Peers,
        clock: Clock,
        rng: random.Random,
        *,
        absorb: Callable[[Iterable[Stored]], None],
    ) -> None:
        """Prepares.

        Args:
            store: what is kept up to date.
            live: what it is to hold.
            circuit: before the store.
            peers: who know whether others were heard.
            clock: of the schedule.
            rng: jitter of the retries.
            absorb: takes in what the store has and we have not seen.
        """
        self._store = store
        self._live = live
        self._circuit = circuit
        self._peers = peers
        self._clock = clock
        self._rng = rng
        self._absorb = absorb
        self._dirty: dict[str, float] = {}  # id -> since when, monotonic; the oldest first
        self._writing: dict[str, float] = {}
        self._written_at: dict[str, float] = {}
        self._everything = False
        self._must_list = False
        self._listed_at = -MAX_LIST_PAUSE_S
        self._has_listed = False
        self._refused_since_s: float | None = None
        self._life = ""
        self._failures = 0
        self._last_error = ""
        self._refresh_at = clock.monotonic()
        self._wake = asyncio.Event()
        self._causes: list[trace.SpanContext] = []
        self._task: asyncio.Task[None] | None = None
        self._tell: Callable[[str], None] = lambda _text: None
        peers.on_current(self.list_again)

    async def __aenter__(self) -> Self:
        work = run_forever("cache-follower", self._run, RETRY, clock=self._clock, rng=self._rng)
        self._task = asyncio.create_task(work, name="cache-follower")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await cancel(self._task)
        if (self._dirty or self._must_list) and not self._failures:  # the next process starts from it
            self._listed_at = -MAX_LIST_PAUSE_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._round(spread=False)

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

    def list_again(self) -> None:
        """Says that the fleet is not what it was, though no server was marked."""
        self._must_list = True
        self._wake.set()

    def tick(self) -> None:
        """Once a second: starts the refresh when it is due."""
        now_s = self._clock.monotonic()
        if self._must_list:
            self._wake.set()
        if now_s < self._refresh_at:
            return
        self._refresh_at = now_s + REFRESH_INTERVAL_S
        written_before_s = now_s - REWRITE_AGE_S
        for server_id, written_s in self._written_at.items():
            if written_s <= written_before_s and server_id not in self._writing:
                self._dirty.setdefault(server_id, now_s)
        self.list_again()

    @property
    def is_failing(self) -> bool:
        """Whether the last write failed: others may be unable to tell what they heard, too."""
        return self._failures > 0

    async def probe(self) -> StoreProbe:
        """How the store is, and how far it is behind even when it does not answer."""
        started_s = self._clock.monotonic()
        try:
            with self._circuit.attempt():
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    with suppress_instrumentation():
                        identity = await self._store.ping()
        except (TimeoutError, OpenManagerError) as error:
            reason = error.message if isinstance(error, OpenManagerError) else f"no answer within {PROBE_TIMEOUT_S} s"
            lag_points, lag_s = self.lag()
            return StoreProbe(address=self._store.address, lag_points=lag_points, lag_seconds=lag_s, down=reason)
        now_s = self._clock.monotonic()
        if self._life not in ("", identity.life):
            _log.info("%s is another one than before: everything is written again", identity.version)
            self._peers.distrust()
            self.mark_everything()
        self._life = identity.life
        lag_points, lag_s = self.lag()
        degraded = identity.trouble or (self._last_error if self._failures else "")
        if not degraded and not self._peers.is_current and self._peers.last_error:
            degraded = f"what other replicas write is not heard: {self._peers.last_error}"
        max_lag_s = MAX_LAG_S if len(self._live) <= SPREAD_OVER_SERVERS else 2 * MAX_SPREAD_S
        if not degraded and lag_s > max_lag_s:
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
            busy_s = await self._round(spread=True)
            if not self._failures:
                pause_s = max(FLUSH_INTERVAL_S, min(MAX_FLUSH_PAUSE_S, busy_s / MAX_FLUSH_SHARE))
                await self._clock.sleep_until(started_s + pause_s)
            else:
                await self._clock.sleep(RETRY.delay_s(self._failures, self._rng))
                self._wake.set()

    async def _round(self, *, spread: bool) -> float:
        """Writes everything that waits, in parts; what fails waits again. Returns the seconds that it was at work."""
        causes, self._causes = self._causes, []
        self._writing, self._dirty = self._dirty, {}
        everything, self._everything = self._everything, False
        ids = list(dict.fromkeys(self._live.ids()) | self._writing if everything else self._writing)
        parts = [ids[at : at + PART_SERVERS] for at in range(0, len(ids), PART_SERVERS)] or [[]]
        pause_s = min(SPREAD_PAUSE_S, MAX_SPREAD_S / len(parts)) if spread and len(ids) > SPREAD_OVER_SERVERS else 0.0
        is_taken, error, busy_s = False, "", 0.0
        start_s = self._clock.monotonic()
        try:
            with _span(causes, len(ids)):
                for place, part in enumerate(parts):
                    if pause_s:
                        await self._clock.sleep_until(start_s + place * pause_s)
                    part_start_s = self._clock.monotonic()
                    fleet = self._fleet(changed=bool(ids)) if place == len(parts) - 1 else None
                    if part or fleet is not None:
                        written = await self._write_part(part, fleet, everything=everything)
                        error = written.error or error
                        is_taken |= len(written.newer) < len(part) or (fleet is not None and written.listed)
                    busy_s += self._clock.monotonic() - part_start_s
        except (OpenManagerError, TimeoutError) as raised:
            self._wait_again(everything=True)
            self._peers.distrust()
            error = raised.message if isinstance(raised, OpenManagerError) else f"no answer within {PART_TIMEOUT_S:g} s"
            self._failed(error, is_new=not (isinstance(raised, OpenManagerError) and is_open_error(raised)))
        except BaseException:
            self._wait_again(everything=True)
            raise
        else:
            self._wait_again(everything=False)
            if error:
                self._failed(error, is_new=True)
            elif self._failures and is_taken:  # what is refused as not seen might have failed all the same
                self._failures = 0
                _log.info("the store is back: everything current was written", extra={"store": self._store.address})
        return busy_s

    def _fleet(self, *, changed: bool) -> Fleet | None:
        """What to write of all servers; None when there is nothing to say, or it is not the time to say it."""
        self._must_list |= changed
        now_s = self._clock.monotonic()
        pause_s = min(MAX_LIST_PAUSE_S, len(self._live) / LIST_SERVERS_PER_S)
        if not self._must_list or not self._peers.is_current or now_s < self._listed_at + pause_s:
            return None
        self._listed_at, self._refresh_at = now_s, now_s + REFRESH_INTERVAL_S
        return self._live.fleet()

    async def _write_part(self, part: list[str], fleet: Fleet | None, *, everything: bool) -> Written:
        """Writes some servers as they are now; returns what came of it."""
        states = [stored for server_id in part if (stored := self._live.stored(server_id)) is not None]
        for server_id in part:
            if (since_s := self._dirty.pop(server_id, None)) is not None:  # it changed since the round began
                self._writing.setdefault(server_id, since_s)
        now_s = self._clock.monotonic()
        with self._circuit.attempt():
            async with asyncio.timeout(PART_TIMEOUT_S):
                written = await self._store.write(states, self._live.bases, fleet)
        self._note(written, states, set(part), now_s)
        if fleet is not None:
            self._must_list = not written.listed or bool(written.error)
            self._note_refusal(is_refused=not written.listed, now_s=now_s)
        if not everything and (written.lost or (self._has_listed and not written.intact)):
            _log.info("the store has lost what it held: everything is written again")
            self.mark_everything()
        self._has_listed |= fleet is not None
        return written

    def _note_refusal(self, *, is_refused: bool, now_s: float) -> None:
        """Whoever wrote the fleet may have died before telling: then everything is read, and nobody waits for it."""
        if not is_refused:
            self._refused_since_s = None
        elif self._refused_since_s is None:
            self._refused_since_s = now_s
        elif now_s - self._refused_since_s > MAX_REFUSED_S:
            self._refused_since_s = None
            self._peers.distrust()

    def _note(self, written: Written, states: Iterable[Stored], part: set[str], now_s: float) -> None:
        """Remembers what the store has now, and takes in what it had already."""
        others = {stored.server_id for stored in written.newer}
        failed = set(written.failed)
        for stored in states:
            if stored.server_id not in others and stored.server_id not in failed:
                self._live.bases[stored.server_id] = stored.version
                self._written_at[stored.server_id] = now_s
                if self._live.get(stored.server_id) is None:
                    self._written_at.pop(stored.server_id)
        for server_id in failed:
            self._writing.setdefault(server_id, now_s)
        for server_id in part - failed:
            self._writing.pop(server_id, None)
        if written.newer:
            self._absorb(written.newer)

    def _failed(self, text: str, *, is_new: bool) -> None:
        self._failures += 1
        self._last_error = text
        if is_new:
            self._tell(text)
        if self._failures == 1:
            _log.warning("the store is away, memory goes on: %s", text, extra={"store": self._store.address})

    def _wait_again(self, *, everything: bool) -> None:
        later = {server_id: since for server_id, since in self._dirty.items() if server_id not in self._writing}
        self._dirty, self._writing = self._writing | later, {}
        self._everything |= everything


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
