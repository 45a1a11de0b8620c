"""The follower as an operator sets it up: settings, and `python -m services.timeseries` with a real InfluxDB."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from fleet.codec import metric_set_to_pb, rows_to_pb
from openmanager.fleet.v1 import status_pb2, status_pb2_grpc
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc
from runtime.channel import Channel
from runtime.settings import SettingsError
from services.timeseries.settings import TimeSeriesSettings
from tests.harness import eventually, free_port
from tests.harness.influxdb import TOKEN, InfluxServer
from tests.timeseries.followers.samples import metric_set, tick

ROOT = Path(__file__).parents[3]
SECRET = "a-secret-of-the-test-suite"
SET = metric_set("cpu_usage", "memory_usage")


def test_settings_that_make_no_sense_are_refused() -> None:
    def problem(**environment: str) -> str:
        with pytest.raises(SettingsError) as caught:
            TimeSeriesSettings.load(environment)
        (line,) = caught.value.problems
        return line

    assert problem(INFLUXDB_URL="http://influxdb:8086") == "INFLUXDB_TOKEN: must be set too, since INFLUXDB_URL is"
    assert problem(INFLUXDB_TOKEN="a\ntoken") == "INFLUXDB_TOKEN: has characters that no header can hold"
    for url, said in {
        "influxdb:8086": "must begin with http:// or https://",
        "ftp://influxdb:8086": "must begin with http:// or https://",
        "http://": "names no host or port",
        "http://influxdb:0": "names no host or port",
        "http://influxdb:port": "is not a URL",
        "http://user:pa55word@influxdb:8086": "must hold no user, password or options",
        "http://influxdb:8086?token=pa55word": "must hold no user, password or options",
    }.items():
        line = problem(INFLUXDB_URL=url, INFLUXDB_TOKEN="t")
        assert line.startswith("INFLUXDB_URL: ") and said in line and "pa55word" not in line
    settings = TimeSeriesSettings.load({"INFLUXDB_URL": "https://influxdb/base/", "INFLUXDB_TOKEN": "pa55word"})
    assert (settings.influxdb_org, settings.influxdb_bucket) == ("openmanager", "metrics")
    assert "pa55word" not in repr(settings)
    assert TimeSeriesSettings.load({}).influxdb_url is None


@pytest.mark.fault("InfluxDB: timeseries killed while its follower lags")
async def test_the_process_ships_shows_its_follower_and_stops(
    influx: InfluxServer, bucket: str, tmp_path: Path
) -> None:
    port = free_port()
    environment = {"DATA_DIR": str(tmp_path), "TIMESERIES_ADDRESS": f"127.0.0.1:{port}", "SERVICE_SECRET": SECRET}
    environment |= {"INFLUXDB_URL": influx.url, "INFLUXDB_TOKEN": TOKEN, "INFLUXDB_BUCKET": bucket}
    process = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, "-m", "services.timeseries"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        stderr=subprocess.PIPE,
    )
    try:
        async with Channel(f"127.0.0.1:{port}", secret=SECRET) as channel:
            stores: Any = status_pb2_grpc.StoreStatusServiceStub(channel.grpc)
            points: Any = timeseries_pb2_grpc.TimeSeriesServiceStub(channel.grpc)

            async def status() -> Any:
                try:
                    found = await stores.ListStoreStatuses(status_pb2.ListStoreStatusesRequest())
                except grpc.aio.AioRpcError as error:
                    raise AssertionError(error.details()) from error
                states = {store.name: store for store in found.stores}
                return states["influxdb"].state == status_pb2.STORE_STATE_UP and states

            states = await eventually(status, within_s=60)
            assert set(states) == {"engine", "influxdb"} and states["influxdb"].role == "follower"
            request = timeseries_pb2.AppendRequest(
                metric_sets=[metric_set_to_pb(SET)], batch=rows_to_pb(tick(SET, 1, ("a", "b")))
            )
            await points.Append(request)
            await eventually(lambda: _there(influx, bucket), within_s=20)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 30) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        printed = process.stderr.read().decode()
        process.stderr.close()
    assert TOKEN not in printed


async def _there(influx: InfluxServer, bucket: str) -> bool:
    return await influx.points(bucket) == {("a", "", ""): 2, ("b", "", ""): 2}
