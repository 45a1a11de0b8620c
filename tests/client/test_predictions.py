"""Predictions, from a gateway that answers in pages."""

import asyncio
import json
from typing import Any

import pytest

from client import OpenManager
from client.predictions import predictions
from openmanager.fleet.v1 import prediction_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb
from tests.client.calling import called, serving

FILLS = prediction_pb2.Prediction(server_id="db-01", probability=0.9)
FILLS.date.seconds, FILLS.low.seconds = 1_796_000_000, 1_795_990_000
FILLS.reasons.add(
    kind=prediction_pb2.PREDICTION_REASON_KIND_SATURATION,
    metric="disk_usage",
    value=81.5,
    limit=95,
    slope_per_hour=4.25,
    share=0.9,
)
FILLS.reasons.add(kind=prediction_pb2.PREDICTION_REASON_KIND_ANOMALY_DENSITY, value=0.8, share=0.1)
FLAPS = prediction_pb2.Prediction(server_id="web-02", probability=0.4)
FLAPS.reasons.add(kind=prediction_pb2.PREDICTION_REASON_KIND_FLAPPING, value=2)
FLAPS.reasons.add(kind=99, value=2)  # as a newer gateway may say
WELL = prediction_pb2.Prediction(server_id="web-03")


class FakeAnalytics:
    """Two predictions on a page."""

    def __init__(self, *told: prediction_pb2.Prediction) -> None:
        self.told = told
        self.asked: list[Any] = []

    async def ListPredictions(self, request: Any, _context: object) -> pb.ListPredictionsResponse:
        self.asked.append(request)
        first = int(request.page_token or 0)
        following = first + 2
        return pb.ListPredictionsResponse(
            predictions=self.told[first:following],
            next_page_token=str(following) if following < len(self.told) else "",
            total_size=len(self.told),
            servers=20,
        )


async def test_all_pages_are_one_list() -> None:
    fake = FakeAnalytics(FILLS, FLAPS, WELL)
    async with serving(fake) as address, OpenManager.connect(address) as manager:
        found = await predictions(manager, min_probability=0.25, environment="production", role="db")
        assert [one.server_id for one in found.predictions] == ["db-01", "web-02", "web-03"]
        assert (found.total_size, found.servers, found.next_page_token) == (3, 20, "")
        assert {(one.min_probability, one.environment, one.role) for one in fake.asked} == {(0.25, "production", "db")}
        assert len(fake.asked) == 2


async def test_the_command_says_it_to_people() -> None:
    fake = FakeAnalytics(FILLS, FLAPS, WELL)
    async with serving(fake) as address:
        done = await asyncio.to_thread(called, address, "predictions", "--min-probability", "25%", "--role", "db")
        assert (done.returncode, done.stderr) == (0, "")
        first, titles, *rows = done.stdout.splitlines()
        assert first == "3 of 20 servers are likely to fail, by 25% or more"
        assert titles.split()[:4] == ["SERVER", "FAILS", "WHY", "METRIC"]
        assert rows[0].split("  ")[0] == "db-01"
        for text in ("90%", "saturation, anomaly density", "disk_usage", "81.5", "4.25", "2026-11-30 00:53"):
            assert text in rows[0], text
        assert "40%" in rows[1] and "flapping, 99" in rows[1]
        assert rows[2].split() == ["web-03", "0%", *"-------"]
        assert {(one.min_probability, one.role) for one in fake.asked} == {(0.25, "db")}


async def test_the_command_writes_json_and_says_when_there_is_none() -> None:
    fake = FakeAnalytics(FILLS)
    async with serving(fake) as address:
        done = await asyncio.to_thread(called, address, "predictions", "--output", "json")
        answer = json.loads(done.stdout)
        assert answer["predictions"][0]["reasons"][0]["kind"] == "PREDICTION_REASON_KIND_SATURATION"
        assert answer["servers"] == 20
        assert fake.asked[0].min_probability == 0.1
        fake.told = ()
        done = await asyncio.to_thread(called, address, "predictions")
        assert done.stdout == "0 of 20 servers are likely to fail, by 10% or more\n"


@pytest.mark.parametrize("text", ["2", "120%", "-0.1", "often", "nan"])
async def test_what_is_no_probability_is_said_before_anybody_is_asked(text: str) -> None:
    fake = FakeAnalytics()
    async with serving(fake) as address:
        done = await asyncio.to_thread(called, address, "predictions", f"--min-probability={text}")
        assert done.returncode == 2
        assert "no probability" in done.stderr
        assert fake.asked == []
