"""Clients that say what they say a byte at a time, or stop in the middle: others are served, and they are let go."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from tests.harness.hostile import Attacked
from tests.harness.http2 import (
    DATA,
    END_HEADERS,
    HEADERS,
    PREFACE,
    SETTINGS,
    Connection,
    block,
    frame,
    grpc_request,
    message,
    request,
)

EACH = 50
"""Clients of a kind."""
DRIP_S = 0.05
DRIPS_FOR_S = 2.0
LITTLE_MB = 60
"""For a few hundred connections of which each has said next to nothing, beside the other client's calls."""
GET_SERVER = "/openmanager.gateway.v1.FleetService/GetServer"


def words(address: str) -> dict[str, tuple[bytes, bytes, float]]:
    """Kind of a client -> what it says at once, what it drips then, and within how many seconds it is let go.

    The times are those of the docs, with something on top: nobody looks at a watch that closely.
    """
    head = f"POST /v1/metrics:write HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    http2 = PREFACE + frame(SETTINGS)
    headers = frame(HEADERS, END_HEADERS, 1, block(request(address, "/v1/servers")))
    return {
        "nothing": (b"", b"", 45),
        "half a preface": (b"", PREFACE[:-1], 45),
        "half a request line": (b"", b"GET /v1/servers", 35),
        "headers without end": (b"GET /v1/servers HTTP/1.1\r\n", b"X-A: b\r\n" * 1_000, 35),
        "a body without end": (head.encode() + b"Content-Length: 1000000\r\n\r\n", b" " * 1_000_000, 15),
        "a preface": (http2, b"", 45),
        "half a frame": (http2, headers[:20], 45),
        "kept alive": (f"GET /healthz HTTP/1.1\r\nHost: {address}\r\n\r\n".encode(), b"", 35),
    }


def grpc_words(address: str) -> dict[str, tuple[bytes, bytes, float]]:
    """The same for the port of gRPC."""
    headers = frame(HEADERS, END_HEADERS, 1, block(grpc_request(address, GET_SERVER)))
    return {
        "nothing": (b"", b"", 25),
        "half a preface": (b"", PREFACE[:-1], 25),
        "a preface": (PREFACE, b"", 25),
        "settings": (PREFACE + frame(SETTINGS), b"", 25),
        "half a frame": (PREFACE + frame(SETTINGS), headers[:20], 25),
        "half a message": (PREFACE + frame(SETTINGS) + headers + frame(DATA, 0, 1, message(1_000)), b"", 25),
    }


async def open_all(address: str, kinds: dict[str, tuple[bytes, bytes, float]]) -> list[Connection]:
    """EACH connections for each kind, in order."""
    host, port = address.rsplit(":", 1)
    opened = []
    for at_once, _, _ in kinds.values():
        for _ in range(EACH):
            connection = Connection(*await asyncio.open_connection(host, int(port)), address)
            connection.writer.write(at_once)
            opened.append(connection)
    return opened


async def drip(connections: list[Connection], kinds: dict[str, tuple[bytes, bytes, float]]) -> None:
    """Until cancelled, or nobody has anything more to say."""
    for place in range(max(len(drops) for _, drops, _ in kinds.values())):
        await asyncio.sleep(DRIP_S)
        for number, (_, drops, _) in enumerate(kinds.values()):
            for connection in connections[number * EACH : (number + 1) * EACH]:
                if place < len(drops) and not connection.writer.is_closing():
                    connection.writer.write(drops[place : place + 1])


@contextlib.asynccontextmanager
async def dripping(address: str, kinds: dict[str, tuple[bytes, bytes, float]]) -> AsyncIterator[list[Connection]]:
    connections = await open_all(address, kinds)
    drops = asyncio.create_task(drip(connections, kinds))
    try:
        yield connections
    finally:
        drops.cancel()
        await asyncio.wait({drops})
        for connection in connections:
            connection.writer.transport.abort()


async def test_others_are_served_meanwhile(target: Attacked) -> None:
    async with (
        target.endures(LITTLE_MB) as other,
        dripping(target.http, words(target.http)),
        dripping(target.grpc, grpc_words(target.grpc)),
    ):
        ends = time.monotonic() + DRIPS_FOR_S
        while time.monotonic() < ends:
            await other.is_served()


async def test_a_body_that_does_not_come_is_waited_for_as_long_as_the_call_has(target: Attacked) -> None:
    head = f"POST /v1/metrics:write HTTP/1.1\r\nHost: {target.http}\r\nContent-Type: application/json\r\n"
    async with target.endures(LITTLE_MB):
        reader, writer = await target.open()
        writer.write(f"{head}Request-Timeout: 1s\r\nContent-Length: 100\r\n\r\n{{".encode())
        async with asyncio.timeout(20):
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 504 ")
            assert b"DEADLINE_EXCEEDED" in await reader.read()
        writer.close()


@pytest.mark.full
async def test_each_is_let_go_in_the_time_that_the_docs_say(target: Attacked) -> None:
    async with target.endures(LITTLE_MB) as other:
        ports = ((target.http, words(target.http)), (target.grpc, grpc_words(target.grpc)))
        late = await asyncio.gather(*(_late(address, kinds) for address, kinds in ports))
        await other.is_served()
    assert late == [{}, {}]


async def _late(address: str, kinds: dict[str, tuple[bytes, bytes, float]]) -> dict[str, int]:
    """Kind -> how many of it were still connected after their time."""
    async with dripping(address, kinds) as connections:
        began = time.monotonic()

        async def is_let_go(connection: Connection, within_s: float) -> bool:
            with contextlib.suppress(ConnectionError):
                try:
                    async with asyncio.timeout(within_s - (time.monotonic() - began)):
                        await connection.reader.read()
                except TimeoutError:
                    return False
            return True

        bounds = [within_s for _, _, within_s in kinds.values() for _ in range(EACH)]
        gone = await asyncio.gather(*(is_let_go(one, bound) for one, bound in zip(connections, bounds, strict=True)))
    counts = {name: EACH - sum(gone[number * EACH : (number + 1) * EACH]) for number, name in enumerate(kinds)}
    return {name: count for name, count in counts.items() if count}
