"""``AnalyticsService`` of a gateway, with whatever a test plays behind it."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fleet.access import OPERATOR, Caller, Scope
from gateway.servicers.anomalies import AnomalyServicer
from gateway.servicers.outlook import SERVICE, analytics_servicer
from openmanager.cache.v1 import cache_pb2
from openmanager.gateway.v1 import analytics_pb2_grpc
from runtime.channel import Channel
from runtime.clock import SystemClock
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from tests.gateway.played_fleet import World, server_state, world

FLEET = (
    server_state("web-1", role="web", environment="production"),
    server_state("web-2", role="web", environment="production"),
    server_state("web-3", role="web", environment="staging"),
    server_state("db-1", role="db", environment="production"),
)


@contextlib.asynccontextmanager
async def analytics_gateway(
    behind: dict[str, object],
    *,
    servers: Sequence[cache_pb2.ServerState] = FLEET,
    scope: Scope | None = None,
    analytics: str | None = None,
) -> AsyncIterator[tuple[Any, World]]:
    """A stub of the gateway's service, and its fleet.

    Args:
        behind: servicers of metadata and analytics, by their services.
        servers: the fleet.
        scope: the caller's.
        analytics: where that is, if not there.
    """
    inner = GrpcServer([bind(service, servicer) for service, servicer in behind.items()], Interception())
    address = await inner.start("127.0.0.1:0")
    async with Channel(address) as metadata, Channel(analytics or address) as other, world(metadata) as made:
        made.cache.send(*servers, snapshot=True)
        assert await made.state.until(made.caught_up, 20.0)
        caller = Caller.of("ada", OPERATOR, "token", scope=scope)
        findings = AnomalyServicer(metadata, other, made.state, made.findings, SystemClock())
        outer = GrpcServer(
            [bind(SERVICE, analytics_servicer(other, made.state, findings))],
            Interception(lambda _method, _context: caller),
        )
        async with Channel(await outer.start("127.0.0.1:0")) as channel:
            yield analytics_pb2_grpc.AnalyticsServiceStub(channel.grpc), made
        await outer.stop(0)
    await inner.stop(0)
