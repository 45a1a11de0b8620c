"""The mirror of the live state and what clients see of it: against a cache that is played, over real gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from fleet.codec import metric_set_to_pb
from fleet.model import Metric, MetricSet
from gateway.servicers.fleet import FleetServicer
from gateway.state import FleetState
from openmanager.cache.v1 import cache_pb2
from openmanager.fleet.v1 import metric_pb2, status_pb2
from openmanager.gateway.v1 import fleet_pb2
from runtime.channel import Channel
from runtime.clock import SystemClock
from runtime.errors import InvalidArgument, NotFound, OpenManagerError, Unavailable
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from tests.harness import eventually

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
    """Sends what a test puts into ``messages``; ``cut`` breaks the stream off."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[cache_pb2.WatchServersResponse | None] = asyncio.Queue()
        self._sequence = 0

    def send(self, *states: cache_pb2.ServerState, removed: tuple[str, ...] = (), **fields: Any) -> None:
        self._sequence += 1
        self.messages.put_nowait(
            cache_pb2.WatchServersResponse(
                version=cache_pb2.Version(epoch="e", sequence=self._sequence),
                states=states,
                removed_server_ids=removed,
                metric_sets=[metric_set_to_pb(SET)],
                **fields,
            )
        )

    def cut(self) -> None:
        self.messages.put_nowait(None)

    async def WatchServers(
        self, _request: cache_pb2.WatchServersRequest, _context: Any
    ) -> AsyncIterator[cache_pb2.WatchServersResponse]:
        while (message := await self.messages.get()) is not None:
            yield message
        raise Unavailable("cut")


class World:
    """A mirror that follows a played cache, and the public servicer on top of it."""

    def __init__(self, cache: PlayedCache, state: FleetState) -> None:
        self.cache = cache
        self.state = state
        self.servicer = FleetServicer(state, None)  # type: ignore[arg-type]  # changes are not tried here
        self.snapshots = 0

    async def follow(self) -> None:
        while True:
            try:
                await self.state.follow(self._snapshot)
            except OpenManagerError:
                continue

    def _snapshot(self) -> None:
        self.snapshots += 1

    def ids(self) -> list[str]:
        return [entry.id for entry in self.state.all()] if self.state.known else []

    async def list(self, **filters: Any) -> list[str]:
        response = await self.servicer.ListServers(fleet_pb2.ListServersRequest(**filters), None)
        return [server.id for server in response.servers]


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    cache = PlayedCache()
    server = GrpcServer([bind("openmanager.cache.v1.CacheService", cache)], Interception())
    address = await server.start("127.0.0.1:0")
    async with Channel(address) as channel:
        made = World(cache, FleetState(channel, SystemClock()))
        task = asyncio.create_task(made.follow())
        try:
            yield made
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await server.stop(0.1)


async def test_before_the_first_snapshot_reads_say_so() -> None:
    async with world() as w:
        with pytest.raises(Unavailable):
            await w.list()


async def test_a_snapshot_and_changes_are_mirrored() -> None:
    async with world() as w:
        w.cache.send(server_state("b", 1, 2, 3, 4), server_state("a", 5, NAN, 7, 8), snapshot=True)
        await eventually(lambda: w.ids() == ["a", "b"])
        full = fleet_pb2.GetServerResponse.FromString(await get(w, "a")).server
        assert dict(full.metrics) == {"cpu_usage": 5, "disk_usage": 7, "other": 8}, "NaN is no value"
        basic = (await w.servicer.ListServers(fleet_pb2.ListServersRequest(), None)).servers[0]
        assert dict(basic.metrics) == {"cpu_usage": 5, "disk_usage": 7}
        w.cache.send(server_state("a", 9, 9, 9, 9, status=CRITICAL), removed=("b",))
        await eventually(lambda: w.ids() == ["a"])
        assert await w.list(status=CRITICAL) == ["a"]
        assert await w.list(status=HEALTHY) == []
        with pytest.raises(NotFound):
            await get(w, "b")


async def get(w: World, server_id: str) -> bytes:
    response = await w.servicer.GetServer(fleet_pb2.GetServerRequest(id=server_id), None)
    assert isinstance(response, bytes)
    return response


async def test_a_large_snapshot_comes_in_parts_and_drops_nobody_before_its_end() -> None:
    async with world() as w:
        w.cache.send(server_state("a", 1, 1, 1, 1), server_state("gone", 1, 1, 1, 1), snapshot=True)
        await eventually(lambda: w.snapshots == 1)
        w.cache.cut()
        w.cache.send(server_state("a", 2, 2, 2, 2), snapshot=True, continues=True)
        await eventually(lambda: w.state.version.endswith("-2"))
        assert w.ids() == ["a", "gone"]
        assert w.snapshots == 1
        w.cache.send(server_state("c", 3, 3, 3, 3))
        await eventually(lambda: w.ids() == ["a", "c"])
        assert w.snapshots == 2


async def test_while_the_cache_is_away_the_last_state_is_served() -> None:
    async with world() as w:
        w.cache.send(server_state("a", 1, 1, 1, 1), snapshot=True)
        await eventually(lambda: w.state.following)
        w.cache.cut()
        await eventually(lambda: not w.state.following)
        assert w.ids() == ["a"]


async def test_a_slow_watcher_gets_the_latest_and_every_server() -> None:
    async with world() as w:
        w.cache.send(server_state("a", 1, 1, 1, 1), server_state("b", 1, 1, 1, 1), snapshot=True)
        await eventually(lambda: w.state.known)
        async with aclosing(w.servicer.WatchFleet(fleet_pb2.WatchFleetRequest(), None)) as watch:
            first = await anext(watch)
            assert (first.snapshot, len(first.servers)) == (True, 2)
            for value in range(2, 50):
                w.cache.send(server_state("a", value, 1, 1, 1))
            w.cache.send(server_state("b", 7, 1, 1, 1))
            await eventually(lambda: w.state.version.endswith("-50"))
            late = await anext(watch)
            values = {server.id: server.metrics["cpu_usage"] for server in late.servers}
            assert (late.snapshot, values) == (False, {"a": 49.0, "b": 7.0})


async def test_a_filtered_watcher_sees_a_server_leave() -> None:
    async with world() as w:
        w.cache.send(server_state("a", environment="x"), server_state("b", environment="y"), snapshot=True)
        await eventually(lambda: w.state.known)
        async with aclosing(w.servicer.WatchFleet(fleet_pb2.WatchFleetRequest(environment="x"), None)) as watch:
            assert [server.id for server in (await anext(watch)).servers] == ["a"]
            w.cache.send(server_state("b", environment="y"))  # of no interest
            w.cache.send(server_state("a", environment="y"))
            message = await anext(watch)
            assert ([one.id for one in message.removed], list(message.servers)) == (["a"], [])
            w.cache.send(server_state("b", environment="x"))
            assert [server.id for server in (await anext(watch)).servers] == ["b"]
            w.cache.send(removed=("b",))
            assert [one.id for one in (await anext(watch)).removed] == ["b"]


async def test_the_summary_adds_up() -> None:
    async with world() as w:
        offline = status_pb2.SERVER_STATUS_OFFLINE
        w.cache.send(
            server_state("a"), server_state("b", status=CRITICAL), server_state("c", status=offline), snapshot=True
        )
        await eventually(lambda: w.state.known)
        summary = (await w.servicer.GetFleetSummary(fleet_pb2.GetFleetSummaryRequest(), None)).summary
        assert (summary.total, summary.healthy, summary.warning, summary.critical, summary.offline) == (3, 1, 0, 1, 1)


async def test_pages_of_servers_follow_each_other() -> None:
    async with world() as w:
        w.cache.send(*(server_state(f"s{index}") for index in range(5)), snapshot=True)
        await eventually(lambda: w.state.known)
        first = await w.servicer.ListServers(fleet_pb2.ListServersRequest(page_size=3), None)
        assert (len(first.servers), first.total_size) == (3, 5)
        assert await w.list(page_size=3, page_token=first.next_page_token) == ["s3", "s4"]
        with pytest.raises(InvalidArgument):
            await w.list(page_token=first.next_page_token, role="web")
