"""Encoding is json_format's, only faster."""

import math
from typing import Any

import orjson
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, wrappers_pb2
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813  a function, named as a class
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.http.encode import encoder_of, to_json
from openmanager.gateway.v1 import fleet_pb2, history_pb2
from tests.gateway.http.messages import messages
from tests.gateway.http.serving import PACKAGE, SERVICES


def public_types() -> list[Descriptor]:
    """Every message type that a public method takes or returns, or that is inside of one."""
    found: dict[str, Descriptor] = {}
    methods = [m for name in SERVICES for m in default_pool().FindServiceByName(f"{PACKAGE}.{name}").methods]
    waiting = [kind for method in methods for kind in (method.input_type, method.output_type)]
    while waiting:
        kind = waiting.pop()
        if kind.full_name not in found and not kind.GetOptions().map_entry:
            found[kind.full_name] = kind
            waiting += [field.message_type for field in kind.fields if field.message_type is not None]
    return sorted(found.values(), key=lambda kind: kind.full_name)


def reference(message: Any) -> Any:
    return json_format.MessageToDict(message, always_print_fields_with_no_presence=True)


@pytest.mark.parametrize("kind", public_types(), ids=lambda kind: kind.full_name)
def test_every_public_type_is_encoded_as_json_format_does(kind: Descriptor) -> None:
    @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(message=messages(kind))
    def check(message: Any) -> None:
        assert encoder_of(kind)(message) == reference(message)
        assert orjson.loads(to_json(message)) == orjson.loads(orjson.dumps(reference(message)))

    check()


def every_kind_of_field() -> Descriptor:
    """A message with a field of every scalar type: plain, optional, repeated, in maps and in a oneof."""
    file = descriptor_pb2.FileDescriptorProto(name="kinds.proto", package="kinds", syntax="proto3")
    file.dependency.append("google/protobuf/wrappers.proto")
    message = file.message_type.add(name="Kinds")
    number = 0
    types = [kind for kind in range(1, 19) if kind not in {10, 11, 14}]  # neither group, message nor enum
    for kind in types:
        for label, name in ((1, f"one_{kind}"), (3, f"many_{kind}")):
            number += 1
            message.field.add(name=name, number=number, type=kind, label=label)
        number += 1
        message.oneof_decl.add(name=f"_maybe_{kind}")
        message.field.add(
            name=f"maybe_{kind}",
            number=number,
            type=kind,
            label=1,
            proto3_optional=True,
            oneof_index=len(message.oneof_decl) - 1,
        )
    for kind in types:
        number += 1
        entry = message.nested_type.add(name=f"Map{kind}Entry")
        entry.options.map_entry = True
        key = kind if kind not in {1, 2, 12} else 9  # no double, float or bytes as keys
        entry.field.add(name="key", number=1, type=key, label=1)
        entry.field.add(name="value", number=2, type=kind, label=1)
        message.field.add(name=f"map{kind}", number=number, type=11, label=3, type_name=f".kinds.Kinds.Map{kind}Entry")
    message.field.add(name="again", number=number + 1, type=11, label=1, type_name=".kinds.Kinds")
    message.field.add(name="w", number=number + 2, type=11, label=1, type_name=".google.protobuf.Int64Value")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindMessageTypeByName("kinds.Kinds")


KINDS = every_kind_of_field()


@settings(max_examples=80, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(message=messages(KINDS, depth=2))
def test_every_kind_of_field_is_encoded_as_json_format_does(message: Any) -> None:
    assert encoder_of(KINDS)(message) == reference(message)


@given(st.floats(width=32))
def test_floats_are_as_short_as_json_format_has_them(value: float) -> None:
    message = GetMessageClass(KINDS)(one_2=value)
    assert encoder_of(KINDS)(message)["one2"] == reference(message)["one2"]


def test_maps_with_other_names_follow_each_other() -> None:
    for names in ("ab", "ba", "ac", "abc", "d", "", "ab"):
        server = fleet_pb2.Server(metrics=dict.fromkeys(names, 1.5))
        assert list(orjson.loads(to_json(server))["metrics"].items()) == [(name, 1.5) for name in sorted(names)]
        assert len(server.metrics) == len(names), "reading one that is not there would have made it"


def test_what_users_read_is_there_when_it_is_zero() -> None:
    assert to_json(fleet_pb2.ListServersResponse()) == b'{"servers":[],"nextPageToken":"","totalSize":0}'
    summary = orjson.loads(to_json(fleet_pb2.FleetSummary(total=1)))
    assert summary == {"total": 1, "healthy": 0, "warning": 0, "critical": 0, "offline": 0, "maintenance": 0}
    assert "observedTime" not in orjson.loads(to_json(fleet_pb2.Server(id="a")))


def test_numbers_that_json_does_not_have_are_strings() -> None:
    message = history_pb2.GetServerHistoryResponse()
    message.series.add(values=[1.0, math.nan, math.inf, -math.inf])
    assert orjson.loads(to_json(message))["series"][0]["values"] == [1.0, "NaN", "Infinity", "-Infinity"]
    server = fleet_pb2.Server(metrics={"a": math.nan})
    assert orjson.loads(to_json(server))["metrics"] == {"a": "NaN"}
