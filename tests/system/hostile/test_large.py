"""Bodies, messages and headers that are far too large are refused early, as the docs say, and cost no memory."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest

from runtime.channel import Channel
from tests.harness.hostile import Attacked
from tests.harness.http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES,
    GOAWAY,
    HEADERS,
    NEWEST,
    RST_STREAM,
    SETTINGS,
    Connection,
    block,
    grpc_request,
    literal,
    message,
    remembered,
    request,
)

GIB = 1 << 30
MIB = 1 << 20
GET_SERVER = "/openmanager.gateway.v1.FleetService/GetServer"
RESOURCE_EXHAUSTED = b"grpc-status\x018"  # as a header field has it
BODY_MB = 100
"""A body of 16 MiB, which is the most that is read, as pieces and as a whole, and what comes of reading it."""
LITTLE_MB = 60
"""Where nothing has to be kept: what buffers of connections, the allocator and the other client's calls may take."""
FLOOD_MB = 400
"""gRPC reads as fast as it comes and does not end the connection; 64 MiB of it are sent."""
WITHIN_S = 30.0


def answer_to(address: str, head: str, pieces: Iterator[bytes]) -> bytes:
    """What is answered to one who sends on and on. What came before his connection was reset can still be read."""
    host, port = address.rsplit(":", 1)
    text = f"POST /v1/metrics:write HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n{head}\r\n\r\n"
    answer = b""
    with socket.create_connection((host, int(port)), WITHIN_S) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(text.encode())
            for piece in pieces:
                connection.sendall(piece)
        with contextlib.suppress(ConnectionError):
            while received := connection.recv(65_536):
                answer += received
    return answer


def gibibyte(framed: Callable[[bytes], bytes] = bytes) -> Iterator[bytes]:
    piece = framed(b"x" * (64 << 10))
    return (piece for _ in range(GIB >> 16))


@pytest.mark.parametrize(
    ("head", "pieces"),
    [
        (f"Content-Length: {GIB}", gibibyte()),
        ("Transfer-Encoding: chunked", gibibyte(lambda data: b"%x\r\n%b\r\n" % (len(data), data))),
    ],
    ids=["declared", "chunked"],
)
async def test_a_body_of_a_gibibyte_is_too_large(target: Attacked, head: str, pieces: Iterator[bytes]) -> None:
    async with target.endures(BODY_MB):
        answer = await asyncio.to_thread(answer_to, target.http, head, pieces)
        assert answer.startswith(b"HTTP/1.1 413 ") and b"MAX_BODY_BYTES" in answer, answer


async def flood(connection: Connection, kind: int, stream: int, payload: bytes, size: int) -> None:
    """Sends frames of one kind until so many bytes are sent or the server has closed; windows are not minded."""
    with contextlib.suppress(ConnectionError):
        for _ in range(size // max(1, len(payload))):
            connection.send(kind, 0, stream, payload)
            await connection.writer.drain()
            if connection.writer.transport.is_closing():
                return


async def end_of(connection: Connection, stream: int) -> list[bytes]:
    """The header fields that were answered until the stream or the connection was ended."""
    fields: list[bytes] = []
    async with asyncio.timeout(WITHIN_S):
        while (got := await connection.until(HEADERS, RST_STREAM, GOAWAY)) is not None:
            if got.kind == GOAWAY:
                break
            if got.stream == stream:
                fields.append(got.payload)
                if got.kind == RST_STREAM or got.flags & END_STREAM:
                    break
    return fields


async def greeted(address: str) -> Connection:
    """A connection whose settings both sides have taken, so that nothing of them comes between frames."""
    connection = await Connection.open(address)
    async with asyncio.timeout(WITHIN_S):
        await connection.until(SETTINGS)
    await connection.writer.drain()
    return connection


async def test_a_message_that_says_it_has_a_gibibyte_is_refused_before_it_comes(target: Attacked) -> None:
    async with target.endures(LITTLE_MB), await greeted(target.grpc) as connection:
        stream = connection.call(GET_SERVER)
        connection.send(DATA, 0, stream, message(GIB))
        fields = b"".join(await end_of(connection, stream))
        assert RESOURCE_EXHAUSTED in fields and b"Received message larger than max" in fields, fields


async def test_who_minds_no_window_has_his_stream_ended(target: Attacked) -> None:
    async with target.endures(LITTLE_MB), await greeted(target.grpc) as connection:
        stream = connection.call(GET_SERVER)
        connection.send(DATA, 0, stream, message(16 * MIB))
        sending = asyncio.create_task(flood(connection, DATA, stream, b"x" * FRAME_BYTES, 64 * MIB))
        async with asyncio.timeout(WITHIN_S):
            ended = await connection.until(RST_STREAM, stream=stream)
        assert ended is not None
        sending.cancel()


@pytest.mark.parametrize("size", [64 * MIB, pytest.param(GIB, marks=pytest.mark.full)], ids=["64 MiB", "1 GiB"])
async def test_a_stream_of_a_gibibyte_is_taken_piece_by_piece(target: Attacked, size: int) -> None:
    """Each message is one: of fields that are unknown here."""
    piece = b"x" * MIB
    async with target.endures(LITTLE_MB), Channel(target.grpc) as channel:
        call = channel.grpc.stream_stream("/openmanager.gateway.v1.IngestService/WriteMetrics")()
        for _ in range(size // MIB):
            await call.write(piece)
            assert await call.read() == b""
        call.cancel()


@pytest.mark.parametrize(
    "head",
    [f"X-Large: {'x' * MIB}", "\r\n".join(f"X-{number}: y" for number in range(10_000))],
    ids=["one of 1 MiB", "10,000"],
)
async def test_too_many_bytes_of_headers_are_431(target: Attacked, head: str) -> None:
    async with target.endures(LITTLE_MB):
        answer = await asyncio.to_thread(answer_to, target.http, head, iter(()))
        assert answer.startswith(b"HTTP/1.1 431 "), answer


def bomb(pairs: list[tuple[str, str]]) -> list[bytes]:
    """Blocks of 256 KiB that stand for a gibibyte of headers: one of 4 kB, which the table remembers, many times."""
    return [block(pairs) + remembered("x-large", "x" * 3_900), *([NEWEST * FRAME_BYTES] * 16)]


async def send_blocks(connection: Connection, stream: int, blocks: list[bytes]) -> None:
    with contextlib.suppress(ConnectionError):
        connection.send(HEADERS, 0, stream, blocks[0])
        for one in blocks[1:]:
            connection.send(CONTINUATION, 0, stream, one)
        connection.send(CONTINUATION, END_HEADERS, stream)
        await connection.writer.drain()


async def test_a_bomb_of_compressed_headers_closes_the_connection(target: Attacked) -> None:
    async with target.endures(LITTLE_MB), await greeted(target.http) as connection:
        stream = connection.stream()
        await send_blocks(connection, stream, bomb(request(target.http, "/v1/servers")))
        assert await end_of(connection, stream) == [], "no answer"


async def test_a_bomb_of_compressed_metadata_is_refused(target: Attacked) -> None:
    async with target.endures(LITTLE_MB), await greeted(target.grpc) as connection:
        stream = connection.stream()
        await send_blocks(connection, stream, bomb(grpc_request(target.grpc, GET_SERVER)))
        fields = b"".join(await end_of(connection, stream))
        assert RESOURCE_EXHAUSTED in fields and b"received metadata size exceeds hard limit" in fields, fields


async def test_endless_headers_close_the_connection(target: Attacked) -> None:
    async with target.endures(LITTLE_MB), await greeted(target.http) as connection:
        stream = connection.stream()
        connection.send(HEADERS, 0, stream, block(request(target.http, "/v1/servers")))
        await flood(connection, CONTINUATION, stream, literal("x", "y" * 1_000) * 16, 64 * MIB)
        assert await end_of(connection, stream) == [], "no answer"


async def test_endless_metadata_is_refused(target: Attacked) -> None:
    async with target.endures(FLOOD_MB), await greeted(target.grpc) as connection:
        stream = connection.stream()
        connection.send(HEADERS, 0, stream, block(grpc_request(target.grpc, GET_SERVER)))
        sending = asyncio.create_task(flood(connection, CONTINUATION, stream, literal("x", "y" * 1_000) * 16, 64 * MIB))
        fields = b"".join(await end_of(connection, stream))
        assert RESOURCE_EXHAUSTED in fields and b"received metadata size exceeds hard limit" in fields, fields
        await sending
