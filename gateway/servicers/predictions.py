"""Which servers are about to fail: analytics is asked about those that match and are seen; then it is paged.

What must stay true: analytics is asked about servers that the caller sees and about no other.
"""

from typing import Final

from fleet import access
from gateway.changes import Wanted
from gateway.entry import BASIC
from gateway.state import FleetState
from openmanager.analytics.v1 import prediction_pb2, prediction_pb2_grpc
from openmanager.fleet.v1.prediction_pb2 import Prediction
from openmanager.gateway.v1 import analytics_pb2 as pb
from runtime import paging
from runtime.channel import Channel, calling

LISTING: Final = "predictions"


class PredictionsServicer:
    """What is likely to fail."""

    def __init__(self, analytics: Channel, state: FleetState) -> None:
        self._stub = prediction_pb2_grpc.PredictionServiceStub(analytics.grpc)
        self._state = state

    async def ListPredictions(self, request: pb.ListPredictionsRequest, _context: object) -> pb.ListPredictionsResponse:
        size = paging.page_size(request.page_size)
        wanted = Wanted(BASIC, request.environment, request.role, access.scope())
        inner = prediction_pb2.ListPredictionsRequest(
            server_ids=[entry.id for entry in self._state.all() if wanted.has(entry)],
            min_probability=request.min_probability,
        )
        async with calling("analytics"):
            answer: prediction_pb2.ListPredictionsResponse = await self._stub.ListPredictions(inner)
        shown, token = paging.page_of(
            answer.predictions,
            _key,
            listing=LISTING,
            filters=[request.min_probability, request.environment, request.role],
            size=size,
            token=request.page_token,
        )
        return pb.ListPredictionsResponse(
            predictions=shown,
            next_page_token=token,
            total_size=len(answer.predictions),
            servers=answer.servers,
        )


def _key(prediction: Prediction) -> tuple[float, str]:
    """What a list is in order of."""
    return -prediction.probability, prediction.server_id
