"""Trends, capacity and forecasts through the gateway: who sees which servers, and what analytics is asked of them."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from fleet.access import Scope
from gateway.servicers.outlook import SERVICE
from openmanager.analytics.v1 import capacity_pb2
from openmanager.fleet.v1 import outlook_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb
from runtime.channel import calling
from runtime.errors import InvalidArgument, NotFound, Unavailable
from services.analytics.outlook.ranking import CAPACITY_SERVICE
from tests.gateway.played_analytics import analytics_gateway
from tests.gateway.played_fleet import server_state

WEBS = Scope.of((), ("web",), ())


class FakeAnalytics:
    """Says what it was asked; knows `silent` servers no more than timeseries does."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.silent: set[str] = set()
        self.ranking = capacity_pb2.RankCapacityResponse()

    def _saw(self, request: Any) -> None:
        self.asked.append(request)
        if request.server_id in self.silent:
            raise NotFound("no such server", reason="SERVER_UNKNOWN", field="server_id")
        if request.metric == "nope":
            raise InvalidArgument("no server has it", field="metric")

    async def GetTrend(self, request: Any, _context: object) -> pb.GetTrendResponse:
        self._saw(request)
        return pb.GetTrendResponse(trend=outlook_pb2.Trend(server_id=request.server_id, level=3))

    async def ForecastCapacity(self, request: Any, _context: object) -> pb.ForecastCapacityResponse:
        self._saw(request)
        return pb.ForecastCapacityResponse(capacity=outlook_pb2.Capacity(server_id=request.server_id, level=3))

    async def ForecastMetric(self, request: Any, _context: object) -> pb.ForecastMetricResponse:
        self._saw(request)
        return pb.ForecastMetricResponse(forecast=outlook_pb2.Forecast(server_id=request.server_id, values=[3]))

    async def RankCapacity(self, request: Any, _context: object) -> capacity_pb2.RankCapacityResponse:
        self.asked.append(request)
        if request.metric == "nope":
            raise InvalidArgument("no server has it", field="metric")
        if request.limit > 100:
            raise InvalidArgument("is over 100 %", field="limit")
        return self.ranking


class Gateway:
    """A gateway's caller, whose scope a test chooses, and the analytics behind it."""

    def __init__(self, analytics: FakeAnalytics, stub: Any) -> None:
        self.analytics = analytics
        self.stub = stub

    async def each(self, server_id: str, metric: str = "m") -> list[Any]:
        """The answers of the three calls about one server."""
        async with calling("gateway"):
            trend = await self.stub.GetTrend(pb.GetTrendRequest(server_id=server_id, metric=metric))
            capacity = await self.stub.ForecastCapacity(pb.ForecastCapacityRequest(server_id=server_id, metric=metric))
            forecast = await self.stub.ForecastMetric(pb.ForecastMetricRequest(server_id=server_id, metric=metric))
        return [trend.trend, capacity.capacity, forecast.forecast]

    async def refused(self, server_id: str, metric: str = "m") -> list[tuple[str, str | None]]:
        """The reasons and fields by which the three calls are refused."""
        found = []
        for method, kind in (
            (self.stub.GetTrend, pb.GetTrendRequest),
            (self.stub.ForecastCapacity, pb.ForecastCapacityRequest),
            (self.stub.ForecastMetric, pb.ForecastMetricRequest),
        ):
            with pytest.raises((NotFound, InvalidArgument)) as caught:
                async with calling("gateway"):
                    await method(kind(server_id=server_id, metric=metric))
            found.append((caught.value.reason, caught.value.field))
        return found

    async def list(self, **more: Any) -> pb.ListCapacityResponse:
        async with calling("gateway"):
            answer: pb.ListCapacityResponse = await self.stub.ListCapacity(pb.ListCapacityRequest(**more))
            return answer


@contextlib.asynccontextmanager
async def gateway(scope: Scope | None = None) -> AsyncIterator[Gateway]:
    analytics = FakeAnalytics()
    behind: dict[str, object] = {SERVICE.full_name: analytics, CAPACITY_SERVICE: analytics}
    async with analytics_gateway(behind, scope=scope) as (stub, _):
        yield Gateway(analytics, stub)


async def test_questions_about_a_server_are_answered_by_analytics() -> None:
    async with gateway() as made:
        trend, capacity, forecast = await made.each("web-1")
        assert (trend.level, capacity.level, list(forecast.values)) == (3, 3, [3])
        assert [request.server_id for request in made.analytics.asked] == ["web-1"] * 3
        assert len(await made.each("gone-1")) == 3, "one that is no more in the fleet has its history still"


async def test_who_has_a_scope_is_answered_about_its_servers_only() -> None:
    async with gateway(WEBS) as made:
        assert [answer.server_id for answer in await made.each("web-3")] == ["web-3"] * 3
        made.analytics.asked.clear()
        for hidden in ("db-1", "nowhere"):
            assert await made.refused(hidden) == [("SERVER_NOT_FOUND", "server_id")] * 3
        assert made.analytics.asked == []


async def test_a_server_that_never_reported_has_no_data_and_one_that_is_not_there_is_not_found() -> None:
    async with gateway() as made:
        made.analytics.silent = {"web-1", "nowhere"}
        trend, capacity, forecast = await made.each("web-1")
        assert (trend.server_id, trend.coverage, trend.HasField("level")) == ("web-1", 0, False)
        assert (capacity.reason, capacity.metric) == (outlook_pb2.CAPACITY_REASON_NO_DATA, "m")
        assert (forecast.server_id, list(forecast.values)) == ("web-1", [])
        assert await made.refused("nowhere") == [("SERVER_NOT_FOUND", "server_id")] * 3


async def test_what_makes_no_sense_is_refused_with_its_field() -> None:
    async with gateway() as made:
        assert await made.refused("web-1", "nope") == [("INVALID_ARGUMENT", "metric")] * 3
        made.analytics.asked.clear()
        assert await made.refused("") == [("INVALID_ARGUMENT", "server_id")] * 3
        assert made.analytics.asked == []
        with pytest.raises(InvalidArgument) as caught:
            await made.list(page_size=-1)
        assert caught.value.field == "page_size"


@pytest.mark.parametrize(
    ("scope", "filters", "asked"),
    [
        (None, {}, ["db-1", "web-1", "web-2", "web-3"]),
        (None, {"role": "web", "environment": "production"}, ["web-1", "web-2"]),
        (WEBS, {}, ["web-1", "web-2", "web-3"]),
        (WEBS, {"environment": "production"}, ["web-1", "web-2"]),
        (WEBS, {"role": "db"}, []),
        (Scope.of(("production",), ("web",), ("web-2",)), {}, ["web-2"]),
    ],
)
async def test_the_list_is_of_the_servers_that_match_and_are_seen(
    scope: Scope | None, filters: dict[str, str], asked: list[str]
) -> None:
    async with gateway(scope) as made:
        await made.list(**filters)
        (request,) = made.analytics.asked
        assert list(request.server_ids) == asked


async def test_the_question_of_the_list_goes_on_as_it_is() -> None:
    async with gateway() as made:
        await made.list()
        await made.list(metric="m", limit=0, falling=True, growth=0.2, within=Duration(seconds=60))
        first, second = made.analytics.asked
        assert (first.metric, first.HasField("limit"), first.growth) == ("disk_usage", False, 0)
        assert (second.metric, second.HasField("limit"), second.falling, second.growth) == ("m", True, True, 0.2)
        assert second.within.seconds == 60
        odd = Duration(seconds=3, nanos=-5)  # of two signs, as no library makes it
        await made.list(within=odd)
        assert made.analytics.asked[2].within == odd


async def test_the_list_comes_in_pages() -> None:
    async with gateway() as made:
        ranking = made.analytics.ranking
        ranking.capacities.add(server_id="z", metric="m", reason=outlook_pb2.CAPACITY_REASON_PAST_LIMIT)
        for server_id, seconds in (("b", 100), ("a", 200), ("c", 200), ("b", 300)):
            ranking.capacities.add(server_id=server_id, metric="m").date.seconds = seconds
        ranking.others.add(reason=outlook_pb2.CAPACITY_REASON_FLAT, series=4)
        ranking.servers, ranking.pending_servers = 7, 2
        ranking.incomplete.append("replica-2")
        seen, token = [], ""
        while True:
            page = await made.list(page_size=2, page_token=token)
            assert (page.total_size, page.servers, page.pending_servers) == (5, 7, 2)
            assert (page.others[0].series, list(page.incomplete)) == (4, ["replica-2"])
            seen += [(capacity.server_id, capacity.date.seconds) for capacity in page.capacities]
            token = page.next_page_token
            if not token:
                break
        assert seen == [("z", 0), ("b", 100), ("a", 200), ("c", 200), ("b", 300)]
        token = (await made.list(page_size=2)).next_page_token
        del ranking.capacities[1]  # looked at again, it is flat: what follows is not shown twice and not left out
        assert [one.server_id for one in (await made.list(page_size=2, page_token=token)).capacities] == ["a", "c"]
        for other in (
            {"limit": 80},
            {"metric": "m"},
            {"role": "web"},
            {"growth": 0.1},
            {"within": Duration(seconds=9)},
        ):
            with pytest.raises(InvalidArgument) as caught:
                await made.list(page_token=token, **other)
            assert caught.value.field == "page_token"


async def test_analytics_that_is_away_is_named() -> None:
    async with analytics_gateway({}, analytics="127.0.0.1:1") as (stub, _):
        made = Gateway(FakeAnalytics(), stub)
        for ask in (made.list, lambda: made.each("web-1")):
            with pytest.raises(Unavailable) as caught:
                await ask()
            assert caught.value.metadata["peer"] == "analytics"


async def test_of_metrics_that_only_others_have_a_list_tells_nothing() -> None:
    """Neither that there is one, nor that it is in percent."""
    servers = [server_state("web-1", 1, 1, 1, 1, role="web"), server_state("db-1", role="db")]
    for scope, tells in ((WEBS, False), (None, True)):
        analytics = FakeAnalytics()
        behind: dict[str, object] = {SERVICE.full_name: analytics, CAPACITY_SERVICE: analytics}
        async with analytics_gateway(behind, servers=servers, scope=scope) as (stub, _):
            made = Gateway(analytics, stub)
            count = outlook_pb2.CapacityCount(reason=outlook_pb2.CAPACITY_REASON_NO_DATA, series=1)
            analytics.ranking = capacity_pb2.RankCapacityResponse(servers=1, others=[count])
            hidden = await made.list(metric="of-others")
            for asked in ({"metric": "nope"}, {"metric": "of-others", "limit": 101}):
                if not tells:
                    assert await made.list(**asked) == hidden, asked
                    continue
                with pytest.raises(InvalidArgument):
                    await made.list(**asked)
            with pytest.raises(InvalidArgument) as caught:  # which he sees himself
                await made.list(metric="disk_usage", limit=101)
            assert caught.value.field == "limit"
