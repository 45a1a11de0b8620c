"""gRPC to what is foretold: decode, call, encode.

What must stay true: it answers from the last minute as it is, in a thread, as 20,000 servers take longer than the event
loop may be held up; before the first minute after a start nothing is foretold of anybody.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from google.protobuf.duration_pb2 import Duration

from fleet.codec import timestamp_from_ms
from openmanager.analytics.v1 import prediction_pb2 as pb
from openmanager.fleet.v1 import prediction_pb2 as words
from runtime.clock import Clock
from runtime.errors import InvalidArgument, ResourceExhausted
from services.analytics.prediction.foresight import HORIZON_MS, Foresight, Kind, Prediction, Reason

PREDICTION_SERVICE: Final = "openmanager.analytics.v1.PredictionService"
MAX_SERVERS: Final = 20_000
STALE_MS: Final = 15 * 60_000
"""What was foretold so long ago is not told any more; so it is of a single resource (`climbs`)."""
_HORIZON: Final = Duration(seconds=HORIZON_MS // 1000)
_KINDS: Final = {kind: words.PredictionReasonKind.Value(f"PREDICTION_REASON_KIND_{kind.value}") for kind in Kind}


class PredictionServicer:
    """Answers ``openmanager.analytics.v1.PredictionService``."""

    def __init__(self, foresight: Callable[[], Foresight | None], clock: Clock) -> None:
        """`foresight`: what the last minute foretold."""
        self._foresight = foresight
        self._clock = clock

    async def ListPredictions(self, request: pb.ListPredictionsRequest, _context: object) -> pb.ListPredictionsResponse:
        if not 0.0 <= request.min_probability <= 1.0:  # also refuses NaN
            raise InvalidArgument("a probability is 0 to 1", field="min_probability")
        if len(request.server_ids) > MAX_SERVERS:
            raise ResourceExhausted(
                f"more than {MAX_SERVERS} servers (MAX_SERVERS): name an environment or a role", reason="MAX_SERVERS"
            )
        foresight = self._foresight()
        if foresight is None or foresight.end_ms <= self._clock.now_ms() - STALE_MS:
            return pb.ListPredictionsResponse()
        return await asyncio.to_thread(_answer, foresight, request)


def _answer(foresight: Foresight, request: pb.ListPredictionsRequest) -> pb.ListPredictionsResponse:
    predictions, watched = foresight.of(request.server_ids, request.min_probability)
    return pb.ListPredictionsResponse(predictions=[_prediction(one) for one in predictions], servers=watched)


def _prediction(one: Prediction) -> words.Prediction:
    return words.Prediction(
        server_id=one.server_id,
        probability=one.probability,
        horizon=_HORIZON,
        date=None if one.date_ms is None else timestamp_from_ms(one.date_ms),
        low=None if one.low_ms is None else timestamp_from_ms(one.low_ms),
        high=None if one.high_ms is None else timestamp_from_ms(one.high_ms),
        reasons=[_reason(reason) for reason in one.reasons],
        compute_time=timestamp_from_ms(one.computed_ms),
    )


def _reason(reason: Reason) -> words.PredictionReason:
    return words.PredictionReason(
        kind=_KINDS[reason.kind],
        metric=reason.metric,
        value=reason.value,
        limit=reason.limit,
        slope_per_hour=reason.slope_per_hour,
        date=None if reason.date_ms is None else timestamp_from_ms(reason.date_ms),
        probability=reason.probability,
        share=reason.share,
    )
