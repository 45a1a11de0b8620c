"""The gateway's fleet, fed by a cache that a test plays, and its watchers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fleet.codec import metric_set_to_pb
from fleet.model import Metric, MetricSet
from gateway.changes import Changes
from gateway.findings import Findings
from gateway.servicers.fleet import FleetServicer
from gateway.state import FleetState
from openmanager.cache.v1 import cache_pb2
from openmanager.fleet.v1 import metric_pb2, status_pb2
from openmanager.gateway.v1 import fleet_pb2
from runtime.channel import Channel
from runtime.clock import Clock, SystemClock
from runtime.errors import OpenManagerError, Unavailable
from runtime.interception import Interception
from runtime.prepared import Prepared
from runtime.server import GrpcServer, bind

SET = MetricSet(tuple(Metric(name=name) for name in ("cpu_usage", "memory_usage", "disk_usage", "other")))
NAN = float("nan")
HEALTHY, CRITICAL = status_pb2.SERVER_STATUS_HEALTHY, status_pb2.SERVER_STATUS_CRITICAL


def server_state(server_id: str, *values: float, **fields: Any) -> cache_pb2.ServerState:
    status = fields.pop("status", HEALTHY)
    descriptor = metric_pb2.ServerDescriptor(server_id=server_id, hostname=server_id, **fields)
    state = cache_pb2.ServerState(descriptor=descriptor, status=status)
    if values:
        state.samples.add(metric_set_id=SET.id, values=values)
        state.observed_time.seconds = 1_700_000_000
        state.receive_time.seconds = 1_700_000_001
    return state


class PlayedCache:
    """Sends what a test puts into ``messages``; ``cut`` breaks the stream off. Asked, it gives the
    ``answer`` of that moment, once it ``may_answer``."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[cache_pb2.WatchServersResponse | None] = asyncio.Queue()
        self.refuses_watchers = False
        self.subscriptions = self.watchers = 0  # in all, and now
        self.answer: cache_pb2.WatchServersResponse | None = None
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.epoch = "e"
        self.sequence = 0

    def send(self, *states: cache_pb2.ServerState, removed: tuple[str, ...] = (), **fields: Any) -> None:
        self.messages.put_nowait(self.message(*states, removed=removed, **fields))

    def message(
        self, *states: cache_pb2.ServerState, removed: tuple[str, ...] = (), **fields: Any
    ) -> cache_pb2.WatchServersResponse:
        for state in states:
            self.sequence += 1
            state.sequence = self.sequence
        self.sequence += len(removed)
        return cache_pb2.WatchServersResponse(
            version=cache_pb2.Version(epoch=self.epoch, sequence=self.sequence),
            states=states,
            removed_server_ids=removed,
            metric_sets=[metric_set_to_pb(SET)],
            **fields,
        )

    def cut(self) -> None:
        self.messages.put_nowait(None)

    def skip(self, changes: int) -> None:
        """As many changes went by before anybody watched."""
        self.sequence += changes

    def restart(self) -> None:
        self.epoch, self.sequence = f"{self.epoch}e", 0

    async def WatchServers(
        self, _request: cache_pb2.WatchServersRequest, _context: Any
    ) -> AsyncIterator[cache_pb2.WatchServersResponse]:
        if self.refuses_watchers:
            raise Unavailable("no more watchers")
        self.subscriptions += 1
        self.watchers += 1
        try:
            while (message := await self.messages.get()) is not None:
                yield message
        finally:
            self.watchers -= 1
        raise Unavailable("cut")

    async def ListServerStates(
        self, _request: cache_pb2.ListServerStatesRequest, _context: Any
    ) -> cache_pb2.ListServerStatesResponse:
        self.asked += 1
        answer = self.answer
        await self.may_answer.wait()
        if answer is None:
            raise Unavailable("away")
        return cache_pb2.ListServerStatesResponse(
            states=reversed(answer.states), metric_sets=answer.metric_sets, version=answer.version
        )


class Said:
    """The context of a call."""

    def __init__(self) -> None:
        self.trailers: dict[str, str] = {}

    def set_trailing_metadata(self, metadata: Any) -> None:
        self.trailers = dict(metadata)


class World:
    """A mirror that follows a played cache, and the public servicer on top of it."""

    def __init__(self, cache: PlayedCache, state: FleetState, findings: Findings) -> None:
        self.cache = cache
        self.state = state
        self.findings = findings
        changes = Changes(state, findings, SystemClock())
        self.servicer = FleetServicer(state, None, changes, None)  # type: ignore[arg-type]  # no changes
        self.context = Said()
        self.snapshots = 0

    async def follow(self) -> None:
        while True:
            try:
                await self.state.follow(self._snapshot)
            except OpenManagerError:
                await asyncio.sleep(0.01)

    def _snapshot(self) -> None:
        self.snapshots += 1

    def caught_up(self) -> bool:
        return (self.state.epoch, self.state.sequence) == (self.cache.epoch, self.cache.sequence)

    def ids(self) -> list[str]:
        return [entry.id for entry in self.state.all()] if self.state.known else []

    async def list(self, **filters: Any) -> list[str]:
        return [server.id for server in (await self.page(**filters)).servers]

    async def page(self, **filters: Any) -> fleet_pb2.ListServersResponse:
        answer = await self.servicer.ListServers(fleet_pb2.ListServersRequest(**filters), self.context)
        return fleet_pb2.ListServersResponse.FromString(answer.data)

    async def get(self, server_id: str) -> Prepared:
        return await self.servicer.GetServer(fleet_pb2.GetServerRequest(id=server_id), self.context)

    @asynccontextmanager
    async def watch(self, **wanted: Any) -> AsyncIterator["Watch"]:
        async with aclosing(self.servicer.WatchFleet(fleet_pb2.WatchFleetRequest(**wanted), None)) as messages:
            yield Watch(messages)


class Watch:
    """A stream of changes as a client reads it."""

    def __init__(self, messages: Any) -> None:
        self._messages = messages
        self.known: dict[str, fleet_pb2.Server] = {}
        self.version = ""

    async def next(self) -> fleet_pb2.WatchFleetResponse:
        message = fleet_pb2.WatchFleetResponse.FromString((await anext(self._messages)).data)
        if message.snapshot:
            self.known.clear()
        self.known.update((server.id, server) for server in message.servers)
        for removed in message.removed:
            self.known.pop(removed.id, None)
        self.version = message.version
        return message


@asynccontextmanager
async def world(metadata: Channel | None = None, clock: Clock | None = None) -> AsyncIterator[World]:
    """`metadata`: where findings come from, once somebody follows them; `clock`: that of the mirror."""
    cache = PlayedCache()
    server = GrpcServer([bind("openmanager.cache.v1.CacheService", cache)], Interception())
    address = await server.start("127.0.0.1:0")
    async with Channel(address) as channel:
        state = FleetState(channel, clock or SystemClock())
        made = World(cache, state, Findings(metadata or channel, state, SystemClock()))
        task = asyncio.create_task(made.follow())
        try:
            yield made
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await server.stop(0.1)
