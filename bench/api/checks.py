"""Real clients that decode what the load generators only count: before, during and after each turn.

What must stay true: a reply is right when its status is OK and it holds every metric of its server; one that is not
raises BenchError, which voids the row.
"""

import http.client
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Self

import grpc
import orjson

from bench.api.product import BEARER, CALL_BOUND_S, CHANNEL_OPTIONS
from bench.peers import BenchError
from openmanager.gateway.v1 import fleet_pb2

GET_SERVER: Final = "/openmanager.gateway.v1.FleetService/GetServer"
METRICS: Final = 511
CHECK_INTERVAL_S: Final = 0.25
"""Four calls a second beside the load: under 0.2 % of the calls, and the same for each contender."""


class GrpcReader:
    """GetServer by gRPC's own client."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, CHANNEL_OPTIONS)
        self._method: Any = self._channel.unary_unary(GET_SERVER)

    def check(self, server_id: str) -> bytes:
        """The reply as it came."""
        request = fleet_pb2.GetServerRequest(id=server_id).SerializeToString()
        try:
            reply, call = self._method.with_call(request, metadata=BEARER, timeout=CALL_BOUND_S)
        except grpc.RpcError as error:
            raise BenchError(f"GetServer {server_id}: {error}") from error
        server = fleet_pb2.GetServerResponse.FromString(reply).server
        if call.code() is not grpc.StatusCode.OK or server.id != server_id or len(server.metrics) != METRICS:
            raise BenchError(f"GetServer {server_id}: {call.code()}, {server.id!r} with {len(server.metrics)} metrics")
        return bytes(reply)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()


def http_answer(address: str, path: str, headers: Mapping[str, str]) -> bytes:
    """A whole answer over HTTP/1.1, of status 200: status line, headers in order, body."""
    connection = http.client.HTTPConnection(address, timeout=CALL_BOUND_S)
    try:
        connection.request("GET", path, headers=dict(headers))
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise BenchError(f"GET {path[:80]}: {response.status} {body[:300]!r}")
    headers_told = [f"{name}: {value}" for name, value in response.headers.items()]
    return "\r\n".join([f"HTTP/1.1 200 {response.reason}", *headers_told]).encode("latin-1") + b"\r\n\r\n" + body


def body_of(answer: bytes) -> bytes:
    """The part behind the headers."""
    return answer.partition(b"\r\n\r\n")[2]


def server_values(answer: bytes, server_id: str) -> list[float]:
    """The values in an answer to GET /v1/servers/{id}, in order of size."""
    server = orjson.loads(body_of(answer))
    metrics = server.get("metrics", {})
    if server.get("id") != server_id or len(metrics) != METRICS:
        raise BenchError(f"GET /v1/servers/{server_id}: {server.get('id')!r} with {len(metrics)} metrics")
    return sorted(metrics.values())


def series_values(answer: bytes) -> list[float]:
    """The values in a Prometheus-compatible answer to an instant query, in order of size."""
    found = orjson.loads(body_of(answer))
    series = found.get("data", {}).get("result", [])
    if found.get("status") != "success" or len(series) != METRICS:
        raise BenchError(f"the instant query: {found.get('status')!r} with {len(series)} series")
    return sorted(float(one["value"][1]) for one in series)


@contextmanager
def checking(check: Callable[[], object]) -> Iterator[None]:
    """Calls `check` before the block, several times a second while it runs, and once after it.

    Raises:
        BenchError: as `check` does, or it could not be called at all while the block ran.
    """
    check()
    over = threading.Event()
    failures: list[Exception] = []
    count = 0

    def work() -> None:
        nonlocal count
        try:
            while not over.is_set():
                check()
                count += 1
                over.wait(CHECK_INTERVAL_S)
        except Exception as error:  # told below, where it belongs
            failures.append(error)

    thread = threading.Thread(target=work, name="bench-checking", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * CALL_BOUND_S)
    if failures:
        raise BenchError(f"while it was loaded: {failures[0]}") from failures[0]
    if not count:
        raise BenchError("no reply was checked while it was loaded")
    check()
