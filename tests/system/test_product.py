"""The product as the README shows it: one command, then every address answers."""

import itertools
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.harness.launched import Launched, within
from tests.harness.product import ROOT
from tests.harness.shared_product import METRICS, SERVERS


def test_every_server_and_metric_is_there(product: Launched) -> None:
    servers = [server for server in product.get("/v1/servers").json["servers"] if server["environment"]]
    assert len(servers) == SERVERS, "those of the simulator; other tests write some of their own"
    first = servers[0]
    assert set(first["metrics"]) == {"cpu_usage", "memory_usage", "disk_usage"}
    assert {"id", "hostname", "environment", "role", "location", "status", "observedTime"} <= set(first)
    whole = product.get(f"/v1/servers/{first['id']}").json
    assert len(whole["metrics"]) == METRICS
    assert product.get("/v1/fleet/summary").json["total"] >= SERVERS
    assert product.get("/v1/metrics").json["totalSize"] >= METRICS


def test_history_has_a_point_for_every_tick(product: Launched) -> None:
    server_id = product.get("/v1/servers").json["servers"][0]["id"]

    def ticks() -> list[float]:
        answer = product.get(f"/v1/servers/{server_id}/history?metric=cpu_usage&start_time=-5m&step=1s")
        series = answer.json["series"]
        times: list[float] = series[0]["times"] if series else []
        return times if len(times) >= 5 else []

    times = within(30, ticks)
    assert [later - earlier for earlier, later in itertools.pairwise(times)] == [1.0] * (len(times) - 1)


def test_streamed_history_is_json_lines(product: Launched) -> None:
    body = {"metrics": ["cpu_usage", "load_1m"], "startTime": "-1m", "step": "10s", "aggregation": "AGGREGATION_MAX"}
    answer = product.post("/v1/history:query", body)
    assert answer.status == 200
    lines = answer.body.decode().strip().splitlines()
    assert lines
    assert "cpu_usage" in lines[0]


def test_the_busiest_servers_and_the_whole_fleet(product: Launched) -> None:
    busiest = product.post("/v1/history:query", {"metrics": ["cpu_usage"], "startTime": "-1m", "top": 3})
    series = busiest.json["series"]
    means = [sum(one["values"]) / len(one["values"]) for one in series]
    assert len(series) == 3
    assert means == sorted(means, reverse=True)
    body = {
        "metrics": ["cpu_usage"],
        "startTime": "-1m",
        "step": "1s",
        "acrossServers": "SERVER_AGGREGATION_PERCENTILE",
    }
    whole = product.post("/v1/history:query", body | {"percentile": 50}).json["series"]
    assert [one["serverId"] for one in whole] == [""]
    assert len(whole[0]["values"]) >= 3


def test_every_store_is_up(product: Launched) -> None:
    for path in ("/api/database/status", "/v1/storage/status"):
        stores = {store["name"]: store for store in product.get(path).json["stores"]}
        assert set(stores) == {"engine", "postgresql"}
        assert {store["state"] for store in stores.values()} == {"STORE_STATE_UP"}


def test_operators_pages(product: Launched) -> None:
    assert product.get("/healthz").status == 200
    assert product.get("/readyz").json["ready"] is True
    document = product.get("/openapi.json").json
    assert document["openapi"].startswith("3.1")
    assert "/v1/servers/{id}" in document["paths"]
    for line in (
        r'openmanager_store_up\w*{.*role="primary",store="engine"} 1.0$',
        r'openmanager_store_up\w*{.*role="embedded",store="postgresql"} 1.0$',  # the stores are asked every 2 s
        r'openmanager_fleet_servers\w*{.*status="healthy"} \d',
    ):
        within(30, lambda line=line: re.search(f"^{line}", product.get("/metrics").body.decode(), re.MULTILINE))


def test_watch_begins_with_every_server_and_goes_on(product: Launched) -> None:
    host, port = product.http_address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"GET /v1/fleet/watch HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        received = b""
        while received.count(b"event: server") < SERVERS * 2:
            received += connection.recv(65536)
    assert b"text/event-stream" in received
    assert received.count(b"\nid: ") >= 2, "a version for each message"


def written(name: str = "m", *, server: str = "agent-1", age_s: float = 0.0) -> dict[str, Any]:
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - age_s))
    return {
        "metrics": [{"name": name, "unit": "1", "kind": "METRIC_KIND_GAUGE"}],
        "rows": [{"serverId": server, "time": moment}],
        "values": [1.5],
    }


def test_written_metrics_are_read_back(product: Launched) -> None:
    answer = product.post("/v1/metrics:write", written())
    assert (answer.status, answer.json["acceptedPoints"], answer.json["rejectedPoints"]) == (200, 1, 0)
    read = product.get("/v1/servers/agent-1/history?metric=m&start_time=-1m").json
    assert read["series"][0]["values"] == [1.5]
    assert within(30, lambda: product.get("/v1/servers/agent-1").status == 200)
    assert product.get("/v1/servers/agent-1").json["metrics"] == {"m": 1.5}
    assert product.post("/v1/metrics:write", written()).status == 200, "sending again is harmless"
    product.post("/v1/servers/agent-1", None, method="DELETE")


def test_a_bad_row_is_named_and_the_rest_is_durable(product: Launched) -> None:
    body = written(server="agent-2")
    body["rows"].append({"serverId": "agent-2", "time": "2099-01-01T00:00:00Z"})
    body["values"].append(2.0)
    answer = product.post("/v1/metrics:write", body)
    assert answer.status == 200
    assert (answer.json["acceptedPoints"], answer.json["rejectedPoints"]) == (1, 1)
    error = answer.json["errors"][0]
    assert (error["row"], error["field"], error["reason"]) == (1, "rows[1].time", "TIME_IN_FUTURE")
    read = product.get("/v1/servers/agent-2/history?metric=m&start_time=-1m&end_time=2100-01-01T00:00:00Z").json
    assert read["series"][0]["values"] == [1.5]
    product.post("/v1/servers/agent-2", None, method="DELETE")


def test_servers_are_created_changed_deleted_and_restored(product: Launched) -> None:
    made = product.post("/v1/servers", {"id": "spare-1", "hostname": "spare", "environment": "staging"})
    assert (made.status, made.json["status"]) == (200, "SERVER_STATUS_OFFLINE")
    assert product.post("/v1/servers", {"id": "spare-1"}).status == 409
    assert product.get("/v1/servers/spare-1").json["environment"] == "staging"
    changed = product.post("/v1/servers/spare-1", {"role": "spare"}, method="PATCH")
    assert (changed.json["role"], changed.json["environment"]) == ("spare", "staging")
    assert product.post("/v1/servers/spare-1", None, method="DELETE").status == 200
    assert product.get("/v1/servers/spare-1").status == 404
    restored = product.post("/v1/servers/spare-1:undelete", {})
    assert (restored.status, restored.json["role"]) == (200, "spare")
    product.post("/v1/servers/spare-1", None, method="DELETE")


def test_ai_interactions_are_kept(product: Launched) -> None:
    sent = {"sessionId": "s1", "query": "why is web-01 slow?", "response": "its disk is full", "confidence": 0.8}
    made = product.post("/v1/ai/interactions", sent)
    assert made.status == 200
    assert product.get(f"/v1/ai/interactions/{made.json['id']}").json["response"] == "its disk is full"
    assert product.get("/v1/ai/interactions?session_id=s1").json["totalSize"] == 1


def test_the_launcher_restarts_what_dies_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with Launched(tmp_path, SIMULATOR_SERVERS="2") as launched:
        dead = launched.pid_of("cache")
        subprocess.run(["kill", "-9", str(dead)], check=True)
        within(30, lambda: launched.says("cache was killed by SIGKILL; starting it again"))
        within(60, lambda: launched.says("cache is back"))
        assert launched.pid_of("cache") != dead
        within(30, lambda: launched.get("/v1/servers").json["totalSize"] == 2)

        second = subprocess.run(
            [sys.executable, "-m", "launcher"],
            cwd=ROOT,
            env=launched.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert second.returncode == 1
        assert "Traceback" not in second.stdout
        assert str(launched.data) in second.stdout or "in use" in second.stdout

        assert launched.stop(signal.SIGINT) == 0, launched.printed
        assert launched.printed.rstrip().endswith("stopped")
        assert "Traceback" not in launched.printed
        assert launched.processes() == []


def test_no_process_outlives_a_killed_launcher(tmp_path: Path) -> None:
    with Launched(tmp_path, SIMULATOR_SERVERS="2") as launched:
        launched.stop(signal.SIGKILL)
        within(40, lambda: launched.processes() == [])


@pytest.mark.full
def test_stopping_once_more_kills_all_that_is_left(tmp_path: Path) -> None:
    with Launched(tmp_path, SIMULATOR_SERVERS="2") as launched:
        subprocess.run(["kill", "-STOP", str(launched.pid_of("simulator"))], check=True)  # the first that is stopped
        assert launched.process is not None
        launched.process.send_signal(signal.SIGINT)
        within(30, lambda: launched.says("stopping"))
        assert launched.stop(signal.SIGINT) == 0, launched.printed
        within(30, lambda: launched.processes() == [])


@pytest.mark.full
def test_bad_settings_stop_the_start_and_are_all_named(tmp_path: Path) -> None:
    launched = Launched(tmp_path, SIMULATOR_SERVERS="-3", SIMULATOR_INTERVAL="soon", CACHE_ADDRESS="here")
    with pytest.raises(AssertionError) as refused, launched:
        pass
    for name in ("SIMULATOR_SERVERS", "SIMULATOR_INTERVAL", "CACHE_ADDRESS"):
        assert name in str(refused.value)
    assert launched.processes() == []
