"""A `FleetWriter` before servicers that a test brings, behind one real server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fleet.writer import FleetWriter
from runtime.channel import Channel
from runtime.clock import SystemClock
from runtime.interception import Interception
from runtime.server import GrpcServer, bind


@asynccontextmanager
async def writer_to(*, timeseries: object, cache: object, metadata: object) -> AsyncIterator[FleetWriter]:
    """Serves the three and writes to them."""
    services = [
        bind("openmanager.timeseries.v1.TimeSeriesService", timeseries),
        bind("openmanager.cache.v1.CacheService", cache),
        bind("openmanager.metadata.v1.ServerRegistryService", metadata),
    ]
    server = GrpcServer(services, Interception())
    address = await server.start("127.0.0.1:0")
    try:
        async with (
            Channel(address) as channel,
            FleetWriter(timeseries=[channel], cache=channel, metadata=channel, clock=SystemClock()) as writer,
        ):
            yield writer
    finally:
        await server.stop(1.0)
