"""The live state of the fleet, mirrored from the cache so that a read is a look-up.

The gateway subscribes to the cache. While the subscription is broken (the cache is restarted, say) the last known
state is served; how old it is shows in ``age_s``. What must stay true: a server's public messages are built once a
version and only when somebody reads them; a watcher holds a set of changed ids, never a queue of messages, so a slow
reader costs memory for the fleet and not for time.
"""

import asyncio
import math
from bisect import insort
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from fleet.codec import descriptor_from_pb, metric_set_from_pb
from fleet.model import HEADLINE_METRICS, MetricSet, ServerDescriptor
from openmanager.cache.v1 import cache_pb2, cache_pb2_grpc
from openmanager.fleet.v1 import status_pb2
from openmanager.gateway.v1 import fleet_pb2
from runtime.channel import Channel, calling
from runtime.clock import Clock
from runtime.errors import ResourceExhausted, Unavailable

MAX_WATCHERS = 5_000
STALE_AFTER_S = 45.0
"""The cache sends a message at least every second while servers report; beyond this age the state counts as old."""

Sets = dict[str, MetricSet]


class ServerEntry:
    """One version of one server, with its public messages, made when first read."""

    __slots__ = ("_basic", "_full", "_full_response", "_sets", "id", "state")

    def __init__(self, state: cache_pb2.ServerState, sets: Sets) -> None:
        self.id = state.descriptor.server_id
        self.state = state
        self._sets = sets
        self._basic: fleet_pb2.Server | None = None
        self._full: fleet_pb2.Server | None = None
        self._full_response: bytes | None = None

    @property
    def status(self) -> status_pb2.ServerStatus.ValueType:
        """How it is."""
        return self.state.status

    def view(self, view: fleet_pb2.ServerView.ValueType) -> fleet_pb2.Server:
        """The public message; FULL unless BASIC is asked for."""
        return self.basic if view == fleet_pb2.SERVER_VIEW_BASIC else self.full

    @property
    def basic(self) -> fleet_pb2.Server:
        """Identity, status, observed time and the headline metrics."""
        if self._basic is None:
            self._basic = self._identity()
            values = self._values()
            self._basic.metrics.update({name: values[name] for name in HEADLINE_METRICS if name in values})
        return self._basic

    @property
    def full(self) -> fleet_pb2.Server:
        """Everything."""
        if self._full is None:
            self._full = self._identity()
            self._full.metrics.update(self._values())
            if self.state.HasField("receive_time"):
                self._full.receive_time.CopyFrom(self.state.receive_time)
                self._full.clock_skew.CopyFrom(self.state.clock_skew)
        return self._full

    @property
    def full_response(self) -> bytes:
        """A serialized GetServerResponse with the full view: sent as it is."""
        if self._full_response is None:
            self._full_response = fleet_pb2.GetServerResponse(server=self.full).SerializeToString()
        return self._full_response

    def _identity(self) -> fleet_pb2.Server:
        descriptor = self.state.descriptor
        message = fleet_pb2.Server(
            id=descriptor.server_id,
            hostname=descriptor.hostname,
            environment=descriptor.environment,
            role=descriptor.role,
            location=descriptor.location,
            status=self.state.status,
        )
        if self.state.HasField("observed_time"):
            message.observed_time.CopyFrom(self.state.observed_time)
        return message

    def _values(self) -> dict[str, float]:
        merged: dict[str, float] = {}
        for sample in self.state.samples:
            keys = self._sets[sample.metric_set_id].keys
            values = np.array(sample.values).tolist()
            merged.update((key, value) for key, value in zip(keys, values, strict=True) if not math.isnan(value))
        return merged


@dataclass(slots=True, eq=False)
class Watcher:
    """What one reader has not seen yet: ids of changed and of removed servers, and whether it needs everything."""

    changed: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)
    everything: bool = True
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    async def next(self) -> tuple[bool, set[str], set[str]]:
        """Waits for a change; returns (everything, changed ids, removed ids) since the last time."""
        await self.wake.wait()
        self.wake.clear()
        news = (self.everything, self.changed, self.removed)
        self.everything, self.changed, self.removed = False, set(), set()
        return news


class FleetState:
    """The mirror. ``follow`` keeps it up to date for as long as it runs."""

    def __init__(self, cache: Channel, clock: Clock) -> None:
        self._stub = cache_pb2_grpc.CacheServiceStub(cache.grpc)
        self._clock = clock
        self._entries: dict[str, ServerEntry] = {}
        self._ids: list[str] = []
        self._watchers: set[Watcher] = set()
        self._received_s: float | None = None
        self._change = asyncio.Event()
        self.version = ""
        self.following = False

    async def follow(self, on_snapshot: Callable[[], None]) -> None:
        """Mirrors the cache until the subscription breaks.

        Args:
            on_snapshot: called each time the whole state has been received.

        Raises:
            OpenManagerError: the subscription broke; the state stays as it is.
        """
        sets: Sets = {}
        seen: set[str] | None = None
        try:
            async with calling("cache"):
                stream: AsyncIterator[cache_pb2.WatchServersResponse]
                stream = self._stub.WatchServers(cache_pb2.WatchServersRequest())
                async for message in stream:
                    sets.update((pb.id, metric_set_from_pb(pb)) for pb in message.metric_sets)
                    if message.snapshot and seen is None:
                        seen = set()
                    self._apply(message, sets, seen)
                    if seen is not None and not message.continues:
                        self._drop(self._entries.keys() - seen)
                        seen = None
                        self.following = True
                        on_snapshot()
                    self._tell_watchers()
        finally:
            self.following = False

    def _apply(self, message: cache_pb2.WatchServersResponse, sets: Sets, seen: set[str] | None) -> None:
        for state in message.states:
            entry = ServerEntry(state, sets)
            if seen is not None:
                seen.add(entry.id)
            if entry.id not in self._entries:
                insort(self._ids, entry.id)
            self._entries[entry.id] = entry
            for watcher in self._watchers:
                watcher.changed.add(entry.id)
                watcher.removed.discard(entry.id)
        self._drop(message.removed_server_ids)
        self.version = f"{message.version.epoch}-{message.version.sequence}"
        self._received_s = self._clock.monotonic()

    def _drop(self, ids: Iterable[str]) -> None:
        for server_id in list(ids):
            if self._entries.pop(server_id, None) is not None:
                self._ids.remove(server_id)
                for watcher in self._watchers:
                    watcher.removed.add(server_id)
                    watcher.changed.discard(server_id)

    def _tell_watchers(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
        for watcher in self._watchers:
            if watcher.everything or watcher.changed or watcher.removed:
                watcher.wake.set()

    @property
    def known(self) -> bool:
        """Whether the fleet was ever received."""
        return self._received_s is not None

    @property
    def age_s(self) -> float:
        """Seconds since the cache was last heard; infinite when it never was."""
        return math.inf if self._received_s is None else self._clock.monotonic() - self._received_s

    def get(self, server_id: str) -> ServerEntry | None:
        """The server, or None.

        Raises:
            Unavailable: the fleet was never received.
        """
        self._check_known()
        return self._entries.get(server_id)

    def all(self) -> list[ServerEntry]:
        """Every server in order of id.

        Raises:
            Unavailable: the fleet was never received.
        """
        self._check_known()
        return [self._entries[server_id] for server_id in self._ids]

    def descriptor(self, server_id: str) -> ServerDescriptor | None:
        """What is known of a server; None for an unknown one."""
        entry = self._entries.get(server_id)
        return None if entry is None else descriptor_from_pb(entry.state.descriptor)

    def __contains__(self, server_id: object) -> bool:
        return server_id in self._entries

    async def until(self, condition: Callable[[], bool], within_s: float) -> bool:
        """Waits for the mirror to satisfy a condition; tells whether it did in time."""
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    await self._change.wait()
        except TimeoutError:
            return False
        return True

    @contextmanager
    def watching(self) -> Iterator[Watcher]:
        """Registers a watcher for the time of the block.

        Raises:
            ResourceExhausted: MAX_WATCHERS watch already.
            Unavailable: the fleet was never received.
        """
        self._check_known()
        if len(self._watchers) >= MAX_WATCHERS:
            raise ResourceExhausted(f"{MAX_WATCHERS} clients watch already (MAX_WATCHERS)")
        watcher = Watcher()
        watcher.wake.set()
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def _check_known(self) -> None:
        if not self.known:
            raise Unavailable("the live state has not been received from the cache yet", retry_after_s=1.0)
