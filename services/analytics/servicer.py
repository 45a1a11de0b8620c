"""gRPC to the detectors and back, and the report of how good all of it has been."""

from typing import Final

from fleet.codec import timestamp_from_ms
from openmanager.analytics.v1 import analytics_pb2 as pb
from openmanager.fleet.v1 import report_pb2
from runtime.clock import Clock
from services.analytics.core import Analysis
from services.analytics.outlook.tally import Tally

DETECTION_SERVICE: Final = "openmanager.analytics.v1.DetectionService"


class DetectionServicer:
    """``DetectionService`` on an analysis."""

    def __init__(self, analysis: Analysis, tally: Tally, clock: Clock) -> None:
        self._analysis = analysis
        self._tally = tally
        self._clock = clock

    async def GetLearned(self, request: pb.GetLearnedRequest, _context: object) -> pb.GetLearnedResponse:
        detector = self._analysis.detector
        if request.server_id:
            learned, partly = detector.learned_of(request.server_id), detector.is_partly_judged(request.server_id)
        else:
            learned, partly = detector.learned, detector.about().partly_judged > 0
        return pb.GetLearnedResponse(learned=learned, partly_judged=partly)

    async def ReportModels(self, _request: pb.ReportModelsRequest, _context: object) -> pb.ReportModelsResponse:
        detector, counters = self._analysis.detector, self._analysis.counters
        about = detector.about()
        detection = report_pb2.DetectionReport(
            learned=detector.learned,
            servers=about.servers,
            series=about.series,
            partly_judged_servers=about.partly_judged,
            state_bytes=about.state_bytes,
            minutes=counters.minutes,
            less_sensitive_servers=about.raised,
            more_sensitive_servers=about.lowered,
        )
        if counters.minutes:
            detection.time_per_minute.FromNanoseconds(round(counters.judged_s / counters.minutes * 1e9))
        report = report_pb2.ModelReport(
            detection=detection,
            forecasts=self._tally.forecasts(),
            capacities=self._tally.capacities(),
            compute_time=timestamp_from_ms(self._clock.now_ms()),
        )
        return pb.ReportModelsResponse(report=report)
