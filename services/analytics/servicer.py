"""gRPC to the detectors and back."""

from typing import Final

from openmanager.analytics.v1 import analytics_pb2 as pb
from services.analytics.core import Analysis

DETECTION_SERVICE: Final = "openmanager.analytics.v1.DetectionService"


class DetectionServicer:
    """``DetectionService`` on an analysis."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis

    async def GetLearned(self, request: pb.GetLearnedRequest, _context: object) -> pb.GetLearnedResponse:
        detector = self._analysis.detector
        learned = detector.learned_of(request.server_id) if request.server_id else detector.learned
        return pb.GetLearnedResponse(learned=learned)
