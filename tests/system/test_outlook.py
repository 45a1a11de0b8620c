"""Trends, dates and forecasts of a year that was written, with real processes: over HTTP, gRPC and by the command."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
import numpy as np
import pytest

from openmanager.fleet.v1 import outlook_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb
from openmanager.gateway.v1 import analytics_pb2_grpc
from runtime.errors import carried_error
from tests.client.calling import called
from tests.harness import eventually
from tests.harness.product import Product
from tests.system.test_access import Manager

HOUR_S: Final = 3_600
DAY_S: Final = 86_400
DAYS: Final = 400
GROWING, FLAT, OTHER = "web-01", "web-02", "db-01"
SILENT: Final = "db-09"
WITHIN_S: Final = 30.0
METRICS: Final = [
    {"name": "cpu_usage", "unit": "%", "kind": "gauge"},
    {"name": "disk_usage", "unit": "%", "kind": "gauge"},
    {"name": "requests_total", "unit": "1", "kind": "counter"},
    {"name": "disk_used", "unit": "By", "labels": {"mount": "/"}},
    {"name": "disk_used", "unit": "By", "labels": {"mount": "/data"}},
]


def year_of(server_id: str, now_s: int) -> list[dict[str, Any]]:
    """Batches of an hourly row for DAYS days: a daily wave, a disk that has grown by .15 a day to 80 (or not at all), a
    counter of 1,000 an hour that was reset half a year ago.

    What noise adds to the wave on one day it takes away on the next: of the 24 ways to cut other noise into days some
    have a trend by chance."""
    hours = np.arange(DAYS * 24)
    noise = np.random.default_rng(5).standard_normal((2, len(hours)))
    two_days = np.where(hours // 24 % 2, -1.0, 1.0) * noise[0, hours // 48 * 24 + hours % 24]
    wave = 40 + 10 * np.sin(2 * np.pi * (now_s // HOUR_S - hours[::-1]) / 24) + two_days
    disk = (80 - hours[::-1] / 24 * 0.15 if server_id == GROWING else 30) + 0.1 * noise[1]
    count = 1_000.0 * hours
    count[len(hours) // 2 :] -= count[len(hours) // 2]
    values = np.stack([wave, disk, count, disk * 1e9, wave * 1e9], axis=1)
    times = (now_s // HOUR_S - hours[::-1]) * HOUR_S
    server = {"serverId": server_id, "role": server_id[:-3], "environment": "production"}
    return [
        {
            "metrics": METRICS,
            "servers": [server],
            "rows": [{"serverId": server_id, "time": time_s} for time_s in times[cut].tolist()],
            "values": values[cut].ravel().tolist(),
        }
        for cut in (slice(at, at + 3_200) for at in range(0, len(hours), 3_200))
    ]


@pytest.fixture(scope="module")
async def manager(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Manager]:
    """Three servers with a year of five metrics, and one that has never reported."""
    async with Product(tmp_path_factory.mktemp("outlook"), GATEWAY_ACCOUNTS="true") as product:
        await product.start("metadata", "timeseries", "cache", "analytics", "gateway")
        manager = Manager(product)
        await manager.set_up()
        for server_id in (GROWING, FLAT, OTHER):
            for batch in year_of(server_id, int(time.time())):
                written = await manager.call("/v1/metrics:write", body=batch)
                assert (written.status, written.json["rejectedPoints"]) == (200, 0), written.body[:500]
        assert (await manager.call("/v1/servers", body={"id": SILENT, "role": "db"})).status == 200

        async def are_shown() -> bool:
            return (await manager.call("/v1/servers")).json.get("totalSize") == 4

        await eventually(are_shown, WITHIN_S)
        yield manager


async def get(manager: Manager, path: str, **more: Any) -> Any:
    answer = await manager.call(path, **more)
    assert answer.status == 200, answer.body
    return answer.json


@pytest.mark.full
async def test_the_trend_of_a_year(manager: Manager) -> None:
    trend = await get(manager, f"/v1/servers/{GROWING}/trend?metric=disk_usage")
    assert trend["slopeLow"] < 0.15 < trend["slopeHigh"] and trend["slopePerDay"] == pytest.approx(0.15, rel=0.01)
    assert trend["direction"] == "TREND_DIRECTION_RISING" and trend["level"] == pytest.approx(79.5, abs=0.3)
    assert trend["coverage"] > 0.99 and trend["days"] in {364, 365} and trend["incomplete"] == []
    assert trend["yearOverYear"]["change"] == pytest.approx(0.15 * 364, rel=0.02)
    wave = await get(manager, f"/v1/servers/{GROWING}/trend?metric=cpu_usage&start_time=-100d&end_time=-10d")
    assert wave["direction"] == "TREND_DIRECTION_NONE" and len(wave["weekly"]) == 168
    assert int(np.argmax(wave["daily"])) == pytest.approx(6, abs=1) and max(wave["daily"]) == pytest.approx(10, abs=1)
    rate = await get(manager, f"/v1/servers/{GROWING}/trend?metric=requests_total")
    assert (rate["unit"], rate["isRate"]) == ("1/s", True) and rate["level"] == pytest.approx(1_000 / HOUR_S, rel=0.01)


async def test_when_a_disk_is_full(manager: Manager) -> None:
    before = time.time()
    found = await get(manager, f"/v1/servers/{GROWING}/capacity?metric=disk_usage&limit=90")
    assert found["low"] < found["date"] < found["high"] and "reason" not in found
    date = np.datetime64(found["date"].rstrip("Z")).astype("datetime64[s]").astype(float)
    assert (date - before) / DAY_S == pytest.approx(10 / 0.15, abs=2)
    assert found["backtest"]["trials"] == 4 and 0 < found["backtest"]["error"] < 0.3
    assert (found["probabilityWithin30Days"], found["probabilityWithin90Days"]) == (0.0, 1.0)
    sooner = await get(manager, f"/v1/servers/{GROWING}/capacity?metric=disk_usage&growth=0.2")
    assert sooner["date"] < found["date"] and sooner["limit"] == 90
    flat = await get(manager, f"/v1/servers/{FLAT}/capacity?metric=disk_usage")
    assert flat["reason"] == "CAPACITY_REASON_FLAT" and "date" not in flat
    past = await get(manager, f"/v1/servers/{GROWING}/capacity?metric=disk_usage&limit=70")
    assert past["reason"] == "CAPACITY_REASON_PAST_LIMIT"


async def test_which_disks_are_full_soon(manager: Manager) -> None:
    found = await get(manager, "/v1/capacity?within=90d")
    assert [one["serverId"] for one in found["capacities"]] == [GROWING]
    assert found["others"] == [
        {"reason": "CAPACITY_REASON_NO_DATA", "series": 1},
        {"reason": "CAPACITY_REASON_FLAT", "series": 2},
    ]
    assert (found["servers"], found["pendingServers"], found["totalSize"]) == (4, 0, 1)
    assert (await get(manager, "/v1/capacity?metric=disk_usage&limit=90&within=30d&role=db"))["totalSize"] == 0
    page = await get(manager, "/v1/capacity?limit=20&within=90d&page_size=2")
    assert [one["serverId"] for one in page["capacities"]] == [OTHER, GROWING]
    rest = await get(manager, f"/v1/capacity?limit=20&within=90d&page_size=2&page_token={page['nextPageToken']}")
    assert [one["serverId"] for one in rest["capacities"]] == [FLAT] and rest["nextPageToken"] == ""


async def test_which_servers_are_likely_to_fail(manager: Manager) -> None:
    found = await get(manager, "/v1/predictions?min_probability=0.5")
    assert (found["predictions"], found["nextPageToken"], found["totalSize"]) == ([], "", 0)
    refused = await manager.call("/v1/predictions?min_probability=2")
    assert refused.status == 400 and b'"field":"min_probability"' in refused.body
    _, agent = await manager.token("AGENT", {"serverRoles": ["web"]})
    assert (await manager.call("/v1/predictions", secret=agent)).status == 403


async def test_what_comes_next(manager: Manager) -> None:
    found = await get(manager, f"/v1/servers/{GROWING}/forecast?metric=cpu_usage&horizon=2d&step=1h")
    times, values = np.array(found["times"]), np.array(found["values"])
    assert len(times) == len(values) == len(found["low95"]) == 48 and 0 <= times[0] - time.time() <= HOUR_S
    expected = 40 + 10 * np.sin(2 * np.pi * times / HOUR_S / 24)
    assert np.abs(values - expected).max() < 2
    assert np.mean((expected >= found["low95"]) & (expected <= found["high95"])) > 0.9
    assert found["backtest"]["trials"] > 3


async def test_over_grpc_the_answers_are_the_same(manager: Manager) -> None:
    shown = (("authorization", f"Bearer {manager.secret}"),)
    async with manager.product.channel("gateway") as channel:
        stub: Any = analytics_pb2_grpc.AnalyticsServiceStub(channel.grpc)
        request = pb.ForecastCapacityRequest(server_id=GROWING, metric="disk_usage", limit=90)
        answer = (await stub.ForecastCapacity(request, metadata=shown)).capacity
        found = await get(manager, f"/v1/servers/{GROWING}/capacity?metric=disk_usage&limit=90")
        assert answer.rate_per_day == found["ratePerDay"] and answer.date.seconds > time.time()
        trend = (await stub.GetTrend(pb.GetTrendRequest(server_id=GROWING, metric="cpu_usage"), metadata=shown)).trend
        assert trend.direction == outlook_pb2.TREND_DIRECTION_NONE and len(trend.daily) == 24
        for bad, field in (
            ({"limit": math.nan}, "limit"),
            ({"growth": math.nan}, "growth"),
            ({"growth": -1}, "growth"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ForecastCapacity(
                    pb.ForecastCapacityRequest(server_id=GROWING, metric="disk_usage", **bad), metadata=shown
                )
            error = carried_error(caught.value)
            assert error is not None and (caught.value.code(), error.field) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                field,
            )


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("trend?metric=nope", 400, '"field":"metric"'),
        ("trend", 400, '"field":"metric"'),
        ("trend?metric=disk_used", 400, "METRIC_AMBIGUOUS"),
        ("trend?metric=cpu_usage&start_time=now&end_time=-1h", 400, '"field":"start_time"'),
        ("trend?metric=cpu_usage&start_time=-1831d", 400, '"field":"start_time"'),
        ("capacity?metric=disk_usage&limit=101", 400, '"field":"limit"'),
        ("capacity?metric=disk_usage&limit=NaN", 400, '"field":"limit"'),
        ("capacity?metric=requests_total", 400, '"field":"limit"'),
        ("capacity?metric=disk_usage&growth=-1", 400, '"field":"growth"'),
        ("forecast?metric=cpu_usage&horizon=731d", 400, '"field":"horizon"'),
        ("forecast?metric=cpu_usage&step=7m", 400, '"field":"step"'),
    ],
)
async def test_what_makes_no_sense_is_refused_with_its_field(
    manager: Manager, path: str, status: int, said: str
) -> None:
    answer = await manager.call(f"/v1/servers/{GROWING}/{path}")
    assert answer.status == status and said in answer.body.decode(), answer.body


async def test_a_server_that_is_not_there_and_one_without_data_are_two_things(manager: Manager) -> None:
    for what in ("trend?metric=disk_usage", "capacity?metric=disk_usage", "forecast?metric=disk_usage"):
        unknown = await manager.call(f"/v1/servers/nothing/{what}")
        assert unknown.status == 404 and "SERVER_NOT_FOUND" in unknown.body.decode()
        silent = await get(manager, f"/v1/servers/{SILENT}/{what}")
        assert silent["serverId"] == SILENT and "level" not in silent
        assert silent.get("reason", "CAPACITY_REASON_NO_DATA") == "CAPACITY_REASON_NO_DATA"


async def test_who_has_a_scope_asks_about_its_servers_only(manager: Manager) -> None:
    _, secret = await manager.token("VIEWER", {"serverRoles": ["web"]})
    for what in ("trend?metric=cpu_usage", "capacity?metric=disk_usage", "forecast?metric=cpu_usage"):
        assert (await manager.call(f"/v1/servers/{GROWING}/{what}", secret=secret)).status == 200
        hidden = await manager.call(f"/v1/servers/{OTHER}/{what}", secret=secret)
        unknown = await manager.call(f"/v1/servers/nothing/{what}", secret=secret)
        assert hidden.status == 404 and hidden.body == unknown.body.replace(b"nothing", OTHER.encode())
    found = await get(manager, "/v1/capacity?limit=20&within=90d", secret=secret)
    assert {one["serverId"] for one in found["capacities"]} == {GROWING, FLAT} and found["servers"] == 2
    assert (await get(manager, "/v1/capacity?limit=20&role=db", secret=secret))["servers"] == 0
    _, agent = await manager.token("AGENT", {"serverRoles": ["web"]})
    assert (await manager.call("/v1/capacity", secret=agent)).status == 403


async def test_the_command_says_it_to_people(manager: Manager) -> None:
    async def command(*words: str) -> Any:
        environ = {"OPENMANAGER_TOKEN": manager.secret}
        return await asyncio.to_thread(called, manager.product.addresses["gateway"], *words, environ=environ)

    trend = await command("trend", GROWING, "disk_usage")
    assert trend.returncode == 0 and trend.stdout.startswith(f"{GROWING} disk_usage (%)\n"), trend.stderr
    assert ", rising\n" in trend.stdout and "year before " in trend.stdout and "100% of the hours" in trend.stdout
    one = await command("capacity", GROWING, "--limit", "90", "--growth", "20%")
    assert one.returncode == 0 and " reaches 90: on 20" in one.stdout and "back-test" in one.stdout, one.stderr
    flat = await command("capacity", FLAT)
    assert flat.returncode == 0 and "reaches 90: no date: flat\n" in flat.stdout
    fleet = await command("capacity", "--within", "90d", "--limit", "90")
    lines = fleet.stdout.splitlines()
    assert lines[:2] == ["disk_usage reaches 90 within 90 days: 1 of 4 servers", "the others: 1 no data, 2 flat"]
    assert lines[3].startswith(f"{GROWING}  disk_usage  ")
    listed = json.loads((await command("capacity", "--limit", "20", "--output", "json")).stdout)
    assert listed["totalSize"] == len(listed["capacities"]) == 3
    for words, status, said in (
        (("trend", SILENT, "disk_usage"), 4, "no points"),
        (("trend", "nobody", "disk_usage"), 4, "there is no server"),
        (("trend", GROWING, "disk_used"), 2, "say which of"),
        (("capacity", GROWING, "--limit", "400"), 2, "0 to 100"),
        (("capacity", "--growth=-200%"), 2, "over -100%"),
        (("trend", GROWING, "cpu_usage", "--from", "now", "--to", "-1d"), 2, "--from is not before --to"),
    ):
        done = await command(*words)
        assert done.returncode == status and said in done.stderr, (words, done.stderr)


@pytest.mark.full
async def test_while_timeseries_is_away_it_says_so_and_afterwards_answers(manager: Manager) -> None:
    paths = (f"/v1/servers/{GROWING}/trend?metric=cpu_usage", "/v1/capacity?growth=0.123")
    await manager.product.kill("timeseries")
    try:
        for path in paths:
            away = await manager.call(path)
            assert away.status == 503 and "timeseries" in away.body.decode(), away.body
    finally:
        await manager.product.start("timeseries")

    async def is_back() -> bool:
        return all([(await manager.call(path)).status == 200 for path in paths])

    await eventually(is_back, WITHIN_S)
