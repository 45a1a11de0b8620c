"""Hypothesis strategies of JSON that is nearly what a message type wants: right names mostly, right values mostly."""

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
NOISE = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
INTEGERS = st.sampled_from([0, 1, -1, 5, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 63, (1 << 63) - 1, 1 << 64])
WHOLE = (
    INTEGERS
    | INTEGERS.map(str)
    | st.integers(0, 9).map(float)
    | st.sampled_from(["1e2", "1.0", " 1", "+1", "٣", "-0", ""])
)
NUMBERS = (
    WHOLE
    | st.floats()
    | st.floats().map(str)
    | st.sampled_from(["NaN", "Infinity", "-Infinity", "nan", "inf", "1e400", "-1e-400", "1_000", ".5", "5.", "0x10"])
)
TIMES = st.sampled_from(
    [
        "2026-01-31T12:00:00Z",
        "2026-01-31T12:00:00.123456789Z",
        "2026-01-31T12:00:00+01:00",
        "2026-01-31T12:00:00-23:59",
        "2026-01-31T24:00:00Z",
        "2026-02-30T00:00:00Z",
        "0001-01-01T00:00:00Z",
        "0000-01-01T00:00:00Z",
        "9999-12-31T23:59:59.999999999Z",
        "9999-12-31T23:59:59-01:00",
        "2026-01-31t12:00:00z",
        "2026-01-31 12:00:00Z",
        "2026-01-31T12:00:00",
        "2026-01-31T12:00:60Z",
        "-1h",
        "now",
        "1769860800",
        1769860800,
        1769860800.5,
        1e300,
    ]
)
SPANS = st.sampled_from(
    ["0s", "60s", "-1.5s", "1.000000001s", "315576000000s", "315576000001s", "5m", "1h", "5", 5, 1.5, "s", "-s"]
)
MASKS = st.sampled_from(["hostname", "hostname,updateMask", "update_mask", "a.b,c", "", ",", "a b", "A", "aB_c", "é"])
BYTES = st.sampled_from(["", "AA==", "AA", "A", "-_8=", "+/8", "é", "AA=A", "AAAA\n"])


def near(descriptor: Descriptor, depth: int = 3) -> st.SearchStrategy[Any]:
    """JSON for a message type."""
    known = {"google.protobuf.Timestamp": TIMES, "google.protobuf.Duration": SPANS, "google.protobuf.FieldMask": MASKS}
    if descriptor.full_name in known:
        return known[descriptor.full_name] | NOISE
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field in descriptor.fields:
        if depth or field.message_type is None:
            fields[field.json_name] = fields[field.name] = _values(field, depth)
    names = sorted(fields)
    if not names:
        return st.dictionaries(TEXT, NOISE, max_size=1)
    known_fields = st.lists(st.sampled_from(names), max_size=4, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({name: fields[name] for name in chosen})
    )
    some_noise = st.tuples(known_fields, st.dictionaries(TEXT, NOISE, max_size=1)).map(lambda both: both[1] | both[0])
    return st.one_of(known_fields, known_fields, known_fields, some_noise, NOISE)


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        value = _one(kind.fields_by_name["value"], depth - 1)
        keys = _one(kind.fields_by_name["key"], 0).filter(lambda key: isinstance(key, str)) | TEXT
        return st.dictionaries(keys, value, max_size=2) | NOISE
    one = _one(field, depth - 1)
    return st.lists(one, max_size=3) | NOISE if field.is_repeated else st.one_of(one, one, st.none(), NOISE)


def _one(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return near(field.message_type, max(depth, 0))
    if field.enum_type is not None:
        names = list(field.enum_type.values_by_name)
        return st.sampled_from([*names, names[-1].lower(), names[-1].rpartition("_")[2], 0, 1, "1", 77, 1.0, True])
    if field.type == FieldDescriptor.TYPE_STRING:
        return TEXT
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.sampled_from([True, False, "true", "false", "True", 0, 1, [], {}])
    if field.type == FieldDescriptor.TYPE_BYTES:
        return BYTES
    if field.cpp_type in {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}:
        return NUMBERS
    return WHOLE
