"""The spans of calls, and who decides on them: the part of runtime.tracing that needs OpenTelemetry's SDK.

A call's span is our own class on OpenTelemetry's API and not the SDK's, which costs more (locks, checked copies of
attributes, a sampler asked through a context that is made for it). What leaves is the SDK's ReadableSpan, made when the
span ends and handed to the same processors as all other spans.

What must stay true: a span that is not sampled is never made; a span is used on one event loop only; attributes, events
and links are bounded as in the SDK; what is done to a span that has ended changes nothing.
"""

import asyncio
import traceback
from collections.abc import Mapping, Sequence
from time import time_ns
from typing import Any, Final

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor, sampling
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceState
from opentelemetry.util import types

from runtime.errors import error_in
from runtime.sampling import Sampling
from runtime.tracing import (
    FLAGS,
    RANDOM,
    SAMPLED,
    TRACEPARENT,
    TRACESTATE,
    Call,
    Decision,
    Metadata,
    Pairs,
    header,
    new_span_id,
    new_trace_id,
    parent_of,
    parse_tracestate,
)

MAX_PARTS: Final = 128
"""Attributes, events and links of a span; what comes after them is dropped. The SDK's own default."""
MAX_VALUE_CHARS: Final = 2_048
"""Longer texts are cut: a path, a caller's name for itself or a message may be as long as a whole header block."""

_SCOPE: Final = InstrumentationScope("openmanager.runtime")
_UNSET: Final = Status(StatusCode.UNSET)


class RecordedSpan(Call):
    """The span of one call, received (entered and left as every Call) or made (ended by the call's end)."""

    def __init__(
        self,
        recorder: "SpanRecorder",
        name: str,
        kind: SpanKind,
        context: SpanContext,
        parent: SpanContext | None,
        attributes: dict[str, Any],
    ) -> None:
        super().__init__(None)
        self._place: SpanContext = context
        self._recorder = recorder
        self._name = name
        self._kind = kind
        self._above = parent
        self._attributes = attributes
        self._events: list[Event] = []
        self._links: list[Link] = []
        self._status = _UNSET
        self._started_ns = time_ns()
        self._ended = False

    def header(self) -> str:
        return header(self._place)

    def is_recording(self) -> bool:
        return not self._ended

    def set_attribute(self, key: str, value: types.AnyValue) -> None:
        if not self._ended and (len(self._attributes) < MAX_PARTS or key in self._attributes):
            self._attributes[key] = _cut(value)

    def set_attributes(self, attributes: Mapping[str, types.AnyValue]) -> None:
        for key, value in attributes.items():
            self.set_attribute(key, value)

    def add_event(self, name: str, attributes: types.Attributes = None, timestamp: int | None = None) -> None:
        if not self._ended and len(self._events) < MAX_PARTS:
            kept = {key: _cut(value) for key, value in (attributes or {}).items()}
            self._events.append(Event(name, kept, timestamp))

    def add_link(self, context: SpanContext, attributes: types.Attributes = None) -> None:
        if not self._ended and len(self._links) < MAX_PARTS:
            self._links.append(Link(context, attributes))

    def update_name(self, name: str) -> None:
        if not self._ended:
            self._name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        if isinstance(status, StatusCode):
            status = Status(status, description if status is StatusCode.ERROR else None)
        before = self._status
        if self._ended or status.is_unset or before.status_code is StatusCode.OK:
            return
        if before.status_code is not status.status_code or status.description is not None:  # silence overwrites nothing
            self._status = status

    def record_exception(
        self,
        exception: BaseException,
        attributes: types.Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        kind = type(exception)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        told: dict[str, Any] = {
            "exception.type": name,
            "exception.message": str(exception),
            "exception.stacktrace": "".join(traceback.format_exception(exception)),
            "exception.escaped": str(escaped),
        }
        self.add_event("exception", told | dict(attributes or {}), timestamp)

    def end(self, end_time: int | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        self._recorder.processors.on_end(
            ReadableSpan(
                name=self._name,
                context=self._place,
                parent=self._above,
                resource=self._recorder.resource,
                attributes=self._attributes,
                events=self._events,
                links=self._links,
                kind=self._kind,
                status=self._status,
                start_time=self._started_ns,
                end_time=end_time or time_ns(),
                instrumentation_scope=_SCOPE,
            )
        )

    def leave(self) -> None:
        self.end()
        super().leave()

    def end_with(self, call: Any) -> None:
        """Ends the span of a call that was made, as a grpc.aio call tells its end."""
        code = _code_of(call)
        self._attributes["rpc.response.status_code"] = code.name
        if code is not grpc.StatusCode.OK:
            error = error_in(_finished(call.trailing_metadata()))
            self._attributes["error.type"] = code.name if error is None else error.reason
            self._status = Status(StatusCode.ERROR, _cut(_finished(call.details()) or ""))
        self.end()


def _code_of(call: Any) -> grpc.StatusCode:
    code: grpc.StatusCode = _finished(call.code())
    return code


def _finished(answer: Any) -> Any:
    """What a coroutine returns with nothing to wait for; a finished call tells its code and details by such ones."""
    try:
        answer.send(None)
    except StopIteration as end:
        return end.value
    finally:
        answer.close()
    raise asyncio.InvalidStateError("a call that has ended does not tell its status")


def _cut(value: Any) -> Any:
    return value[:MAX_VALUE_CHARS] if isinstance(value, str) and len(value) > MAX_VALUE_CHARS else value


class SpanRecorder:
    """What runtime.tracing asks while tracing is on."""

    def __init__(self, rule: Sampling, resource: Resource, processors: SpanProcessor) -> None:
        self._rule = rule
        self.resource = resource
        self.processors = processors

    def decide(self, pairs: Pairs | None) -> Decision:
        """Whether a call is recorded; nothing is made for it yet."""
        parent = parent_of(pairs)
        if parent is None:
            trace_id = new_trace_id()
            return self._rule.takes(trace_id, None), trace_id, None
        return self._rule.takes(parent.trace_id, parent.sampled), parent.trace_id, parent

    def begin(self, name: str, decision: Decision, attributes: Mapping[str, Any]) -> Call:
        """A call that was received: its span, or its unrecorded place."""
        taken, trace_id, parent = decision
        if not taken:
            return Call(None, parent, trace_id)
        above, state, flags = None, None, RANDOM
        if parent is not None:
            flags = parent.flags
            state = parse_tracestate(parent.state) if parent.state else None
            above = SpanContext(trace_id, parent.span_id, True, FLAGS[flags], state)
        place = SpanContext(trace_id, new_span_id(), False, FLAGS[flags | SAMPLED], state)
        return RecordedSpan(self, name, SpanKind.SERVER, place, above, dict(attributes))

    def outgoing(self, method: str) -> tuple[Metadata, RecordedSpan | None]:
        """The metadata of a call that is made now, below the current span, and the call's own span if there is one."""
        if not is_instrumentation_enabled():
            return (), None
        above: SpanContext | None = trace.get_current_span().get_span_context()
        if above is None or not above.is_valid:
            above, trace_id, flags, state = None, new_trace_id(), RANDOM, None
            taken = self._rule.takes(trace_id, None)
        else:
            trace_id, flags, state = above.trace_id, above.trace_flags & (SAMPLED | RANDOM), above.trace_state
            taken = self._rule.takes(trace_id, bool(flags & SAMPLED))
        flags = flags | SAMPLED if taken else flags & RANDOM
        place = SpanContext(trace_id, new_span_id(), False, FLAGS[flags], state)
        metadata: Metadata = ((TRACEPARENT, header(place)),)
        if state:
            metadata += ((TRACESTATE, state.to_header()),)
        if not taken:
            return metadata, None
        attributes = {"rpc.system.name": "grpc", "rpc.method": method[1:]}
        return metadata, RecordedSpan(self, method, SpanKind.CLIENT, place, above, attributes)


class SpanSampler(sampling.Sampler):
    """The same rule for the spans that the SDK makes."""

    def __init__(self, rule: Sampling) -> None:
        self.rule = rule

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,  # noqa: ARG002
        kind: SpanKind | None = None,  # noqa: ARG002
        attributes: types.Attributes = None,
        links: Sequence[Link] | None = None,  # noqa: ARG002
        trace_state: TraceState | None = None,  # noqa: ARG002
    ) -> sampling.SamplingResult:
        parent = trace.get_current_span(parent_context).get_span_context()
        sampled = parent.trace_flags.sampled if parent.is_valid else None
        state = parent.trace_state if parent.is_valid else None
        if self.rule.takes(trace_id, sampled):
            return sampling.SamplingResult(sampling.Decision.RECORD_AND_SAMPLE, attributes, state)
        return sampling.SamplingResult(sampling.Decision.DROP, None, state)

    def get_description(self) -> str:
        return repr(self.rule)
