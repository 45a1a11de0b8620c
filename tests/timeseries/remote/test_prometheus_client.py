"""Asking a store's nodes: a request ends within its bound, whatever a node does."""

import asyncio

import pytest

from runtime.errors import Unavailable
from services.timeseries.prometheus.client import Nodes

HEADS = {
    "head": b"HTTP/1.1 200 OK\r\nX-Slow: ",
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n",
    "endless": b"HTTP/1.1 200 OK\r\n\r\n",
}


@pytest.mark.parametrize("where", HEADS)
async def test_a_node_that_drips_is_not_listened_to_for_longer_than_one_that_is_silent(where: str) -> None:
    left = asyncio.Event()

    async def drip(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await stream.readuntil(b"\r\n\r\n")
            writer.write(HEADS[where])
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.05)
        except ConnectionError:
            writer.close()
            left.set()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        nodes = Nodes([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"])
        asked = asyncio.to_thread(nodes.request, "GET", timeout_s=0.5)
        with pytest.raises(Unavailable, match="does not answer"):
            await asyncio.wait_for(asked, 15.0)
        await asyncio.wait_for(left.wait(), 15.0)
        nodes.close()


async def test_a_node_that_says_nothing_is_not_said_to_have_hung_up() -> None:
    async def say_nothing(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stream.read()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        nodes = Nodes([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"])
        for _ in range(5):  # who shuts the connection first, its time-out or the watch, is chance
            with pytest.raises(Unavailable, match=r"does not answer: .*(timed out|in time)"):
                await asyncio.to_thread(nodes.request, "GET", timeout_s=0.2)
        nodes.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfive!",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfive!\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nfive!",
    ],
)
async def test_an_answer_that_was_cut_off_is_none(answer: bytes) -> None:
    async def cut(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stream.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(cut, "127.0.0.1", 0) as server:
        nodes = Nodes([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"])
        with pytest.raises(Unavailable, match="does not answer"):
            await asyncio.to_thread(nodes.request, "GET", timeout_s=5.0)
        nodes.close()
