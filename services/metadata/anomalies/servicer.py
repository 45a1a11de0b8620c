"""gRPC to the record of findings and back: decode, call, encode. Every rule is in the store.

Who says something of a finding is told by the gateway (`runtime.caller`).
"""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from fleet.anomaly import anomaly_from_pb
from fleet.codec import us_from_timestamp
from openmanager.fleet.v1 import anomaly_pb2
from openmanager.metadata.v1 import anomaly_pb2 as pb
from runtime import caller
from runtime.errors import InvalidArgument
from runtime.interception import CallContext
from services.metadata.anomalies.query import AnomalyFilter
from services.metadata.anomalies.store import BATCH, AnomalyStore, Told

ANOMALY_STORE: Final = "openmanager.metadata.v1.AnomalyStoreService"
MAX_PART_BYTES: Final = 4 << 20
"""Of a message to a follower, but for one finding, which may be of 1.5 MB: 10 metrics whose labels are 64 KiB."""
_VERDICTS: Final[dict[int, str]] = {
    anomaly_pb2.ANOMALY_VERDICT_UNSPECIFIED: "none",
    anomaly_pb2.ANOMALY_VERDICT_REAL: "real",
    anomaly_pb2.ANOMALY_VERDICT_FALSE: "false",
}
_IS_REAL: Final = {"none": None, "real": True, "false": False}


class AnomalyStoreServicer:
    """``AnomalyStoreService`` on a store."""

    def __init__(self, store: AnomalyStore) -> None:
        self._store = store

    async def RecordAnomalies(self, request: pb.RecordAnomaliesRequest, _context: object) -> pb.RecordAnomaliesResponse:
        if len(request.anomalies) > BATCH:
            raise InvalidArgument(f"are more than {BATCH}", field="anomalies")
        await self._store.record([anomaly_from_pb(message) for message in request.anomalies])
        return pb.RecordAnomaliesResponse()

    async def QueryAnomalies(self, request: pb.QueryAnomaliesRequest, _context: object) -> pb.QueryAnomaliesResponse:
        page = await self._store.listing(_filter(request), page_size=request.page_size, page_token=request.page_token)
        response = pb.QueryAnomaliesResponse(
            anomalies=[known.to_pb() for known in page.items],
            next_page_token=page.next_page_token,
            total_size=page.total_size,
        )
        if page.stale_since is not None:
            response.stale_since.FromDatetime(page.stale_since)
        return response

    async def ReadAnomaly(self, request: pb.ReadAnomalyRequest, _context: object) -> pb.ReadAnomalyResponse:
        return pb.ReadAnomalyResponse(anomaly=(await self._store.get(request.id)).to_pb())

    async def RemarkOnAnomaly(
        self, request: pb.RemarkOnAnomalyRequest, context: CallContext
    ) -> pb.RemarkOnAnomalyResponse:
        known = await self._store.remark(
            request.id,
            is_real=_IS_REAL[_verdict(request.verdict)],
            author=caller.told(context).name,
            comment=request.comment,
        )
        return pb.RemarkOnAnomalyResponse(anomaly=known.to_pb())

    async def FollowAnomalies(
        self, request: pb.FollowAnomaliesRequest, _context: object
    ) -> AsyncGenerator[pb.FollowAnomaliesResponse, None]:
        if request.after_version < 0:
            raise InvalidArgument("is negative", field="after_version")
        async with aclosing(self._store.follow(request.after_version)) as told:
            async for one in told:
                for message in _messages(one):
                    yield message

    async def CountAnomalies(self, request: pb.CountAnomaliesRequest, _context: object) -> pb.CountAnomaliesResponse:
        counts = await self._store.count(_us(request.start_time, "start_time"))
        return pb.CountAnomaliesResponse(counts=[pb.AnomalyCount(**count) for count in counts])


def _messages(told: Told) -> Iterator[pb.FollowAnomaliesResponse]:
    """What a follower is told; where that is large in parts, of which each says how far it goes."""
    part: list[anomaly_pb2.Anomaly] = []
    size = 0
    for known in told.findings:
        anomaly = known.to_pb()
        if part and size + anomaly.ByteSize() > MAX_PART_BYTES:
            until = told.version if told.is_snapshot else us_from_timestamp(part[-1].update_time)
            yield pb.FollowAnomaliesResponse(
                version=until, snapshot=told.is_snapshot, continues=told.is_snapshot, anomalies=part
            )
            part, size = [], 0
        part.append(anomaly)
        size += anomaly.ByteSize()
    yield pb.FollowAnomaliesResponse(
        version=told.version,
        snapshot=told.is_snapshot,
        continues=told.continues,
        partial=told.is_partial,
        anomalies=part,
    )


def _filter(request: pb.QueryAnomaliesRequest) -> AnomalyFilter:
    return AnomalyFilter(
        server_id=request.server_id,
        start_us=_us(request.start_time, "start_time") if request.HasField("start_time") else None,
        end_us=_us(request.end_time, "end_time") if request.HasField("end_time") else None,
        detector=request.detector,
        metric=request.metric,
        min_score=request.min_score,
        open=request.open if request.HasField("open") else None,
        acknowledged=request.acknowledged if request.HasField("acknowledged") else None,
        verdict=_verdict(request.verdict) if request.HasField("verdict") else "",
        server_ids=tuple(request.server_ids) if request.within_server_ids else None,
    )


def _verdict(number: int) -> str:
    if number not in _VERDICTS:
        raise InvalidArgument("is none of real and false", field="verdict")
    return _VERDICTS[number]


def _us(message: Timestamp, field: str) -> int:
    try:
        return message.ToMicroseconds()
    except (OverflowError, ValueError):
        raise InvalidArgument("the time is outside of the years 1 to 9999", field=field) from None
