"""What senders tell a cache again that was restarted does not undo what the record, or others, say since."""

import random
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from fleet.model import ServerDescriptor, ServerDetails, WriteBatch
from fleet.writer import FleetWriter
from openmanager.metadata.v1 import metadata_pb2
from openmanager.timeseries.v1 import timeseries_pb2
from runtime.clock import SystemClock
from services.cache.core import Cache
from services.cache.servicer import CacheServicer
from services.cache.state import Update
from services.cache.store_memory import MemoryStateStore
from tests.cache.samples import HEADLINE, descriptor, rows_of
from tests.fleet.serving import writer_to
from tests.harness import eventually

RECORDED = ServerDetails(revision=2)


def cache_of_life(number: int) -> Cache:
    return Cache(MemoryStateStore(SystemClock()), SystemClock(), epoch=f"epoch-{number}", rng=random.Random(1))


class Others:
    """Timeseries and metadata, which take everything."""

    async def Append(self, _request: Any, _context: Any) -> timeseries_pb2.AppendResponse:
        return timeseries_pb2.AppendResponse()

    async def RegisterServers(self, _request: Any, _context: Any) -> metadata_pb2.RegisterServersResponse:
        return metadata_pb2.RegisterServersResponse()


def sender_to(servicer: CacheServicer) -> AbstractAsyncContextManager[FleetWriter]:
    return writer_to(timeseries=Others(), cache=servicer, metadata=Others())


@pytest.mark.parametrize("record_first", [True, False])
async def test_a_sender_tells_a_new_cache_nothing_that_was_changed_since(record_first: bool) -> None:
    said, other = descriptor("a", environment="staging"), descriptor("b")
    recorded = descriptor("a", environment="production")
    clock = SystemClock()

    async def send(writer: FleetWriter, *servers: ServerDescriptor) -> None:
        values = {"a": (1.0, 2.0, 3.0), "b": (4.0, 5.0, 6.0)}
        metric_set, rows = rows_of(HEADLINE, values, clock.now_ms())
        await writer.write(WriteBatch(metric_set=metric_set, rows=rows, servers=servers))

    async def change(cache: Cache) -> None:
        """As the gateway tells what an operator changed."""
        await cache.update(Update(descriptors=[recorded], details={"a": RECORDED}), [])

    def environments(cache: Cache) -> dict[str, str]:
        return {state.server_id: state.descriptor.environment for state in cache.states()[0] if state.samples}

    async with cache_of_life(1) as before, cache_of_life(2) as after:
        servicer = CacheServicer(before)
        async with sender_to(servicer) as writer:
            await send(writer, said, other)
            await eventually(lambda: environments(before) == {"a": "staging", "b": "production"})
            await change(before)
            servicer._cache = after
            if record_first:
                await change(after)
            await send(writer)
            await eventually(lambda: len(environments(after)) == 2, within_s=15)
            if not record_first:
                assert environments(after) == {"a": "staging", "b": "production"}, "better than nothing"
                await change(after)
            assert environments(after) == {"a": "production", "b": "production"}
            moved = descriptor("a", environment="test")
            await send(writer, moved)
            await eventually(lambda: environments(after)["a"] == "test")
