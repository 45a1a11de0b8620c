"""A start that is cut off half-way, as when another server of the process cannot have its address."""

import asyncio
import contextlib
import gc
import logging
import socket

import pytest

from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from tests.harness import eventually, free_port
from tests.runtime.echo import SERVICE, EchoServicer

MOST_STEPS = 12
"""Of the event loop; a start takes about half as many."""


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def cut_off(server: GrpcServer, port: int, steps: int) -> bool:
    """Starts a server and cuts it off so many steps later; whether that was in time."""
    starting = asyncio.create_task(server.start(f"127.0.0.1:{port}"))
    for _ in range(steps):
        await asyncio.sleep(0)
    if starting.done():
        await server.stop(0)
        return False
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    return True


async def test_it_leaves_no_open_port_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The loop's exceptions fail the test by themselves: see tests/conftest.py."""
    in_time = 0
    for steps in range(MOST_STEPS):
        port, server = free_port(), GrpcServer([bind(SERVICE, EchoServicer())], Interception())
        in_time += await cut_off(server, port, steps)
        await eventually(lambda port=port: not listens(port))
        gc.collect()  # what nobody awaited is told then
        await asyncio.sleep(0)
    assert 2 < in_time < MOST_STEPS, "the moments that matter were not all tried"
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
