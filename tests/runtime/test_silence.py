"""Connections on which less is said than must be are closed by the server; the bounds here are short ones."""

import asyncio
import re

import pytest

from runtime import limits
from runtime.channel import Channel, calling
from runtime.errors import Unavailable
from tests.harness.http2 import ACK, GOAWAY, PING, PREFACE, SETTINGS, Connection, frame
from tests.runtime.conftest import serving
from tests.runtime.echo import Echo, EchoStub

HANDSHAKE_MS, KEEPALIVE_MS, ANSWER_MS = 700, 1_000, 500
PATIENT_MS = 60_000
"""Of the bounds that a test does not overstep on purpose: a machine that stalls must not, either."""
WITHIN_S = 20.0


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_MS", PATIENT_MS)
    monkeypatch.setattr(limits, "KEEPALIVE_TIME_MS", KEEPALIVE_MS)
    monkeypatch.setattr(limits, "KEEPALIVE_TIMEOUT_MS", PATIENT_MS)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handshakes have little time."""
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_MS", HANDSHAKE_MS)


async def connected(address: str) -> Connection:
    host, port = address.rsplit(":", 1)
    return Connection(*await asyncio.open_connection(host, int(port)), address)


async def closed(connection: Connection) -> str:
    """Waits until the server closes it; what it said, frames and all."""
    async with asyncio.timeout(WITHIN_S):
        return (await connection.reader.read()).decode("latin-1")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "words", [b"", PREFACE[:10], PREFACE, PREFACE + frame(SETTINGS)], ids=["none", "a part", "preface", "settings"]
)
async def test_who_does_not_finish_the_handshake_is_let_go(words: bytes) -> None:
    async with serving() as running, await connected(running.address) as connection:
        connection.writer.write(words)
        assert re.search("settings_timeout|handshake timeout", await closed(connection))


@pytest.mark.usefixtures("hasty")
async def test_who_drips_is_let_go_before_the_last_drop() -> None:
    async with serving() as running, await connected(running.address) as connection:

        async def drip() -> None:
            for byte in PREFACE:
                connection.writer.write(bytes([byte]))
                await asyncio.sleep(HANDSHAKE_MS / 2_000)

        drops = asyncio.create_task(drip())
        await closed(connection)
        assert not drops.done()
        drops.cancel()


async def test_who_stops_in_the_middle_of_a_frame_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """His answers to pings do not come any more."""
    monkeypatch.setattr(limits, "KEEPALIVE_TIMEOUT_MS", ANSWER_MS)
    async with serving() as running, await Connection.open(running.address) as connection:
        assert await connection.until(SETTINGS) is not None  # and acknowledges ours
        connection.writer.write(frame(SETTINGS)[:5])
        assert "ping_timeout" in await closed(connection), "as gRPC says it"


async def test_who_answers_pings_is_not() -> None:
    async with serving() as running, running.channel() as channel, await Connection.open(running.address) as connection:
        pings = 0
        while pings < 3:  # the next one comes when the one before was answered
            async with asyncio.timeout(WITHIN_S):
                got = await connection.receive()
            assert got is not None and got.kind != GOAWAY
            pings += got.kind == PING
        assert (await EchoStub(channel.grpc).Get(Echo(text="x"))).text == "x"


async def test_a_server_that_answers_no_pings_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.channel.KEEPALIVE_TIME_MS", KEEPALIVE_MS)
    monkeypatch.setattr("runtime.channel.KEEPALIVE_TIMEOUT_MS", ANSWER_MS)

    async def greet_and_fall_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(SETTINGS) + frame(SETTINGS, ACK))
        while await reader.read(65_536):
            pass
        writer.close()

    async with await asyncio.start_server(greet_and_fall_silent, "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        async with Channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(WITHIN_S):
            with pytest.raises(Unavailable):
                async with calling("the silent one"):
                    _ = [answer async for answer in EchoStub(channel.grpc).Watch(Echo())]
