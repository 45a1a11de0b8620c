"""A stranger with grpcurl and no protos of ours: reflection, health and calls."""

import json
import subprocess

import pytest

from runtime.interception import REFLECTION_SERVICES
from tests.gateway.http.serving import PACKAGE, SERVICES
from tests.harness.commands import require_command
from tests.harness.launched import Launched
from tests.harness.shared_product import METRICS, SERVERS

INNER = {
    "cache": "openmanager.cache.v1.CacheService",
    "timeseries": "openmanager.timeseries.v1.TimeSeriesService",
    "metadata": "openmanager.metadata.v1.ServerRegistryService",
    "simulator": "openmanager.simulator.v1.SimulatorControlService",
    "analytics": "openmanager.analytics.v1.DetectionService",
}


def grpcurl(*words: str, seconds: str = "20") -> "subprocess.CompletedProcess[str]":
    command = [require_command("grpcurl"), "-plaintext", "-max-time", seconds, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_public_services_are_listed_and_described(product: Launched) -> None:
    listed = grpcurl(product.addresses["gateway"], "list").stdout.split()
    plumbing = {"grpc.health.v1.Health", *REFLECTION_SERVICES}
    assert set(listed) - plumbing == {f"{PACKAGE}.{name}" for name in SERVICES}, "what the contract test walks"
    described = grpcurl(product.addresses["gateway"], "describe", "openmanager.gateway.v1.FleetService.GetServer")
    assert "GetServerRequest" in described.stdout


def test_calls_by_reflection(product: Launched) -> None:
    address = product.addresses["gateway"]
    servers = product.get("/v1/servers").json["servers"]
    server_id = next(server["id"] for server in servers if "cpu_usage" in server["metrics"])  # others write some, too
    answer = grpcurl("-d", json.dumps({"id": server_id}), address, "openmanager.gateway.v1.FleetService/GetServer")
    assert len(json.loads(answer.stdout)["server"]["metrics"]) == METRICS
    query = json.dumps({"metrics": ["cpu_usage"], "serverIds": [server_id]})
    answer = grpcurl("-d", query, address, "openmanager.gateway.v1.HistoryService/QueryHistory")
    assert json.loads(answer.stdout)["series"][0]["serverId"] == server_id
    watched = grpcurl(address, "openmanager.gateway.v1.FleetService/WatchFleet", seconds="3")
    assert watched.stdout.count('"observedTime"') >= SERVERS * 2, "a snapshot and at least a tick"


def test_an_unknown_server_is_not_found(product: Launched) -> None:
    answer = grpcurl(
        "-d", '{"id": "nope"}', product.addresses["gateway"], "openmanager.gateway.v1.FleetService/GetServer"
    )
    assert "NotFound" in answer.stderr


@pytest.mark.parametrize("name", INNER)
def test_each_service_reflects_and_tells_its_health(product: Launched, name: str) -> None:
    address = product.addresses[name]
    assert INNER[name] in grpcurl(address, "list").stdout.split()
    assert "SERVING" in grpcurl(address, "grpc.health.v1.Health/Check").stdout
    health = grpcurl("-d", json.dumps({"service": INNER[name]}), address, "grpc.health.v1.Health/Check")
    assert '"SERVING"' in health.stdout


def test_inner_services_answer_only_with_the_service_secret(product: Launched) -> None:
    call = (product.addresses["cache"], "openmanager.cache.v1.CacheService/GetFleetSummary")
    refused = grpcurl(*call)
    assert "Unauthenticated" in refused.stderr
    assert "service-secret" in refused.stderr, "the error says what to pass"
    secret = (product.data / "service-secret").read_text().strip()
    assert secret not in refused.stderr
    assert json.loads(grpcurl("-H", f"authorization: Bearer {secret}", *call).stdout)["total"] >= SERVERS
