"""Traces and metrics: silent without a destination, complete and truthful with one."""

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from runtime import errors, logs, telemetry
from runtime.channel import calling
from runtime.logs import JsonFormatter
from tests.harness import eventually
from tests.runtime.conftest import serving
from tests.runtime.echo import Echo, EchoServicer, EchoStub, unary

ROOT = Path(__file__).parents[2]


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    telemetry.configure("openmanager-test", exporter=exporter)
    yield exporter
    telemetry.shutdown()
    assert not telemetry.tracing_enabled()


def raising(error: Exception) -> EchoServicer:
    def get(request: Any, context: Any) -> Any:
        raise error

    return EchoServicer(get)


async def server_span(spans: InMemorySpanExporter) -> ReadableSpan:
    def found() -> ReadableSpan | None:
        return next((span for span in spans.get_finished_spans() if span.kind is SpanKind.SERVER), None)

    span = await eventually(found)
    assert span is not None
    return span


async def test_a_call_is_one_trace_from_caller_to_handler(spans: InMemorySpanExporter) -> None:
    async def work(request: Any, context: Any) -> Any:
        with telemetry.tracer("test").start_as_current_span("work"):
            return request

    async with serving(EchoServicer(work)) as running, running.channel() as channel:
        with telemetry.tracer("test").start_as_current_span("tick"):
            await EchoStub(channel.grpc).Get(Echo())
    await eventually(lambda: len(spans.get_finished_spans()) == 4)
    by_id = {span.context.span_id: span for span in spans.get_finished_spans()}
    path = []
    span: ReadableSpan | None = next(span for span in by_id.values() if span.name == "work")
    while span is not None:
        path.append((span.name, span.kind.name))
        span = by_id[span.parent.span_id] if span.parent else None
    method = "/openmanager.test.v1.EchoService/Get"
    assert path == [("work", "INTERNAL"), (method, "SERVER"), (method, "CLIENT"), ("tick", "INTERNAL")]
    assert len({span.context.trace_id for span in by_id.values()}) == 1


@pytest.mark.parametrize("method", ["Get", "Chat"])
async def test_a_refused_call_is_not_an_ok_one_on_its_span(spans: InMemorySpanExporter, method: str) -> None:
    async with serving(raising(errors.NotFound("no", reason="SERVER_UNKNOWN"))) as running, running.raw() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            if method == "Get":
                await unary(channel)
            else:
                _ = [answer async for answer in EchoStub(channel).Chat(iter([Echo()]))]
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert errors.from_rpc_error(caught.value).reason == "SERVER_UNKNOWN"
    span = await server_span(spans)
    attributes = dict(span.attributes or {})
    assert attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert attributes["error.type"] == "SERVER_UNKNOWN"
    assert span.status.status_code is not StatusCode.OK  # UNSET: not found is the caller's mistake, not the server's
    assert span.events == ()


@pytest.mark.parametrize("method", ["Get", "Chat"])
async def test_a_fault_of_ours_is_an_error_on_its_span(spans: InMemorySpanExporter, method: str) -> None:
    async with serving(raising(ZeroDivisionError("text"))) as running, running.raw() as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            if method == "Get":
                await unary(channel)
            else:
                _ = [answer async for answer in EchoStub(channel).Chat(iter([Echo()]))]
    span = await server_span(spans)
    assert span.status.status_code is StatusCode.ERROR
    assert dict(span.attributes or {})["rpc.response.status_code"] == "INTERNAL"
    assert [dict(event.attributes or {})["exception.type"] for event in span.events] == ["ZeroDivisionError"]


async def test_the_callers_span_has_the_error_too(spans: InMemorySpanExporter) -> None:
    refused = errors.NotFound("no", reason="SERVER_UNKNOWN")
    async with serving(raising(refused)) as running, running.channel() as channel:
        with pytest.raises(errors.NotFound):
            async with calling("echo"):
                await EchoStub(channel.grpc).Get(Echo())
    span = next(span for span in spans.get_finished_spans() if span.kind is SpanKind.CLIENT)
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "SERVER_UNKNOWN", "as docs/telemetry.md says of both ends"


async def test_streams_work_while_traced(spans: InMemorySpanExporter) -> None:
    async with serving() as running, running.channel() as channel:
        chat = EchoStub(channel.grpc).Chat()
        await chat.write(Echo(text="a"))
        await chat.done_writing()
        assert [answer.text async for answer in chat] == ["a"]
        running.servicer.hold.set()
        assert [answer.text async for answer in EchoStub(channel.grpc).Watch(Echo(text="b"))] == ["b", "b"]
        assert (await EchoStub(channel.grpc).Collect(iter([Echo(text="c")]))).text == "c"


async def test_health_is_not_traced(spans: InMemorySpanExporter) -> None:
    async with serving() as running, running.channel() as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel.grpc)
        await stub.Check(health_pb2.HealthCheckRequest())
        await EchoStub(channel.grpc).Get(Echo())
    await server_span(spans)
    assert {span.name for span in spans.get_finished_spans()} == {"/openmanager.test.v1.EchoService/Get"}


async def test_without_a_destination_nothing_is_traced() -> None:
    spans = InMemorySpanExporter()
    telemetry.configure("openmanager-test", exporter=spans)
    telemetry.shutdown()
    async with serving() as running, running.channel() as channel:
        await EchoStub(channel.grpc).Get(Echo())
    assert spans.get_finished_spans() == ()


def test_log_lines_name_their_trace(spans: InMemorySpanExporter) -> None:
    record = logging.LogRecord("test", logging.INFO, "", 0, "hello", None, None)
    with telemetry.tracer("test").start_as_current_span("tick") as span:
        line = json.loads(JsonFormatter("test").format(record))
    assert line["trace_id"] == f"{span.get_span_context().trace_id:032x}"
    assert line["span_id"] == f"{span.get_span_context().span_id:016x}"


def test_stopping_does_not_wait_for_a_dead_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            over.wait(60)

    over = threading.Event()
    monkeypatch.setattr(telemetry, "FLUSH_BOUND_S", 0.1)
    telemetry.configure("openmanager-test", exporter=Dead())
    started = time.monotonic()
    telemetry.shutdown()
    assert time.monotonic() - started < 20
    over.set()


def in_a_new_process(code: str, **environ: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=True
    )
    return answer.stdout + answer.stderr


def test_nothing_of_the_sdk_is_imported_without_a_destination() -> None:
    code = (
        "import sys\n"
        "from runtime import telemetry\n"
        "import runtime.process\n"
        "telemetry.configure('openmanager-test', None)\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])\n"
    )
    assert in_a_new_process(code) == "[]\n"


def test_the_metric_of_calls_can_be_read_by_prometheus() -> None:
    code = (
        "import asyncio, prometheus_client\n"
        "from runtime import telemetry\n"
        "telemetry.configure('openmanager-test', prometheus=True)\n"
        "telemetry.configure('openmanager-test', prometheus=True)\n"
        "from tests.runtime.conftest import serving\n"
        "from tests.runtime.echo import Echo, EchoStub\n"
        "async def main():\n"
        "    async with serving() as running, running.channel() as channel:\n"
        "        await EchoStub(channel.grpc).Get(Echo())\n"
        "asyncio.run(main())\n"
        "telemetry.shutdown()\n"
        "print(prometheus_client.generate_latest().decode())\n"
    )
    text = in_a_new_process(code)
    line = next(line for line in text.splitlines() if line.startswith("rpc_server_call_duration_seconds_count"))
    assert 'rpc_method="openmanager.test.v1.EchoService/Get"' in line
    assert 'rpc_response_status_code="OK"' in line
    assert line.endswith(" 1.0")


def test_spans_reach_an_otlp_collector() -> None:
    code = (
        "import asyncio, threading, time, grpc\n"
        "from concurrent import futures\n"
        "from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb\n"
        "got = []\n"
        "def export(request, context):\n"
        "    got.extend(s.name for r in request.resource_spans for c in r.scope_spans for s in c.spans)\n"
        "    got.extend(a.value.string_value for r in request.resource_spans for a in r.resource.attributes)\n"
        "    return pb.ExportTraceServiceResponse()\n"
        "server = grpc.server(futures.ThreadPoolExecutor(2))\n"
        "server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(\n"
        "    'opentelemetry.proto.collector.trace.v1.TraceService', {'Export': grpc.unary_unary_rpc_method_handler(\n"
        "        export, pb.ExportTraceServiceRequest.FromString,\n"
        "        pb.ExportTraceServiceResponse.SerializeToString)}),))\n"
        "port = server.add_insecure_port('127.0.0.1:0')\n"
        "server.start()\n"
        "from runtime import telemetry\n"
        "telemetry.FLUSH_BOUND_S = 20.0\n"
        "telemetry.configure('openmanager-test', f'http://127.0.0.1:{port}')\n"
        "with telemetry.tracer('x').start_as_current_span('tick'): pass\n"
        "telemetry.shutdown()\n"
        "server.stop(0)\n"
        "print(got)\n"
    )
    text = in_a_new_process(code)
    assert "tick" in text
    assert "openmanager-test" in text


async def test_a_caller_that_leaves_a_traced_stream_leaves_no_noise(
    spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    """The stream is then closed by the event loop, in another context than its span was made in."""
    logs.configure("test")
    ended = 0

    class Flood(EchoServicer):
        async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
            nonlocal ended
            try:
                while True:
                    yield Echo(text="x" * 1_000_000)
            finally:
                ended += 1

    async with serving(Flood()) as running, running.raw() as channel:
        for _ in range(3):
            call = EchoStub(channel).Watch(Echo())
            await call.read()
            await asyncio.sleep(0.1)  # until flow control holds the server in the middle of sending
            call.cancel()
        await eventually(lambda: ended == 3)
    await asyncio.sleep(0)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
