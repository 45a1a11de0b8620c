"""The proxy that breaks connections must break them as it says, or the tests that use it prove nothing."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from tests.harness.fault_proxy import FaultProxy, fault_proxy


@pytest.fixture
async def proxy() -> AsyncIterator[FaultProxy]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):  # that is what the proxy is for
            while chunk := await reader.read(65_536):
                writer.write(chunk)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, fault_proxy(server.sockets[0].getsockname()[1]) as made:
        yield made


async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes, within_s: float = 20.0) -> bytes:
    writer.write(text)
    async with asyncio.timeout(within_s):
        return await reader.readexactly(len(text))


async def test_passes_on(proxy: FaultProxy) -> None:
    connection = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await say(*connection, b"x" * 300_000) == b"x" * 300_000
    connection[1].write_eof()
    assert await connection[0].read() == b""
    connection[1].close()


async def test_cut_closes_and_refuses_until_restored(proxy: FaultProxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await say(reader, writer, b"hello") == b"hello"
    await proxy.cut()
    assert await reader.read() == b""
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", proxy.port)
    await proxy.restore()
    again = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await say(*again, b"hello") == b"hello"
    writer.close()
    again[1].close()


async def test_reset_resets_and_lets_new_ones_in(proxy: FaultProxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await say(reader, writer, b"hello") == b"hello"
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)
    again = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await say(*again, b"hello") == b"hello"
    writer.close()
    again[1].close()


async def test_half_open_says_nothing_to_old_and_new_connections(proxy: FaultProxy) -> None:
    old = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await say(*old, b"hello") == b"hello"
    proxy.half_open()
    new = await asyncio.open_connection("127.0.0.1", proxy.port)
    for connection in (old, new):
        with pytest.raises(TimeoutError):
            await say(*connection, b"hello", within_s=0.2)
    await proxy.restore()
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await old[0].readexactly(5)
    for connection in (old, new):
        connection[1].close()


async def test_delay_holds_every_chunk_back_but_costs_no_bandwidth(proxy: FaultProxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    proxy.delay_s = 0.2
    started = time.monotonic()
    text = b"x" * 10_000_000
    assert await say(reader, writer, text) == text  # one after the other 153 chunks would take 61 s
    assert time.monotonic() - started >= 0.4  # there and back
    writer.close()


async def test_bandwidth_bounds_what_passes(proxy: FaultProxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    proxy.bandwidth = 1_000_000
    started = time.monotonic()
    assert await say(reader, writer, b"x" * 400_000) == b"x" * 400_000
    assert time.monotonic() - started >= 0.3
    writer.close()
