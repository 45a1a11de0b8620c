"""Keeps processes running: start, watch, restart with back-off, stop.

What must stay true: a process that dies after it was ready is started again, and that is said; one that cannot start
(it exits by itself before it was ready, because a setting is wrong or its address is taken) stops everything with its
own words; stopping is orderly and bounded; no process outlives the launcher, not even when that is killed.
"""

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.logfile import LogFile, summary_of
from runtime.clock import Clock

RESTART_INITIAL_S = 0.5
RESTART_MAX_S = 30.0
HEALTHY_AFTER_S = 30.0
"""A process that ran this long since its last start has recovered: the next back-off begins anew."""
STOP_BOUND_S = 10.0
READY_POLL_S = 0.1
MAX_LAST_LINES = 20

Say = Callable[[str], None]
Ready = Callable[[], Awaitable[bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """One process of the product.

    Attributes:
        name: for people and for the log file.
        module: what ``python -m`` runs.
        ready: tells whether it serves; asked until it does.
        stop_wave: processes of a lower wave are stopped first, so that writers stop before what they write to.
    """

    name: str
    module: str
    ready: Ready
    stop_wave: int


class StartFailedError(Exception):
    """A process ended before it was ever ready; the text is what it said."""


@dataclass(slots=True)
class _Running:
    spec: ProcessSpec
    process: asyncio.subprocess.Process | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_LAST_LINES))


class Supervisor:
    """Runs a set of processes until told to stop."""

    def __init__(
        self, specs: Sequence[ProcessSpec], *, environ: Mapping[str, str], logs: Path, clock: Clock, say: Say
    ) -> None:
        self._running = [_Running(spec) for spec in specs]
        self._environ = {**environ, "OPENMANAGER_PARENT_PID": str(os.getpid())}
        self._logs = logs
        self._clock = clock
        self._say = say
        self._stopping = asyncio.Event()

    async def run(self, when_ready: Callable[[], None]) -> None:
        """Runs until ``stop``; calls ``when_ready`` once, as soon as every process serves.

        Raises:
            StartFailedError: a process could not start; the others are stopped by then.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            async with asyncio.TaskGroup() as group:
                keepers = [
                    group.create_task(self._keep(running), name=f"keep-{running.spec.name}")
                    for running in self._running
                ]
                group.create_task(self._announce(when_ready), name="announce")
                await self._stopping.wait()
                await self._stop_processes()
                for keeper in keepers:
                    keeper.cancel()
        except* StartFailedError as failures:
            await self._stop_processes()
            raise failures.exceptions[0] from None

    def stop(self) -> None:
        """Asks ``run`` to stop everything; asked twice, it kills what is left."""
        if self._stopping.is_set():
            for running in self._running:
                _signal(running.process, signal.SIGKILL)
        self._stopping.set()

    async def _announce(self, when_ready: Callable[[], None]) -> None:
        for running in self._running:
            await running.ready.wait()
        if not self._stopping.is_set():
            when_ready()

    async def _keep(self, running: _Running) -> None:
        name, failures = running.spec.name, 0
        with LogFile(self._logs / f"{name}.log") as log:
            while not self._stopping.is_set():
                started = self._clock.monotonic()
                status = await self._run_once(running, log, again=failures > 0)
                if self._stopping.is_set():
                    return
                if not running.ready.is_set() and status > 0:
                    raise StartFailedError("\n".join(running.last_lines) or f"{name} ended with status {status}")
                if self._clock.monotonic() - started >= HEALTHY_AFTER_S:
                    failures = 0
                delay_s = min(RESTART_MAX_S, RESTART_INITIAL_S * 2**failures)
                failures += 1
                self._say(f"{name} {_how_it_ended(status)}; starting it again in {delay_s:g} s (log: {log.path})")
                await self._clock.sleep(delay_s)

    async def _run_once(self, running: _Running, log: LogFile, *, again: bool) -> int:
        running.last_lines.clear()
        process = running.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            running.spec.module,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environ,
            process_group=0,  # Ctrl-C in the terminal reaches the launcher alone, which stops the others in order
            limit=1 << 20,
        )
        watcher = asyncio.create_task(self._watch_ready(running, again=again), name=f"ready-{running.spec.name}")
        try:
            assert process.stdout is not None
            async for line in _lines(process.stdout):
                log.write(line)
                text = summary_of(line)
                if text:
                    running.last_lines.append(text)
                    if running.ready.is_set() and not self._stopping.is_set():
                        self._say(f"{running.spec.name}: {text}")
            return await process.wait()
        finally:
            watcher.cancel()

    async def _watch_ready(self, running: _Running, *, again: bool) -> None:
        while not await running.spec.ready():
            await self._clock.sleep(READY_POLL_S)
        running.ready.set()
        if again:
            self._say(f"{running.spec.name} is back")

    async def _stop_processes(self) -> None:
        for wave in sorted({running.spec.stop_wave for running in self._running}):
            members = [running.process for running in self._running if running.spec.stop_wave == wave]
            alive = [process for process in members if process is not None and process.returncode is None]
            for process in alive:
                _signal(process, signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_BOUND_S):
                    await asyncio.gather(*(process.wait() for process in alive))
            except TimeoutError:
                for process in alive:
                    _signal(process, signal.SIGKILL)
                await asyncio.gather(*(process.wait() for process in alive))


def _signal(process: asyncio.subprocess.Process | None, number: signal.Signals) -> None:
    if process is not None and process.returncode is None:
        process.send_signal(number)


def _how_it_ended(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        try:
            line = await stream.readuntil()
        except asyncio.IncompleteReadError as rest:
            if rest.partial:
                yield rest.partial
            return
        except asyncio.LimitOverrunError as overrun:  # a line of over 1 MiB: passed on in parts
            line = await stream.readexactly(overrun.consumed)
        yield line
