"""Findings through the gateway: who is told of which, what metadata is asked, and what watchers get."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from fleet.access import OPERATOR, Caller, Scope
from fleet.codec import timestamp_from_us
from gateway import findings as findings_module
from gateway.servicers.anomalies import AnomalyServicer
from gateway.servicers.outlook import SERVICE, analytics_servicer
from openmanager.analytics.v1 import analytics_pb2
from openmanager.fleet.v1 import anomaly_pb2, report_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb
from openmanager.gateway.v1 import analytics_pb2_grpc
from openmanager.metadata.v1 import anomaly_pb2 as metadata_pb2
from runtime import caller
from runtime.channel import Channel, calling
from runtime.clock import SystemClock
from runtime.errors import InvalidArgument, NotFound, OpenManagerError, Unavailable
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from tests.gateway.test_state import Watch, World, server_state, world
from tests.harness import eventually

WEBS = Scope.of((), ("web",), ())
NOW_US = SystemClock().now_ms() * 1_000
REAL, FALSE = anomaly_pb2.ANOMALY_VERDICT_REAL, anomaly_pb2.ANOMALY_VERDICT_FALSE


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

    def tell(self, *anomalies: anomaly_pb2.Anomaly, snapshot: bool = False, version: int | None = None) -> None:
        version = max(NOW_US, *(one.update_time.ToMicroseconds() for one in anomalies)) if version is None else version
        self.told.put_nowait(
            metadata_pb2.FollowAnomaliesResponse(version=version, snapshot=snapshot, anomalies=anomalies)
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
        return analytics_pb2.GetLearnedResponse(learned=0.25 if request.server_id else 0.5)

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

    def __init__(self, metadata: PlayedMetadata, channel: Channel, made: World) -> None:
        self.metadata = metadata
        self.world = made
        self.stub: Any = analytics_pb2_grpc.AnalyticsServiceStub(channel.grpc)

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
    inner = GrpcServer(
        [
            bind("openmanager.metadata.v1.AnomalyStoreService", played),
            bind("openmanager.analytics.v1.DetectionService", played),
        ],
        Interception(),
    )
    address = await inner.start("127.0.0.1:0")
    async with Channel(address) as metadata, Channel(analytics or address) as other, world(metadata) as w:
        w.cache.send(
            server_state("web-1", role="web", environment="production"),
            server_state("web-2", role="web", environment="staging"),
            server_state("db-1", role="db", environment="production"),
            snapshot=True,
        )
        assert await w.state.until(w.caught_up, 20.0)
        who = Caller.of("ada", OPERATOR, "token", scope=scope)
        servicer = AnomalyServicer(metadata, other, w.state, w.findings, SystemClock())
        outer = GrpcServer(
            [bind(SERVICE, analytics_servicer(other, w.state, servicer))], Interception(lambda _method, _context: who)
        )
        async with Channel(await outer.start("127.0.0.1:0")) as channel:
            yield Gateway(played, channel, w)
        await outer.stop(0)
    await inner.stop(0)


async def test_the_question_goes_on_as_it_is_and_the_answer_comes_back() -> None:
    async with gateway() as made:
        answer = await made.list(server_id="web-1")
        assert (list(answer.anomalies), answer.next_page_token, answer.total_size) == (made.metadata.known, "next", 7)
        assert (answer.learned, answer.stale_since) == (0.25, timestamp_from_us(NOW_US))
        assert (await made.list()).learned == 0.5
        asked = {
            "page_size": 3,
            "page_token": "t",
            "server_id": "web-1",
            "start_time": timestamp_from_us(1),
            "end_time": timestamp_from_us(2),
            "detector": "silence",
            "metric": "m",
            "min_score": 0.5,
            "open": False,
            "acknowledged": True,
            "verdict": anomaly_pb2.ANOMALY_VERDICT_UNSPECIFIED,
        }
        await made.list(**asked)
        assert made.metadata.asked[-1] == metadata_pb2.QueryAnomaliesRequest(**asked)
        assert made.metadata.asked[-1].HasField("verdict")
        assert made.metadata.asked[0] == metadata_pb2.QueryAnomaliesRequest(server_id="web-1")


def test_the_fields_that_are_passed_on_are_the_same_on_both_sides() -> None:
    public, inner = (
        {field.number: field for field in message.DESCRIPTOR.fields}
        for message in (pb.ListAnomaliesRequest, metadata_pb2.QueryAnomaliesRequest)
    )
    assert {public[number].name for number in public.keys() - inner.keys()} == {"environment", "role"}
    assert {inner[number].name for number in inner.keys() - public.keys()} == {"server_ids", "within_server_ids"}
    for number in public.keys() & inner.keys():
        one, other = public[number], inner[number]
        assert (one.name, one.type, one.is_repeated) == (other.name, other.type, other.is_repeated)


@pytest.mark.parametrize(
    ("scope", "filters", "asked"),
    [
        (None, {}, None),
        (None, {"role": "web", "environment": "production"}, ["web-1"]),
        (None, {"environment": "none"}, []),
        (WEBS, {}, ["web-1", "web-2"]),
        (WEBS, {"environment": "staging"}, ["web-2"]),
        (Scope.of((), (), ("nowhere",)), {}, []),
    ],
)
async def test_listed_is_what_matches_and_is_seen(
    scope: Scope | None, filters: dict[str, str], asked: list[str] | None
) -> None:
    async with gateway(scope) as made:
        await made.list(**filters)
        (request,) = made.metadata.asked
        assert request.within_server_ids == (asked is not None)
        assert list(request.server_ids) == (asked or [])


async def test_what_only_metadata_may_be_asked_cannot_be_smuggled_in() -> None:
    own = metadata_pb2.QueryAnomaliesRequest(within_server_ids=True, server_ids=["db-1"]).SerializeToString()
    for scope, within in ((None, []), (WEBS, ["web-1", "web-2"])):
        async with gateway(scope) as made:
            await made.stub.ListAnomalies(pb.ListAnomaliesRequest.FromString(own))
            assert list(made.metadata.asked[-1].server_ids) == within
            assert made.metadata.asked[-1].within_server_ids == (scope is not None)


async def test_who_has_a_scope_is_told_of_its_servers_only() -> None:
    async with gateway(WEBS) as made:
        web, db = (one.id for one in made.metadata.known)
        assert (await made.get(id=web)).server_id == "web-1"
        assert (await made.acknowledge(id=web, comment="on it")).server_id == "web-1"
        assert (await made.feedback(id=web, verdict=FALSE)).server_id == "web-1"
        made.metadata.asked.clear()
        for call, more in ((made.get, {}), (made.acknowledge, {}), (made.feedback, {"verdict": REAL})):
            for hidden in (db, "f" * 32):
                assert await made.refused(call, id=hidden, **more) == ("NOT_FOUND", "id")
        assert await made.refused(made.list, server_id="db-1") == ("SERVER_NOT_FOUND", "server_id")
        assert made.metadata.asked == []


async def test_who_says_something_is_named_by_the_gateway() -> None:
    async with gateway() as made:
        db = made.metadata.known[1].id
        await made.acknowledge(id=db, comment="mine")
        await made.feedback(id=db, verdict=REAL, comment="it burnt")
        first, second = made.metadata.asked
        assert (first.verdict, first.comment, second.verdict, second.comment) == (0, "mine", REAL, "it burnt")
        assert made.metadata.authors == ["ada", "ada"]
        assert await made.refused(made.feedback, id=db) == ("INVALID_ARGUMENT", "verdict")
        assert len(made.metadata.asked) == 2


async def test_findings_are_listed_while_analytics_is_away() -> None:
    async with gateway(analytics="127.0.0.1:1") as made:
        answer = await made.list()
        assert len(answer.anomalies) == 2
        assert not answer.HasField("learned")


async def test_the_report_says_what_people_said_and_what_could_not_be_asked() -> None:
    async with gateway() as made:
        made.metadata.counts = [
            metadata_pb2.AnomalyCount(detector="departure", found=42, open=1, said_real=3, said_false=1),
            metadata_pb2.AnomalyCount(detector="silence", found=7),
        ]

        async def report(**request: Any) -> report_pb2.ModelReport:
            return (await made.stub.GetModelReport(pb.GetModelReportRequest(**request))).report

        found = await report(span=Duration(seconds=7 * 86_400))
        before_us = made.metadata.asked[-1].start_time.ToMicroseconds()
        assert abs(before_us - (SystemClock().now_ms() * 1_000 - 7 * 86_400_000_000)) < 60e6
        departure, silence = found.detection.detectors
        assert (departure.found, departure.open, departure.precision) == (42, 1, 0.75)
        assert (silence.found, silence.HasField("precision")) == (7, False)
        assert (found.detection.span.seconds, list(found.incomplete)) == (7 * 86_400, [])
        made.metadata.counts = None
        found = await report()
        assert (list(found.incomplete), len(found.detection.detectors)) == (["metadata"], 0)
        assert (found.detection.servers, found.detection.span.seconds) == (20, 30 * 86_400)
        for bad in (Duration(seconds=-1), Duration(seconds=731 * 86_400)):
            assert await made.refused(report, span=bad) == ("INVALID_ARGUMENT", "span")


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


async def test_the_fleet_is_watched_with_its_findings() -> None:
    async with gateway() as made:
        web, db = made.metadata.known
        task = await followed(made)
        made.metadata.tell(web, db, snapshot=True)
        made.metadata.tell(version=NOW_US + 2)
        await reached(made, 2)
        async with made.world.watch() as watch, made.world.watch(role="web") as narrow:
            told, of_webs = Told(watch._messages), Told(narrow._messages)
            await told.until("a", "b")
            await of_webs.until("a")
            made.metadata.tell(anomaly("a", "web-1", 3, over=True), anomaly("c", "gone-1", 4), anomaly("d", "web-2", 5))
            await told.until("b", "c", "d")
            await of_webs.until("d")
            assert set(told.known) == {"web-1", "web-2", "db-1"}
            version = told.version
        made.metadata.tell(anomaly("d", "web-2", 6, over=True))
        made.world.cache.send(server_state("web-1", role="web"))
        await reached(made, 6)
        assert await made.world.state.until(made.world.caught_up, 20.0)
        async with made.world.watch(after_version=version) as watch:
            again = Told(watch._messages)
            message = await again.next()
            assert not message.snapshot
            assert [one.id for one in message.servers] == ["web-1"]
            assert [one.id for one in message.anomalies] == ["d" * 32]
        task.cancel()


async def test_a_scope_hides_findings_from_watchers() -> None:
    async with gateway(WEBS) as made:
        task = await followed(made)
        made.metadata.tell(*made.metadata.known, snapshot=True)
        made.metadata.tell(version=NOW_US + 2)
        await reached(made, 2)
        stream = made.stub.WatchAnomalies(pb.WatchAnomaliesRequest())
        first = await stream.read()
        assert first.snapshot
        assert [one.server_id for one in first.anomalies] == ["web-1"]
        made.metadata.tell(anomaly("c", "db-1", 3), anomaly("d", "gone-1", 4), anomaly("e", "web-2", 5))
        assert [one.server_id for one in (await stream.read()).anomalies] == ["web-2"]
        stream.cancel()
        assert await made.refused(_first_of(made.stub), server_id="db-1") == ("SERVER_NOT_FOUND", "server_id")
        assert await made.refused(_first_of(made.stub), after_version="x") == ("INVALID_ARGUMENT", "after_version")
        task.cancel()


def _first_of(stub: Any) -> Any:
    async def ask(**request: Any) -> None:
        await stub.WatchAnomalies(pb.WatchAnomaliesRequest(**request)).read()

    return ask


async def test_watchers_of_findings_go_on_where_they_were() -> None:
    async with gateway() as made:
        task = await followed(made)
        made.metadata.tell(*made.metadata.known, snapshot=True)
        made.metadata.tell(version=NOW_US + 2)
        await reached(made, 2)

        async def first(**request: Any) -> pb.WatchAnomaliesResponse:
            async with aclosing(made.world.findings.watch(lambda _server_id: True, **request)) as messages:
                return await anext(messages)

        opened = await first(after_version="")
        made.metadata.cut()  # the stream breaks, and goes on from the version
        made.metadata.tell(anomaly("a", "web-1", 3, over=True))
        await reached(made, 3)
        assert made.metadata.followed_from[-1] == NOW_US + 2
        later = await first(after_version=opened.version)
        assert (later.snapshot, [one.id[0] for one in later.anomalies]) == (False, ["a"])
        assert later.anomalies[0].HasField("end_time")
        anew = await first(after_version="")
        assert [one.id[0] for one in anew.anomalies] == ["b"]
        task.cancel()


async def test_a_version_is_the_same_at_gateways_that_started_at_different_times() -> None:
    async with gateway() as one, gateway() as other:
        tasks = []
        for made in (one, other):
            tasks.append(await followed(made))
            made.metadata.tell(*made.metadata.known, snapshot=True, version=made.metadata.followed_from[-1])
            made.metadata.tell(version=NOW_US + 2)
            await reached(made, 2)
        assert one.metadata.followed_from[0] <= other.metadata.followed_from[0]
        assert one.world.findings.version == other.world.findings.version
        async with one.world.watch() as watch:
            told = Told(watch._messages)
            await told.until("a", "b")
        other.world.cache.send(server_state("web-1", role="db"))
        assert await other.world.state.until(other.world.caught_up, 20.0)
        async with other.world.watch(after_version=told.version) as watch:
            message = await watch.next()
            assert (message.snapshot, [one.id for one in message.servers], list(message.anomalies)) == (
                False,
                ["web-1"],
                [],
            )
        for task in tasks:
            task.cancel()


async def test_who_is_behind_by_too_much_is_given_all_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings_module, "KEPT", 4)
    async with gateway() as made:
        task = await followed(made)
        made.metadata.tell(*made.metadata.known, snapshot=True)
        made.metadata.tell(version=NOW_US + 2)
        await reached(made, 2)
        async with made.world.watch() as watch:
            told = Told(watch._messages)
            await told.until("a", "b")
            made.metadata.tell(anomaly("a", "web-1", 3, over=True))
            for number in range(8):  # of the oldest nobody knows any more that it is over
                made.metadata.tell(anomaly(str(number), "web-2", 10 + number, over=True))
            await reached(made, 17)
            assert len(made.world.findings._known) <= 4 + 1 + 1
            await told.until("b")
        async with aclosing(made.world.findings.watch(lambda _: True, str(NOW_US + 2))) as messages:
            message = await anext(messages)
            assert message.snapshot
            assert [one.id[0] for one in message.anomalies] == ["b"]
        task.cancel()


async def test_servers_are_watched_while_metadata_is_away() -> None:
    async with gateway() as made:
        async with made.world.watch() as watch:
            told = Told(watch._messages)
            await told.until()
            await told.next()
            assert set(told.known) == {"web-1", "web-2", "db-1"}
            assert "." not in told.version
            made.world.cache.send(server_state("web-1", role="db"))
            message = await told.next()
            assert [one.id for one in message.servers] == ["web-1"]
        with pytest.raises(Unavailable):
            async with aclosing(made.world.findings.watch(lambda _: True, "")) as messages:
                await anext(messages)
