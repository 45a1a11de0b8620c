"""What the live state hears of the record when the cache begins anew; cache and metadata are played."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from gateway import registry as registry_module
from gateway.entry import ServerEntry
from gateway.registry import ASK_AGAIN_S, Registry
from openmanager.cache.v1 import cache_pb2
from openmanager.fleet.v1 import details_pb2, metric_pb2
from openmanager.metadata.v1 import metadata_pb2
from runtime.channel import Channel
from runtime.clock import ManualClock
from runtime.errors import InvalidArgument, ResourceExhausted
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from tests.harness import eventually


class Cache:
    def __init__(self) -> None:
        self.told: list[str] = []
        self.recorded: list[str] = []
        self.removed: list[str] = []
        self.most_removed = 0
        """In one request."""
        self.is_full = False
        """Until servers are removed."""

    async def UpdateServers(
        self, request: cache_pb2.UpdateServersRequest, _context: Any
    ) -> cache_pb2.UpdateServersResponse:
        assert not request.admit_removed
        if self.is_full:
            raise ResourceExhausted("no room", metadata={"limit": "MAX_SERVERS"})
        self.told += [server.server_id for server in request.servers]
        self.recorded += [recorded.server_id for recorded in request.details]
        return cache_pb2.UpdateServersResponse()

    async def RemoveServers(
        self, request: cache_pb2.RemoveServersRequest, _context: Any
    ) -> cache_pb2.RemoveServersResponse:
        self.removed += request.server_ids
        self.most_removed = max(self.most_removed, len(request.server_ids))
        self.is_full = False
        return cache_pb2.RemoveServersResponse(removed=len(request.server_ids))


class Metadata:
    """A page for each server; the last one is from a copy while `is_away`."""

    def __init__(self) -> None:
        self.is_away = False
        self.registered: list[tuple[str, str]] = []
        self.servers = {"known": False, "changed": False, "new": False, "gone": True, "restored": False}

    async def ListServerRecords(
        self, request: metadata_pb2.ListServerRecordsRequest, _context: Any
    ) -> metadata_pb2.ListServerRecordsResponse:
        place = int(request.page_token or 0)
        server_id, is_deleted = list(self.servers.items())[place]
        response = metadata_pb2.ListServerRecordsResponse()
        record = response.servers.add()
        record.descriptor.CopyFrom(metric_pb2.ServerDescriptor(server_id=server_id, environment="production"))
        record.details.revision = 2 if server_id == "changed" else 1
        if is_deleted:
            record.delete_time.seconds = 1
        if place + 1 < len(self.servers):
            response.next_page_token = str(place + 1)
        elif self.is_away:
            response.stale_since.seconds = 1
        return response

    async def RegisterServers(
        self, request: metadata_pb2.RegisterServersRequest, _context: Any
    ) -> metadata_pb2.RegisterServersResponse:
        assert not self.is_away
        self.registered += [(server.server_id, server.environment) for server in request.servers]
        return metadata_pb2.RegisterServersResponse()


class State:
    """Knows two servers, of each the first revision of its record, and two of which it knows no record."""

    known = True

    def revision(self, server_id: str) -> int | None:
        return {"known": 1, "changed": 1, "unrecorded": 0, "restored": 0}.get(server_id)

    def find(self, server_id: str) -> ServerEntry | None:
        return next((entry for entry in self.all() if entry.id == server_id), None)

    def __contains__(self, server_id: object) -> bool:
        return self.find(str(server_id)) is not None

    def all(self) -> list[ServerEntry]:
        states = [
            cache_pb2.ServerState(
                descriptor=metric_pb2.ServerDescriptor(server_id=server_id, environment="production"),
                details=details_pb2.ServerDetails(revision=self.revision(server_id)),
            )
            for server_id in ("changed", "known", "restored", "unrecorded")
        ]
        return [ServerEntry(state, {}, "epoch", None) for state in states]


@asynccontextmanager
async def registry_on(cache: Cache, metadata: Any, clock: ManualClock) -> AsyncIterator[Registry]:
    async with AsyncExitStack() as stack:
        channels = []
        for service, servicer in (("cache.v1.CacheService", cache), ("metadata.v1.ServerRegistryService", metadata)):
            server = GrpcServer([bind(f"openmanager.{service}", servicer)], Interception())
            address = await server.start("127.0.0.1:0")
            stack.push_async_callback(server.stop, 0)
            channels.append(await stack.enter_async_context(Channel(address)))
        yield Registry(
            cache=channels[0],
            metadata=channels[1],
            writer=None,  # type: ignore[arg-type]  # nothing is written
            state=State(),  # type: ignore[arg-type]  # all that is asked of it
            clock=clock,
        )


async def test_what_the_record_refuses_of_a_filter_is_called_as_the_caller_calls_it() -> None:
    class Refusing:
        async def ListServerRecords(
            self, _request: metadata_pb2.ListServerRecordsRequest, _context: Any
        ) -> metadata_pb2.ListServerRecordsResponse:
            raise InvalidArgument("longer than 63 bytes", field="labels")

    async with registry_on(Cache(), Refusing(), ManualClock()) as registry:
        with pytest.raises(InvalidArgument) as refused:
            await registry.deleted("", "", [("team", "x" * 64)], after_id="", size=1)
        assert refused.value.field == "label"


async def test_nobody_is_taken_out_on_the_word_of_a_copy() -> None:
    cache, metadata, clock = Cache(), Metadata(), ManualClock()
    async with registry_on(cache, metadata, clock) as registry:
        task = asyncio.create_task(registry.seed())
        metadata.is_away, metadata.servers["restored"] = True, True  # the copy does not know that it was restored
        registry.snapshot_received()
        await eventually(lambda: cache.told == ["changed", "new"])
        assert (cache.removed, cache.recorded) == ([], ["changed", "new"])
        await eventually(lambda: clock.sleepers == 1)
        assert cache.removed == []
        metadata.is_away, metadata.servers["restored"] = False, False
        clock.advance(ASK_AGAIN_S)
        await eventually(lambda: cache.removed == ["gone"])
        assert cache.told == ["changed", "new", "changed", "new", "restored"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_server_that_only_the_live_state_knows_is_recorded_once_the_record_is_back() -> None:
    """Its agent described it while the record was away, and the gateway that was to tell of it was restarted."""
    cache, metadata, clock = Cache(), Metadata(), ManualClock()
    metadata.is_away = True
    async with registry_on(cache, metadata, clock) as registry:
        task = asyncio.create_task(registry.seed())
        registry.snapshot_received()
        await eventually(lambda: clock.sleepers == 1)
        assert metadata.registered == [], "the copy may not know of it"
        metadata.is_away = False
        clock.advance(ASK_AGAIN_S)
        await eventually(lambda: metadata.registered)
        assert metadata.registered == [("unrecorded", "production")]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_any_number_of_deleted_servers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one message 65,000 of the longest ids were too many, and the cache was told of nothing any more."""
    monkeypatch.setattr(registry_module, "SEED_PAGE_SIZE", 2)
    cache, metadata = Cache(), Metadata()
    metadata.servers = dict.fromkeys("abcde", True)
    async with registry_on(cache, metadata, ManualClock()) as registry:
        task = asyncio.create_task(registry.seed())
        registry.snapshot_received()
        await eventually(lambda: cache.removed == list("abcde"))
        assert cache.most_removed == 2
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_cache_without_room_is_made_room_in_and_told_again() -> None:
    cache, metadata, clock = Cache(), Metadata(), ManualClock()
    cache.is_full = True
    async with registry_on(cache, metadata, clock) as registry:
        task = asyncio.create_task(registry.seed())
        registry.snapshot_received()
        await eventually(lambda: cache.removed == ["gone"] and clock.sleepers == 1)
        assert cache.told == []
        clock.advance(ASK_AGAIN_S)
        await eventually(lambda: cache.told == ["changed", "new", "restored"])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
