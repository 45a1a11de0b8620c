"""Predictions through the gateway, with the servicer of analytics behind it: who sees what, order and pages."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fleet.access import Scope
from openmanager.gateway.v1 import analytics_pb2 as pb
from runtime.channel import calling
from runtime.clock import ManualClock
from runtime.errors import InvalidArgument, Unavailable
from services.analytics.prediction.foresight import Foresight
from services.analytics.prediction.servicer import PREDICTION_SERVICE, PredictionServicer
from tests.analytics.prediction.made import NAMES, climb, foretold, new_predictor
from tests.gateway.played_analytics import FLEET, analytics_gateway
from tests.gateway.played_fleet import server_state

WATCHED = ("db-1", "gone-1", "web-1", "web-2", "web-3")
WEBS = Scope.of((), ("web",), ())


def foresight() -> Foresight:
    """web-2's disk fills; db-1 and gone-1 flap, web-3 a little, web-1 is well."""
    predictor = new_predictor(WATCHED)
    for minute, disk in enumerate(climb(40.0, 20.0, 100)):
        values = [[50.0, 40.0, 0.5, 0.5] for _ in WATCHED]
        values[3][NAMES.index("disk")] = disk
        found = foretold(predictor, minute, values, falls=[2.0, 2.0, 0.0, 0.0, 1.3])
    return found


class Gateway:
    """A gateway's caller."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    async def list(self, **more: Any) -> pb.ListPredictionsResponse:
        async with calling("gateway"):
            answer: pb.ListPredictionsResponse = await self._stub.ListPredictions(pb.ListPredictionsRequest(**more))
            return answer

    async def refused(self, **more: Any) -> str | None:
        """The field by which a call is refused."""
        with pytest.raises(InvalidArgument) as caught:
            await self.list(**more)
        return caught.value.field


@contextlib.asynccontextmanager
async def gateway(scope: Scope | None = None, told: Foresight | None = None) -> AsyncIterator[Gateway]:
    """With new-1, too, which has never reported."""
    told = told or foresight()
    behind: dict[str, object] = {PREDICTION_SERVICE: PredictionServicer(lambda: told, ManualClock(told.end_ms))}
    servers = (*FLEET, server_state("new-1", role="db", environment="production"))
    async with analytics_gateway(behind, servers=servers, scope=scope) as (stub, _):
        yield Gateway(stub)


def ids(answer: pb.ListPredictionsResponse) -> list[str]:
    return [one.server_id for one in answer.predictions]


@pytest.mark.parametrize(
    ("scope", "filters", "listed"),
    [
        (None, {}, ["web-2", "db-1", "web-3", "web-1"]),
        (None, {"min_probability": 0.5}, ["web-2", "db-1"]),
        (None, {"role": "web", "environment": "production"}, ["web-2", "web-1"]),
        (WEBS, {}, ["web-2", "web-3", "web-1"]),
        (WEBS, {"role": "db"}, []),
        (Scope.of(("production",), ("web",), ("web-1",)), {}, ["web-1"]),
    ],
)
async def test_the_list_is_of_the_servers_that_match_and_are_seen_likeliest_first(
    scope: Scope | None, filters: dict[str, Any], listed: list[str]
) -> None:
    async with gateway(scope) as made:
        answer = await made.list(**filters)
        assert (ids(answer), answer.total_size, answer.next_page_token) == (listed, len(listed), "")
        if not filters:
            assert answer.servers == len(listed), "those that have never reported were not judged"


async def test_the_list_comes_in_pages() -> None:
    async with gateway() as made:
        seen, token = [], ""
        while True:
            page = await made.list(page_size=2, page_token=token)
            assert (page.total_size, page.servers) == (4, 4)
            seen += ids(page)
            token = page.next_page_token
            if not token:
                break
        assert seen == ["web-2", "db-1", "web-3", "web-1"]
        token = (await made.list(page_size=2)).next_page_token
        for other in ({"min_probability": 0.1}, {"role": "web"}, {"environment": "staging"}):
            assert await made.refused(page_token=token, **other) == "page_token"


async def test_what_makes_no_sense_is_refused_with_its_field() -> None:
    async with gateway() as made:
        assert await made.refused(page_size=-1) == "page_size"
        assert await made.refused(min_probability=1.5) == "min_probability"
        assert await made.refused(min_probability=float("nan")) == "min_probability"
        assert await made.refused(page_token="nonsense") == "page_token"


async def test_reasons_pass_as_they_are() -> None:
    async with gateway() as made:
        first = (await made.list()).predictions[0]
        assert (first.reasons[0].metric, first.reasons[0].limit) == ("disk", 95.0)
        assert first.low.seconds <= first.date.seconds <= first.high.seconds
        assert first.horizon.seconds == 8 * 3_600


@pytest.mark.full
async def test_analytics_that_is_away_is_named() -> None:
    async with analytics_gateway({}, analytics="127.0.0.1:1") as (stub, _):
        with pytest.raises(Unavailable) as caught:
            await Gateway(stub).list()
        assert caught.value.metadata["peer"] == "analytics"
