"""Requests on their way from granian to the application, on the real server."""

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from gateway.http.app import HttpApp
from gateway.http.replies import Event, Receive, Scope, Send
from gateway.http.server import serve_http
from tests.gateway.http.serving import read_answer


class Played:
    """Answers /quick at once, /broken-quick and /broken not at all, all else in a task."""

    in_flight = 0

    def __init__(self) -> None:
        self.called: list[str] = []
        self.root: object = None

    def at_once(self, scope: Scope) -> tuple[Event, Event] | None:
        if scope["path"] == "/broken-quick":
            raise RuntimeError("nobody is to read this")
        return _events(b"quick") if scope["path"] == "/quick" else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.called.append(scope["path"])
        self.root = scope["root_path"]
        assert asyncio.current_task() is not None
        if scope["path"] == "/broken":
            raise RuntimeError("nobody is to read this")
        if scope["path"] == "/cancelled":
            raise asyncio.CancelledError
        body = (await receive())["body"]
        for event in _events(b"slow " + body):
            await send(event)

    def begin_drain(self) -> None:
        pass

    def cut_off(self) -> None:
        pass


def _events(body: bytes) -> tuple[Event, Event]:
    headers = [(b"content-length", b"%d" % len(body))]
    return (
        {"type": "http.response.start", "status": 200, "headers": headers},
        {"type": "http.response.body", "body": body},
    )


class Connection:
    """One, on which requests follow each other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def ask(self, path: str, body: bytes = b"") -> tuple[int, bytes]:
        self.writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        answer = await asyncio.wait_for(read_answer(self._reader), 30)
        return answer.status, answer.body


@contextlib.asynccontextmanager
async def connected(app: Played) -> AsyncGenerator[Connection, None]:
    stopping = asyncio.Event()
    bound: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(
        serve_http(cast("HttpApp", app), "127.0.0.1:0", stopping, bound=bound.set_result), name="server"
    )
    try:
        connection = Connection(*await asyncio.open_connection("127.0.0.1", int((await bound).rpartition(":")[2])))
        yield connection
        connection.writer.close()
    finally:
        stopping.set()
        await serving


async def test_what_is_known_at_once_needs_no_call() -> None:
    app = Played()
    async with connected(app) as connection:
        for _ in range(3):
            assert await connection.ask("/quick", b"a body that nobody reads") == (200, b"quick")
        assert app.called == []
        assert await connection.ask("/other", b"body") == (200, b"slow body")
    assert app.called == ["/other"] and app.root == ""


@pytest.mark.parametrize("path", ["/broken-quick", "/broken", "/cancelled"])
async def test_whoever_asks_for_what_fails_is_answered_and_it_is_logged(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(Played()) as connection:
        status, body = await connection.ask(path)
        assert status == 500 and b"nobody" not in body
        assert await connection.ask("/quick") == (200, b"quick")
    (logged,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "Application callable raised an exception" in logged


async def test_who_leaves_before_the_answer_harms_nobody() -> None:
    app = Played()
    async with connected(app) as connection:
        where = connection.writer.get_extra_info("peername")
        for _ in range(20):
            with socket.create_connection(where) as leaving:
                leaving.sendall(b"GET /quick HTTP/1.1\r\nhost: x\r\n\r\n")
        assert await connection.ask("/quick") == (200, b"quick")


@pytest.mark.parametrize("path", ["/quick", "/other"])
async def test_nothing_is_left_of_a_request(path: str) -> None:
    async with connected(Played()) as connection:
        await connection.ask(path)
        before = _handles()
        for _ in range(200):
            await connection.ask(path)
        assert _handles() < before + 100, "granian does not free what it is given for having told of a request"


def _handles() -> int:
    gc.collect()
    found: list[Any] = gc.get_objects()
    return sum(type(one).__name__ == "Handle" for one in found)
