"""A trace goes in by `traceparent` and out by `traceresponse`, and its span is named after the route."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from runtime import telemetry, tracing
from tests.gateway.http.serving import Answer, read_head, serving
from tests.harness import eventually

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    spans = InMemorySpanExporter()
    telemetry.configure("test", exporter=spans)
    yield spans
    telemetry.shutdown()


def place_of(answer: Answer) -> tracing.Parent:
    place = tracing.parse_traceparent(answer.headers["traceresponse"])
    assert place is not None
    return place


async def test_a_request_is_one_span_of_the_callers_trace(exporter: InMemorySpanExporter) -> None:
    async with serving() as served:
        answer = await served.get("/v1/servers/a?view=SERVER_VIEW_FULL", traceparent=SAMPLED)
        await served.get("/healthz", traceparent=SAMPLED)
        await eventually(exporter.get_finished_spans)
    (span,) = exporter.get_finished_spans()
    assert span.name == "GET /v1/servers/{id}"
    assert span.parent is not None
    assert span.context is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    attributes = dict(span.attributes or {})
    assert attributes.pop("network.peer.address") == "127.0.0.1"
    assert attributes == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "http.route": "/v1/servers/{id}",
        "rpc.method": "openmanager.gateway.v1.FleetService/GetServer",
        "rpc.response.status_code": "OK",
        "url.path": "/v1/servers/a",
        "url.scheme": "http",
    }


async def test_a_token_in_a_path_is_on_no_span(exporter: InMemorySpanExporter) -> None:
    async with serving() as served:
        await served.call("DELETE", f"/v1/tokens/om_{'x' * 43}", headers={"traceparent": SAMPLED})
        await eventually(exporter.get_finished_spans)
    assert [(span.attributes or {})["url.path"] for span in exporter.get_finished_spans()] == ["/v1/tokens/***"]


@pytest.mark.parametrize(
    ("verb", "target", "name", "status", "reason", "is_error"),
    [
        ("GET", "/v1/servers/missing", "GET /v1/servers/{id}", 404, "NOT_FOUND", False),
        ("GET", "/v1/servers/busy", "GET /v1/servers/{id}", 503, "UNAVAILABLE", True),
        ("GET", "/v1/nothing", "GET", 404, None, False),
        ("BREW", "/v1/servers", "HTTP", 405, "METHOD_NOT_ALLOWED", False),
        ("POST", "/v1/servers", "POST /v1/servers", 415, "CONTENT_TYPE_NOT_JSON", False),
    ],
)
async def test_what_became_of_a_request_is_on_its_span(
    exporter: InMemorySpanExporter, verb: str, target: str, name: str, status: int, reason: str | None, is_error: bool
) -> None:
    async with serving() as served:
        answer = await served.call(verb, target, headers={"traceparent": SAMPLED})
        await eventually(exporter.get_finished_spans)
    (span,) = exporter.get_finished_spans()
    attributes = dict(span.attributes or {})
    assert (span.name, answer.status) == (name, status)
    assert attributes["http.response.status_code"] == status
    assert attributes.get("error.type") == reason
    assert (span.status.status_code is StatusCode.ERROR) is is_error
    assert place_of(answer).sampled


async def test_a_fault_of_ours_is_told_on_the_span(exporter: InMemorySpanExporter) -> None:
    async with serving() as served:
        await served.get("/v1/servers/bug")
        await eventually(exporter.get_finished_spans)
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description
    assert "secret" not in span.status.description
    assert [dict(event.attributes or {})["exception.type"] for event in span.events] == ["ZeroDivisionError"]


@pytest.mark.parametrize("header", [f"00-{TRACE}-{PARENT}-00", SAMPLED.upper(), None])
async def test_what_is_not_sampled_has_an_id_and_no_span(monkeypatch: pytest.MonkeyPatch, header: str | None) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    spans = InMemorySpanExporter()
    telemetry.configure("test", exporter=spans)
    try:
        async with serving() as served:
            answer = await served.get("/v1/servers/a", **({"traceparent": header} if header else {}))
    finally:
        telemetry.shutdown()
    is_valid = header is not None and header.islower()
    assert (f"{place_of(answer).trace_id:032x}" == TRACE) is is_valid
    assert not place_of(answer).sampled
    assert spans.get_finished_spans() == ()


async def test_every_answer_names_its_trace_with_tracing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def attach(_context: Any) -> Any:
        raise AssertionError("attached")

    monkeypatch.setattr(otel_context, "attach", attach)
    async with serving(token="secret") as served:
        known = {"authorization": "Bearer secret"}
        statuses = set()
        for verb, target, headers in (
            ("GET", "/v1/servers/a", known),
            ("HEAD", "/v1/servers/a", known),
            ("GET", "/v1/servers/missing", known),
            ("GET", "/v1/servers/bug", known),
            ("GET", "/v1/servers/a", {}),
            ("DELETE", "/v1/servers", known),
            ("GET", "/nothing", known),
            ("GET", "/healthz", {}),
            ("GET", "/readyz", {}),
            ("GET", "/metrics", known),
            ("GET", "/docs", known),
        ):
            given = await served.call(verb, target, headers=headers | {"traceparent": SAMPLED})
            statuses.add(given.status)
            assert f"{place_of(given).trace_id:032x}" == TRACE
            assert not place_of(given).sampled  # by us
            made = [place_of(await served.call(verb, target, headers=headers)).trace_id for _ in range(2)]
            assert len({*made, int(TRACE, 16)}) == 3
        assert statuses == {200, 401, 404, 405, 500}
        reader, writer = await served.send("GET", "/v1/fleet/watch", headers=known | {"traceparent": SAMPLED})
        served.servicer.ticks.put_nowait(None)
        _, head = await read_head(reader)
        assert head["traceresponse"].startswith(f"00-{TRACE}-")
        writer.close()


async def test_the_log_has_the_id_that_the_caller_got(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "access")
    seen: list[Any] = []

    class Seeing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(tracing.place())

    handler = Seeing()
    logging.getLogger("access").addHandler(handler)
    try:
        async with serving() as served:
            answer = await served.get("/v1/servers/missing")
    finally:
        logging.getLogger("access").removeHandler(handler)
    assert [place.trace_id for place in seen] == [place_of(answer).trace_id]
