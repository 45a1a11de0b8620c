"""A call's place in a trace: what is believed of its headers, what becomes a span, and what is passed on."""

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, SpanKind, StatusCode

from runtime import errors, telemetry, tracing
from runtime.logs import JsonFormatter
from runtime.sampling import Sampling
from tests.harness import eventually
from tests.runtime.conftest import serving
from tests.runtime.echo import Echo, EchoServicer, EchoStub, unary

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"
GET = "/openmanager.test.v1.EchoService/Get"
MALFORMED = {
    "empty": "",
    "no id": f"00-{'0' * 32}-{SPAN}-01",
    "no span": f"00-{TRACE}-{'0' * 16}-01",
    "upper case": f"00-{TRACE.upper()}-{SPAN}-01",
    "short id": f"00-{TRACE[1:]}-{SPAN}-01",
    "long id": f"00-{TRACE}a-{SPAN}-01",
    "no hex": f"00-{TRACE[:-1]}g-{SPAN}-01",
    "version ff": f"ff-{TRACE}-{SPAN}-01",
    "more than version 00 has": f"00-{TRACE}-{SPAN}-01-more",
    "unseparated": f"cc-{TRACE}-{SPAN}-01.more",
    "spaces": f"00 -{TRACE}-{SPAN}-01",
}


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    telemetry.configure("openmanager-test", exporter=exporter)
    yield exporter
    telemetry.shutdown()


def of_kind(spans: InMemorySpanExporter, kind: SpanKind) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.kind is kind]


def place_of(span: ReadableSpan) -> SpanContext:
    context: SpanContext | None = span.context
    assert context is not None
    return context


class Where(EchoServicer):
    """Answers with the trace that its code runs in, as OpenTelemetry and as our logs see it."""

    def __init__(self) -> None:
        super().__init__()
        self.headers: list[dict[str, Any]] = []

    async def Get(self, request: Any, context: Any) -> Any:
        self.headers.append(dict(context.invocation_metadata()))
        await asyncio.sleep(0)
        place = tracing.place()
        assert place is not None
        seen = trace.get_current_span().get_span_context()
        assert not seen.is_valid or seen == place
        return Echo(text=f"{place.trace_id:032x}")


async def test_below_a_sampled_caller_there_is_one_span(spans: InMemorySpanExporter) -> None:
    async with serving(Where()) as running, running.raw() as channel:
        answer = await unary(channel, metadata=(("traceparent", SAMPLED), ("tracestate", "a=1,b=2")))
    (span,) = await eventually(spans.get_finished_spans)
    assert answer.text == TRACE == f"{place_of(span).trace_id:032x}"
    assert (span.name, span.kind) == (GET, SpanKind.SERVER)
    assert span.parent is not None
    assert span.parent.is_remote
    assert f"{span.parent.span_id:016x}" == SPAN
    assert dict(place_of(span).trace_state) == {"a": "1", "b": "2"}
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time <= span.end_time
    assert dict(span.attributes or {}) == {
        "rpc.system.name": "grpc",
        "rpc.method": GET[1:],
        "rpc.response.status_code": "OK",
        "network.peer.address": "127.0.0.1",
    }


async def test_below_a_caller_that_is_not_sampled_there_is_none(spans: InMemorySpanExporter) -> None:
    class Working(Where):
        async def Get(self, request: Any, context: Any) -> Any:
            with telemetry.tracer("test").start_as_current_span("work"):
                pass
            with trace.get_tracer("a library").start_as_current_span("work"):
                pass
            return await super().Get(request, context)

    async with serving(Working()) as running, running.raw() as channel:
        answer = await unary(channel, metadata=(("traceparent", UNSAMPLED),))
        assert answer.text == TRACE
        await unary(channel, metadata=(("traceparent", SAMPLED),))
    await eventually(lambda: len(spans.get_finished_spans()) == 3)
    assert {f"{place_of(span).trace_id:032x}" for span in spans.get_finished_spans()} == {TRACE}
    assert len(of_kind(spans, SpanKind.SERVER)) == 1


@pytest.mark.parametrize("text", [None, *MALFORMED.values()], ids=["absent", *MALFORMED])
async def test_without_a_valid_caller_a_trace_begins(spans: InMemorySpanExporter, text: str | None) -> None:
    async with serving(Where()) as running, running.raw() as channel:
        answer = await unary(channel, metadata=() if text is None else (("traceparent", text), ("tracestate", "a=1")))
    (span,) = await eventually(spans.get_finished_spans)
    assert span.parent is None
    assert answer.text == f"{place_of(span).trace_id:032x}" != TRACE
    assert not place_of(span).trace_state


async def test_an_sdk_that_is_switched_off_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    telemetry.configure("openmanager-test", exporter=InMemorySpanExporter())
    assert not telemetry.tracing_enabled()


async def test_the_ratio_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.3")
    exporter = InMemorySpanExporter()
    telemetry.configure("openmanager-test", exporter=exporter)
    try:
        async with serving(Where()) as running, running.raw() as channel:
            answers = await asyncio.gather(*(unary(channel) for _ in range(400)))
            await unary(channel, metadata=(("traceparent", SAMPLED),))  # whatever the ratio says
            await eventually(lambda: any(span.parent for span in exporter.get_finished_spans()))
    finally:
        telemetry.shutdown()
    taken = {f"{place_of(span).trace_id:032x}" for span in exporter.get_finished_spans()} - {TRACE}
    assert 60 <= len(taken) <= 180  # 120 +- 6.5 standard deviations
    rule = Sampling.of({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.3"})
    assert taken == {answer.text for answer in answers if rule.takes(int(answer.text, 16), None)}


async def chained(header: str | None, state: str | None = None) -> tuple[dict[str, Any], str]:
    """What a service gets that is called by another, and the trace that the first answered with."""
    back = Where()
    async with serving(back) as behind, behind.channel() as inner:

        async def ask(request: Any, context: Any) -> Any:
            await EchoStub(inner.grpc).Get(request)
            raise errors.NotFound("to see the trailers")

        async with serving(EchoServicer(ask)) as front, front.raw() as channel:
            pairs = (("traceparent", header), ("tracestate", state))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await unary(channel, metadata=tuple(pair for pair in pairs if pair[1] is not None))
    answered = dict(caught.value.trailing_metadata())["traceresponse"]
    assert tracing.parse_traceparent(str(answered)) is not None
    return back.headers[0], str(answered)


async def test_a_sampled_trace_goes_on_to_a_second_service(spans: InMemorySpanExporter) -> None:
    got, answered = await chained(SAMPLED, "a=1")
    await eventually(lambda: len(spans.get_finished_spans()) == 3)
    (made,) = of_kind(spans, SpanKind.CLIENT)
    first, second = sorted(of_kind(spans, SpanKind.SERVER), key=lambda span: span.start_time or 0)
    assert made.parent is not None
    assert second.parent is not None
    assert (made.parent.span_id, second.parent.span_id) == (place_of(first).span_id, place_of(made).span_id)
    assert got["traceparent"] == tracing.header(place_of(made))
    assert got["tracestate"] == "a=1"
    assert answered == tracing.header(place_of(first)) == f"00-{TRACE}-{place_of(first).span_id:016x}-01"


@pytest.mark.parametrize("header", [UNSAMPLED, None])
async def test_an_unsampled_trace_goes_on_to_a_second_service(
    monkeypatch: pytest.MonkeyPatch, header: str | None
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    exporter = InMemorySpanExporter()
    telemetry.configure("openmanager-test", exporter=exporter)
    try:
        got, answered = await chained(header)
    finally:
        telemetry.shutdown()
    sent = tracing.parse_traceparent(got["traceparent"])
    assert sent is not None
    assert not sent.sampled
    assert f"{sent.trace_id:032x}" == answered[3:35]
    assert (answered[3:35] == TRACE) is (header is not None)
    assert exporter.get_finished_spans() == ()


async def test_a_call_below_nothing_is_a_trace_or_says_that_it_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the called service would decide anew, and its part would look like a whole trace."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    exporter = InMemorySpanExporter()
    telemetry.configure("openmanager-test", exporter=exporter)
    back = Where()
    try:
        async with serving(back) as running, running.channel() as channel:
            await EchoStub(channel.grpc).Get(Echo())
    finally:
        telemetry.shutdown()
    assert back.headers[0]["traceparent"].endswith(("-00", "-02"))
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize(("header", "state"), [(SAMPLED, "a=1"), (UNSAMPLED, None), (SAMPLED, "a=1,a=2")])
async def test_without_tracing_the_callers_headers_go_on_as_they_came(header: str, state: str | None) -> None:
    got, answered = await chained(header, state)
    assert got["traceparent"] == header
    assert got.get("tracestate") == ("a=1" if state == "a=1" else None)
    assert answered[3:35] == TRACE
    assert answered.endswith("-00")  # nothing was recorded here


async def test_without_tracing_and_without_a_caller_there_is_an_id_all_the_same() -> None:
    got, answered = await chained(None)
    assert got["traceparent"] == answered


@pytest.mark.parametrize("on", [False, True])
async def test_each_of_many_calls_at_once_is_in_its_own_trace(request: pytest.FixtureRequest, on: bool) -> None:
    if on:
        request.getfixturevalue("spans")
    ids = [f"{number:032x}" for number in range(1, 101)]
    async with serving(Where()) as running, running.raw() as channel:
        calls = (
            unary(channel, metadata=(("traceparent", f"00-{one}-{SPAN}-0{number % 2}"),))
            for number, one in enumerate(ids)
        )
        answers = await asyncio.gather(*calls)
    assert [answer.text for answer in answers] == ids


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("header", [SAMPLED, UNSAMPLED])
async def test_a_call_that_is_left_leaves_nothing(request: pytest.FixtureRequest, on: bool, header: str) -> None:
    if on:
        request.getfixturevalue("spans")
    before = otel_context.get_current()
    for _ in range(2):
        call = tracing.begin("one", lambda: [(b"traceparent", header.encode())])
        assert tracing.place() == call.get_span_context()
        call.leave()
        assert tracing.current.get() is None
        assert otel_context.get_current() is before
        assert tracing.place() is None


async def test_what_outlives_a_call_is_not_in_it() -> None:
    seen: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def later(left: asyncio.Event) -> None:
        await left.wait()
        seen.set_result((tracing.place(), tracing.passed_on()))

    left = asyncio.Event()

    call = tracing.begin("one", lambda: [("traceparent", SAMPLED)])
    task = asyncio.create_task(later(left))
    call.leave()
    left.set()
    await task
    assert seen.result() == (None, ())


async def test_tracing_that_is_off_attaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def attach(_context: Any) -> Any:
        raise AssertionError("attached")

    monkeypatch.setattr(otel_context, "attach", attach)
    async with serving(Where()) as running, running.channel() as channel:
        assert len((await EchoStub(channel.grpc).Get(Echo())).text) == 32
        running.servicer.hold.set()
        assert len([answer async for answer in EchoStub(channel.grpc).Watch(Echo())]) == 2


async def test_a_stream_that_is_left_ends_its_spans(spans: InMemorySpanExporter) -> None:
    async with serving() as running, running.channel() as channel:
        for leave_by_cancel in (True, False):
            call = EchoStub(channel.grpc).Watch(Echo(text="a"))
            await call.read()
            assert spans.get_finished_spans() == ()
            if leave_by_cancel:
                call.cancel()
            else:
                running.servicer.hold.set()
                while await call.read() is not grpc.aio.EOF:
                    pass
            await eventually(lambda: len(spans.get_finished_spans()) == 2)
            kinds = {span.kind: span for span in spans.get_finished_spans()}
            made, received = kinds[SpanKind.CLIENT], kinds[SpanKind.SERVER]
            expected = "CANCELLED" if leave_by_cancel else "OK"
            for span in (made, received):
                assert (span.attributes or {})["rpc.response.status_code"] == expected
            assert received.status.status_code is StatusCode.UNSET
            assert (made.status.status_code is StatusCode.ERROR) is leave_by_cancel
            spans.clear()


async def test_a_call_that_cannot_be_made_has_an_error_on_its_span(spans: InMemorySpanExporter) -> None:
    async with serving() as running:
        channel = running.channel()
    async with channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await EchoStub(channel.grpc).Create(Echo(), timeout=5)
    (span,) = await eventually(spans.get_finished_spans)
    assert (span.attributes or {})["error.type"] == "UNAVAILABLE"
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description


async def test_a_refusals_log_line_has_the_trace_that_its_caller_got(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "access")
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(JsonFormatter("test"))
    access = logging.getLogger("access")
    access.addHandler(handler)
    try:
        _, answered = await chained(None)
    finally:
        access.removeHandler(handler)
    (line,) = (json.loads(text) for text in lines.getvalue().splitlines() if "NOT_FOUND" in text)
    assert (line["trace_id"], line["span_id"]) == (answered[3:35], answered[36:52])


def recorded(exporter: InMemorySpanExporter, name: str = "one") -> tracing.Call:
    call = tracing.begin(name, lambda: [("traceparent", SAMPLED)])
    assert call.is_recording()
    return call


def test_a_span_is_bounded_and_closed(spans: InMemorySpanExporter) -> None:
    call = recorded(spans)
    call.set_attributes({f"key-{number}": number for number in range(1_000)})
    call.set_attribute("key-0", "x" * 10_000)
    for number in range(1_000):
        call.add_event(str(number))
        call.add_link(call.get_span_context())
    call.update_name("two")
    call.leave()
    call.set_attribute("key-1", "late")
    call.update_name("late")
    call.set_status(StatusCode.ERROR)
    call.end()
    (span,) = spans.get_finished_spans()
    assert (span.name, len(span.attributes or {}), len(span.events), len(span.links)) == ("two", 128, 128, 128)
    assert (span.attributes or {})["key-1"] == 1
    assert len(str((span.attributes or {})["key-0"])) == 2_048
    assert span.status.status_code is StatusCode.UNSET


def test_a_status_with_a_reason_is_kept(spans: InMemorySpanExporter) -> None:
    call = recorded(spans)
    call.set_status(StatusCode.ERROR, "why")
    call.set_status(StatusCode.ERROR)
    call.set_status(StatusCode.UNSET)
    call.leave()
    call = recorded(spans)
    call.set_status(StatusCode.OK)
    call.set_status(StatusCode.ERROR, "too late")
    call.leave()
    first, second = (span.status for span in spans.get_finished_spans())
    assert (first.status_code, first.description, second.status_code) == (StatusCode.ERROR, "why", StatusCode.OK)


def test_our_spans_go_through_the_exporter_of_the_sdk(spans: InMemorySpanExporter) -> None:
    call = recorded(spans)
    call.set_attributes({"text": "a", "number": 1, "share": 0.5, "yes": True})
    call.record_exception(ValueError("why"))
    call.leave()
    (sent,) = encode_spans(spans.get_finished_spans()).resource_spans[0].scope_spans[0].spans
    assert (sent.trace_id.hex(), sent.parent_span_id.hex(), sent.name, sent.kind) == (TRACE, SPAN, "one", 2)
    assert {one.key for one in sent.attributes} == {"text", "number", "share", "yes"}
    (event,) = sent.events
    told = {one.key: one.value.string_value for one in event.attributes}
    assert (told["exception.type"], told["exception.message"]) == ("ValueError", "why")
    assert re.search("ValueError: why", told["exception.stacktrace"])
