"""The cache as one thing: what the servicer calls, and the work that goes on by itself.

What must stay true: every change reaches the watchers and the follower; no call waits for the store.
"""

import asyncio
import logging
import math
import random
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

from opentelemetry.instrumentation.utils import suppress_instrumentation

from fleet.model import MetricSet
from fleet.status import StoreMonitor
from runtime.circuit import Circuit
from runtime.clock import Clock
from runtime.errors import NotFound, OpenManagerError
from runtime.tasks import Backoff, cancel, run_forever
from services.cache.follower import Follower
from services.cache.metric_sets import MetricSets
from services.cache.model import FleetSummary, ServerState, Stored
from services.cache.peers import Peers
from services.cache.state import LiveState, Outcome, Update
from services.cache.store import StateStore
from services.cache.watch import Watchers
from services.cache.wire import Encoder

SWEEP_INTERVAL_S: Final = 1.0
LOAD_TIMEOUT_S: Final = 2.0
"""How long a start waits for the store to be read back; what has come by then is used."""
STORE_PAUSES: Final = Backoff(initial_s=0.1, max_s=2.0)
"""Between two attempts at a store that is away, whoever makes them: its return shows within 2 s."""
CATCH_UP_S: Final = 5.0
"""So long after the store is back other replicas may still have to tell what they heard while it was away: they try
every 2 s, and what they hear goes out in parts."""
ROWS_PER_SLICE: Final = 250
"""Rows that are applied before other calls get their turn; 3-5 ms."""

_log = logging.getLogger(__name__)


class Cache:
    """The live state with its watchers and its follower. Enter it to read the store back and to start the work."""

    def __init__(self, store: StateStore, clock: Clock, *, epoch: str, rng: random.Random) -> None:
        """Joins the parts.

        Args:
            store: the follower's; closed when the cache is left.
            clock: of receive times, silence and the work's schedule.
            epoch: identifies this life of the process in every version.
            rng: jitter of the follower's retries.
        """
        self.clock = clock
        self.sets = MetricSets()
        self.encoder = Encoder()
        self._live = LiveState(clock, self.sets, epoch=epoch)
        self._watchers = Watchers(self._live, self.encoder, clock)
        self._store = store
        circuit = Circuit("Redis", clock, rng=rng, pauses=STORE_PAUSES)
        self._peers = Peers(store, self._live, circuit, clock, rng, absorb=self._absorb, missing=self._mark)
        self.follower = Follower(store, self._live, circuit, self._peers, clock, rng, absorb=self._absorb)
        self._sweeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._read_back()
        await self._peers.__aenter__()
        await self.follower.__aenter__()
        work = run_forever("cache-sweep", self._sweep_forever, clock=self.clock)
        self._sweeper = asyncio.create_task(work, name="cache-sweep")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._sweeper is not None:
                await cancel(self._sweeper)
            await self.follower.__aexit__(kind, error, trace)
            await self._peers.__aexit__(kind, error, trace)
        finally:
            await self._store.close()

    @property
    def is_current(self) -> bool:
        """Whether everything that other replicas wrote to the store is known here, but for what is on its way."""
        return self._peers.is_current

    def monitor(self, store_name: str | None) -> StoreMonitor:
        """The monitor of the follower's store under that name, of no store for None."""
        if store_name is None:
            return StoreMonitor("cache", {}, self.clock)
        monitor = StoreMonitor("cache", {store_name: ("follower", self.follower.probe)}, self.clock)
        self.follower.tell_errors(lambda text: monitor.record_error(store_name, text))
        return monitor

    async def update(self, update: Update, new_sets: Iterable[MetricSet] = ()) -> Outcome:
        """Learns sets and applies an update, a slice at a time.

        Raises:
            ResourceExhausted: there was no room for some servers, in metadata `limit`; all else is applied.
        """
        for metric_set in new_sets:
            self.sets.add(metric_set)
        changed: dict[str, None] = {}
        ignored = 0
        no_room: OpenManagerError | None = None
        for index, part in enumerate(_slices(update)):
            if index:
                await asyncio.sleep(0)
            outcome = self._live.update(part)
            self._publish(outcome.changed)
            changed.update(dict.fromkeys(outcome.changed))
            ignored += outcome.ignored_rows
            no_room = outcome.no_room or no_room
        if no_room is not None:
            raise no_room
        return Outcome(changed=tuple(changed), ignored_rows=ignored)

    def remove(self, server_ids: Sequence[str], revisions: Mapping[str, int] | None = None) -> int:
        """Forgets servers until they are admitted again; returns how many were there. `revisions`: of their records."""
        there = self._live.remove(server_ids, revisions)
        self.encoder.forget(server_ids)
        self._publish(server_ids)
        return there

    def get(self, server_id: str) -> ServerState:
        """One server's state.

        Raises:
            NotFound: it is unknown or removed.
        """
        state = self._live.get(server_id)
        if state is None:
            raise NotFound(f"there is no server {server_id[:255]!r}", field="server_id")
        return state

    def states(self) -> tuple[Sequence[ServerState], str, int]:
        """All states in order of id, with the epoch and the sequence that they are of."""
        return self._live.fleet().states, self._live.epoch, self._live.sequence

    def summary(self) -> FleetSummary:
        """Servers by status."""
        return self._live.summary()

    def watch(self) -> AsyncGenerator[bytes, None]:
        """Serialized WatchServersResponses, the first one a snapshot."""
        return self._watchers.watch()

    def _publish(self, server_ids: Iterable[str]) -> None:
        if server_ids:
            self._watchers.notify()
            self.follower.mark(server_ids)

    def _absorb(self, stored: Iterable[Stored], *, at_start: bool = False) -> None:
        """Takes in what others wrote, and has written what they lack."""
        absorbed = self._live.absorb(stored, at_start=at_start)
        if absorbed.changed:
            self.encoder.forget(server_id for server_id in absorbed.changed if self._live.is_removed(server_id))
            self._watchers.notify()
            self.follower.list_again()
        if absorbed.ahead:
            self.follower.mark(absorbed.ahead)

    def _mark(self, server_ids: Iterable[str]) -> None:
        self.follower.mark(server_ids)

    async def _read_back(self) -> None:
        try:
            with suppress_instrumentation():
                async with asyncio.timeout(LOAD_TIMEOUT_S), aclosing(self._store.differences({})) as parts:
                    async for part in parts:
                        self._absorb(part.found, at_start=True)
        except (OpenManagerError, TimeoutError) as error:
            text = str(error) or f"no answer within {LOAD_TIMEOUT_S:g} s"
            _log.warning("the store could not be read back: %s", text, extra={"servers": len(self._live)})
        if len(self._live):
            _log.info("%d servers were read back from the store", len(self._live))
        self.follower.mark_everything()

    async def _sweep_forever(self) -> None:
        deaf_until_s = -math.inf
        while True:
            await self.clock.sleep(SWEEP_INTERVAL_S)
            now_s = self.clock.monotonic()
            if self._peers.has_others and (not self._peers.is_current or self.follower.is_failing):
                deaf_until_s = now_s + CATCH_UP_S
            self._publish(self._live.sweep(deaf=now_s < deaf_until_s))
            self._peers.tick()
            self.follower.tick()


def _slices(update: Update) -> Iterator[Update]:
    """The update as several, each with at most ROWS_PER_SLICE rows of one batch; the descriptors come first."""
    if sum(len(rows.server_ids) for _, rows in update.batches) <= ROWS_PER_SLICE:
        yield update
        return
    yield replace(update, batches=())
    for metric_set, rows in update.batches:
        for start in range(0, len(rows.server_ids), ROWS_PER_SLICE):
            some = slice(start, start + ROWS_PER_SLICE)  # not `select`, which looks at all rows: 2 s for 100,000
            part = replace(
                rows,
                server_ids=rows.server_ids[some],
                times_ms=rows.times_ms[some].copy(),  # what is kept of a slice is not to hold the whole batch
                values=rows.values[some].copy(),
            )
            yield replace(update, descriptors=(), batches=((metric_set, part),), details={})
