"""``AnalyticsService``: what analytics finds and foresees, for whoever sees the server.

Trends, capacity and forecasts of one server are forwarded byte for byte; of the fleet's list the gateway says which
servers are asked about, since only it knows them and their places.

What must stay true: analytics is asked about servers that the caller sees and about no other; of a server of the fleet
that has never reported the answer is that there are no data, as its history is empty.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from fleet import access
from fleet.codec import ms_from_timestamp
from gateway.changes import Wanted
from gateway.entry import BASIC
from gateway.servicers.anomalies import AnomalyServicer
from gateway.servicers.fleet import unknown_server
from gateway.servicers.forward import forwarded
from gateway.servicers.predictions import PredictionsServicer
from gateway.state import FleetState
from gateway.visible import sees
from openmanager.analytics.v1 import capacity_pb2, capacity_pb2_grpc
from openmanager.fleet.v1 import outlook_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb
from runtime import paging
from runtime.channel import Channel, calling
from runtime.errors import InvalidArgument, NotFound

SERVICE: Final = pb.DESCRIPTOR.services_by_name["AnalyticsService"]
DEFAULT_METRIC: Final = "disk_usage"
DEFAULT_LIMIT: Final = 90.0
"""What analytics takes; where it takes none it says so before it looks for the server."""
Request = pb.GetTrendRequest | pb.ForecastCapacityRequest | pb.ForecastMetricRequest
Answer = TypeVar("Answer", bound=Message)


def analytics_servicer(analytics: Channel, state: FleetState, findings: AnomalyServicer) -> object:
    """Answers ``openmanager.gateway.v1.AnalyticsService``; for `bind`."""
    outlook = OutlookServicer(analytics, state)
    own: dict[str, Callable[..., Any]] = {
        "ListAnomalies": findings.ListAnomalies,
        "GetAnomaly": findings.GetAnomaly,
        "AcknowledgeAnomaly": findings.AcknowledgeAnomaly,
        "FeedbackAnomaly": findings.FeedbackAnomaly,
        "WatchAnomalies": findings.WatchAnomalies,
        "GetModelReport": findings.GetModelReport,
        "GetTrend": outlook.GetTrend,
        "ForecastCapacity": outlook.ForecastCapacity,
        "ForecastMetric": outlook.ForecastMetric,
        "ListCapacity": outlook.ListCapacity,
        "ListPredictions": PredictionsServicer(analytics, state).ListPredictions,
    }
    return forwarded(SERVICE, "analytics", analytics, own=own)


class OutlookServicer:
    """What is to come."""

    def __init__(self, analytics: Channel, state: FleetState) -> None:
        self._forward: Any = forwarded(SERVICE, "analytics", analytics)
        self._stub = capacity_pb2_grpc.CapacityServiceStub(analytics.grpc)
        self._state = state

    async def GetTrend(self, request: pb.GetTrendRequest, context: object) -> bytes | pb.GetTrendResponse:
        nothing = outlook_pb2.Trend(server_id=request.server_id, metric=request.metric)
        return await self._of(self._forward.GetTrend, request, context, pb.GetTrendResponse(trend=nothing))

    async def ForecastCapacity(
        self, request: pb.ForecastCapacityRequest, context: object
    ) -> bytes | pb.ForecastCapacityResponse:
        nothing = outlook_pb2.Capacity(
            server_id=request.server_id,
            metric=request.metric,
            limit=request.limit if request.HasField("limit") else DEFAULT_LIMIT,
            falling=request.falling,
            growth=request.growth,
            reason=outlook_pb2.CAPACITY_REASON_NO_DATA,
        )
        answer = pb.ForecastCapacityResponse(capacity=nothing)
        return await self._of(self._forward.ForecastCapacity, request, context, answer)

    async def ForecastMetric(
        self, request: pb.ForecastMetricRequest, context: object
    ) -> bytes | pb.ForecastMetricResponse:
        nothing = outlook_pb2.Forecast(server_id=request.server_id, metric=request.metric)
        return await self._of(
            self._forward.ForecastMetric, request, context, pb.ForecastMetricResponse(forecast=nothing)
        )

    async def ListCapacity(self, request: pb.ListCapacityRequest, _context: object) -> pb.ListCapacityResponse:
        """Asks about the servers that match and that the caller sees; then pages."""
        size = paging.page_size(request.page_size)
        wanted = Wanted(BASIC, request.environment, request.role, access.scope())
        inner = capacity_pb2.RankCapacityRequest(
            server_ids=[entry.id for entry in self._state.all() if wanted.has(entry)],
            metric=request.metric or DEFAULT_METRIC,
            falling=request.falling,
            growth=request.growth,
            within=request.within,
        )
        if request.HasField("limit"):
            inner.limit = request.limit
        answer = await self._ranked(inner)
        shown, token = paging.page_of(
            answer.capacities,
            _key,
            listing="capacity",
            filters=[*_question(inner), request.environment, request.role],
            size=size,
            token=request.page_token,
        )
        return pb.ListCapacityResponse(
            capacities=shown,
            next_page_token=token,
            total_size=len(answer.capacities),
            others=answer.others,
            servers=answer.servers,
            pending_servers=answer.pending_servers,
            incomplete=answer.incomplete,
        )

    async def _ranked(self, inner: capacity_pb2.RankCapacityRequest) -> capacity_pb2.RankCapacityResponse:
        """What analytics says; but of a metric that none of the servers asked about has, to who sees some only, the
        same whether others have it or nobody has."""
        try:
            async with calling("analytics"):
                answer: capacity_pb2.RankCapacityResponse = await self._stub.RankCapacity(inner)
                return answer
        except InvalidArgument as error:
            known = (self._state.find(server_id) for server_id in inner.server_ids)
            if (
                access.scope() is None
                or error.field not in {"metric", "limit"}
                or any(entry is not None and entry.has_metric(inner.metric) for entry in known)
            ):
                raise
        count = len(inner.server_ids)
        nothing = outlook_pb2.CapacityCount(reason=outlook_pb2.CAPACITY_REASON_NO_DATA, series=count)
        return capacity_pb2.RankCapacityResponse(servers=count, others=[nothing] if count else [])

    async def _of(
        self, call: Callable[[Request, object], Awaitable[bytes]], request: Request, context: object, nothing: Answer
    ) -> bytes | Answer:
        """Of a server that the caller sees."""
        if not request.server_id:
            raise InvalidArgument("name a server", field="server_id")
        if not sees(self._state, request.server_id):
            raise unknown_server(request.server_id, "server_id")
        try:
            return await call(request, context)
        except NotFound as error:
            if error.reason != "SERVER_UNKNOWN":
                raise
            if request.server_id not in self._state:
                raise unknown_server(request.server_id, "server_id") from None
            return nothing  # in the fleet, but it has never reported


def _key(capacity: outlook_pb2.Capacity) -> tuple[int, str, str]:
    """What a list is in order of; of those past the limit 0."""
    when_ms = ms_from_timestamp(capacity.date) if capacity.HasField("date") else 0
    return when_ms, capacity.server_id, capacity.metric


def _question(asked: capacity_pb2.RankCapacityRequest) -> list[object]:
    return [
        asked.metric,
        asked.limit if asked.HasField("limit") else None,
        asked.falling,
        asked.growth,
        asked.within.seconds,
        asked.within.nanos,
    ]
