"""The `openmanager` command as a shell calls it: with its output in a pipe, or on a terminal."""

import asyncio
import contextlib
import errno
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Self

from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from tests.harness.product import ROOT

COMMAND = [sys.executable, "-m", "client"]
WITHIN_S = 30.0


def environment(address: str | None, **more: str) -> dict[str, str]:
    """A shell's environment: ours, but nothing of OpenManager's except what is given."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    kept |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "TERM": "xterm", "PYTHONUTF8": "1"}
    return kept | ({} if address is None else {"OPENMANAGER_ADDRESS": address}) | more


def called(
    address: str | None, *arguments: str, stdin: str | bytes = b"", environ: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """The command with pipes for its input and output."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        env=environment(address, **(environ or {})),
        capture_output=True,
        timeout=60,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


class OnTerminal:
    """The command on a terminal of its own; `shown` is all that was written to it."""

    def __init__(
        self,
        address: str,
        *arguments: str,
        columns: int = 100,
        lines: int = 30,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(address, **(environ or {})),
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WITHIN_S)
        os.close(self._ours)

    def until(self, condition: Callable[[str], object]) -> str:
        """Reads until what is shown satisfies a condition."""
        ends = time.monotonic() + WITHIN_S
        while not condition(self.shown):
            assert self._read(ends), f"not within {WITHIN_S} s, or it ended: {self.shown[-2_000:]!r}"
        return self.shown

    def ended(self) -> int:
        """Reads to the end; returns the exit status."""
        ends = time.monotonic() + WITHIN_S
        while self._read(ends):
            pass
        return self.process.wait(WITHIN_S)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def resize(self, *, columns: int, lines: int) -> None:
        """Another size of the window."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def _read(self, ends: float) -> bool:
        ready, _, _ = select.select([self._ours], [], [], max(ends - time.monotonic(), 0))
        if not ready:
            return False
        try:
            read = os.read(self._ours, 65_536)
        except OSError as error:  # what Linux says when the other end is closed
            assert error.errno == errno.EIO
            return False
        self.shown += read.decode()
        return bool(read)


class Running:
    """The command with pipes, while it runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.out = ""
        self.err = ""

    async def _collect(self) -> None:
        await asyncio.gather(self._follow("out", self.process.stdout), self._follow("err", self.process.stderr))

    async def _follow(self, name: str, stream: asyncio.StreamReader | None) -> None:
        assert stream is not None
        while read := await stream.read(65_536):
            setattr(self, name, getattr(self, name) + read.decode())


@contextlib.asynccontextmanager
async def running(address: str, *arguments: str, stdin: int = subprocess.DEVNULL) -> AsyncIterator[Running]:
    """Starts the command; what it writes grows in `out` and `err`."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(address),
    )
    run = Running(process)
    collecting = asyncio.create_task(run._collect())
    try:
        yield run
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await collecting


@contextlib.asynccontextmanager
async def serving(fake: object) -> AsyncIterator[str]:
    """The address of a gateway whose `AnalyticsService` is a test's."""
    server = GrpcServer([bind("openmanager.gateway.v1.AnalyticsService", fake)], Interception())
    address = await server.start("127.0.0.1:0")
    try:
        yield address
    finally:
        await server.stop(0)
