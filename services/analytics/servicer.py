"""gRPC to the findings and back: decode, call, encode. Every rule is in ``findings``."""

import asyncio
from typing import Final

from fleet.codec import ms_from_timestamp, timestamp_from_ms
from openmanager.analytics.v1 import analytics_pb2 as pb
from services.analytics.core import Analysis
from services.analytics.findings import Anomaly, Filter

_ENCODED_AT_ONCE: Final = 200
"""Findings between two turns of the event loop: 4 ms."""

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
        detector = self._analysis.detector
        page = self._analysis.findings.list(wanted, page_size=request.page_size, page_token=request.page_token)
        response = pb.QueryAnomaliesResponse(
            next_page_token=page.next_page_token,
            total_size=page.total_size,
            learned=detector.learned_of(request.server_id) if request.server_id else detector.learned,
        )
        for start in range(0, len(page.findings), _ENCODED_AT_ONCE):
            response.anomalies.extend(_anomaly(finding) for finding in page.findings[start : start + _ENCODED_AT_ONCE])
            await asyncio.sleep(0)
        return response


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
        contributions=[
            pb.Contribution(
                metric=part.metric,
                value=part.value,
                expected_low=part.expected_low,
                expected_high=part.expected_high,
                score=part.score,
            )
            for part in finding.contributions
        ],
    )
