"""What is believed of a caller's headers, and which traces are recorded: the standard and the SDK, compared."""

import logging

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import sampling
from opentelemetry.trace import SpanContext, TraceFlags, TraceState

from runtime import tracing
from runtime.sampling import Sampling
from tests.runtime.test_tracing import SAMPLED, SPAN, TRACE

hexes = st.text("0123456789abcdef")
versions = st.sampled_from(["00", "01"])


def naively(text: str) -> tuple[int, int, int] | None:
    """The standard, read slowly."""
    parts = text.strip(" \t").split("-")
    if [len(part) for part in parts[:4]] != [2, 32, 16, 2] or (not text.isprintable() and "\t" not in text):
        return None
    if any(letter not in "0123456789abcdef" for part in parts[:4] for letter in part):
        return None
    if parts[0] == "ff" or (parts[0] == "00" and len(parts) > 4) or not parts[1].strip("0") or not parts[2].strip("0"):
        return None
    return int(parts[1], 16), int(parts[2], 16), int(parts[3], 16) & 3


@given(
    st.one_of(
        st.builds(
            lambda *parts: "-".join(parts),
            st.sampled_from(["00", "01", "cc", "ff", "0", "0A"]),
            st.one_of(hexes.filter(lambda text: len(text) < 40), st.just(TRACE), st.just("0" * 32)),
            st.one_of(st.just(SPAN), st.just("0" * 16), hexes),
            st.sampled_from(["00", "01", "02", "03", "ff", "1", "0G"]),
        ),
        st.builds(lambda at, letter: SAMPLED[:at] + letter + SAMPLED[at + 1 :], st.integers(0, 54), st.characters()),
        st.builds(lambda version, more: f"{version}-{TRACE}-{SPAN}-01{more}", versions, st.text("-ab. ", max_size=5)),
        st.text(max_size=60),
    )
)
@example(SAMPLED)
@example(f" \t{SAMPLED} ")
@example(SAMPLED + "\n")
@example(SAMPLED.replace("4bf9", "４bf9"))
@settings(deadline=None)
def test_a_traceparent_is_read_to_the_letter(text: str) -> None:
    parsed = tracing.parse_traceparent(text)
    assert (parsed and (parsed.trace_id, parsed.span_id, parsed.flags)) == naively(text)


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 3))
@settings(deadline=None)
def test_what_is_written_is_read_again(trace_id: int, span_id: int, flags: int) -> None:
    text = tracing.header(SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(flags)))
    assert tracing.parse_traceparent(text) == tracing.Parent(trace_id, span_id, flags)
    call = tracing.Call(lambda: [("traceparent", text)])
    assert call.get_span_context()[:1] == (trace_id,)
    assert tracing.header(call.get_span_context()) == call.header()
    assert not call.get_span_context().trace_flags.sampled


members = st.text("ab1@=,_ \t*/-é", max_size=12) | st.sampled_from(["a=1", "b=2", "t@v=x y", "1=a", "a" * 257 + "=1"])


@given(st.lists(members, max_size=40).map(",".join))
@example(",".join(f"k{number}=v" for number in range(33)))
@example("a=" + "x" * 520)
@settings(deadline=None)
def test_a_tracestate_is_whole_or_nothing(text: str) -> None:
    logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)
    theirs = TraceState.from_header([text])
    expected = dict(theirs) if theirs and len(text) <= tracing.MAX_TRACESTATE_CHARS else None
    ours = tracing.parse_tracestate(text)
    assert (None if ours is None else dict(ours)) == expected


@given(st.integers(1, 2**128 - 1), st.floats(0, 1), st.booleans(), st.sampled_from([None, True, False]))
@settings(deadline=None)
def test_our_rule_is_the_samplers_of_the_sdk(trace_id: int, ratio: float, by_parent: bool, parent: bool | None) -> None:
    name = ("parentbased_" if by_parent else "") + "traceidratio"
    rule = Sampling.of({"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": str(ratio)})
    theirs: sampling.Sampler = sampling.TraceIdRatioBased(ratio)
    theirs = sampling.ParentBased(theirs) if by_parent else theirs
    context = otel_context.Context()
    if parent is not None:
        place = SpanContext(trace_id, 1, is_remote=True, trace_flags=TraceFlags(int(parent)))
        context = trace.set_span_in_context(trace.NonRecordingSpan(place), context)
    taken = theirs.should_sample(context, trace_id, "x").decision is sampling.Decision.RECORD_AND_SAMPLE
    assert rule.takes(trace_id, parent) is taken


@pytest.mark.parametrize(
    ("name", "argument", "takes"),  # without a parent, below a sampled one, below one that is not
    [
        (None, None, (True, True, False)),
        ("parentbased_always_on", None, (True, True, False)),
        ("PARENTBASED_ALWAYS_OFF", None, (False, True, False)),
        ("always_on", None, (True, True, True)),
        ("always_off", None, (False, False, False)),
        ("traceidratio", "0", (False, False, False)),
        ("parentbased_traceidratio", "0", (False, True, False)),
        ("parentbased_traceidratio", "1", (True, True, False)),
        ("parentbased_traceidratio", "much", (True, True, False)),
        ("traceidratio", "nan", (True, True, True)),
        ("traceidratio", "1.5", (True, True, True)),
        ("jaeger_remote", None, (True, True, False)),
    ],
)
def test_samplers_by_name(name: str | None, argument: str | None, takes: tuple[bool, ...]) -> None:
    given = {"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": argument}
    rule = Sampling.of({key: value for key, value in given.items() if value is not None})
    assert tuple(rule.takes(2**128 - 1, parent) for parent in (None, True, False)) == takes


def test_a_sampler_that_is_not_one_is_said(caplog: pytest.LogCaptureFixture) -> None:
    Sampling.of({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "much"})
    Sampling.of({"OTEL_TRACES_SAMPLER": "sometimes"})
    assert "OTEL_TRACES_SAMPLER_ARG=much" in caplog.messages[0]
    assert "OTEL_TRACES_SAMPLER=sometimes" in caplog.messages[1]


def test_two_callers_are_none() -> None:
    once = [(b"host", b"a"), (b"traceparent", SAMPLED.encode()), (b"tracestate", b"a=1"), (b"tracestate", b"b=2")]
    parent = tracing.parent_of(once)
    assert parent == tracing.Parent(int(TRACE, 16), int(SPAN, 16), 1, "a=1,b=2")
    assert tracing.parent_of([*once, (b"traceparent", SAMPLED.encode())]) is None
