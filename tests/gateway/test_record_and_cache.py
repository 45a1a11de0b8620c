"""A real cache beside a record that a test plays: what is recorded is shown, whatever failed meanwhile."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fleet.model import ServerDescriptor
from gateway.registry import Registry
from gateway.state import FleetState
from openmanager.cache.v1 import cache_pb2
from openmanager.fleet.v1 import metric_pb2
from openmanager.metadata.v1 import metadata_pb2
from runtime.channel import Channel
from runtime.clock import SystemClock
from runtime.errors import OpenManagerError, Unavailable
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from services.cache.core import Cache
from services.cache.servicer import CacheServicer
from services.cache.store_memory import MemoryStateStore
from tests.harness import eventually


class Record:
    """Every change of a server is a revision of it; those who watch are told when the test says so."""

    def __init__(self) -> None:
        self.servers: dict[str, metadata_pb2.ServerRecord] = {}
        self.told: asyncio.Queue[list[metadata_pb2.ServerRecord]] = asyncio.Queue()
        self.pages: list[asyncio.Event] = []
        """What a page waits for that was read already."""

    def change(self, server_id: str, **fields: str) -> metadata_pb2.ServerRecord:
        record = self.servers.setdefault(server_id, metadata_pb2.ServerRecord())
        record.descriptor.MergeFrom(metric_pb2.ServerDescriptor(server_id=server_id, hostname=server_id, **fields))
        record.details.revision += 1
        return self._read(server_id)

    def tell(self, *server_ids: str) -> None:
        self.told.put_nowait([self._read(server_id) for server_id in server_ids])

    def _read(self, server_id: str) -> metadata_pb2.ServerRecord:
        return metadata_pb2.ServerRecord.FromString(self.servers[server_id].SerializeToString())

    async def ListServerRecords(
        self, request: metadata_pb2.ListServerRecordsRequest, _context: Any
    ) -> metadata_pb2.ListServerRecordsResponse:
        wanted = request.server_ids or sorted(self.servers)
        response = metadata_pb2.ListServerRecordsResponse(servers=[self._read(one) for one in wanted])
        if self.pages:
            await self.pages.pop().wait()
        return response

    async def GetServerRecord(
        self, request: metadata_pb2.GetServerRecordRequest, _context: Any
    ) -> metadata_pb2.GetServerRecordResponse:
        return metadata_pb2.GetServerRecordResponse(server=self._read(request.server_id))

    async def UpdateServerRecord(
        self, request: metadata_pb2.UpdateServerRecordRequest, _context: Any
    ) -> metadata_pb2.UpdateServerRecordResponse:
        said = request.descriptor
        return metadata_pb2.UpdateServerRecordResponse(server=self.change(said.server_id, environment=said.environment))

    async def DeleteServerRecord(
        self, request: metadata_pb2.DeleteServerRecordRequest, _context: Any
    ) -> metadata_pb2.DeleteServerRecordResponse:
        self.servers[request.server_id].delete_time.GetCurrentTime()
        return metadata_pb2.DeleteServerRecordResponse(server=self.change(request.server_id))

    async def UndeleteServerRecord(
        self, request: metadata_pb2.UndeleteServerRecordRequest, _context: Any
    ) -> metadata_pb2.UndeleteServerRecordResponse:
        self.servers[request.server_id].ClearField("delete_time")
        return metadata_pb2.UndeleteServerRecordResponse(server=self.change(request.server_id))

    async def WatchServerRecords(
        self, _request: metadata_pb2.WatchServerRecordsRequest, _context: Any
    ) -> AsyncIterator[metadata_pb2.WatchServerRecordsResponse]:
        while True:
            yield metadata_pb2.WatchServerRecordsResponse(servers=await self.told.get())


class Servicer(CacheServicer):
    """The cache's, which takes nothing while it `is_away`."""

    is_away = False

    async def UpdateServers(
        self, request: cache_pb2.UpdateServersRequest, context: Any
    ) -> cache_pb2.UpdateServersResponse:
        if self.is_away:
            raise Unavailable("away")
        return await super().UpdateServers(request, context)


class Writer:
    async def tell_servers(self, servers: Sequence[ServerDescriptor]) -> None:
        """Nobody keeps history here."""


class Product:
    def __init__(self, record: Record, cache: Servicer, state: FleetState, registry: Registry) -> None:
        self.record = record
        self.cache = cache
        self.state = state
        self.registry = registry

    def shown(self) -> dict[str, str]:
        """Environments by id."""
        return {entry.id: entry.place[0] for entry in self.state.all()} if self.state.known else {}


async def _again_and_again(work: Any) -> None:
    while True:
        try:
            await work()
        except OpenManagerError:
            await asyncio.sleep(0.05)


@asynccontextmanager
async def product() -> AsyncIterator[Product]:
    clock, record = SystemClock(), Record()
    async with AsyncExitStack() as stack:
        cache = await stack.enter_async_context(Cache(MemoryStateStore(clock), clock, epoch="e", rng=random.Random(1)))
        servicer = Servicer(cache)
        channels = []
        for service, served in (("cache.v1.CacheService", servicer), ("metadata.v1.ServerRegistryService", record)):
            server = GrpcServer([bind(f"openmanager.{service}", served)], Interception())
            address = await server.start("127.0.0.1:0")
            stack.push_async_callback(server.stop, 0)
            channels.append(await stack.enter_async_context(Channel(address)))
        state = FleetState(channels[0], clock)
        registry = Registry(
            cache=channels[0],
            metadata=channels[1],
            writer=Writer(),  # type: ignore[arg-type]  # all that is asked of it
            state=state,
            clock=clock,
        )
        works = (lambda: state.follow(registry.snapshot_received), registry.seed, registry.follow_records)
        tasks = [asyncio.create_task(_again_and_again(work)) for work in works]
        try:
            yield Product(record, servicer, state, registry)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_server_that_was_restored_while_the_cache_was_away_is_shown_once_it_is_back() -> None:
    async with product() as live:
        live.record.change("a", environment="old")
        live.record.tell("a")
        await eventually(lambda: live.shown() == {"a": "old"})
        await live.registry.delete("a")
        assert live.shown() == {}
        live.cache.is_away = True
        await live.registry.undelete("a")
        live.cache.is_away = False
        await eventually(lambda: live.shown() == {"a": "old"})


async def test_a_change_that_the_next_one_overtook_is_shown_all_the_same() -> None:
    """Such as a file of servers that is imported, and a maintenance window for one of them at once."""
    async with product() as live:
        live.record.change("a", environment="old")
        live.record.tell("a")
        await eventually(lambda: live.shown() == {"a": "old"})
        live.record.change("a", environment="new")
        window = live.record.change("a")
        await live.registry.show_details("a", window.details)
        assert live.state.revision("a") == 3
        live.record.tell("a")
        await eventually(lambda: live.shown() == {"a": "new"})


async def test_a_server_that_is_restored_while_the_record_is_compared_stays() -> None:
    async with product() as live:
        live.record.change("a", environment="old")
        live.record.tell("a")
        await eventually(lambda: live.shown() == {"a": "old"})
        await live.registry.delete("a")
        page = asyncio.Event()
        live.record.pages.append(page)
        live.registry.snapshot_received()
        await eventually(lambda: not live.record.pages)
        await live.registry.undelete("a")
        sequence = live.state.sequence
        page.set()
        live.record.change("z", environment="last")
        live.registry.snapshot_received()
        await eventually(lambda: "z" in live.shown())
        assert live.shown() == {"a": "old", "z": "last"}
        assert [entry.sequence for entry in live.state.all()] == [sequence, sequence + 1], "it never went"
