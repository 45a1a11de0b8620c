"""The follower as an operator sets it up: settings, and `python -m services.timeseries` with a real Prometheus."""

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
from services.timeseries.settings import TimeSeriesSettings, split_urls
from tests.harness import eventually, free_port
from tests.harness.prometheus import PrometheusServer, prometheus_server
from tests.timeseries.followers.samples import CLOCK, metric_set, rows

ROOT = Path(__file__).parents[3]
SECRET = "a-secret-of-the-test-suite"
TOKEN = "a-bearer-token-nobody-may-see"
SET = metric_set("cpu_usage", "memory_usage")


@pytest.mark.parametrize("setting", ["PROMETHEUS_WRITE_URL", "PROMETHEUS_QUERY_URL"])
def test_addresses_that_make_no_sense_are_refused(setting: str) -> None:
    for url, said in {
        "prometheus:9090": "must begin with http:// or https://",
        "http://a:1,b:2": "must begin with http:// or https://",
        "http://a:1,": "must begin with http:// or https://",
        "http://": "names no host or port",
        "http://a:0/api": "names no host or port",
        "http://a:port": "is not a URL",
        "http://a, http://user:pa55word@b": "must hold no user, password or options",
        "http://a?token=pa55word": "must hold no user, password or options",
    }.items():
        with pytest.raises(SettingsError) as caught:
            TimeSeriesSettings.load({setting: url})
        (line,) = caught.value.problems
        assert line.startswith(f"{setting}: ") and said in line and "pa55word" not in line


def test_settings_of_the_store() -> None:
    for name, value in (("PROMETHEUS_BEARER_TOKEN", "a\ntoken"), ("PROMETHEUS_TENANT", "a tenant")):
        with pytest.raises(SettingsError) as caught:
            TimeSeriesSettings.load({name: value})
        assert caught.value.problems == [f"{name}: has characters that no header can hold"]
    settings = TimeSeriesSettings.load(
        {"PROMETHEUS_WRITE_URL": "http://a:1/push, https://b/push", "PROMETHEUS_BEARER_TOKEN": "pa55word"}
    )
    assert split_urls(settings.prometheus_write_url or "") == ["http://a:1/push", "https://b/push"]
    assert "pa55word" not in repr(settings)


async def test_the_process_ships_shows_its_follower_and_stops(tmp_path: Path) -> None:
    async with prometheus_server() as prometheus:
        port = free_port()
        environment = {"DATA_DIR": str(tmp_path), "TIMESERIES_ADDRESS": f"127.0.0.1:{port}", "SERVICE_SECRET": SECRET}
        nobody = f"http://127.0.0.1:{free_port()}/api/v1/write"
        environment |= {"PROMETHEUS_WRITE_URL": f"{nobody}, {prometheus.write_url}", "PROMETHEUS_BEARER_TOKEN": TOKEN}
        environment |= {"PROMETHEUS_QUERY_URL": prometheus.query_url()}
        process = await asyncio.to_thread(
            subprocess.Popen,
            [sys.executable, "-m", "services.timeseries"],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **environment},
            stderr=subprocess.PIPE,
        )
        try:
            await _ships_and_shows(port, prometheus)
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 30) == 0
        finally:
            process.kill()
            process.wait()
            assert process.stderr is not None
            printed = process.stderr.read().decode()
            process.stderr.close()
        assert TOKEN not in printed


async def _ships_and_shows(port: int, prometheus: PrometheusServer) -> None:
    now_ms = CLOCK.now_ms()
    async with Channel(f"127.0.0.1:{port}", secret=SECRET) as channel:
        stores: Any = status_pb2_grpc.StoreStatusServiceStub(channel.grpc)
        points: Any = timeseries_pb2_grpc.TimeSeriesServiceStub(channel.grpc)

        async def up() -> Any:
            try:
                found = await stores.ListStoreStatuses(status_pb2.ListStoreStatusesRequest())
            except grpc.aio.AioRpcError as error:
                raise AssertionError(error.details()) from error
            states = {store.name: store for store in found.stores}
            return states["prometheus"].state == status_pb2.STORE_STATE_UP and states["prometheus"]

        store = await eventually(up, within_s=60)
        assert store.role == "follower" and store.address.endswith(prometheus.write_url)
        assert store.server_version == "Prometheus API unknown, remote write 2.0"
        batch = rows_to_pb(rows(SET, [(server, now_ms, [1.0, 2.0]) for server in ("a", "b")]))
        await points.Append(timeseries_pb2.AppendRequest(metric_sets=[metric_set_to_pb(SET)], batch=batch))

        async def there() -> bool:
            return await prometheus.points(now_ms + 1_000) == {("a", "", ""): 2, ("b", "", ""): 2}

        await eventually(there, within_s=15)
