"""What was found abnormal, and what people say of it."""

from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Any, Final

from client.api import PAGE_SIZE, OpenManager
from client.history import timestamp
from openmanager.fleet.v1 import anomaly_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb

SERVICE: Final = "/openmanager.gateway.v1.AnalyticsService"


async def anomalies(
    manager: OpenManager,
    *,
    start: datetime | float | None = None,
    end: datetime | float | None = None,
    **filters: Any,
) -> AsyncGenerator[pb.ListAnomaliesResponse, None]:
    """Pages of findings, newest first.

    Args:
        manager: the gateway.
        start, end: only those with a part in `[start, end)`: datetimes with their zone, or seconds since the epoch.
        filters: fields of the request, such as server_id, metric, min_score, open, acknowledged, environment.
    """
    request = pb.ListAnomaliesRequest(
        page_size=PAGE_SIZE,
        start_time=None if start is None else timestamp(start),
        end_time=None if end is None else timestamp(end),
        **filters,
    )
    while True:
        raw = await manager.call(f"{SERVICE}/ListAnomalies", request.SerializeToString())
        page = pb.ListAnomaliesResponse.FromString(raw)
        yield page
        request.page_token = page.next_page_token
        if not request.page_token:
            return


async def anomaly(manager: OpenManager, anomaly_id: str) -> anomaly_pb2.Anomaly:
    """One finding."""
    request = pb.GetAnomalyRequest(id=anomaly_id)
    answer = await manager.call(f"{SERVICE}/GetAnomaly", request.SerializeToString())
    return pb.GetAnomalyResponse.FromString(answer).anomaly


async def acknowledge(manager: OpenManager, anomaly_id: str, comment: str = "") -> anomaly_pb2.Anomaly:
    """Says that the caller takes care of a finding; returns it."""
    request = pb.AcknowledgeAnomalyRequest(id=anomaly_id, comment=comment)
    answer = await manager.call(f"{SERVICE}/AcknowledgeAnomaly", request.SerializeToString())
    return pb.AcknowledgeAnomalyResponse.FromString(answer).anomaly


async def judge(manager: OpenManager, anomaly_id: str, *, is_real: bool, comment: str = "") -> anomaly_pb2.Anomaly:
    """Says whether something was wrong, which moves what is found later; returns the finding."""
    verdict = anomaly_pb2.ANOMALY_VERDICT_REAL if is_real else anomaly_pb2.ANOMALY_VERDICT_FALSE
    request = pb.FeedbackAnomalyRequest(id=anomaly_id, verdict=verdict, comment=comment)
    answer = await manager.call(f"{SERVICE}/FeedbackAnomaly", request.SerializeToString())
    return pb.FeedbackAnomalyResponse.FromString(answer).anomaly
