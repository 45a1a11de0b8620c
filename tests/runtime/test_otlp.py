"""Spans are sent as the SDK would send them."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from runtime import otlp, tracing
from tests.runtime.test_tracing import recorded, spans

__all__ = ["spans"]  # a fixture

RESOURCES = [Resource({"service.name": "a"}), Resource({"service.name": "b"})]
SCOPES = [InstrumentationScope("one"), InstrumentationScope("two", "1.0")]
ids = st.integers(1, 2**64 - 1)
places = st.builds(
    SpanContext,
    st.integers(1, 2**128 - 1),
    ids,
    st.booleans(),
    st.sampled_from([TraceFlags(1), TraceFlags(3)]),
    st.sampled_from([None, TraceState([("a", "1"), ("b", "2")])]),
)
numbers = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
values = st.text(max_size=9) | numbers | st.tuples(st.text())
attributes = st.dictionaries(st.sampled_from(["a", "b", "c"]), values)
readable = st.builds(
    ReadableSpan,
    name=st.text(max_size=9),
    context=places,
    parent=st.none() | places,
    resource=st.sampled_from(RESOURCES),
    attributes=attributes,
    events=st.lists(st.builds(Event, st.text(), attributes, ids), max_size=1),
    links=st.lists(st.builds(Link, places, attributes), max_size=1),
    kind=st.sampled_from(SpanKind),
    status=st.builds(Status, st.sampled_from(StatusCode)) | st.just(Status(StatusCode.ERROR, "why")),
    start_time=ids,
    end_time=ids,
    instrumentation_scope=st.sampled_from(SCOPES),
)


def told(request: Any) -> list[tuple[str, str, bytes]]:
    """Each span with who it is from, in an order of its own: how they are grouped says nothing."""
    return sorted(
        (str(group.resource), str(scope.scope), span.SerializeToString(deterministic=True))
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    )


@given(st.lists(readable, min_size=1, max_size=6))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_request_tells_what_the_sdks_encoder_tells(batch: list[ReadableSpan]) -> None:
    assert told(otlp.encode(batch)) == told(encode_spans(batch))


def test_our_encoder_is_the_exporters(spans: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the SDK's exporter no longer asks the method that we replace."""
    asked = []

    def encode(batch: Any) -> Any:
        asked.append(len(batch))
        return encode_spans(batch)

    monkeypatch.setattr(otlp, "encode", encode)
    call: tracing.Call = recorded(spans)
    call.leave()
    exporter = otlp.SpanExporter(endpoint="http://127.0.0.1:9", timeout=0.01)
    exporter.export(spans.get_finished_spans())
    exporter.shutdown()
    assert asked == [1]


def test_values_that_are_equal_are_told_apart() -> None:
    """True, 1 and 1.0 are one key to a dictionary, as are 0.0 and -0.0, and encoded attributes are kept in one."""
    place = SpanContext(1, 1, is_remote=False)
    who, values = RESOURCES[0], (True, 1, 1.0, 0.0, -0.0)
    batch = [ReadableSpan("one", place, None, who, {"a": value}, start_time=1, end_time=2) for value in values]
    sent = [span.attributes[0].value for span in otlp.encode(batch).resource_spans[0].scope_spans[0].spans]
    assert [value.WhichOneof("value") for value in sent] == ["bool_value", "int_value", *["double_value"] * 3]
    assert told(otlp.encode(batch)) == told(encode_spans(batch))


@pytest.mark.parametrize("with_event", [True, False])
def test_the_texts_of_errors_are_redacted(*, with_event: bool) -> None:
    place, secret = SpanContext(1, 1, is_remote=False), "hunter2-and-more"
    told = {"exception.message": f"no login as postgresql://u:{secret}@h/d", "exception.escaped": True}
    span = ReadableSpan(
        "one",
        place,
        None,
        RESOURCES[0],
        events=[Event("exception", told, 1)] if with_event else [],
        status=Status(StatusCode.ERROR, f"OSError: authorization: Bearer {secret}"),
        start_time=1,
        end_time=2,
    )
    request = otlp.encode([span])
    (sent,) = request.resource_spans[0].scope_spans[0].spans
    assert secret.encode() not in request.SerializeToString()
    assert sent.status.message == "OSError: authorization: Bearer ***"
    texts = [attribute.value.string_value for event in sent.events for attribute in event.attributes]
    assert texts == (["no login as postgresql://u:***@h/d", ""] if with_event else [])
