"""Bytes that no client of ours would send, to every call of a running gateway, by gRPC and by HTTP.

Whatever comes, the answer is one that names the fault, or a normal one; nothing is INTERNAL, nobody ends, nobody logs
an error. FUZZ_EXAMPLES multiplies how much is tried.
"""

import http.client
import json
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from gateway.http.encode import to_json
from gateway.http.routes import Route
from openmanager.gateway.v1 import ingest_pb2
from runtime.errors import STATUS_DETAILS_KEY
from tests.gateway.http.messages import messages
from tests.gateway.http.near_json import near
from tests.gateway.http.test_decode_fuzz import EDITS, WITH_BODY, edited, tried
from tests.gateway.http.test_routes import public_services
from tests.harness.halves import every_other
from tests.harness.launched import Launched
from tests.harness.shared_product import unharmed

METHODS = [method for service in public_services() for method in service.methods]
CALLERS_FAULT = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,  # of another revision than the one that it names
    grpc.StatusCode.UNAUTHENTICATED,  # no set-up token
}
# What exists, so that a request gets past the first check; and times and spans that only protobuf can say.
KNOWN: dict[str, list[Any]] = {
    "server_id": ["web-01", "db-01", "fuzz-1"],
    "server_ids": ["web-01", "nobody"],
    "id": ["web-01", "fuzz-1", "6b9f4c1e-2d3a-4f5b-8c7d-9e0f1a2b3c4d"],
    "metric": ["cpu_usage", "load_1m"],
    "metrics": ["cpu_usage", "load_1m"],
    "name": ["cpu-spike", "fuzz"],
    "page_size": [1, -1, 1000],
}
EDGES: dict[str, list[Any]] = {
    "google.protobuf.Timestamp": [
        Timestamp(seconds=(1 << 63) - 1, nanos=999_999_999),
        Timestamp(seconds=-(1 << 63)),
        Timestamp(seconds=1_769_860_800, nanos=-1),
        Timestamp(nanos=(1 << 31) - 1),
        *[Timestamp(seconds=1_769_860_800)] * 6,
    ],
    "google.protobuf.Duration": [
        Duration(seconds=(1 << 63) - 1, nanos=999_999_999),
        Duration(seconds=-(1 << 63), nanos=-1),
        Duration(seconds=1, nanos=-1),
        *[Duration(seconds=60)] * 6,
    ],
}


def likely(message: Any, dice: list[int], *, edges: bool = True) -> Any:
    """The message with some fields replaced by what exists or is an edge, as the dice fall."""
    for field in message.DESCRIPTOR.fields:
        roll = dice[field.number % len(dice)]
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            continue
        choices = EDGES.get(kind.full_name, []) if kind is not None else KNOWN.get(field.name, [])
        if kind is not None and not edges:
            choices = choices[-1:]
        if choices and roll % 3:
            chosen = choices[roll % len(choices)]
            if field.is_repeated:
                getattr(message, field.name)[:] = [chosen]
            elif kind is not None:
                getattr(message, field.name).CopyFrom(chosen)
            else:
                setattr(message, field.name, chosen)
        elif kind is not None and not choices:
            inner = getattr(message, field.name)
            for each in inner if field.is_repeated else [inner] if message.HasField(field.name) else []:
                likely(each, dice, edges=edges)
    if isinstance(message, ingest_pb2.WriteMetricsRequest) and dice[0] % 2:
        message.metric_set_id = ""
        message.values[:] = [float(dice[0])] * (len(message.rows) * len(message.metrics))
    return message


DICE = st.lists(st.integers(0, 30), min_size=8, max_size=8)


def requests(method: MethodDescriptor) -> st.SearchStrategy[bytes]:
    """Serialized requests, right, likely and damaged, and what is none."""
    right = messages(method.input_type)
    nearly = st.builds(likely, right, DICE).map(serialized)
    return st.one_of(nearly, nearly, right.map(serialized), st.builds(edited, nearly, EDITS), st.binary())


def serialized(message: Message) -> bytes:
    return message.SerializeToString()


@pytest.fixture(scope="module")
def channel(abused: Launched) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(abused.addresses["gateway"]) as channel:
        yield channel


def asked(channel: grpc.Channel, method: MethodDescriptor, request: bytes) -> tuple[grpc.StatusCode, str]:
    """Status and reason of one call; of a stream, of its first message."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    try:
        if not method.server_streaming:
            channel.unary_unary(path)(request, timeout=20)
        elif method.client_streaming:
            list(channel.stream_stream(path)(iter([request]), timeout=20))
        else:
            call = channel.unary_stream(path)(request, timeout=20)
            next(call, None)
            call.cancel()
    except grpc.RpcError as error:
        trailers = dict(error.trailing_metadata() or ())
        details = status_pb2.Status.FromString(trailers.get(STATUS_DETAILS_KEY, b"")).details
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in details), f"{error.code()} {error.details()} has no reason"
        return error.code(), info.reason
    return grpc.StatusCode.OK, ""


@pytest.mark.parametrize(
    "method", every_other(METHODS), ids=lambda method: method.full_name.removeprefix("openmanager.gateway.v1.")
)
def test_any_bytes_are_answered_or_their_fault_is_named(channel: grpc.Channel, method: MethodDescriptor) -> None:
    kind = GetMessageClass(method.input_type)

    @tried(20)
    @given(requests(method))
    def check(request: bytes) -> None:
        try:
            kind.FromString(request)
        except DecodeError:
            assert asked(channel, method, request) == (grpc.StatusCode.INVALID_ARGUMENT, "UNDECODABLE")
        else:
            code, reason = asked(channel, method, request)
            assert code is grpc.StatusCode.OK or (code in CALLERS_FAULT and reason != "UNDECODABLE"), (code, reason)

    check()


@pytest.fixture(scope="module")
def post(abused: Launched) -> Iterator[Callable[[str, str, bytes], tuple[int, bytes]]]:
    """Sends a body over a connection that stays open, which a server that breaks would close."""
    connection = http.client.HTTPConnection(abused.http_address, timeout=20)

    def send(verb: str, path: str, body: bytes) -> tuple[int, bytes]:
        connection.request(verb, path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()

    yield send
    connection.close()


@pytest.mark.parametrize("route", every_other(WITH_BODY), ids=lambda route: f"{route.verb} {route.template}")
def test_any_body_is_answered_or_its_fault_is_named(
    post: Callable[[str, str, bytes], tuple[int, bytes]], route: Route
) -> None:
    kind = route.method.input_type
    if route.body != "*":
        kind = kind.fields_by_name[route.body].message_type or kind
    right = st.builds(likely, messages(kind), DICE, edges=st.just(False)).map(to_json)
    nearly = st.one_of(near(kind).map(lambda value: json.dumps(value).encode()), right, right)
    path = route.template
    for name in route.variables:
        path = path.replace(f"{{{name}}}", "fuzz-1")

    @tried(40)
    @given(nearly | st.builds(edited, nearly, EDITS))
    def check(body: bytes) -> None:
        status, said = post(route.verb, path, body)
        assert status == 200 or 400 <= status < 500, said
        if status != 200:
            error = json.loads(said)
            assert error["message"] and error["details"][0]["reason"], said

    check()


def test_it_is_unharmed(abused: Launched) -> None:
    unharmed(abused)
