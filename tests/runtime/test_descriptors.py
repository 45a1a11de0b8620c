"""Files and connections: the limit is lifted, and strangers' connections do not take all of it."""

import asyncio
import json
import resource
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from runtime import descriptors
from tests.harness import eventually
from tests.harness.http2 import Connection
from tests.runtime.conftest import serving
from tests.runtime.echo import Echo, EchoStub

ROOT = Path(__file__).resolve().parents[2]
MOST = 5
PROGRAM = """
import json, logging, resource, sys
from runtime import descriptors
logging.basicConfig(level="INFO", stream=sys.stderr)
descriptors.allow_many()
print(json.dumps([resource.getrlimit(resource.RLIMIT_NOFILE)[0], descriptors.max_connections()]))
"""


def lifted(soft: int, hard: int) -> tuple[int, int, str]:
    """In a process of these limits, the new soft one, how many connections that makes, and what it says."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )
    limit, connections = json.loads(done.stdout)
    return limit, connections, done.stderr


def test_the_limit_is_lifted_as_far_as_allowed_and_shared() -> None:
    assert lifted(256, 4_256) == (4_256, 2_000, "")
    limit, connections, said = lifted(512, 1_024)
    assert (limit, connections) == (1_024, 384)
    assert "at most 384 connections can be open at once: raise the limit of open files" in said
    assert lifted(100, 100)[1] == 1


async def test_more_connections_than_that_are_refused_and_the_others_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(descriptors, "max_connections", lambda: MOST)
    async with serving() as running, running.channel() as channel, AsyncExitStack() as stack:
        stub = EchoStub(channel.grpc)
        assert (await stub.Get(Echo(text="before"))).text == "before"
        opened = [await stack.enter_async_context(await Connection.open(running.address)) for _ in range(2 * MOST)]
        async with asyncio.timeout(10):
            greetings = [await connection.receive() for connection in opened]
        assert [greeting is not None for greeting in greetings] == [True] * (MOST - 1) + [False] * (MOST + 1)
        assert (await stub.Get(Echo(text="meanwhile"))).text == "meanwhile"
        await stack.aclose()
        await eventually(lambda: is_greeted(running.address))


async def is_greeted(address: str) -> bool:
    async with await Connection.open(address) as connection, asyncio.timeout(10):
        return await connection.receive() is not None
