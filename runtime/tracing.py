"""The place of a call in a trace (W3C Trace Context), known before a span is made and cheap when none is.

    traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03
                 |  trace id                         |                |  flags: 1 sampled, 2 the trace id is random
                 |  version                          |  id of the caller's span

Whatever carries a call begins it here and leaves it at its end: runtime.handlers under gRPC, gateway.http.app under
HTTP; runtime.interception says what became of it, runtime.channel and runtime.logs pass its ids on.

    call = tracing.begin("/pkg.Service/Method", context.invocation_metadata)
    try: ...
    finally: call.leave()

What must stay true: a call that is not recorded makes no span, and no id either unless somebody asks for one; without
tracing nothing is attached to OpenTelemetry's context; with it every call is, so that spans below a call that is not
recorded are not recorded either; a header that is not to the letter of the standard counts as absent and never fails
or alters a call; what a call has set is gone when it is left. docs/adr/0005-tracing.md has the reasons and numbers.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar, Token
from typing import Any, Final, NamedTuple, Protocol

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import SpanContext, TraceFlags, TraceState

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"
TRACERESPONSE: Final = "traceresponse"
"""What an answer names its trace by; the form is that of `traceparent`."""
MAX_TRACESTATE_CHARS: Final = 512
"""What the standard asks to be passed on; longer ones are ignored, since gRPC takes 8 KB of metadata in all."""
MAX_TRACESTATE_MEMBERS: Final = 32

SAMPLED: Final = 0x01
RANDOM: Final = 0x02
FLAGS: Final = tuple(TraceFlags(bits) for bits in range(4))

Pairs = Iterable[tuple[str, str | bytes]] | Iterable[tuple[bytes, bytes]]
Carrier = Callable[[], Pairs | None]
"""Tells the headers or metadata of a call, names in lower case; asked at most once, and maybe never."""
Metadata = tuple[tuple[str, str], ...]

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x20-\x7e]*)?")
_KEY: Final = r"(?:[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
_VALUE: Final = r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
_MEMBER: Final = re.compile(f"({_KEY})=({_VALUE})")
_WANTED: Final[Mapping[str | bytes, str]] = {
    TRACEPARENT: TRACEPARENT,
    TRACEPARENT.encode(): TRACEPARENT,
    TRACESTATE: TRACESTATE,
    TRACESTATE.encode(): TRACESTATE,
}
_EMPTY: Final = otel_context.Context()
HEADERS_AT_ONCE: Final = 256
"""Made together they take 0.2 us each, alone 0.45 us."""
_headers: Final[list[str]] = []


class Parent(NamedTuple):
    """The caller's place, as its headers say it."""

    trace_id: int
    span_id: int
    flags: int
    state: str = ""
    """`tracestate`, not looked at yet."""

    @property
    def sampled(self) -> bool:
        return bool(self.flags & SAMPLED)


def parse_traceparent(text: str) -> Parent | None:
    """The fields of a `traceparent`, None when it is none. Of a version to come, what it shares with version 00."""
    match = _TRACEPARENT.fullmatch(text.strip(" \t"))
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    parent = Parent(int(trace_id, 16), int(span_id, 16), int(flags, 16) & (SAMPLED | RANDOM))
    return parent if parent.trace_id and parent.span_id else None


def parse_tracestate(text: str) -> TraceState | None:
    """The members of a `tracestate`; None when it is too long or any member is not valid."""
    if len(text) > MAX_TRACESTATE_CHARS:
        return None
    members: dict[str, str] = {}
    for piece in text.split(","):
        member = piece.strip(" \t")
        if not member:
            continue
        match = _MEMBER.fullmatch(member)
        if match is None or match[1] in members:
            return None
        members[match[1]] = match[2]
    if not members or len(members) > MAX_TRACESTATE_MEMBERS:
        return None
    return TraceState(list(members.items()))


def parent_of(pairs: Pairs | None) -> Parent | None:
    """The caller's place; None when it named none, or two, or none that is valid."""
    found: str | None = None
    states: list[str] = []
    for name, value in pairs or ():
        wanted = _WANTED.get(name)
        if wanted is None:
            continue
        text = value if isinstance(value, str) else value.decode("latin-1")
        if wanted is TRACESTATE:
            states.append(text)
        elif found is None:
            found = text
        else:
            return None
    parent = None if found is None else parse_traceparent(found)
    return parent if parent is None or not states else parent._replace(state=",".join(states))


def new_trace_id() -> int:
    return random.getrandbits(128) or 1


def new_span_id() -> int:
    return random.getrandbits(64) or 1


def new_header() -> str:
    """A `traceresponse` of a new trace that is not recorded."""
    if not _headers:
        digits = random.randbytes(24 * HEADERS_AT_ONCE).hex()  # noqa: S311  no secret
        for at in range(0, len(digits), 48):
            _headers.append(f"00-{digits[at : at + 32]}-{digits[at + 32 : at + 48]}-0{RANDOM}")
    return _headers.pop()


def header(context: SpanContext) -> str:
    """A `traceparent` or `traceresponse`."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


class Call(trace.NonRecordingSpan):
    """One call that is not recorded; a recorded one is runtime.tracing_sdk.RecordedSpan.

    It is a span to OpenTelemetry, with a place but no record, and finds its place when first asked for it.
    """

    def __init__(self, carrier: Carrier | None, parent: Parent | None = None, trace_id: int = 0) -> None:
        """`carrier`: to be asked for the parent; None: `parent` and `trace_id` say what is known already."""
        self._carrier = carrier
        self._parent = parent
        self._trace_id = trace_id
        self._header = ""
        self._place: SpanContext | None = None
        self._entered: Token[Call | None] | None = None
        self._attached: Token[otel_context.Context] | None = None
        self.over = False

    @property
    def parent(self) -> Parent | None:
        if self._carrier is not None:
            self._parent, self._carrier = parent_of(self._carrier()), None
        return self._parent

    def header(self) -> str:
        """Its place as a `traceparent` or `traceresponse`."""
        if not self._header:
            parent = self.parent
            if parent is not None:
                self._header = f"00-{parent.trace_id:032x}-{new_span_id():016x}-0{parent.flags & RANDOM}"
            elif self._trace_id:
                self._header = f"00-{self._trace_id:032x}-{new_span_id():016x}-0{RANDOM}"
            else:
                self._header = new_header()
        return self._header

    def get_span_context(self) -> SpanContext:
        if self._place is None:
            text, parent = self.header(), self.parent
            state = parse_tracestate(parent.state) if parent is not None and parent.state else None
            self._place = SpanContext(int(text[3:35], 16), int(text[36:52], 16), False, FLAGS[int(text[-1])], state)
        return self._place

    def enter(self, *, attach: bool) -> None:
        """Makes it the current call; with `attach` also the current span of OpenTelemetry."""
        self._entered = current.set(self)
        if attach:
            self._attached = otel_context.attach(trace.set_span_in_context(self, _EMPTY))

    def leave(self) -> None:
        """The call's end."""
        self.over = True
        self._carrier = None  # it may hold the whole request
        if self._entered is None:
            return
        try:
            current.reset(self._entered)
        except ValueError:  # a stream that was left: the event loop closes it in a context of its own
            return
        finally:
            self._entered = None
        if self._attached is not None:
            otel_context.detach(self._attached)
            self._attached = None


current: ContextVar[Call | None] = ContextVar("openmanager_call", default=None)


at_the_door: Final[ContextVar[Pairs | None]] = ContextVar("openmanager_metadata_at_the_door", default=None)
"""What runtime.doorman was shown of a gRPC call's metadata while tracing is on; each call has a task of its own. gRPC
makes the metadata anew whenever it is asked for."""

Decision = tuple[bool, int, Parent | None]
"""Of a call that was received: whether it is recorded, its trace id, its caller's place. A plain tuple: one a call."""


class Recorder(Protocol):
    """What decides and records while tracing is on: runtime.tracing_sdk.SpanRecorder."""

    def decide(self, pairs: Pairs | None) -> Decision:
        """What becomes of a call with such metadata or headers."""

    def begin(self, name: str, decision: Decision, attributes: Mapping[str, Any]) -> Call:
        """A call that was received, as was decided."""

    def outgoing(self, method: str) -> "tuple[Metadata, Any]":
        """The metadata to send with a call that is made now, and its RecordedSpan or None."""


_recorder: Recorder | None = None  # runtime.telemetry sets it while tracing is on


def record_with(recorder: Recorder | None) -> None:
    """Begins tracing with `recorder`; None ends it. Calls that run are not changed."""
    global _recorder  # noqa: PLW0603  one for the process, read on every call
    _recorder = recorder


def recorder() -> Recorder | None:
    """None while tracing is off."""
    return _recorder


_NOTHING: Final[Mapping[str, Any]] = {}


def begin(
    name: str,
    carrier: Carrier,
    attributes: Mapping[str, Any] = _NOTHING,
    *,
    quiet: bool = False,
    decided: Call | None = None,
) -> Call:
    """Begins a call and makes it current; `leave` ends it. `attributes` are for its span, if it gets one.

    `quiet`: one that is never recorded, such as a probe. `decided`: what the recorder has begun.
    """
    if _recorder is None:
        call = decided or Call(carrier)
        call.enter(attach=False)
        return call
    if decided is None:
        decided = Call(carrier) if quiet else _recorder.begin(name, _recorder.decide(carrier()), attributes)
    call = decided
    call.enter(attach=True)
    return call


def passed_on() -> Metadata:
    """Metadata for a call that is made now, while tracing is off: a process that does not trace changes nothing.

    So the caller's header goes on as it came. A call without one gets an id of ours, for the logs of all who serve it.
    """
    call = current.get()
    if call is None or call.over:
        return ()
    parent = call.parent
    if parent is None:
        return ((TRACEPARENT, call.header()),)
    text = f"00-{parent.trace_id:032x}-{parent.span_id:016x}-{parent.flags:02x}"
    if not parent.state or parse_tracestate(parent.state) is None:
        return ((TRACEPARENT, text),)
    return ((TRACEPARENT, text), (TRACESTATE, parent.state))


def place() -> SpanContext | None:
    """Where the running code is in a trace: in a span, or in a call; None when in neither."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        return context
    call = current.get()
    return None if call is None or call.over else call.get_span_context()
