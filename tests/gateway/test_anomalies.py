"""Findings through the gateway: who is told of which, what metadata is asked, and what watchers get."""

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from fleet.access import Scope
from fleet.codec import timestamp_from_us
from openmanager.fleet.v1 import anomaly_pb2, report_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb
from openmanager.metadata.v1 import anomaly_pb2 as metadata_pb2
from runtime.clock import SystemClock
from tests.gateway.played_findings import NOW_US, WEBS, gateway

REAL, FALSE = anomaly_pb2.ANOMALY_VERDICT_REAL, anomaly_pb2.ANOMALY_VERDICT_FALSE


async def test_the_question_goes_on_as_it_is_and_the_answer_comes_back() -> None:
    async with gateway() as made:
        answer = await made.list(server_id="web-1")
        assert (list(answer.anomalies), answer.next_page_token, answer.total_size) == (made.metadata.known, "next", 7)
        assert (answer.learned, answer.stale_since) == (0.25, timestamp_from_us(NOW_US))
        assert (await made.list()).learned == 0.5
        assert [(await made.list(server_id=one)).partly_judged for one in ("", "web-1", "db-1")] == [False, False, True]
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
        assert not answer.HasField("learned") and not answer.partly_judged


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
