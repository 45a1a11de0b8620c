"""Findings for whoever sees their servers: metadata keeps them, and analytics says how much it has learned.

What must stay true: of a server that the caller does not see no finding is told, nor that there is one; while analytics
is away the findings are listed all the same.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration

from fleet import access
from fleet.codec import duration_from_ms, ms_from_duration, timestamp_from_ms
from gateway.changes import Wanted
from gateway.entry import BASIC
from gateway.findings import Findings
from gateway.servicers.fleet import unknown_server
from gateway.servicers.passing import inner_of
from gateway.state import FleetState
from gateway.visible import sees
from openmanager.analytics.v1 import analytics_pb2, analytics_pb2_grpc
from openmanager.fleet.v1 import anomaly_pb2, report_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb
from openmanager.metadata.v1 import anomaly_pb2 as metadata_pb2
from openmanager.metadata.v1 import anomaly_pb2_grpc
from runtime import caller
from runtime.channel import Channel, calling
from runtime.circuit import Circuit
from runtime.clock import Clock
from runtime.errors import DeadlineExceeded, InvalidArgument, NotFound, OpenManagerError, Unavailable

LEARNED_WITHIN_S: Final = 0.5
DAY_MS: Final = 86_400_000
DEFAULT_SPAN_DAYS: Final = 30
MAX_SPAN_DAYS: Final = 730
_FALSE_OR_REAL: Final = (anomaly_pb2.ANOMALY_VERDICT_REAL, anomaly_pb2.ANOMALY_VERDICT_FALSE)


class AnomalyServicer:
    """The part of ``openmanager.gateway.v1.AnalyticsService`` that is about findings."""

    def __init__(
        self, metadata: Channel, analytics: Channel, state: FleetState, findings: Findings, clock: Clock
    ) -> None:
        self._record = anomaly_pb2_grpc.AnomalyStoreServiceStub(metadata.grpc)
        self._detection = analytics_pb2_grpc.DetectionServiceStub(analytics.grpc)
        self._circuit = Circuit("analytics", clock)
        self._state = state
        self._findings = findings
        self._clock = clock

    async def ListAnomalies(self, request: pb.ListAnomaliesRequest, _context: object) -> pb.ListAnomaliesResponse:
        """A page, newest first."""
        if request.server_id and not sees(self._state, request.server_id):
            raise unknown_server(request.server_id, "server_id")
        inner = inner_of(request, metadata_pb2.QueryAnomaliesRequest)
        wanted = Wanted(BASIC, request.environment, request.role, access.scope())
        if not wanted.has_finding(None):
            inner.within_server_ids = True
            inner.server_ids.extend(entry.id for entry in self._state.all() if wanted.has(entry))
        learned = asyncio.ensure_future(self._learned(request.server_id))
        try:
            async with calling("metadata"):
                page: metadata_pb2.QueryAnomaliesResponse = await self._record.QueryAnomalies(inner)
            known = await learned
            return pb.ListAnomaliesResponse(
                anomalies=page.anomalies,
                next_page_token=page.next_page_token,
                total_size=page.total_size,
                learned=None if known is None else known.learned,
                stale_since=page.stale_since if page.HasField("stale_since") else None,
                partly_judged=known is not None and known.partly_judged,
            )
        finally:
            learned.cancel()

    async def _learned(self, server_id: str) -> analytics_pb2.GetLearnedResponse | None:
        """None while analytics does not answer."""
        try:
            with self._circuit.attempt():
                async with calling("analytics"):
                    answer: analytics_pb2.GetLearnedResponse = await self._detection.GetLearned(
                        analytics_pb2.GetLearnedRequest(server_id=server_id), timeout=LEARNED_WITHIN_S
                    )
        except OpenManagerError:  # the answer says it: `learned` is absent
            return None
        return answer

    async def GetAnomaly(self, request: pb.GetAnomalyRequest, _context: object) -> pb.GetAnomalyResponse:
        """One finding."""
        return pb.GetAnomalyResponse(anomaly=await self._seen(request.id))

    async def _seen(self, anomaly_id: str) -> anomaly_pb2.Anomaly:
        async with calling("metadata"):
            answer = await self._record.ReadAnomaly(metadata_pb2.ReadAnomalyRequest(id=anomaly_id))
        anomaly: anomaly_pb2.Anomaly = answer.anomaly
        if not sees(self._state, anomaly.server_id):
            raise NotFound(f"there is no finding {anomaly_id}", field="id")
        return anomaly

    async def AcknowledgeAnomaly(
        self, request: pb.AcknowledgeAnomalyRequest, context: Any
    ) -> pb.AcknowledgeAnomalyResponse:
        """Keeps that the caller takes care of it."""
        inner = metadata_pb2.RemarkOnAnomalyRequest(id=request.id, comment=request.comment)
        return pb.AcknowledgeAnomalyResponse(anomaly=await self._remark(inner, context))

    async def FeedbackAnomaly(self, request: pb.FeedbackAnomalyRequest, context: Any) -> pb.FeedbackAnomalyResponse:
        """Keeps whether it was real."""
        if request.verdict not in _FALSE_OR_REAL:
            raise InvalidArgument("say REAL or FALSE", field="verdict")
        inner = metadata_pb2.RemarkOnAnomalyRequest(id=request.id, comment=request.comment, verdict=request.verdict)
        return pb.FeedbackAnomalyResponse(anomaly=await self._remark(inner, context))

    async def _remark(self, request: metadata_pb2.RemarkOnAnomalyRequest, context: Any) -> anomaly_pb2.Anomaly:
        if access.scope() is not None:
            await self._seen(request.id)
        async with calling("metadata"):
            answer = await self._record.RemarkOnAnomaly(request, metadata=caller.metadata_of(caller.of(context)))
        anomaly: anomaly_pb2.Anomaly = answer.anomaly
        return anomaly

    async def GetModelReport(self, request: pb.GetModelReportRequest, _context: object) -> pb.GetModelReportResponse:
        """What analytics knows, and what metadata knows of the findings."""
        span_ms = _span_ms(request.span)
        async with calling("analytics"):
            answer = await self._detection.ReportModels(analytics_pb2.ReportModelsRequest())
        report: report_pb2.ModelReport = answer.report
        start_ms = max(0, self._clock.now_ms() - span_ms)
        report.detection.span.CopyFrom(duration_from_ms(span_ms))
        try:
            async with calling("metadata"):
                counted = await self._record.CountAnomalies(
                    metadata_pb2.CountAnomaliesRequest(start_time=timestamp_from_ms(start_ms))
                )
        except (Unavailable, DeadlineExceeded):  # the answer says it
            report.incomplete.append("metadata")
        else:
            report.detection.detectors.extend(_reported(count) for count in counted.counts)
        return pb.GetModelReportResponse(report=report)

    async def WatchAnomalies(
        self, request: pb.WatchAnomaliesRequest, _context: object
    ) -> AsyncGenerator[pb.WatchAnomaliesResponse, None]:
        """First what goes on, then what changes."""
        if request.server_id and not sees(self._state, request.server_id):
            raise unknown_server(request.server_id, "server_id")
        wanted = Wanted(BASIC, request.environment, request.role, access.scope())

        def wants(server_id: str) -> bool:
            return request.server_id in {"", server_id} and wanted.has_finding(self._state.find(server_id))

        by_place = not wanted.has_finding(None)
        watch = self._findings.watch(wants, request.after_version, by_place=by_place, mark=wanted.mark)
        async with aclosing(watch) as messages:
            async for message in messages:
                yield message


def _span_ms(span: Duration) -> int:
    if span == Duration():
        return DEFAULT_SPAN_DAYS * DAY_MS
    span_ms = ms_from_duration(span)
    if not 0 < span_ms <= MAX_SPAN_DAYS * DAY_MS:
        raise InvalidArgument(f"is none of up to {MAX_SPAN_DAYS} days", field="span")
    return span_ms


def _reported(count: metadata_pb2.AnomalyCount) -> report_pb2.DetectorReport:
    judged = count.said_real + count.said_false
    return report_pb2.DetectorReport(
        detector=count.detector,
        found=count.found,
        open=count.open,
        acknowledged=count.acknowledged,
        said_real=count.said_real,
        said_false=count.said_false,
        precision=count.said_real / judged if judged else None,
    )
