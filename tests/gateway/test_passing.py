"""Requests and answers that are passed on as bytes have the same fields on both sides, or data would be mixed up."""

import pytest
from google.protobuf.descriptor import Descriptor

from openmanager.gateway.v1 import simulator_pb2 as public_simulator_pb2
from openmanager.simulator.v1 import simulator_pb2

METHODS = [
    (public_simulator_pb2, "GetSimulator", simulator_pb2, "GetStatus"),
    (public_simulator_pb2, "StartSimulator", simulator_pb2, "StartSending"),
    (public_simulator_pb2, "StopSimulator", simulator_pb2, "StopSending"),
    (public_simulator_pb2, "InjectScenario", simulator_pb2, "StartScenario"),
    (public_simulator_pb2, "ClearScenarios", simulator_pb2, "StopScenarios"),
]


def shape(message: Descriptor) -> list[tuple[int, str, int, bool, str]]:
    return [
        (
            field.number,
            field.name,
            field.type,
            field.is_repeated,
            field.message_type.full_name if field.message_type else "",
        )
        for field in message.fields
    ]


@pytest.mark.parametrize(("public", "method", "inner", "inner_method"), METHODS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("suffix", ["Request", "Response"])
def test_both_sides_have_the_same_fields(
    public: object, method: str, inner: object, inner_method: str, suffix: str
) -> None:
    outer_message = getattr(public, method + suffix).DESCRIPTOR
    inner_message = getattr(inner, inner_method + suffix).DESCRIPTOR
    assert shape(outer_message) == shape(inner_message)
