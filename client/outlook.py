"""What is to come: trends, dates at which limits are reached, and forecasts."""

from datetime import datetime
from typing import Final

from google.protobuf.duration_pb2 import Duration

from client.api import PAGE_SIZE, OpenManager
from client.history import timestamp
from openmanager.fleet.v1 import outlook_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb

SERVICE: Final = "/openmanager.gateway.v1.AnalyticsService"


async def trend(
    manager: OpenManager,
    server_id: str,
    metric: str,
    *,
    start: datetime | float | None = None,
    end: datetime | float | None = None,
) -> outlook_pb2.Trend:
    """What a metric did in `[start, end)`; default: the last 365 days."""
    request = pb.GetTrendRequest(
        server_id=server_id,
        metric=metric,
        start_time=None if start is None else timestamp(start),
        end_time=None if end is None else timestamp(end),
    )
    answer = await manager.call(f"{SERVICE}/GetTrend", request.SerializeToString())
    return pb.GetTrendResponse.FromString(answer).trend


async def capacity(
    manager: OpenManager,
    server_id: str,
    metric: str,
    *,
    limit: float | None = None,
    falling: bool = False,
    growth: float = 0.0,
) -> outlook_pb2.Capacity:
    """When a metric reaches a limit, or why that cannot be said.

    Args:
        manager: the gateway.
        server_id, metric: which.
        limit: in the metric's unit; default: 90 for a metric in percent.
        falling: it is reached from above.
        growth: what if it grew by so much more a day, 0.2 for 20 % more.
    """
    request = pb.ForecastCapacityRequest(
        server_id=server_id, metric=metric, limit=limit, falling=falling, growth=growth
    )
    answer = await manager.call(f"{SERVICE}/ForecastCapacity", request.SerializeToString())
    return pb.ForecastCapacityResponse.FromString(answer).capacity


async def fleet_capacity(
    manager: OpenManager,
    metric: str,
    *,
    limit: float | None = None,
    falling: bool = False,
    growth: float = 0.0,
    within_s: float = 0.0,
    environment: str = "",
    role: str = "",
) -> pb.ListCapacityResponse:
    """The servers that reach a limit within a span (default 30 days), all pages of them.

    There may be `pending_servers`, for which there was no time: ask again, and the gateway goes on with them.
    """
    request = pb.ListCapacityRequest(
        page_size=PAGE_SIZE,
        metric=metric,
        limit=limit,
        falling=falling,
        growth=growth,
        within=_duration(within_s),
        environment=environment,
        role=role,
    )
    whole: pb.ListCapacityResponse | None = None
    while True:
        raw = await manager.call(f"{SERVICE}/ListCapacity", request.SerializeToString())
        page = pb.ListCapacityResponse.FromString(raw)
        request.page_token = page.next_page_token
        if whole is None:
            whole = page
        else:
            whole.capacities.extend(page.capacities)
        if not request.page_token:
            whole.next_page_token = ""
            return whole


async def forecast(
    manager: OpenManager, server_id: str, metric: str, *, horizon_s: float = 0.0, step_s: float = 0.0
) -> outlook_pb2.Forecast:
    """What comes next of a metric; default: 7 days by the hour."""
    request = pb.ForecastMetricRequest(
        server_id=server_id, metric=metric, horizon=_duration(horizon_s), step=_duration(step_s)
    )
    answer = await manager.call(f"{SERVICE}/ForecastMetric", request.SerializeToString())
    return pb.ForecastMetricResponse.FromString(answer).forecast


def _duration(seconds: float) -> Duration | None:
    if not seconds:
        return None
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
