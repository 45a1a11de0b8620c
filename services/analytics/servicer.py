"""gRPC to the findings and back: decode, call, encode. Every rule is in ``findings``."""

from fleet.codec import ms_from_timestamp, timestamp_from_ms
from openmanager.analytics.v1 import analytics_pb2 as pb
from services.analytics.core import Analysis
from services.analytics.findings import Anomaly, Filter

ANOMALY_SERVICE = "openmanager.analytics.v1.AnomalyService"


class AnomalyServicer:
    """``AnomalyService`` on an analysis."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis

    async def QueryAnomalies(self, request: pb.QueryAnomaliesRequest, _context: object) -> pb.QueryAnomaliesResponse:
        wanted = Filter(
            server_id=request.server_id,
            start_ms=ms_from_timestamp(request.start_time) if request.HasField("start_time") else None,
            end_ms=ms_from_timestamp(request.end_time) if request.HasField("end_time") else None,
        )
        page = self._analysis.findings.list(wanted, page_size=request.page_size, page_token=request.page_token)
        return pb.QueryAnomaliesResponse(
            anomalies=[_anomaly(finding) for finding in page.findings],
            next_page_token=page.next_page_token,
            total_size=page.total_size,
            learned=self._analysis.detector.learned,
        )


def _anomaly(finding: Anomaly) -> pb.Anomaly:
    return pb.Anomaly(
        id=finding.id,
        server_id=finding.server_id,
        metric=finding.metric,
        start_time=timestamp_from_ms(finding.start_ms),
        end_time=None if finding.end_ms is None else timestamp_from_ms(finding.end_ms),
        peak_time=timestamp_from_ms(finding.peak_ms),
        score=finding.score,
        value=finding.value,
        expected_low=finding.expected_low,
        expected_high=finding.expected_high,
        detector=finding.detector,
    )
