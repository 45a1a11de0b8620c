"""A trace goes in by `traceparent` and out by `traceresponse`, and its span is named after the route."""

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from runtime import telemetry
from tests.gateway.http.serving import serving
from tests.harness import eventually

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    spans = InMemorySpanExporter()
    telemetry.configure("test", exporter=spans)
    yield spans
    telemetry.shutdown()


async def test_a_request_is_one_span_of_the_callers_trace(exporter: InMemorySpanExporter) -> None:
    async with serving() as served:
        answer = await served.get("/v1/servers/a", traceparent=f"00-{TRACE}-{PARENT}-01")
        await served.get("/healthz")
        await eventually(exporter.get_finished_spans)
    (span,) = exporter.get_finished_spans()
    assert span.name == "GET /v1/servers/{id}"
    assert span.parent is not None
    assert span.context is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert not [name for name in answer.headers if name.startswith("access-control-")]


async def test_without_tracing_nothing_is_said_of_a_trace() -> None:
    async with serving() as served:
        answer = await served.get("/v1/servers/a", traceparent=f"00-{TRACE}-{PARENT}-01")
    assert "traceresponse" not in answer.headers
