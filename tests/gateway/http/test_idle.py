"""Connections that do nothing are ended, and no other; the bounds here are short, the ones in use are of minutes."""

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.http import idle
from gateway.http.idle import IdleBounds
from openmanager.gateway.v1 import fleet_pb2
from tests.gateway.http.serving import Served, full_server, read_answer, read_head, serving
from tests.harness import eventually
from tests.harness.http2 import PREFACE

LOOK_S = 0.05
NEVER_S = 3_600.0
SHORT_S = 1.5
STALL_S = 2.5
"""Longer than a busy machine stops between two words of who is to be kept."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="connections are looked at on Linux only")


def bounds(*, first_words_s: float = NEVER_S, quiet_s: float = NEVER_S) -> IdleBounds:
    return IdleBounds(first_words_s=first_words_s, quiet_s=quiet_s, look_every_s=LOOK_S)


async def watching(served: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A reader of events who has had the first one."""
    reader, writer = await served.send("GET", "/v1/fleet/watch")
    served.servicer.ticks.put_nowait(fleet_pb2.WatchFleetResponse(servers=[full_server()]))
    assert (await read_head(reader))[0] == 200
    return reader, writer


@contextlib.asynccontextmanager
async def told_again_and_again(served: Served) -> AsyncIterator[None]:
    """Something happens to the fleet all the time."""

    async def tell() -> None:
        while True:
            served.servicer.ticks.put_nowait(fleet_pb2.WatchFleetResponse(servers=[full_server()]))
            await asyncio.sleep(SHORT_S / 30)

    telling = asyncio.create_task(tell())
    try:
        yield
    finally:
        telling.cancel()


async def ends(reader: asyncio.StreamReader) -> None:
    """Waits until the server has closed a connection."""
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionError):
            while await reader.read(65_536):
                pass


async def test_who_says_nothing_is_let_go_and_others_are_not() -> None:
    async with serving(idle=bounds(first_words_s=SHORT_S)) as served:
        kept_reader, kept = await served.send("GET", "/healthz")
        assert (await read_answer(kept_reader)).status == 200
        event_reader, events = await watching(served)
        silent, mumbling = await served.open(), await served.open()
        mumbling[1].write(PREFACE[:10])
        dripping = await served.open()

        async def drip() -> None:
            for byte in PREFACE[:-1]:
                await asyncio.sleep(SHORT_S / 2)
                dripping[1].write(bytes([byte]))

        drops = asyncio.create_task(drip())
        for reader, _ in (silent, mumbling, dripping):
            await ends(reader)
        assert not drops.done(), "it was ended for being slow, not after its last byte"
        drops.cancel()
        assert served.servicer.running == 1 and not event_reader.at_eof()
        kept.write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert (await read_answer(kept_reader)).status == 200
        for writer in (kept, events, silent[1], mumbling[1], dripping[1]):
            writer.close()


async def test_who_does_not_read_is_let_go_and_who_reads_is_not() -> None:
    async with serving(idle=bounds(quiet_s=STALL_S)) as served, told_again_and_again(served):
        reader, writer = await watching(served)
        reading = asyncio.create_task(ends(reader))
        deaf_reader, deaf = await served.send("GET", "/v1/fleet/watch")
        assert (await read_head(deaf_reader))[0] == 200
        deaf.transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(60):  # more than the buffers on the way take
            served.servicer.ticks.put_nowait(fleet_pb2.WatchFleetResponse(servers=[full_server()] * 20))
        assert served.servicer.running == 2
        await eventually(lambda: served.servicer.running == 1, within_s=30)
        assert not reading.done()
        reading.cancel()
        deaf.transport.abort()
        writer.close()


async def test_who_is_silent_after_the_tls_handshake_is_let_go(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    async with serving(tls_cert_file=cert, tls_key_file=key, idle=bounds(quiet_s=SHORT_S)) as served:
        context = ssl.create_default_context(cafile=str(cert))
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", served.port, ssl=context, server_hostname="localhost"
        )
        await ends(reader)
        writer.close()


def test_looking_at_a_number_that_became_no_socket_leaves_nothing_open() -> None:
    before = len(list(idle._DESCRIPTORS.iterdir()))
    reading, writing = os.pipe()
    for _ in range(3):
        with pytest.raises(OSError), idle._opened_again(reading):
            pass
    os.close(reading)
    os.close(writing)
    assert len(list(idle._DESCRIPTORS.iterdir())) == before
