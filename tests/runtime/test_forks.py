"""Programs that a process starts by fork, as PostgreSQL under another user is, while gRPC is busy in it."""

import asyncio
import os
import subprocess
import sys

import pytest

from runtime.process import NO_FORKS
from tests.runtime.conftest import serving
from tests.runtime.echo import Echo, EchoStub

CHILDREN = 150


async def started_amid_calls() -> int:
    """How many of the children did not run their program."""
    failed = 0
    async with serving() as running, running.channel() as channel:
        stub = EchoStub(channel.grpc)

        async def call() -> None:
            while True:
                await stub.Get(Echo())

        calls = [asyncio.create_task(call()) for _ in range(4)]
        for _ in range(CHILDREN):
            child = await asyncio.create_subprocess_exec("/bin/true", user=os.getuid(), stderr=subprocess.DEVNULL)
            failed += await child.wait() != 0
        for task in calls:
            task.cancel()
    return failed


@pytest.mark.skipif(os.getuid() != 0, reason="only root starts programs under another user")
def test_each_child_runs_its_program() -> None:
    code = "import asyncio; from tests.runtime.test_forks import started_amid_calls as s; print(asyncio.run(s()))"
    command, environ = [sys.executable, "-c", code], os.environ | dict([NO_FORKS])
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environ)
    assert done.stdout.strip() == "0", done.stderr[-2000:]


async def test_processes_and_tests_have_it_set() -> None:
    assert os.environ[NO_FORKS[0]] == NO_FORKS[1]
