"""Requests and answers of single messages, over real connections."""

import asyncio
import gc
import math
import tracemalloc
from typing import Any

import orjson
import pytest

from gateway.http.app import Health
from gateway.http.exchange import MAX_BODY_BYTES
from runtime.errors import STATUS_TABLE, NotFound, OpenManagerError
from tests.gateway.http.serving import METRICS, read_answer, serving
from tests.harness import eventually


async def test_a_resource_is_returned_bare_and_complete() -> None:
    async with serving() as served:
        answer = await served.get("/v1/servers/server-1")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    server = answer.json()
    assert server["id"] == "server-1"
    assert server["status"] == "SERVER_STATUS_HEALTHY"
    assert server["observedTime"] == "2026-01-31T12:00:00Z"
    assert len(server["metrics"]) == METRICS


async def test_serialized_answers_are_the_same_json() -> None:
    async with serving() as served:
        ready, made = await served.get("/v1/servers/ready"), await served.get("/v1/servers/server-1")
    assert ready.json() == made.json()


async def test_lists_and_counts_are_there_when_empty() -> None:
    async with serving() as served:
        servers, summary = await served.get("/v1/servers"), await served.get("/v1/fleet/summary")
        stores = await served.get("/api/database/status")
        same = await served.get("/v1/storage/status")
    assert servers.json() == {"servers": [], "nextPageToken": "", "totalSize": 0}
    assert summary.json() == {"total": 2, "healthy": 0, "warning": 0, "critical": 0, "offline": 0, "maintenance": 0}
    assert stores.json()["stores"][0]["lagPoints"] == "0"
    assert stores.json() == same.json()


async def test_path_query_and_body_reach_the_method() -> None:
    async with serving() as served:
        await served.get("/v1/servers/a%2Fb/history?metric=x&metric=y&start_time=-1h&end_time=now&step=60s")
        history = served.servicer.requests.pop()
        await served.call("PATCH", "/v1/servers/s", {"hostname": "h"})
        update = served.servicer.requests.pop()
        await served.call("POST", "/v1/servers/s:undelete", b"")
        undelete = served.servicer.requests.pop()
        await served.call("DELETE", "/v1/servers/s")
        delete = served.servicer.requests.pop()
    assert (history.server_id, list(history.metric), history.step.seconds) == ("a/b", ["x", "y"], 60)
    assert history.end_time.ToMilliseconds() - history.start_time.ToMilliseconds() == 3_600_000
    assert (update.server.id, update.server.hostname, list(update.update_mask.paths)) == ("s", "h", ["hostname"])
    assert undelete.id == delete.id == "s"


async def test_a_batch_is_written_with_one_request() -> None:
    values = [None, "NaN", 1.5] * 3_000
    async with serving() as served:
        answer = await served.call("POST", "/v1/metrics:write", {"rows": [{"serverId": "a"}], "values": values})
        request = served.servicer.requests.pop()
    assert answer.json() == {"acceptedPoints": 9_000, "rejectedPoints": 0, "errors": [], "metricSetId": "set"}
    assert math.isnan(request.values[0])
    assert request.values[2] == 1.5


async def test_errors_are_a_status_with_the_right_code() -> None:
    async with serving() as served:
        missing = await served.get("/v1/servers/missing")
        busy = await served.get("/v1/servers/busy")
        wrong = await served.get("/v1/servers?nope=1")
        unimplemented = await served.get("/v1/anomalies")
    assert (missing.status, missing.json()["code"], missing.field()) == (404, 5, "id")
    assert (busy.status, busy.json()["code"], busy.headers["retry-after"]) == (503, 14, "2")
    assert (wrong.status, wrong.field(), wrong.reason()) == (400, "nope", "PARAMETER_UNKNOWN")
    assert unimplemented.status == 501


@pytest.mark.parametrize(("kind", "status"), [(row[0], row[2]) for row in STATUS_TABLE])
async def test_every_error_class_has_the_status_of_the_one_table(kind: type[OpenManagerError], status: int) -> None:
    async with serving() as served:

        async def fail(_request: Any, _context: Any) -> Any:
            raise kind("why")

        endpoint = served.app.bridge.endpoint("FleetService", "ListServers")
        endpoint.behaviour = fail
        assert (await served.get("/v1/servers")).status == status


async def test_an_unknown_error_shows_an_id_and_no_text() -> None:
    async with serving() as served:
        answer = await served.get("/v1/servers/bug")
    assert answer.status == 500
    assert b"secret" not in answer.body
    assert answer.json()["message"].startswith("internal error, id ")


async def test_unknown_paths_and_wrong_methods_are_answered_in_json() -> None:
    async with serving() as served:
        unknown = await served.get("/v1/nothing")
        encoded = await served.call("POST", "/v1/metrics%3Awrite", {})
        wrong = await served.call("PUT", "/v1/servers/a", {})
        page = await served.call("POST", "/healthz", {})
        head_of_stream = await served.call("HEAD", "/v1/fleet/watch")
    assert (unknown.status, unknown.reason()) == (404, "ROUTE_UNKNOWN")
    assert (encoded.status, encoded.json()["message"]) == (404, "nothing is at /v1/metrics%3Awrite"), "as it was sent"
    assert (wrong.status, wrong.headers["allow"], wrong.reason()) == (
        405,
        "DELETE, GET, HEAD, PATCH",
        "METHOD_NOT_ALLOWED",
    )
    assert (page.status, page.reason()) == (405, "METHOD_NOT_ALLOWED")
    assert head_of_stream.status == 405


async def test_head_has_the_headers_of_get_and_no_body() -> None:
    async with serving() as served:
        reader, writer = await served.send("HEAD", "/v1/servers", headers={"connection": "close"})
        head = (await reader.read()).decode()
        writer.close()
    assert head.startswith("HTTP/1.1 200")
    assert "content-length: 47" in head.lower()
    assert head.endswith("\r\n\r\n")


async def test_a_body_over_the_limit_is_refused_naming_it() -> None:
    async with serving() as served:
        said = await served.send(
            "POST",
            "/v1/metrics:write",
            None,
            {"content-type": "application/json", "content-length": str(MAX_BODY_BYTES + 1)},
        )
        announced = await read_answer(said[0])
        said[1].close()
        reader, writer = await served.send(
            "POST", "/v1/metrics:write", None, {"content-type": "application/json", "transfer-encoding": "chunked"}
        )
        piece = b" " * (1 << 20)
        try:
            for _ in range(17):
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await writer.drain()
        except ConnectionError:
            pass  # refused already
        sent = await read_answer(reader)
        writer.close()
        assert (await served.get("/healthz")).status == 200
    for answer in (announced, sent):
        assert (answer.status, answer.json()["code"]) == (413, 8)
        assert "MAX_BODY_BYTES" in answer.json()["message"]


async def test_a_body_that_breaks_off_is_the_senders_fault_and_no_call() -> None:
    async with serving() as served:
        sent = {"content-type": "application/json", "transfer-encoding": "chunked"}
        reader, writer = await served.send("POST", "/v1/servers", None, sent)
        writer.write(b"no length\r\n{}\r\n0\r\n\r\n")
        no_chunks = await read_answer(reader)
        writer.close()
        reader, writer = await served.send("POST", "/v1/servers", b"{}", {"content-length": "100"})
        writer.write_eof()
        short = await read_answer(reader)
        writer.close()
        assert served.servicer.requests == []
    for answer in (no_chunks, short):
        assert (answer.status, answer.field(), answer.reason()) == (400, "body", "INVALID_ARGUMENT")


async def test_malformed_bodies_and_content_types() -> None:
    async with serving() as served:
        malformed = await served.call("POST", "/v1/servers", b"{")
        form = await served.call("POST", "/v1/servers", b"a=b", {"content-type": "application/x-www-form-urlencoded"})
        nothing = await served.call("POST", "/v1/simulator:start", None)
    assert (malformed.status, malformed.field()) == (400, "body")
    assert (form.status, form.field(), form.reason()) == (415, "content-type", "CONTENT_TYPE_NOT_JSON")
    assert nothing.status == 415


async def test_the_deadline_of_the_request_is_kept_and_known_to_the_method() -> None:
    async with serving() as served:
        for wait in ("50ms", "2s", "20s"):  # on a busy machine it may be over before the method is called
            late = await served.get("/v1/servers/slow", request_timeout=wait)
            if served.servicer.cancelled:
                break
        assert served.servicer.contexts[-1].time_remaining() <= 0
        await served.get("/v1/servers/a", request_timeout="50s")
        assert 30 < served.servicer.contexts[-1].time_remaining() <= 50
        await served.get("/v1/servers/a", request_timeout="50")
        assert 30 < served.servicer.contexts[-1].time_remaining() <= 50
        await served.get("/v1/servers/a")
        assert served.servicer.contexts[-1].time_remaining() is None
        bad = await served.get("/v1/servers/a", request_timeout="soon")
    assert (late.status, late.json()["code"]) == (504, 4)
    assert served.servicer.cancelled == 1
    assert (bad.status, bad.field()) == (400, "request-timeout")


async def test_a_caller_that_leaves_cancels_its_call() -> None:
    async with serving() as served:
        _reader, writer = await served.send("GET", "/v1/servers/slow")
        await eventually(lambda: served.servicer.running == 1)
        writer.close()
        await eventually(lambda: served.servicer.cancelled == 1, within_s=8)  # a call that nobody leaves has 10 s
        await eventually(lambda: served.app.in_flight == 0)
        assert (await served.get("/v1/servers/a")).status == 200


async def test_the_method_sees_who_calls() -> None:
    async with serving() as served:
        await served.get("/v1/servers/a", x_request_id="r-1")
        context = served.servicer.contexts.pop()
    assert context.peer().startswith("ipv4:127.0.0.1:")
    assert ("x-request-id", "r-1") in context.invocation_metadata()
    assert context.caller.name == "local-administrator"


async def test_one_connection_carries_many_requests() -> None:
    async with serving() as served:
        reader, writer = await served.open()
        for index in range(20):
            writer.write(f"GET /v1/servers/s{index} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            assert (await read_answer(reader)).json()["id"] == f"s{index}"
        writer.close()


async def test_a_connection_goes_on_after_a_call_whose_caller_was_watched() -> None:
    async with serving() as served:
        reader, writer = await served.open()
        for _ in range(3):
            served.servicer.release.clear()
            writer.write(b"GET /v1/servers/slow HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await eventually(lambda: any(task.get_name() == "http-disconnect" for task in asyncio.all_tasks()))
            served.servicer.release.set()
            assert (await read_answer(reader)).status == 200
            await eventually(lambda: not any(task.get_name() == "http-disconnect" for task in asyncio.all_tasks()))
        writer.close()
        assert served.servicer.cancelled == 0


async def test_hundreds_at_once() -> None:
    async with serving() as served:
        answers = await asyncio.gather(*(served.get(f"/v1/servers/s{index}") for index in range(200)))
    assert [answer.json()["id"] for answer in answers] == [f"s{index}" for index in range(200)]


async def test_operators_pages() -> None:
    async with serving() as served:
        alive, ready, metrics = [await served.get(path) for path in ("/healthz", "/readyz", "/metrics")]
    assert (alive.status, alive.json()) == (200, {"status": "ok"})
    assert (ready.status, ready.json()) == (200, {"ready": True})
    assert metrics.body == b"up 1\n"
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    async with serving(health=Health(ready=False, reasons=("cache is away",))) as served:
        alive, ready = await served.get("/healthz"), await served.get("/readyz")
    assert alive.status == 200
    assert (ready.status, ready.json()) == (503, {"ready": False, "reasons": ["cache is away"]})


async def test_every_answer_has_the_security_headers_and_none_allows_another_origin() -> None:
    async with serving() as served:
        paths = ("/v1/servers", "/v1/servers/missing", "/nothing", "/healthz", "/docs", "/openapi.json")
        answers = [await served.get(path) for path in paths]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not [name for name in answer.headers if name.startswith("access-control-")]


async def test_a_page_that_breaks_shows_no_text() -> None:
    from starlette.routing import Route as Page  # noqa: PLC0415

    async def broken(_request: Any) -> Any:
        raise ValueError("a secret text")

    async with serving(extra=[Page("/broken", broken)]) as served:
        answer = await served.get("/broken")
    assert answer.status == 500
    assert b"secret" not in answer.body
    assert orjson.loads(answer.body)["code"] == 13


@pytest.mark.parametrize("given", ['""', "", 'W/"', '"r1", "r2"', "r1, r2", '"r1', "r1 r2"])
async def test_a_change_that_is_bound_to_no_one_tag_does_not_happen_unbound(given: str) -> None:
    """As of `-H "If-Match: \\"$ETAG\\""` in a script that did not get the tag."""
    async with serving() as served:
        reader, writer = await served.open()
        head = f"host: localhost\r\nif-match: {given}\r\nconnection: close"
        writer.write(f"DELETE /v1/servers/server-1 HTTP/1.1\r\n{head}\r\n\r\n".encode())
        answer = await read_answer(reader)
        writer.close()
        assert (answer.status, answer.field()) == (400, "if-match")
        assert served.servicer.requests == []


async def test_a_change_is_bound_to_the_tag_that_the_header_names() -> None:
    async with serving() as served:
        given = ('"r1"', "r1", 'W/"r1"', "*")
        for tag in given:
            assert (await served.call("DELETE", "/v1/servers/a", headers={"if-match": tag})).status == 200
        assert [request.etag for request in served.servicer.requests] == ["r1", "r1", 'W/"r1"', ""]
        both = await served.call("DELETE", "/v1/servers/a?etag=r2", headers={"if-match": '"r1"'})
        assert (both.status, both.field()) == (400, "etag")
        both = await served.call("DELETE", "/v1/servers/a?etag=r1", headers={"if-match": '"r1"'})
        assert (both.status, served.servicer.requests[-1].etag) == (200, "r1")


async def test_a_deletion_whose_condition_is_in_a_body_does_not_happen_without_it() -> None:
    async with serving() as served:
        for body in ({"etag": "r1"}, {"nonsense": 1}, b"no JSON"):
            answer = await served.call("DELETE", "/v1/servers/server-1", body)
            assert (answer.status, answer.field()) == (400, "body")
        assert served.servicer.requests == []
        for nothing in (None, b"", {}, b" {} \n", b"null"):
            assert (await served.call("DELETE", "/v1/servers/server-1?etag=r1", nothing)).status == 200
        assert {request.etag for request in served.servicer.requests} == {"r1"}


class InMemory:
    """Has no server."""

    def GetServer_at_once(self, _request: Any, _who: Any) -> None:
        return None

    async def GetServer(self, request: Any, _context: Any) -> Any:
        raise NotFound(f"no server {request.id[:9]}", field="id")


@pytest.mark.parametrize(("verb", "path"), [("GET", "/v1/servers/{}"), ("{}", "/v1/servers"), ("GET", "/{}")])
async def test_what_a_caller_invents_at_length_is_not_kept(verb: str, path: str) -> None:
    """What short paths mean is: 4,096 times 64 KiB of each kind would be."""
    count, length = 100, 50_000
    async with serving(servicers={"FleetService": InMemory()}) as served:

        async def ask(number: int) -> None:
            invented = f"{number:03}" + "X" * length
            assert (await served.call(verb.format(invented), path.format(invented))).status in {404, 405}

        await ask(0)
        gc.collect()
        tracemalloc.start()
        try:
            for number in range(1, count):
                await ask(number)
            gc.collect()
            kept = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
    assert kept < count * length / 4
