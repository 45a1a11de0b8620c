"""Keeps processes running: start, watch, restart with back-off, stop.

What must stay true: a process that dies after it was ready is started again, as soon as the system lets us, and that is
said; one that cannot start (it exits by itself before it was ready, because a setting is wrong or its address is taken)
stops everything with its own words; stopping is orderly and bounded; no process outlives the launcher, not even when
that is killed; a log that cannot be written (a full disk) stops nobody.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from launcher.logfile import LogFile, is_of_set_up, summary_of
from runtime import notify
from runtime.clock import Clock
from runtime.notifications import NotifySocket

RESTART_INITIAL_S = 0.5
RESTART_MAX_S = 30.0
HEALTHY_AFTER_S = 30.0
"""A process that ran this long since its last start has recovered: the next back-off begins anew."""
STOP_BOUND_S = 10.0
REPEAT_AFTER_S = 60.0
"""The terminal shows a line, whatever its numbers, once in this time."""
MAX_SHOWN = 100
MAX_LAST_LINES = 20
MAX_LINE_BYTES = 1 << 20

SETTLE_BOUND_S = 5.0
"""When a process cannot start, how long the others may take to tell whether they can, so that all faults are shown."""

_NUMBERS = re.compile(r"\b[0-9a-f]*[0-9][0-9a-f]*\b")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """One process of the product.

    Attributes:
        name: for people and for the log file.
        module: what ``python -m`` runs.
        stop_wave: processes of a lower wave are stopped first, so that writers stop before what they write to.
    """

    name: str
    module: str
    stop_wave: int


class StartFailedError(Exception):
    """A process ended before it was ever ready; the text is what it said."""


@dataclass(slots=True)
class _Running:
    spec: ProcessSpec
    process: asyncio.subprocess.Process | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    failure: str = ""
    shown: dict[str, float] = field(default_factory=dict)
    of_set_up: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_LAST_LINES))
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
        self._said_of_set_up: set[str] = set()
        self._stopping = asyncio.Event()

    async def run(self, when_ready: Callable[[], None]) -> None:
        """Runs until ``stop``; calls ``when_ready`` once, as soon as every process serves.

        Raises:
            StartFailedError: processes could not start; all are stopped by then.
        """
        with contextlib.ExitStack() as stack:
            try:
                for folder in (self._logs.parent, self._logs):  # DATA_DIR as the processes make it
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                logs = [stack.enter_context(LogFile(self._logs / f"{one.spec.name}.log")) for one in self._running]
            except OSError as error:
                name = error.filename or self._logs
                raise StartFailedError(f"cannot use {name}: {error.strerror} (set DATA_DIR)") from error
            await self._run(when_ready, logs)

    async def _run(self, when_ready: Callable[[], None], logs: Sequence[LogFile]) -> None:
        async with asyncio.TaskGroup() as group:
            keepers = [
                group.create_task(self._keep(running, log), name=f"keep-{running.spec.name}")
                for running, log in zip(self._running, logs, strict=True)
            ]
            start = group.create_task(self._started(when_ready), name="start")
            stop = group.create_task(self._stopping.wait(), name="stop")
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            failures = start.result() if start.done() else []
            if not failures:
                await stop
            self._stopping.set()
            await self._stop_processes()
            for task in (*keepers, start):
                task.cancel()
        if failures:
            raise StartFailedError("\n".join(failures))

    def stop(self) -> None:
        """Asks ``run`` to stop everything; asked twice, it kills what is left."""
        if self._stopping.is_set():
            for running in self._running:
                _kill(running.process)
        self._stopping.set()

    async def _started(self, when_ready: Callable[[], None]) -> list[str]:
        """Waits until every process is ready; returns what those said that could not start."""
        waiting = [asyncio.create_task(running.settled.wait()) for running in self._running]
        try:
            for settled in asyncio.as_completed(waiting):
                await settled
                if any(running.failure for running in self._running):
                    await asyncio.wait(waiting, timeout=SETTLE_BOUND_S)
                    return list(dict.fromkeys(running.failure for running in self._running if running.failure))
        finally:
            for task in waiting:
                task.cancel()
        when_ready()
        return []

    async def _keep(self, running: _Running, log: LogFile) -> None:
        name, failures = running.spec.name, 0
        while not self._stopping.is_set():
            started = self._clock.monotonic()
            try:
                status = await self._run_once(running, log, again=failures > 0)
                ended = _how_it_ended(status)
            except OSError as error:  # no memory or no process left for another program: there may be again
                status, ended = 1, f"cannot be started: {error.strerror or error}"
                running.last_lines.append(f"{name} {ended}")
            if self._stopping.is_set():
                return
            if not running.settled.is_set() and status > 0:
                running.failure = "\n".join(running.last_lines) or f"{name} ended with status {status}"
                running.settled.set()
                return
            if self._clock.monotonic() - started >= HEALTHY_AFTER_S:
                failures = 0
            delay_s = min(RESTART_MAX_S, RESTART_INITIAL_S * 2**failures)
            failures += 1
            self._say(f"{name} {ended}; starting it again in {delay_s:g} s (log: {log.path})")
            await self._clock.sleep(delay_s)

    async def _run_once(self, running: _Running, log: LogFile, *, again: bool) -> int:
        running.last_lines.clear()
        running.ready.clear()
        with NotifySocket() as notifications:
            process = running.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                running.spec.module,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=self._environ | {notify.VARIABLE: notifications.address},
                process_group=0,  # Ctrl-C in the terminal reaches the launcher alone, which stops the others in order
                limit=MAX_LINE_BYTES,
            )
            watcher = asyncio.create_task(self._watch_ready(running, notifications, again=again))
            try:
                await self._read(running, process, log)
                return await process.wait()
            finally:
                watcher.cancel()

    async def _read(self, running: _Running, process: asyncio.subprocess.Process, log: LogFile) -> None:
        assert process.stdout is not None
        async for line in _lines(process.stdout):
            try:
                log.write(line)
            except OSError as error:
                self._tell_news(running, f"error: {log.path} lacks lines: {error.strerror}")
            text = summary_of(line)
            if text:
                running.last_lines.append(text)
                if running.settled.is_set():
                    if not self._stopping.is_set():
                        self._tell_news(running, text)
                elif is_of_set_up(line):
                    running.of_set_up.append(text)

    def _tell_news(self, running: _Running, text: str) -> None:
        if self._is_news(running, text):
            self._say(f"{running.spec.name}: {text}")

    def _is_news(self, running: _Running, text: str) -> bool:
        """Whether the terminal has not shown the like of it lately; the log file has every line."""
        now_s = self._clock.monotonic()
        kind = _NUMBERS.sub("#", text)
        shown_s = running.shown.get(kind, -REPEAT_AFTER_S)
        if now_s < shown_s + REPEAT_AFTER_S:
            return False
        if len(running.shown) >= MAX_SHOWN:
            running.shown.clear()
        running.shown[kind] = now_s
        return True

    async def _watch_ready(self, running: _Running, notifications: NotifySocket, *, again: bool) -> None:
        while notify.READY not in await notifications.receive():
            pass
        running.ready.set()
        if not running.settled.is_set():
            running.settled.set()
            self._tell_of_set_up(running)
        if again:
            self._say(f"{running.spec.name} is back")

    def _tell_of_set_up(self, running: _Running) -> None:
        """Such as a setting that a process does not know; what several say is said once."""
        for text in running.of_set_up:
            if text not in self._said_of_set_up:
                self._said_of_set_up.add(text)
                self._tell_news(running, text)

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
                    _kill(process)
                await asyncio.gather(*(process.wait() for process in alive))


def _signal(process: asyncio.subprocess.Process | None, number: signal.Signals) -> None:
    if process is not None and process.returncode is None:
        process.send_signal(number)


def _kill(process: asyncio.subprocess.Process | None) -> None:
    """At once, with all that it started: metadata's PostgreSQL would go on."""
    if process is None or process.returncode is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(process.pid)
        for one in (leader, *leader.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    known = {number.value: number.name for number in signal.Signals}  # of the real-time ones only the ends
    return f"was killed by {known.get(-status, f'signal {-status}')}"


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
