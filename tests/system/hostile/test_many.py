"""Many of what one alone would be harmless: connections, cancelled calls, frames and readers who do not read."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.harness import eventually
from tests.harness.hostile import Attacked
from tests.harness.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Connection,
    block,
    frame,
    grpc_request,
    message,
    request,
)

GET_SERVER = "/openmanager.gateway.v1.FleetService/GetServer"
WATCH_FLEET = "/openmanager.gateway.v1.FleetService/WatchFleet"
CHECK_HEALTH, WATCH_HEALTH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
SET_UP = "/openmanager.gateway.v1.AccessService/SetUp"
CANCEL = b"\0\0\0\x08"
LITTLE_MB = 80
"""For calls of which none is kept, beside the other client's."""
A_CONNECTION_KB = 40
"""At most, of either port: measured are 7 over HTTP and 28 over gRPC."""
SAID_AT_MOST = {"http": PREFACE[:10], "grpc": PREFACE + frame(SETTINGS)}
"""Of it alone the servers' own timers would not let go over HTTP."""
RESERVED = 500
"""Descriptors of this process that are not for connections."""
READERS = 40
SERVERS, TICKS = 20, 60
"""Of 511 metrics: a tick is 0.2 MB."""
UNREAD_MB = 150
"""For 80 readers what gRPC or granian has on the way to each. Measured: 64; 340, were each message kept for each."""
WITHIN_S = 60.0


@pytest.fixture
def descriptors() -> Iterator[int]:
    """As many as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard if hard != resource.RLIM_INFINITY else 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("wanted", [1_000, pytest.param(10_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("port", ["http", "grpc"])
async def test_idle_connections(
    target: Attacked, port: str, wanted: int, descriptors: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who is there is served meanwhile; a newcomer is, at the latest when those that say nothing have been ended."""
    count = min(wanted, descriptors - RESERVED)
    if count < wanted:
        with capsys.disabled():
            print(f"\n{count} connections instead of {wanted}: the limit of open files is {descriptors}")
    host, number = getattr(target, port).rsplit(":", 1)
    opened: list[asyncio.StreamWriter] = []
    before = target.memory.held
    async with target.endures(LITTLE_MB + count * A_CONNECTION_KB // 1_000) as other:
        try:
            for place in range(count):
                _, writer = await asyncio.open_connection(host, int(number))
                writer.write(SAID_AT_MOST[port] if place % 2 else b"")
                opened.append(writer)
            await other.is_served()
            await eventually(lambda: is_let_in(target), within_s=WITHIN_S)
            print(f"{port}: {count} connections, {target.memory.held - before} MiB")
        finally:
            for writer in opened:
                writer.transport.abort()


async def is_let_in(target: Attacked) -> bool:
    """Whether a newcomer is served at both ports."""
    with contextlib.suppress(OSError):  # also that he waits too long
        return (await target.product.http("/v1/fleet/summary")).status == 200 and await target.product.serves("gateway")
    return False


async def cancelled(connection: Connection, head: bytes, body: bytes, count: int) -> int:
    """Opens and cancels so many streams as fast as it can; how many there were when the server closed."""
    for number in range(count):
        stream = connection.stream()
        connection.send(HEADERS, END_HEADERS | (0 if body else END_STREAM), stream, head)
        if body:
            connection.send(DATA, END_STREAM, stream, body)
        connection.send(RST_STREAM, 0, stream, CANCEL)
        try:
            await connection.writer.drain()
        except ConnectionError:
            return number
        if number % 100 == 0:
            await asyncio.sleep(0)
    return count


async def heard(connection: Connection) -> None:
    """Reads until the connection is closed."""
    while await connection.receive() is not None:
        pass


@contextlib.asynccontextmanager
async def listening(connection: Connection) -> AsyncIterator["asyncio.Task[None]"]:
    """Somebody reads what comes."""
    reading = asyncio.create_task(heard(connection))
    try:
        yield reading
    finally:
        reading.cancel()
        await asyncio.wait({reading})


async def test_http_streams_that_are_cancelled_at_once_close_the_connection(target: Attacked) -> None:
    head = block(request(target.http, "/v1/servers"))
    async with (
        target.endures(LITTLE_MB),
        await Connection.open(target.http) as connection,
        listening(connection) as reading,
    ):
        await cancelled(connection, head, b"", 20_000)
        async with asyncio.timeout(WITHIN_S):
            await reading


@pytest.mark.parametrize("method", [GET_SERVER, WATCH_FLEET, CHECK_HEALTH, WATCH_HEALTH, SET_UP])
async def test_grpc_calls_that_are_cancelled_at_once(target: Attacked, method: str) -> None:
    head = block(grpc_request(target.grpc, method))
    async with (
        target.endures(LITTLE_MB) as other,
        await Connection.open(target.grpc) as connection,
        listening(connection),
    ):
        await cancelled(connection, head, message(0), 10_000)
        await other.is_served()


@pytest.mark.full
async def test_watchers_that_come_and_go(target: Attacked) -> None:
    """10,000, of whom some hundred are there at a time; each has had his first message."""
    async with target.endures(LITTLE_MB) as other, await Connection.open(target.grpc) as connection:
        for _ in range(100):
            streams = [connection.call(WATCH_FLEET) for _ in range(100)]
            waiting = set(streams)
            for stream in streams:
                connection.send(DATA, END_STREAM, stream, message(0))
            async with asyncio.timeout(WITHIN_S):
                while waiting:
                    got = await connection.receive()
                    assert got is not None and got.kind != GOAWAY
                    assert not (got.stream in waiting and got.flags & END_STREAM), got
                    if got.kind == DATA:
                        waiting.discard(got.stream)
                        connection.send(WINDOW_UPDATE, 0, 0, len(got.payload).to_bytes(4, "big"))
            for stream in streams:
                connection.send(RST_STREAM, 0, stream, CANCEL)
        await other.is_served()


@pytest.mark.parametrize("port", ["http", "grpc"])
@pytest.mark.parametrize("kind", [PING, SETTINGS], ids=["pings", "settings"])
async def test_frames_that_want_an_answer_which_nobody_reads(target: Attacked, port: str, kind: int) -> None:
    many = frame(kind, 0, 0, b"12345678" if kind == PING else b"") * 1_000
    async with target.endures(LITTLE_MB) as other, await Connection.open(getattr(target, port)) as connection:
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
        with contextlib.suppress(ConnectionError, TimeoutError):
            for _ in range(1_000):
                connection.writer.write(many)
                async with asyncio.timeout(0.5):  # then nothing of it is taken any more
                    await connection.writer.drain()
        await other.is_served()


async def deaf(address: str) -> asyncio.StreamWriter:
    """A connection of one who does not read, and whose kernel takes next to nothing for him."""
    host, port = address.rsplit(":", 1)
    reads = socket.socket()
    reads.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    reads.setblocking(False)
    await asyncio.get_running_loop().sock_connect(reads, (host, int(port)))
    _, writer = await asyncio.open_connection(sock=reads)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    return writer


@pytest.mark.full
async def test_readers_who_do_not_read(target: Attacked) -> None:
    """Their next message holds what has changed meanwhile, however much, and is not made before they take it."""
    http = f"GET /v1/fleet/watch?view=FULL HTTP/1.1\r\nHost: {target.http}\r\n\r\n".encode()
    full = message(2, b"\x08\x02")  # view FULL
    window = (1 << 30).to_bytes(4, "big")
    grpc = PREFACE + frame(SETTINGS) + frame(WINDOW_UPDATE, 0, 0, window)
    grpc += frame(HEADERS, END_HEADERS, 1, block(grpc_request(target.grpc, WATCH_FLEET)))
    grpc += frame(WINDOW_UPDATE, 0, 1, window) + frame(DATA, END_STREAM, 1, full)
    writers: list[asyncio.StreamWriter] = []
    async with target.endures(UNREAD_MB, afterwards_mb=LITTLE_MB) as other:
        try:
            for _ in range(READERS):
                for address, words in ((target.http, http), (target.grpc, grpc)):
                    writers.append(await deaf(address))
                    writers[-1].write(words)
            for tick in range(TICKS):
                await target.write(float(tick), SERVERS)
                await eventually(lambda tick=tick: target.shows(float(tick)), within_s=20)
            await other.is_served()
        finally:
            for writer in writers:
                writer.transport.abort()
