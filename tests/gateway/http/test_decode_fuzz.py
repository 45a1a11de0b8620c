"""Whatever JSON comes: the message that json_format reads from it, or a fault that names a field; never anything else.

Where the two may differ, and how:

    we take more     relative times and epoch seconds, `5m`, `healthy`, null inside a list of numbers (values.py)
    we take less     a field given twice by its two names, numbers of an enum that has none such, what Python calls a
                     number and JSON does not (" 1", ".5", "1_000", True), base64 with line ends, [] and "" as objects

FUZZ_EXAMPLES multiplies how much is tried.
"""

import json
import os
import re
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.http.decode import decoder_of
from gateway.http.encode import to_json
from gateway.http.routes import Route
from gateway.http.transcode import RequestReader, query_parameters
from gateway.http.values import BadValue
from runtime.errors import InvalidArgument
from tests.gateway.http.messages import messages
from tests.gateway.http.near_json import NOISE, TEXT, near
from tests.gateway.http.test_encode import KINDS, public_types
from tests.gateway.http.test_openapi import ROUTES
from tests.harness.halves import every_other

NOW_MS = 1_769_860_800_500
MORE = int(os.environ.get("FUZZ_EXAMPLES", "1"))
WE_TAKE_LESS = re.compile(r"given twice|is none of|is not a (whole )?number|is not a JSON object|not base64")
OURS = [kind for kind in [*public_types(), KINDS] if not kind.full_name.startswith("google.")]


def tried(examples: int) -> settings:
    """The settings of a test that tries so many: the same each time, unless more is wanted."""
    return settings(
        max_examples=examples * MORE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=MORE == 1,
    )


def theirs(kind: Descriptor, value: Any) -> Any:
    """What json_format reads; None when it does not."""
    try:
        return json_format.ParseDict(value, GetMessageClass(kind)())
    except (json_format.ParseError, TypeError, OverflowError, AttributeError):  # the last three are faults of its own
        return None


@pytest.mark.parametrize("kind", every_other(OURS), ids=lambda kind: kind.full_name)
def test_near_json_is_read_as_json_format_does_or_its_field_is_named(kind: Descriptor) -> None:
    @tried(30)
    @given(near(kind))
    def check(value: Any) -> None:
        ours, reference = GetMessageClass(kind)(), theirs(kind, value)
        try:
            decoder_of(kind).into(ours, value, NOW_MS)
        except BadValue as fault:
            assert fault.field or not isinstance(value, dict) or "" in value
            assert reference is None or WE_TAKE_LESS.search(fault.message), (fault.field, fault.message)
        else:
            assert reference is None or as_dict(ours) == as_dict(reference)

    check()


def as_dict(message: Any) -> Any:
    """A message so that NaN is equal to NaN; without the empty paths of field masks, which mean nothing."""
    value = json_format.MessageToDict(message)
    if isinstance(value.get("updateMask"), str):
        value["updateMask"] = value["updateMask"].strip(",")
    return value


@pytest.mark.parametrize("kind", every_other(OURS), ids=lambda kind: kind.full_name)
def test_what_we_write_json_format_reads_and_we_do(kind: Descriptor) -> None:
    @tried(20)
    @given(messages(kind))
    def check(message: Any) -> None:
        written = to_json(message)
        if theirs(kind, json_format.MessageToDict(message)) is None:
            return  # the largest and the smallest 32-bit floats, which it does not read back
        assert as_dict(json_format.Parse(written, GetMessageClass(kind)())) == as_dict(message)
        again = GetMessageClass(kind)()
        try:
            decoder_of(kind).into(again, orjson.loads(written), NOW_MS)
        except BadValue as fault:
            assert "'77' is none of" in fault.message
        else:
            assert as_dict(again) == as_dict(message)

    check()


WITH_BODY = [route for route in ROUTES if route.body]
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 2), st.binary(min_size=1, max_size=2)), max_size=3)


def edited(body: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """A body with bytes put in, taken out or put over others."""
    for where, taken, put in edits:
        at = int(where * len(body))
        body = body[:at] + put + body[at + taken :]
    return body


@pytest.mark.parametrize("route", every_other(WITH_BODY), ids=lambda route: f"{route.verb} {route.template}")
def test_a_mutated_body_is_read_or_its_field_is_named(route: Route) -> None:
    reader = RequestReader(route)
    kind = route.method.input_type
    if route.body != "*":
        kind = kind.fields_by_name[route.body].message_type or kind
    values = tuple("web-01" for _ in route.variables)

    @tried(60)
    @given(near(kind), EDITS)
    def check(value: Any, edits: list[tuple[float, int, bytes]]) -> None:
        body = edited(json.dumps(value).encode(), edits)
        try:
            reader.read(values, b"", body, NOW_MS)
        except InvalidArgument as error:
            assert error.field

    check()


@pytest.mark.parametrize("route", every_other(ROUTES), ids=lambda route: f"{route.verb} {route.template}")
def test_any_path_and_query_is_read_or_its_parameter_is_named(route: Route) -> None:
    reader = RequestReader(route)
    names = st.sampled_from(sorted(query_parameters(route)) or ["nope"]) | TEXT
    texts = (TEXT | NOISE.map(str) | st.sampled_from(["-1h", "1e2", "healthy", "FULL", "5", ""])).map(quote)
    raw = st.binary(max_size=4).map(lambda some: some.decode("latin-1"))
    pair = st.tuples(names.map(quote), texts | raw).map("=".join)

    @tried(40)
    @given(st.lists(pair, max_size=3), st.lists(texts | raw, min_size=2, max_size=2))
    def check(pairs: list[str], values: list[str]) -> None:
        given_values = tuple(values[: len(route.variables)])
        try:
            reader.read(given_values, "&".join(pairs).encode("latin-1"), b"", NOW_MS)
        except InvalidArgument as error:
            assert error.field

    check()
