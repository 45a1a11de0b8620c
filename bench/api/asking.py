"""`python -m bench.api.asking`: the gateway, but that GetServer asks the cache for every read and builds the answer.

What the live state is compared with; for the bench alone, so it is no setting of the product. It does as well as one
can that way: it mirrors nothing, and decodes a metric set once.
"""

import asyncio
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fleet.codec import metric_set_from_pb
from fleet.model import MetricSet
from gateway import __main__ as product
from gateway.servicers.fleet import FleetServicer
from gateway.settings import GatewaySettings
from gateway.state import FleetState
from openmanager.cache.v1 import cache_pb2, cache_pb2_grpc
from openmanager.gateway.v1 import fleet_pb2
from runtime.channel import Channel, calling
from runtime.clock import Clock
from runtime.process import run_process


class NoState(FleetState):
    """Mirrors nothing, and says that it is ready."""

    def __init__(self, cache: Channel, clock: Clock) -> None:
        super().__init__(cache, clock)
        self.cache: Any = cache_pb2_grpc.CacheServiceStub(cache.grpc)

    async def follow(self, on_snapshot: Callable[[], None]) -> None:
        """Never ends."""
        on_snapshot()
        await asyncio.Event().wait()

    @property
    def known(self) -> bool:
        """Nothing has to be received first."""
        return True


class AskingServicer(FleetServicer):
    """Answers GetServer from the cache."""

    def __init__(self, state: NoState, *rest: Any) -> None:
        super().__init__(state, *rest)
        self._cache = state.cache
        self._sets: dict[str, MetricSet] = {}

    async def GetServer(self, request: fleet_pb2.GetServerRequest, _context: object) -> Any:
        """The full view."""
        async with calling("cache"):
            answer = await self._cache.GetServerState(cache_pb2.GetServerStateRequest(server_id=request.id))
        for message in answer.metric_sets:
            if message.id not in self._sets:
                self._sets[message.id] = metric_set_from_pb(message)
        return fleet_pb2.GetServerResponse(server=_server(answer.state, self._sets))


def _server(state: cache_pb2.ServerState, sets: dict[str, MetricSet]) -> fleet_pb2.Server:
    descriptor = state.descriptor
    server = fleet_pb2.Server(
        id=descriptor.server_id,
        hostname=descriptor.hostname,
        environment=descriptor.environment,
        role=descriptor.role,
        location=descriptor.location,
        status=state.status,
        observed_time=state.observed_time,
        receive_time=state.receive_time,
        clock_skew=state.clock_skew,
    )
    for sample in state.samples:
        keys, values = sets[sample.metric_set_id].keys, np.array(sample.values).tolist()
        server.metrics.update({key: value for key, value in zip(keys, values, strict=True) if not math.isnan(value)})
    return server


if __name__ == "__main__":
    vars(product).update(FleetState=NoState, FleetServicer=AskingServicer)
    run_process("gateway", GatewaySettings, product.serve, prometheus=True)
