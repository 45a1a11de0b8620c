"""What bad input gets: the right status, the field's name, and never the text of an unknown error."""

import socket
from typing import Any

import grpc
import pytest

from openmanager.gateway.v1 import history_pb2, history_pb2_grpc
from tests.harness.launched import Launched, within

HISTORY = "/v1/servers/{id}/history"
ROW = {"serverId": "bad-1", "time": "2026-01-01T00:00:00Z"}
METRIC = {"name": "m"}


@pytest.mark.parametrize(
    ("path", "field"),
    [
        (HISTORY + "?metric=cpu_usage&start_time=yesterday", "start_time"),
        (HISTORY + "?metric=cpu_usage&start_time=2026-02-01T00:00:00Z&end_time=2026-01-01T00:00:00Z", "start_time"),
        (HISTORY + "?metric=cpu_usage&end_time=99999-01-01", "end_time"),
        (HISTORY + "?metric=cpu_usage&step=NaN", "step"),
        (HISTORY + "?metric=cpu_usage&step=-5s", "step"),
        (HISTORY + "?metric=cpu_usage&step=1ms", "step"),
        (HISTORY + "?metric=cpu_usage&step=10s&aggregation=MEDIAN", "aggregation"),
        (HISTORY + "?metric=cpu_usage&step=10s&aggregation=RATE", "aggregation"),
        (HISTORY + "?metric=no_such_metric", "metric"),
        (HISTORY + "?metric=", "metric"),
        (HISTORY, "metric"),
        (HISTORY + "?metric=cpu_usage&colour=red", "colour"),
        ("/v1/servers?page_size=-1", "page_size"),
        ("/v1/servers?page_size=many", "page_size"),
        ("/v1/servers?page_token=garbage", "page_token"),
        ("/v1/servers?status=sleepy", "status"),
        ("/v1/servers?view=HUGE", "view"),
        ("/v1/anomalies?page_token=garbage", "page_token"),
        ("/v1/ai/interactions?page_token=garbage", "page_token"),
        ("/v1/ai/interactions/not-a-uuid", "id"),
    ],
)
def test_bad_parameters_are_400_and_named(product: Launched, path: str, field: str) -> None:
    server_id = product.get("/v1/servers?role=web").json["servers"][0]["id"]
    answer = product.get(path.replace("{id}", server_id))
    assert answer.status == 400, answer.body
    assert answer.json["code"] == 3
    assert field_of(answer.json).split("[")[0].split(".")[-1] == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"metrics": [METRIC], "rows": [ROW], "values": [1, 2]}, "values"),
        ({"metrics": [METRIC, METRIC], "rows": [ROW], "values": [1, 2]}, "metrics[1]"),
        ({"metrics": [{"name": ""}], "rows": [ROW], "values": [1]}, "metrics[0].name"),
        ({"rows": [ROW], "values": [1]}, "metrics"),
        ({"metrics": [METRIC], "metricSetId": "0" * 32, "rows": [ROW], "values": [1]}, "metric_set_id"),
        ({"metrics": [METRIC], "servers": [{"serverId": "a/b"}], "rows": [], "values": []}, "servers[0].server_id"),
    ],
)
def test_structural_faults_refuse_the_batch(product: Launched, body: dict[str, Any], field: str) -> None:
    answer = product.post("/v1/metrics:write", body)
    assert answer.status == 400, answer.body
    assert field_of(answer.json) == field
    assert product.get("/v1/servers/bad-1").status == 404, "nothing of it is kept"


@pytest.mark.parametrize(
    ("body", "field"), [({}, "server.id"), ({"id": "bad-1", "role": "r" * 51}, "server.role"), ({"id": 7}, "server.id")]
)
def test_a_server_that_cannot_be_kept_names_the_field(product: Launched, body: dict[str, Any], field: str) -> None:
    answer = product.post("/v1/servers", body)
    assert (answer.status, field_of(answer.json)) == (400, field)


def test_a_set_of_many_metrics_is_taken_and_checked_all_the_same(product: Launched) -> None:
    metrics = [{"name": f"many_{index}"} for index in range(3_000)]
    row = {"serverId": "many-1", "time": "2026-01-01T00:00:00Z"}
    taken = product.post("/v1/metrics:write", {"metrics": metrics, "rows": [row], "values": [1.0] * 3_000})
    assert (taken.status, taken.json["acceptedPoints"]) == (200, 3_000)
    twice = product.post("/v1/metrics:write", {"metrics": [*metrics, METRIC, METRIC], "rows": [], "values": []})
    assert (twice.status, field_of(twice.json)) == (400, "metrics[3001]")


def test_an_unknown_metric_set_is_asked_for(product: Launched) -> None:
    answer = product.post("/v1/metrics:write", {"metricSetId": "f" * 32, "rows": [ROW], "values": [1]})
    assert answer.status == 400
    assert answer.json["code"] == 9
    assert answer.json["details"][0]["reason"] == "METRIC_SET_UNKNOWN"


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"rows": 7}', b'{"nonsense": 1}', b'{"values": ["x"]}', b"\xff\xfe"])
def test_undecodable_bodies_are_400(product: Launched, body: bytes) -> None:
    answer = product.post("/v1/metrics:write", body)
    assert answer.status == 400, answer.body
    assert answer.json["code"] == 3


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "field"),
    [
        ("GET", "/v1/servers/nope", None, 404, "id"),
        ("GET", "/v1/servers/nope/history?metric=cpu_usage", None, 404, "server_id"),
        ("GET", "/v1/metrics?server_id=nope", None, 404, "server_id"),
        ("POST", "/v1/history:query", {"serverIds": ["web-01", "nope"], "metrics": ["cpu_usage"]}, 404, "server_ids"),
        ("PATCH", "/v1/servers/nope", {"role": "web"}, 404, "server.id"),
        ("DELETE", "/v1/servers/nope", None, 404, "id"),
        ("POST", "/v1/servers/nope:undelete", {}, 404, "id"),
        ("POST", "/v1/servers/web-01:undelete", {}, 409, "id"),
        ("POST", "/v1/servers", {"id": "web-01"}, 409, "server.id"),
    ],
)
def test_a_server_that_does_not_fit_is_named_by_the_field_of_the_request(
    product: Launched, method: str, path: str, body: Any, status: int, field: str
) -> None:
    # The record of a server is told of it after its first tick.
    answer = within(20, lambda: (got := product.post(path, body, method=method)).status == status and got)
    assert field_of(answer.json) == field


@pytest.mark.parametrize(
    "path", ["/v1/servers/nope", "/v1/servers/nope/history?metric=cpu_usage", "/v1/nowhere", "/v1/servers/a/b/c"]
)
def test_what_is_not_there_is_404(product: Launched, path: str) -> None:
    answer = product.get(path)
    assert answer.status == 404
    assert answer.json["code"] in (5, 12)


def test_a_body_over_the_limit_names_the_limit(product: Launched) -> None:
    host, port = product.http_address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        headers = f"Host: {host}:{port}\r\nContent-Type: application/json\r\nContent-Length: {17 << 20}\r\n"
        connection.sendall(f"POST /v1/metrics:write HTTP/1.1\r\n{headers}\r\n".encode())
        answer = connection.recv(65536)
    assert answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 429")), answer
    assert b"MAX_BODY_BYTES" in answer


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"X-Forwarded-For": "10.0.0.1"}, 403),
        ({"Forwarded": "for=10.0.0.1"}, 403),
    ],
)
def test_the_local_administrator_is_local(product: Launched, headers: dict[str, str], status: int) -> None:
    assert product.get("/v1/servers", headers=headers).status == status


def test_changes_need_a_json_content_type(product: Launched) -> None:
    headers = {"content-type": "text/plain"}
    assert product.post("/v1/servers", {"id": "plain"}, headers=headers).status in (400, 415)
    assert product.get("/v1/servers/plain").status == 404


def field_of(status: dict[str, Any]) -> str:
    """The field that a google.rpc.Status names."""
    for detail in status["details"]:
        for violation in detail.get("fieldViolations", ()):
            return str(violation["field"])
    raise AssertionError(f"no field is named: {status}")


@pytest.mark.parametrize("field", ["start_time", "end_time"])
@pytest.mark.parametrize("seconds", [-(1 << 63), (1 << 63) - 1])
def test_a_time_that_only_protobuf_can_say_is_refused(product: Launched, field: str, seconds: int) -> None:
    request: Any = history_pb2.GetServerHistoryRequest(server_id="web-01", metric=["cpu_usage"])
    getattr(request, field).seconds = seconds
    with grpc.insecure_channel(product.addresses["gateway"]) as channel, pytest.raises(grpc.RpcError) as caught:
        history_pb2_grpc.HistoryServiceStub(channel).GetServerHistory(request, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in caught.value.details()
