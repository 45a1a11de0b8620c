"""A gateway for its callers, and metadata as a test plays it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fleet.access import Scope
from fleet.codec import timestamp_from_us
from openmanager.analytics.v1 import analytics_pb2
from openmanager.fleet.v1 import anomaly_pb2, report_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb
from openmanager.metadata.v1 import anomaly_pb2 as metadata_pb2
from runtime import caller
from runtime.channel import calling
from runtime.clock import SystemClock
from runtime.errors import InvalidArgument, NotFound, OpenManagerError, Unavailable
from services.analytics.servicer import DETECTION_SERVICE
from services.metadata.anomalies.servicer import ANOMALY_STORE
from tests.gateway.played_analytics import analytics_gateway
from tests.gateway.played_fleet import Watch, World, server_state
from tests.harness import eventually

WEBS = Scope.of((), ("web",), ())
"""Sees the web servers only."""
NOW_US = SystemClock().now_ms() * 1_000


def anomaly(name: str, server_id: str, at_us: int, *, over: bool = False) -> anomaly_pb2.Anomaly:
    """`at_us` after NOW_US it changed."""
    made = anomaly_pb2.Anomaly(id=name * 32, server_id=server_id, update_time=timestamp_from_us(NOW_US + at_us))
    if over:
        made.end_time.CopyFrom(timestamp_from_us(NOW_US))
    return made


class PlayedMetadata:
    """Says what it was asked, and tells followers what a test puts in."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.authors: list[str] = []
        self.known = [anomaly("a", "web-1", 1), anomaly("b", "db-1", 2)]
        self.told: asyncio.Queue[metadata_pb2.FollowAnomaliesResponse | None] = asyncio.Queue()
        self.followed_from: list[int] = []
        self.counts: list[metadata_pb2.AnomalyCount] | None = []

    def tell(
        self,
        *anomalies: anomaly_pb2.Anomaly,
        snapshot: bool = False,
        partial: bool = False,
        version: int | None = None,
    ) -> None:
        version = (
            max([NOW_US, *(one.update_time.ToMicroseconds() for one in anomalies)]) if version is None else version
        )
        self.told.put_nowait(
            metadata_pb2.FollowAnomaliesResponse(
                version=version, snapshot=snapshot, partial=partial, anomalies=anomalies
            )
        )

    def cut(self) -> None:
        self.told.put_nowait(None)

    async def QueryAnomalies(
        self, request: metadata_pb2.QueryAnomaliesRequest, _context: Any
    ) -> metadata_pb2.QueryAnomaliesResponse:
        self.asked.append(request)
        return metadata_pb2.QueryAnomaliesResponse(
            anomalies=self.known, next_page_token="next", total_size=7, stale_since=timestamp_from_us(NOW_US)
        )

    async def ReadAnomaly(
        self, request: metadata_pb2.ReadAnomalyRequest, _context: Any
    ) -> metadata_pb2.ReadAnomalyResponse:
        for one in self.known:
            if one.id == request.id:
                return metadata_pb2.ReadAnomalyResponse(anomaly=one)
        raise NotFound(f"there is no finding {request.id}", field="id")

    async def RemarkOnAnomaly(
        self, request: metadata_pb2.RemarkOnAnomalyRequest, context: Any
    ) -> metadata_pb2.RemarkOnAnomalyResponse:
        self.asked.append(request)
        self.authors.append(caller.told(context).name)
        read = await self.ReadAnomaly(metadata_pb2.ReadAnomalyRequest(id=request.id), context)
        return metadata_pb2.RemarkOnAnomalyResponse(anomaly=read.anomaly)

    async def FollowAnomalies(
        self, request: metadata_pb2.FollowAnomaliesRequest, _context: Any
    ) -> AsyncIterator[metadata_pb2.FollowAnomaliesResponse]:
        self.followed_from.append(request.after_version)
        while (message := await self.told.get()) is not None:
            yield message
        raise Unavailable("cut")

    async def GetLearned(
        self, request: analytics_pb2.GetLearnedRequest, _context: Any
    ) -> analytics_pb2.GetLearnedResponse:
        """Analytics' only part here."""
        learned = 0.25 if request.server_id else 0.5
        return analytics_pb2.GetLearnedResponse(learned=learned, partly_judged=request.server_id == "db-1")

    async def ReportModels(
        self, _request: analytics_pb2.ReportModelsRequest, _context: Any
    ) -> analytics_pb2.ReportModelsResponse:
        detection = report_pb2.DetectionReport(servers=20, learned=1.0)
        return analytics_pb2.ReportModelsResponse(report=report_pb2.ModelReport(detection=detection))

    async def CountAnomalies(
        self, request: metadata_pb2.CountAnomaliesRequest, _context: Any
    ) -> metadata_pb2.CountAnomaliesResponse:
        self.asked.append(request)
        if self.counts is None:
            raise Unavailable("away")
        return metadata_pb2.CountAnomaliesResponse(counts=self.counts)


class Gateway:
    """A gateway's caller, whose scope a test chooses, and the metadata behind it."""

    def __init__(self, metadata: PlayedMetadata, stub: Any, made: World) -> None:
        self.metadata = metadata
        self.world = made
        self.stub = stub

    async def list(self, **more: Any) -> pb.ListAnomaliesResponse:
        async with calling("gateway"):
            answer: pb.ListAnomaliesResponse = await self.stub.ListAnomalies(pb.ListAnomaliesRequest(**more))
            return answer

    async def refused(self, call: Any, **request: Any) -> tuple[str, str | None]:
        """Reason and field by which a call is refused."""
        with pytest.raises((NotFound, InvalidArgument)) as caught:
            async with calling("gateway"):
                await call(**request)
        return caught.value.reason, caught.value.field

    async def get(self, **fields: Any) -> anomaly_pb2.Anomaly:
        return (await self.stub.GetAnomaly(pb.GetAnomalyRequest(**fields))).anomaly

    async def acknowledge(self, **fields: Any) -> anomaly_pb2.Anomaly:
        return (await self.stub.AcknowledgeAnomaly(pb.AcknowledgeAnomalyRequest(**fields))).anomaly

    async def feedback(self, **fields: Any) -> anomaly_pb2.Anomaly:
        return (await self.stub.FeedbackAnomaly(pb.FeedbackAnomalyRequest(**fields))).anomaly


@asynccontextmanager
async def gateway(scope: Scope | None = None, *, analytics: str | None = None) -> AsyncIterator[Gateway]:
    """With web-1 in production, web-2 in staging, and db-1."""
    played = PlayedMetadata()
    behind: dict[str, object] = {ANOMALY_STORE: played, DETECTION_SERVICE: played}
    servers = (
        server_state("web-1", role="web", environment="production"),
        server_state("web-2", role="web", environment="staging"),
        server_state("db-1", role="db", environment="production"),
    )
    async with analytics_gateway(behind, servers=servers, scope=scope, analytics=analytics) as (stub, made):
        yield Gateway(played, stub, made)


async def followed(made: Gateway) -> "asyncio.Task[None]":
    """Follows the findings as the process does."""

    async def follow() -> None:
        while True:
            try:
                await made.world.findings.follow()
            except OpenManagerError:
                await asyncio.sleep(0.01)

    task = asyncio.create_task(follow())
    await eventually(lambda: made.metadata.followed_from)
    return task


async def reached(made: Gateway, after_us: int) -> None:
    await eventually(lambda: made.world.findings.version >= NOW_US + after_us)


async def known_to(made: Gateway) -> "asyncio.Task[None]":
    """Follows them until it has what metadata knows: findings a and b, as of NOW_US + 2."""
    task = await followed(made)
    made.metadata.tell(*made.metadata.known, snapshot=True)
    made.metadata.tell(version=NOW_US + 2)
    await reached(made, 2)
    return task


class Told(Watch):
    """A watcher of the fleet, and what it knows of findings."""

    def __init__(self, messages: Any) -> None:
        super().__init__(messages)
        self.findings: dict[str, anomaly_pb2.Anomaly] = {}

    async def until(self, *ids: str) -> None:
        """Takes messages until these are the findings that go on."""
        async with asyncio.timeout(20.0):
            while {one.id[0] for one in self.findings.values() if not one.HasField("end_time")} != set(ids):
                message = await self.next()
                if message.snapshot:
                    self.findings.clear()
                self.findings |= {one.id: one for one in message.anomalies}
