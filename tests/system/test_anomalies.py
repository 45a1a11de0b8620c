"""Findings in the record of a running product: listed, judged and watched over HTTP, gRPC and by the command."""

import contextlib
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc

from openmanager.gateway.v1 import analytics_pb2 as pb
from openmanager.gateway.v1 import analytics_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from tests.client.calling import called
from tests.harness.findings import finding, tell
from tests.harness.launched import Launched, within

MINUTE_MS = 60_000


def test_a_finding_is_listed_taken_care_of_judged_and_shown(product: Launched) -> None:
    now_ms = int(time.time() * 1_000)
    server_id = product.get("/v1/servers").json["servers"][0]["id"]
    one = finding(server_id, now_ms - 10 * MINUTE_MS)
    tell(product, one, finding("gone-1", now_ms - 9 * MINUTE_MS, end_ms=now_ms))
    path = f"/v1/anomalies/{one.id}"
    listed = product.get(f"/v1/anomalies?server_id={server_id}&open=true&start_time=-1h").json
    assert [found["id"] for found in listed["anomalies"]] == [one.id]
    assert 0 <= listed["learned"] < 1, "it has just begun to learn"
    shown = product.get(path).json
    assert shown == listed["anomalies"][0]
    assert (shown["metric"], shown["contributions"][0]["value"], shown["verdict"]) == (
        "cpu_usage",
        97.5,
        "ANOMALY_VERDICT_UNSPECIFIED",
    )
    mine = product.post(f"{path}:acknowledge", {"comment": "on it"}).json
    assert (mine["acknowledgement"]["author"], mine["acknowledgement"]["comment"]) == ("local-administrator", "on it")
    judged = product.post(f"{path}:feedback", {"verdict": "false"}).json
    assert judged["verdict"] == "ANOMALY_VERDICT_FALSE"
    assert product.get(path).json == judged
    for query, found in (("acknowledged=true&verdict=false", True), ("acknowledged=false", False), ("verdict=real", 0)):
        page = product.get(f"/v1/anomalies?server_id={server_id}&{query}").json
        assert (one.id in [each["id"] for each in page["anomalies"]]) == bool(found), query
    for bad, field in (
        (product.post(f"{path}:feedback", {}), "verdict"),
        (product.post(f"{path}:feedback", {"verdict": "perhaps"}), "verdict"),
        (product.get("/v1/anomalies/nonsense"), "id"),
        (product.get("/v1/anomalies?min_score=2"), "min_score"),
        (product.post(f"{path}:acknowledge", {"comment": "x" * 17_000}), "comment"),
    ):
        violations = [each for detail in bad.json["details"] for each in detail.get("fieldViolations", [])]
        assert (bad.status, [each["field"] for each in violations]) == (400, [field])
    assert product.get(f"/v1/anomalies/{'0' * 32}").status == 404
    within(20, lambda: "FeedbackAnomaly" in json.dumps(product.get("/v1/audit").json))


def test_both_streams_tell_of_it(product: Launched) -> None:
    now_ms = int(time.time() * 1_000)
    server_id = product.get("/v1/servers").json["servers"][1]["id"]
    with grpc.insecure_channel(product.addresses["gateway"]) as channel:
        findings: Any = analytics_pb2_grpc.AnalyticsServiceStub(channel)  # type: ignore[no-untyped-call]
        fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)  # type: ignore[no-untyped-call]
        watched = findings.WatchAnomalies(pb.WatchAnomaliesRequest(server_id=server_id), timeout=60)
        of_fleet = fleet.WatchFleet(fleet_pb2.WatchFleetRequest(), timeout=60)
        assert next(watched).snapshot
        assert next(of_fleet).snapshot
        one = finding(server_id, now_ms - 5 * MINUTE_MS)
        tell(product, one)
        assert [each.id for each in next(watched).anomalies] == [one.id]
        in_fleet = next(message for message in of_fleet if message.anomalies)
        assert [each.id for each in in_fleet.anomalies] == [one.id]
        tell(product, one.changed(end_ms=now_ms))
        over = next(watched)
        assert over.anomalies[0].HasField("end_time")
        watched.cancel()
        of_fleet.cancel()
    with events(product, "/v1/fleet/watch", in_fleet.version) as lines:
        id_line = next(line for line in lines if f'"id":"{one.id}"' in line)
        assert '"endTime"' in id_line, "who was cut off is told how it is now"


@contextlib.contextmanager
def events(product: Launched, path: str, after: str) -> Iterator[Iterator[str]]:
    """The data of the event `anomaly` of a stream."""
    request = urllib.request.Request(f"http://{product.http_address}{path}", headers={"Last-Event-ID": after})
    with urllib.request.urlopen(request, timeout=30) as answer:

        def found() -> Iterator[str]:
            event = ""
            for raw in answer:
                line = raw.decode()
                if line.startswith("event:"):
                    event = line[6:].strip()
                elif line.startswith("data:") and event == "anomaly":
                    yield line[5:].strip()

        yield found()


def test_the_command_lists_shows_and_judges(product: Launched) -> None:
    now_ms = int(time.time() * 1_000)
    one = finding("command-1", now_ms - 3 * MINUTE_MS)
    tell(product, one)
    address = product.addresses["gateway"]
    listed = called(address, "anomalies", "command-1", "--open")
    assert listed.returncode == 0, listed.stderr
    assert re.search(rf"goes on +command-1 +0\.62 +cpu_usage +{one.id}", listed.stdout)
    judged = called(address, "anomaly", one.id, "--false", "--comment", "the nightly backup")
    assert judged.returncode == 0, judged.stderr
    assert "false, local-administrator" in judged.stdout
    assert "the nightly backup" in judged.stdout
    assert re.search(r"cpu_usage +97\.5 +10 to 30 +0\.75", judged.stdout)
    as_json = called(address, "anomalies", "command-1", "--output", "json")
    assert [json.loads(line)["verdict"] for line in as_json.stdout.splitlines()] == ["ANOMALY_VERDICT_FALSE"]
    assert called(address, "anomaly", one.id, "--comment", "alone").returncode != 0
    missing = called(address, "anomaly", "0" * 32)
    assert missing.returncode != 0
    assert "there is no finding" in missing.stderr
