"""The InfluxDB follower against the real server: everything there, once, under the right tags, whatever was killed."""

import asyncio
import logging
import math
from collections import Counter
from pathlib import Path

import pytest

from fleet.model import Metric, MetricSet
from fleet.status import PROBE_TIMEOUT_S, StoreMonitor, StoreState
from services.timeseries.followers import influxdb as adapter
from services.timeseries.followers.backend import TaggedRows
from tests.harness import eventually
from tests.harness.influxdb import InfluxServer
from tests.timeseries.followers.samples import (
    CLOCK,
    NOON_MS,
    backend,
    caught_up,
    descriptor,
    following,
    metric_set,
    rows,
    tick,
)

SET = metric_set("cpu_usage", "memory_usage", "disk_usage")
WIDE = metric_set(*(f"metric_{number}" for number in range(511)))
SERVERS = tuple(f"server-{number:02}" for number in range(20))


async def test_every_point_is_there_under_the_tags_of_its_time(
    influx: InfluxServer, bucket: str, tmp_path: Path
) -> None:
    async with following(tmp_path, influx.url, bucket) as (engine, follower):
        told = [descriptor(server, "staging") for server in SERVERS]
        for number in range(30):
            servers = told if number == 0 else [descriptor(SERVERS[0], role="db")] if number == 10 else []
            await engine.append(tick(SET, number, SERVERS), metric_sets=(SET,), servers=servers)
        await engine.append(servers=[descriptor(SERVERS[1], environment="", role="")])
        await engine.append(tick(SET, 30, (*SERVERS, "never-told")))
        await caught_up(engine)
        assert follower.shipped_points == (30 * 20 + 21) * 3
    expected = {(server, "staging", "web"): 31 * 3 for server in SERVERS[2:]}
    expected |= {(SERVERS[0], "staging", "web"): 10 * 3, (SERVERS[0], "production", "db"): 21 * 3}
    expected |= {(SERVERS[1], "staging", "web"): 30 * 3, (SERVERS[1], "", ""): 3, ("never-told", "", ""): 3}
    assert await influx.points(bucket) == expected
    found = await influx.query(
        f'from(bucket: "{bucket}") |> range(start: 0) |> filter(fn: (r) => r.server_id == "{SERVERS[0]}" and'
        ' r._field == "memory_usage") |> group() |> sort(columns: ["_time"])'
    )
    assert [(record["_time"].timestamp() * 1000, record["_value"]) for record in found] == [
        (NOON_MS + number, float(number)) for number in range(31)
    ]


@pytest.mark.fault("InfluxDB killed, a server moves, our process restarts")
async def test_a_killed_influxdb_stops_nobody_and_gets_everything_once(
    influx: InfluxServer, bucket: str, tmp_path: Path
) -> None:
    number = 0
    async with following(tmp_path, influx.url, bucket) as (engine, follower):

        async def write(ticks: int, pause_s: float = 0.0) -> None:
            nonlocal number
            for _ in range(ticks):
                environment = "staging" if number < 60 else "production"
                told = [descriptor(server, environment) for server in SERVERS] if number in (0, 60) else []
                await engine.append(tick(WIDE, number, SERVERS), metric_sets=(WIDE,), servers=told)
                number += 1
                await asyncio.sleep(pause_s)

        streaming = asyncio.create_task(write(40, 0.01))
        await eventually(lambda: follower.shipped_points > 0, within_s=20)
        influx.kill()
        async with asyncio.timeout(60):  # who waited for the store would wait for ever
            await streaming
            await write(60)  # 61 MB of line protocol: many times what the follower holds
        away = await follower.probe()
        assert "does not answer" in away.down and away.address == influx.url
        assert away.lag_points >= 60 * 10_220 and away.spool_bytes > 60 * 80_000
        shipped_before = follower.shipped_points
    # the follower restarts while InfluxDB is still away: the tags of what was not shipped must come back too
    async with following(tmp_path, influx.url, bucket) as (engine, follower):
        await engine.append(tick(WIDE, number, SERVERS))
        await influx.start()
        await caught_up(engine)
        assert follower.shipped_points == 101 * 10_220 - shipped_before, "the cursor resumes"
        assert (await follower.probe()).lag_points == 0
    found = Counter[str]()
    for (_, environment, _), points in (await influx.points(bucket)).items():
        found[environment] += points
    assert found == {"staging": 60 * 10_220, "production": 41 * 10_220}


async def test_a_token_that_is_refused_is_an_outage_and_never_shown(
    influx: InfluxServer, bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "a-wrong-token-nobody-may-see"
    async with following(tmp_path, influx.url, bucket, wrong) as (engine, follower):
        probes = {"influxdb": ("follower", follower.probe)}
        async with StoreMonitor("timeseries", probes, CLOCK) as monitor:
            follower.tell_errors(lambda text: monitor.record_error("influxdb", text))
            await engine.append(tick(SET, 1), metric_sets=(SET,))
            await eventually(lambda: monitor.statuses()[0].state == StoreState.STORE_STATE_DOWN, within_s=20)
            (status,) = monitor.statuses()
            assert "INFLUXDB_TOKEN" in status.last_error and "unauthorized" in status.last_error
            await eventually(lambda: "away" in caplog.text, within_s=20)
            assert wrong not in caplog.text and wrong not in str(status)
    async with (
        following(tmp_path, influx.url, bucket) as (engine, follower),
        StoreMonitor("timeseries", {"influxdb": ("follower", follower.probe)}, CLOCK) as monitor,
    ):
        await caught_up(engine)
        await eventually(lambda: monitor.statuses()[0].state == StoreState.STORE_STATE_UP, within_s=20)
        (status,) = monitor.statuses()
        assert status.role == "follower" and status.address == influx.url and status.latency_ms > 0
        assert status.server_version.startswith("InfluxDB ")
    assert await influx.points(bucket) == {("a", "", ""): 3}


async def test_names_and_values_come_back_as_they_were(influx: InfluxServer, bucket: str, tmp_path: Path) -> None:
    labels = (("disk", 'a "b" \\ c=d, é%s'), ("path", "C:\\"))
    fit = [
        Metric(name="plain"),
        Metric(name="of labels", labels=labels),
        Metric(name='q"uo,te=d %d%'),
        Metric(name="back\\slash"),
        Metric(name="_value"),
    ]
    unfit = [Metric(name="time"), Metric(name="ends\\"), Metric(name="odd\\ run")]
    of_set = MetricSet(metrics=(*fit, *unfit))
    server = 'srv é "1", = \\,x'
    values = [[1e-7, 5e-324, 1.7976931348623157e308, -0.0, 0.1 + 0.2], [math.nan, math.inf, -math.inf, 1e22, 7.0]]
    async with following(tmp_path, influx.url, bucket) as (engine, follower):
        lines = [(server, NOON_MS + at, [*row, 1.0, 1.0, math.nan]) for at, row in enumerate(values)]
        lines += [(server, NOON_MS + 2, [math.nan] * 8), ("ends\\", NOON_MS, [1.0] * 8)]
        told = [descriptor(server, "pro duction,=", "w\\eb")]
        await engine.append(rows(of_set, lines), metric_sets=(of_set,), servers=told)
        whole = MetricSet(metrics=tuple(fit))
        await engine.append(rows(whole, [("whole", NOON_MS, values[0])]), metric_sets=(whole,))
        await caught_up(engine)
        refused = {reason: refusal.points for reason, refusal in follower.refusals.items()}
        assert refused == {"INFINITE_VALUE": 2, "NAME_NOT_REPRESENTABLE": 2 * 2 + 8}
        assert follower.shipped_points == 7 + 5
    assert await influx.points(bucket) == {(server, "pro duction,=", "w\\eb"): 7, ("whole", "", ""): 5}
    found = await influx.query(f'from(bucket: "{bucket}") |> range(start: 0)')
    read = {
        (record["_field"], record["_time"].timestamp() * 1000 - NOON_MS): record["_value"]
        for record in found
        if record["server_id"] == server
    }
    at_once = {record["_field"]: record["_value"] for record in found if record["server_id"] == "whole"}
    assert at_once == dict(zip(whole.keys, values[0], strict=True))
    assert math.copysign(1, at_once["back\\slash"]) == -1, "the sign of zero comes back too"
    assert read == {(of_set.keys[i], 0): values[0][i] for i in range(5)} | {
        (of_set.keys[i], 1): values[1][i] for i in (3, 4)
    }
    assert of_set.keys[1] == 'of labels{disk="a \\"b\\" \\\\ c=d, é%s",path="C:\\\\"}'


async def test_lines_and_requests_over_their_bounds_are_split(
    influx: InfluxServer, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "MAX_LINE_BYTES", 1_000)
    monkeypatch.setattr(adapter, "MAX_BODY_BYTES", 5_000)
    tagged = TaggedRows(metric_set=WIDE, rows=tick(WIDE, 0, SERVERS), descriptors=(None,) * 20)
    bodies = list(adapter.LineEncoder().encode([tagged], Counter()))
    assert all(len(body.text) <= 5_000 for body in bodies) and sum(body.points for body in bodies) == 10_220
    assert sum(body.lines for body in bodies) == 20 * 6
    async with following(tmp_path, influx.url, bucket) as (engine, follower):
        holed = rows(WIDE, [("holed", NOON_MS, [math.nan] * 300 + [1.0] * 211)])
        await engine.append(tick(WIDE, 0, SERVERS), metric_sets=(WIDE,))
        await engine.append(holed)
        await caught_up(engine)
        assert follower.shipped_points == 10_220 + 211
    assert await influx.points(bucket) == {(server, "", ""): 511 for server in SERVERS} | {("holed", "", ""): 211}


async def test_what_is_refused_for_good_is_counted_and_stops_nobody(
    influx: InfluxServer, bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now_ms = CLOCK.now_ms() - 60_000
    await influx.make_bucket(f"{bucket}-short", retention_s=3_600)
    async with following(tmp_path, influx.url, f"{bucket}-short") as (engine, follower):
        mixed = [("a", now_ms + at if at % 3 else NOON_MS + at, [1.0, 2.0, 3.0]) for at in range(30)]
        await engine.append(rows(SET, mixed), metric_sets=(SET,))
        await engine.append(tick(SET, 1))
        await engine.append(rows(SET, [("b", now_ms, [1.0, 2.0, math.nan])]))
        await caught_up(engine)
        refusal = follower.refusals["BEYOND_RETENTION"]
        assert refusal.points == (10 + 1) * 3 and refusal.first_ms <= refusal.last_ms
        assert follower.shipped_points == 20 * 3 + 2
        assert len([record for record in caplog.records if "BEYOND_RETENTION" in record.message]) == 1
    assert await influx.points(f"{bucket}-short") == {("a", "", ""): 60, ("b", "", ""): 2}
    await influx.write(bucket, f"server_metrics,server_id=a cpu_usage=1i {NOON_MS}")
    async with following(tmp_path / "second", influx.url, bucket) as (engine, follower):
        await engine.append(tick(SET, 1, ("a", "b")), metric_sets=(SET,))
        await caught_up(engine)
        assert follower.refusals["FIELD_TYPE_CONFLICT"].points == 6 - follower.shipped_points


async def test_a_store_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adapter.PROBE_TIMEOUT_S < PROBE_TIMEOUT_S, "so that it still shows how far it is behind"
    monkeypatch.setattr(adapter, "WRITE_TIMEOUT_S", 100.0)

    held: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _reader, writer: held.append(writer), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with asyncio.timeout(60), following(tmp_path, url, "b") as (engine, follower):  # stopping, too, is quick
        for number in range(50):
            await engine.append(tick(SET, number), metric_sets=(SET,))
        probe = await follower.probe()
        assert "does not answer" in probe.down
        assert probe.lag_points == 150
    for writer in held:
        writer.close()
    server.close()


async def test_a_probe_of_nothing_says_where_nothing_is() -> None:
    nowhere = backend("http://127.0.0.1:9", "b")
    with pytest.raises(Exception, match="InfluxDB does not answer"):
        await nowhere.probe()
    await nowhere.close()
