"""A real redis-server that a test may kill and start again.

Found on the PATH (Debian's package redis-server). Where it is missing the test is skipped, visibly, and in CI fails.
It keeps nothing on disk, so that a killed one comes back empty, which is the harder case for whoever follows it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tests.harness import eventually, free_port

START_BOUND_S: Final = 30.0
PORT_ATTEMPTS: Final = 3


class RedisServer:
    """One server on one port of 127.0.0.1."""

    def __init__(self, program: str, folder: Path, options: tuple[str, ...] = ()) -> None:
        self._program = program
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def client(self) -> Redis:
        """A client of the driver's own, to look at what is really there. Close it."""
        return Redis(port=self.port, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=10.0)

    async def start(self) -> None:
        """Starts the server, on the same port as before when there was one, and returns once it answers."""
        again = self.port != 0
        for _ in range(PORT_ATTEMPTS):
            self.port = self.port if again else free_port()
            self._launch()
            if await self._answers():
                return
            self.end()
        raise AssertionError(f"redis-server did not start: {(self._folder / 'redis.log').read_text()[-1000:]}")

    def pause(self) -> None:
        """SIGSTOP: connections stay, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Goes on after `pause`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL: connections are reset and everything is lost."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def end(self) -> None:
        """Kills the server if it runs."""
        if self._process is not None:
            self.kill()

    def _launch(self) -> None:
        command = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        command += ["--dir", str(self._folder), "--logfile", str(self._folder / "redis.log"), *self._options]
        self._start(command)

    def _start(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    async def _answers(self) -> bool:
        async def ping() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                return True
            async with self.client() as client:
                try:
                    return bool(await client.ping())
                except RedisError as error:
                    raise AssertionError(str(error)) from error

        await eventually(ping, within_s=START_BOUND_S)
        return self._process is not None and self._process.poll() is None


def found_program() -> str:
    """Where redis-server is; without it the test is skipped, and in CI fails."""
    program = shutil.which("redis-server")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("redis-server is not installed, and CI may not skip")
        pytest.skip("redis-server is not installed (Debian: redis-server)")
    return program


@contextlib.asynccontextmanager
async def redis_server(*options: str) -> AsyncIterator[RedisServer]:
    """A running server with extra options of its command line, ended with the block."""
    program = found_program()
    with tempfile.TemporaryDirectory(prefix="openmanager-redis-") as folder:
        server = RedisServer(program, Path(folder), options)
        await server.start()
        try:
            yield server
        finally:
            server.end()
