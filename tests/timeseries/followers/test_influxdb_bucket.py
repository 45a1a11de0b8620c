"""The bucket and the token against the real server: made, kept as set, taken away and given back while rows come."""

import itertools
import logging
from pathlib import Path

import pytest

from fleet import status
from fleet.status import StoreMonitor, StoreState
from runtime.errors import Unavailable
from services.timeseries.followers import influxdb as adapter
from services.timeseries.settings import TimeSeriesSettings
from tests.harness import eventually
from tests.harness.influxdb import InfluxServer
from tests.timeseries.followers.samples import CLOCK, backend, caught_up, following, metric_set, tick

SET = metric_set("cpu_usage", "memory_usage")
_numbers = itertools.count(1)


@pytest.fixture
def missing() -> str:
    return f"missing-{next(_numbers)}"


@pytest.mark.parametrize("retention_s", [None, 7_200.0])
async def test_a_bucket_that_is_missing_is_made(
    influx: InfluxServer, missing: str, tmp_path: Path, retention_s: float | None
) -> None:
    async with following(tmp_path, influx.url, missing, retention_s=retention_s) as (engine, follower):
        assert (await follower.probe()).down == "", "also when there is nothing to ship"
        assert await influx.retention_s(missing) == (retention_s or 0)
        await engine.append(tick(SET, CLOCK.now_ms() - 1_700_000_000_000), metric_sets=(SET,))
        await caught_up(engine)
    assert await influx.points(missing) == {("a", "", ""): 2}


async def test_the_retention_of_a_bucket_is_changed_only_when_it_is_set(
    influx: InfluxServer, missing: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await influx.make_bucket(missing, retention_s=7_200)
    for number, (retention_s, expected) in enumerate([(None, 7_200), (10_800.0, 10_800), (10_800.0, 10_800)]):
        caplog.clear()
        async with following(tmp_path / str(number), influx.url, missing, retention_s=retention_s) as (engine, _):
            await engine.append(tick(SET, CLOCK.now_ms() - 1_700_000_000_000), metric_sets=(SET,))
            await caught_up(engine)
        assert await influx.retention_s(missing) == expected
        assert ("from 7200 s to 10800 s" in caplog.text) == (number == 1)


@pytest.mark.parametrize("before_s", [0, 30 * 86_400])
async def test_the_shortest_retention_is_given_to_a_bucket_of_long_files(
    influx: InfluxServer, missing: str, tmp_path: Path, before_s: int
) -> None:
    await influx.make_bucket(missing, retention_s=before_s)
    async with following(tmp_path, influx.url, missing, retention_s=3_600.0) as (engine, _):
        await engine.append(tick(SET, CLOCK.now_ms() - 1_700_000_000_000), metric_sets=(SET,))
        await caught_up(engine)
    assert await influx.retention_s(missing) == 3_600 and await influx.points(missing) == {("a", "", ""): 2}


async def test_a_token_that_may_only_write_is_enough_where_the_bucket_is(
    influx: InfluxServer, missing: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await influx.make_bucket(missing)
    token = await influx.make_token(missing, "write")
    async with following(tmp_path, influx.url, missing, token.text, retention_s=7_200.0) as (engine, follower):
        await engine.append(tick(SET, 1), metric_sets=(SET,))
        await caught_up(engine)
        await eventually(lambda: "INFLUXDB_RETENTION is not applied" in caplog.text, within_s=20)
        assert await influx.retention_s(missing) == 0

        await influx.delete_bucket(missing)
        probe = await follower.probe()
        assert "INFLUXDB_TOKEN may not create it" in probe.down and missing in probe.down
        await engine.append(tick(SET, 2))
        await eventually(lambda: "INFLUXDB_TOKEN may not create it" in follower._last_error, within_s=20)
        assert (await follower.probe()).lag_points == 2, "an outage: nothing is given up"
        await influx.make_bucket(missing)
        again = await influx.make_token(missing, "write")
    async with following(tmp_path, influx.url, missing, again.text) as (engine, _):
        await caught_up(engine)
    assert await influx.points(missing) == {("a", "", ""): 2}


async def test_an_organization_that_is_missing_is_an_outage(influx: InfluxServer, missing: str) -> None:
    nowhere = backend(influx.url, missing)
    nowhere._target.org = "nobody"
    with pytest.raises(Unavailable, match="INFLUXDB_ORG 'nobody' or INFLUXDB_BUCKET"):
        await nowhere.probe()
    await nowhere.close()


@pytest.mark.fault("InfluxDB: bucket deleted")
@pytest.mark.parametrize("found_by", ["ship", "probe"])
async def test_a_bucket_that_is_deleted_is_made_again_and_that_is_said(
    influx: InfluxServer,
    missing: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    found_by: str,
) -> None:
    caplog.set_level(logging.WARNING)
    for module in (adapter, status):  # the probe that makes it is not to be given up
        monkeypatch.setattr(module, "PROBE_TIMEOUT_S", 20.0)
    async with following(tmp_path, influx.url, missing) as (engine, follower):
        await engine.append(tick(SET, 1), metric_sets=(SET,))
        await caught_up(engine)
        await influx.delete_bucket(missing)
        told: list[str] = []
        if found_by == "ship":
            follower.tell_errors(told.append)
            await engine.append(tick(SET, 2))
            await caught_up(engine)
        else:
            probes = {"influxdb": ("follower", follower.probe)}
            async with StoreMonitor("timeseries", probes, CLOCK) as monitor:
                await eventually(lambda: monitor.statuses()[0].state == StoreState.STORE_STATE_UP, within_s=20)
                told.append(monitor.statuses()[0].last_error)
            await engine.append(tick(SET, 2))
            await caught_up(engine)
        assert len(told) == 1 and "was deleted and is created again, empty" in told[0]
        assert "backfill --to influxdb --from" in told[0] and told[0] in caplog.text
    assert await influx.points(missing) == {("a", "", ""): 2}


@pytest.mark.fault("InfluxDB: token revoked and restored")
async def test_a_token_that_is_revoked_and_restored_loses_nothing(
    influx: InfluxServer, bucket: str, tmp_path: Path
) -> None:
    token = await influx.make_token(bucket, "write")
    async with following(tmp_path, influx.url, bucket, token.text) as (engine, follower):
        await engine.append(tick(SET, 1), metric_sets=(SET,))
        await caught_up(engine)
        await token.revoke()
        for number in range(2, 30):
            await engine.append(tick(SET, number))
        await eventually(lambda: "inactive" in follower._last_error, within_s=20)
        probe = await follower.probe()
        assert probe.down.startswith("INFLUXDB_TOKEN may not write to the bucket") and probe.lag_points == 56
        await token.restore()
        await caught_up(engine)
        assert (await follower.probe()).down == "" and not follower.refusals
    assert await influx.points(bucket) == {("a", "", ""): 58}


def test_the_retention_is_a_duration_that_influxdb_takes() -> None:
    needed = {"INFLUXDB_URL": "http://influxdb:8086", "INFLUXDB_TOKEN": "pa55word"}
    assert TimeSeriesSettings.load(needed).influxdb_retention is None
    assert TimeSeriesSettings.load(needed | {"INFLUXDB_RETENTION": "30d"}).influxdb_retention == 30 * 86_400
    with pytest.raises(Exception, match="INFLUXDB_RETENTION"):
        TimeSeriesSettings.load(needed | {"INFLUXDB_RETENTION": "5m"})
