"""Hypothesis strategies that make any message of a type, for tests that compare with json_format."""

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
I32, I64 = st.integers(-(1 << 31), (1 << 31) - 1), st.integers(-(1 << 63), (1 << 63) - 1)
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: TEXT,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=8),
    FieldDescriptor.TYPE_UINT32: U32,
    FieldDescriptor.TYPE_UINT64: U64,
    FieldDescriptor.TYPE_INT32: I32,
    FieldDescriptor.TYPE_SINT32: I32,
    FieldDescriptor.TYPE_INT64: I64,
    FieldDescriptor.TYPE_SINT64: I64,
    FieldDescriptor.TYPE_FIXED32: U32,
    FieldDescriptor.TYPE_FIXED64: U64,
    FieldDescriptor.TYPE_SFIXED32: I32,
    FieldDescriptor.TYPE_SFIXED64: I64,
}
TIMESTAMPS = st.builds(
    Timestamp, seconds=st.integers(-62_135_596_800, 253_402_300_799), nanos=st.integers(0, 999_999_999)
)
DURATIONS = st.builds(
    lambda seconds, nanos, sign: Duration(seconds=sign * seconds, nanos=sign * nanos),
    st.integers(0, 315_576_000_000 - 1),
    st.integers(0, 999_999_999),
    st.sampled_from([-1, 1]),
)
MASKS = st.builds(FieldMask, paths=st.lists(st.sampled_from(["hostname", "location", "update_mask"]), max_size=3))


def messages(descriptor: Descriptor, depth: int = 3) -> st.SearchStrategy[Message]:
    """Any message of a type; messages inside go `depth` deep."""
    known = {"google.protobuf.Timestamp": TIMESTAMPS, "google.protobuf.Duration": DURATIONS}
    known["google.protobuf.FieldMask"] = MASKS
    if descriptor.full_name in known:
        return known[descriptor.full_name]
    fields = {field.name: _values(field, depth) for field in descriptor.fields if depth or field.message_type is None}
    kind = GetMessageClass(descriptor)
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: kind(**_one_of_each(descriptor, given)))


def _one_of_each(descriptor: Descriptor, given: dict[str, Any]) -> dict[str, Any]:
    """Only the first given field of each oneof, whose members exclude each other."""
    taken: set[str] = set()
    result = {}
    for name, value in given.items():
        group = descriptor.fields_by_name[name].containing_oneof
        if group is None or group.name not in taken:
            result[name] = value
        if group is not None:
            taken.add(group.name)
    return result


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        key, value = kind.fields_by_name["key"], kind.fields_by_name["value"]
        return st.dictionaries(_one(key, depth - 1), _one(value, depth - 1), max_size=4)
    one = _one(field, depth - 1)
    return st.lists(one, max_size=4) if field.is_repeated else one


def _one(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(field.message_type, max(depth, 0))
    if field.enum_type is not None:
        return st.sampled_from(sorted(field.enum_type.values_by_number)) | st.just(77)
    return SCALARS[field.type]
