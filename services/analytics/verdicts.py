"""Following what people say of findings, and which findings metadata takes for open.

What must stay true: each verdict is applied once, also over restarts: how far was followed is in the state, and a
verdict that is not newer is passed over; what was open when this service lost its memory, or found otherwise when it
read the tail again, is ended once the tail has come so far that it would be open here, too; so is the silence of a
server that is heard here, whoever found it: its rows went to another replica for a while, and are missed there now; and
so is silence that is older than any detector lets it become, for its server is gone and nobody would end it.
"""

from collections.abc import Sequence
from typing import Final

from fleet.anomaly import Anomaly, anomaly_from_pb
from fleet.codec import us_from_timestamp
from openmanager.fleet.v1 import anomaly_pb2
from openmanager.metadata.v1 import anomaly_pb2 as pb
from openmanager.metadata.v1 import anomaly_pb2_grpc
from runtime.channel import Channel, calling
from services.analytics import silence
from services.analytics.core import Analysis, Verdict

_IS_REAL: Final = {anomaly_pb2.ANOMALY_VERDICT_REAL: True, anomaly_pb2.ANOMALY_VERDICT_FALSE: False}


class VerdictFollower:
    """Feeds an analysis from metadata."""

    def __init__(self, metadata: Channel, analysis: Analysis) -> None:
        self._stub = anomaly_pb2_grpc.AnomalyStoreServiceStub(metadata.grpc)
        self._analysis = analysis

    async def follow(self) -> None:
        """Reads one stream to its end.

        Raises:
            OpenManagerError: the stream broke off; call again.
        """
        asked = pb.FollowAnomaliesRequest(after_version=self._analysis.verdicts_until)
        going_on: list[Anomaly] = []
        call = self._stub.FollowAnomalies(asked)
        try:
            async with calling("metadata"):
                async for message in call:
                    if not message.snapshot:
                        verdicts = _verdicts(message, after=self._analysis.verdicts_until)
                        await self._analysis.take_verdicts(verdicts, message.version)
                        self._take_changed([anomaly_from_pb(one) for one in message.anomalies])
                        continue
                    going_on += [anomaly_from_pb(one) for one in message.anomalies]
                    if not message.continues:
                        self._analysis.take_going_on(going_on)
                        await self._analysis.take_verdicts((), message.version)
                        going_on = []  # another may come in the same stream, when the database is back
        finally:
            call.cancel()

    def _take_changed(self, findings: Sequence[Anomaly]) -> None:
        self._analysis.take_over(one.id for one in findings if one.end_ms is not None)
        self._analysis.take_open(one for one in findings if one.end_ms is None and one.detector == silence.DETECTOR)


def _verdicts(message: pb.FollowAnomaliesResponse, after: int) -> list[Verdict]:
    """Those that were said after a time."""
    return [
        Verdict(finding=anomaly_from_pb(one), is_real=_IS_REAL[one.verdict])
        for one in message.anomalies
        if one.verdict in _IS_REAL and us_from_timestamp(one.verdict_remark.time) > after
    ]
