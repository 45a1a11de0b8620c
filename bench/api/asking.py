"""`python -m bench.api.asking`: the gateway, but that GetServer asks the cache for every read and builds the answer.

What the live state is compared with; for the bench alone, so it is no setting of the product. It does as well as one
can that way: it mirrors nothing, and decodes a metric set once.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from fleet.codec import metric_set_from_pb
from fleet.model import MetricSet
from gateway import __main__ as product
from gateway.entry import FULL, ServerEntry
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
        return ServerEntry(answer.state, self._sets, "", None).answer(FULL)


if __name__ == "__main__":
    vars(product).update(FleetState=NoState, FleetServicer=AskingServicer)
    run_process("gateway", GatewaySettings, product.serve, prometheus=True)
