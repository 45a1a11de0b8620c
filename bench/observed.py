"""`python -m bench.observed`: the timeseries process as it is, and what its engine says of itself, for long benches.

The engine's status is not on any wire in full, so this process writes it to `STATUS_FILE` every second, and at once on
SIGUSR2, whole or not at all; `seconds` in it is the monotonic time of it and `rests` how often SIGUSR1, which asks the
engine to maintain everything, has been answered. What must stay true: the service runs by its own code and settings;
nothing is changed but the engine's bounds that `ENGINE` names (JSON), and who sets those says so in the report.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from unittest import mock

import orjson

from bench.peers import START_BOUND_S, BenchError, Server, ours
from runtime import tasks
from runtime.clock import Clock
from runtime.process import Process, run_process
from services.timeseries import __main__ as service
from services.timeseries.engine import Engine, EngineSettings
from services.timeseries.settings import TimeSeriesSettings

MODULE: Final = "bench.observed"
STATUS_FILE: Final = "BENCH_STATUS_FILE"
ENGINE: Final = "BENCH_ENGINE"
INTERVAL_S: Final = 1.0
"""A status walks over all heads: four a second took 2.5 % of a core with 20,000 servers."""
REST_BOUND_S: Final = 900.0


class _Observer:
    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine = engine
        self._path = path
        self._wanted = asyncio.Event()
        self._rest_wanted = asyncio.Event()
        self._rests = 0
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self._rest_wanted.set)
        loop.add_signal_handler(signal.SIGUSR2, self._wanted.set)

    async def tell(self) -> None:
        while True:
            await self._write()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), INTERVAL_S)
            self._wanted.clear()

    async def rest(self) -> None:
        while True:
            await self._rest_wanted.wait()
            self._rest_wanted.clear()
            await self._engine.maintain(everything=True)
            self._rests += 1
            await self._write()

    async def _write(self) -> None:
        status = asdict(await self._engine.status()) | {"rests": self._rests, "seconds": time.monotonic()}
        partial = self._path.with_suffix(".partial")
        partial.write_bytes(orjson.dumps(status, default=str))
        partial.replace(self._path)


async def _serve(settings: TimeSeriesSettings, process: Process[TimeSeriesSettings]) -> None:
    opened = Engine.open

    @asynccontextmanager
    async def observed(folder: Path, *, clock: Clock, settings: EngineSettings) -> AsyncIterator[Engine]:
        settings = replace(settings, **orjson.loads(os.environ.get(ENGINE, "{}")))
        async with AsyncExitStack() as stack:
            engine = await stack.enter_async_context(opened(folder, clock=clock, settings=settings))
            observer = _Observer(engine, Path(os.environ[STATUS_FILE]))
            await stack.enter_async_context(tasks.beside("bench-status", observer.tell()))
            await stack.enter_async_context(tasks.beside("bench-rest", observer.rest()))
            yield engine

    with mock.patch.object(Engine, "open", observed):
        await service.serve(settings, process)


@contextmanager
def observed(
    folder: Path,
    *,
    settings: Mapping[str, str] = MappingProxyType({}),
    engine: Mapping[str, float] = MappingProxyType({}),
    start_bound_s: float = START_BOUND_S,
) -> "Iterator[Observed]":
    """A timeseries process that can be watched, with some of the engine's bounds; otherwise as `peers.ours`."""
    path = folder / "engine.json"
    path.unlink(missing_ok=True)
    everything = {**settings, STATUS_FILE: str(path), ENGINE: orjson.dumps(dict(engine)).decode()}
    with ours(folder, module=MODULE, settings=everything, start_bound_s=start_bound_s) as server:
        yield Observed(server, path)


class Observed:
    """A running timeseries process and its engine's words."""

    def __init__(self, server: Server, path: Path) -> None:
        self.server = server
        self.store = server.folder / "timeseries"
        self._path = path

    def status(self) -> dict[str, Any]:
        """What the engine said last; empty before it said anything."""
        try:
            found: dict[str, Any] = orjson.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        return found

    def fresh_status(self, bound_s: float = 60.0) -> dict[str, Any]:
        """What the engine says from now on."""
        asked, ends = time.monotonic(), time.monotonic() + bound_s
        while not self.status():  # its signals are answered from then on
            self._check(ends, "its engine says nothing")
            time.sleep(0.05)
        self.server.process.send_signal(signal.SIGUSR2)
        while (status := self.status()).get("seconds", 0.0) < asked:
            self._check(ends, "its engine says nothing")
            time.sleep(0.05)
        return status

    def rest(self, bound_s: float = REST_BOUND_S) -> bool:
        """Has everything maintained and waits for it; whether that ended within the bound."""
        wanted, ends = (self.status() or self.fresh_status())["rests"] + 1, time.monotonic() + bound_s
        self.server.process.send_signal(signal.SIGUSR1)
        while self.status()["rests"] < wanted:
            if time.monotonic() > ends:
                return False
            self._check(ends + 60, "it does not come to rest")
            time.sleep(0.05)
        return True

    def _check(self, ends: float, what: str) -> None:
        if self.server.process.poll() is not None or time.monotonic() > ends:
            log = (self.server.folder / f"{self.server.name}.log").read_text(errors="replace")
            raise BenchError(f"timeseries: {what}: {log[-2000:]}")


if __name__ == "__main__":
    run_process("timeseries", TimeSeriesSettings, _serve)
