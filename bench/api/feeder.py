"""A process that writes ticks of the default fleet while something else is measured.

`through` a gateway: as agents do, by IngestService. `stores`: as the simulator does, by FleetWriter, past the gateway,
which then only hears of it from the cache.
"""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final

import grpc
import numpy as np

from bench.api.child import child
from bench.api.product import BEARER, CHANNEL_OPTIONS, Gateway, Inner, tick_request
from bench.load import SERVERS, Mix
from bench.peers import BenchError
from fleet.model import Rows, WriteBatch
from fleet.writer import FleetWriter
from openmanager.gateway.v1 import ingest_pb2_grpc
from runtime.channel import Channel
from runtime.clock import SystemClock

START_BOUND_S: Final = 30.0
END_BOUND_S: Final = 30.0
LEAST_SHARE: Final = 0.75
"""Of the ticks that were due; with fewer the load was not what it is said to be."""


@dataclass(slots=True)
class Fed:
    """What was acknowledged, complete once the block is left: ticks, and milliseconds of each."""

    due: int = 0
    acknowledged_ms: list[float] = field(default_factory=list)


@contextmanager
def feeding(to: Gateway | Inner, *, every_s: float) -> Iterator[Fed]:
    """Writes a tick at once, then one every so often; the block runs once the first is acknowledged.

    Raises:
        BenchError: at the end, when a tick was refused or most came too late.
    """
    fed = Fed()
    if isinstance(to, Gateway):
        work, arguments = _through_gateway, (to.address, every_s)
    else:
        targets = {name: service.address for name, service in to.services.items()}
        work, arguments = _past_gateway, (targets, to.secret, every_s)  # type: ignore[assignment]
    with child(work, *arguments) as feeder:
        feeder.hear(START_BOUND_S)
        yield fed
        feeder.tell("end")
        found: Fed = feeder.hear(END_BOUND_S)
    fed.due, fed.acknowledged_ms = found.due, found.acknowledged_ms
    if len(fed.acknowledged_ms) < LEAST_SHARE * fed.due:
        raise BenchError(f"{len(fed.acknowledged_ms)} of {fed.due} ticks were taken in their time")


class _Ticks:
    """Their times by the wall clock, until the parent says so or is gone."""

    def __init__(self, parent: "Connection[Any, Any]", every_s: float) -> None:
        self._every_s = every_s
        self._parent = parent
        self.over = threading.Event()
        self.fed = Fed()
        self._started_s = time.monotonic()
        threading.Thread(target=self._listen, name="bench-listening", daemon=True).start()

    def _listen(self) -> None:
        with suppress(EOFError):
            self._parent.recv()
        self.over.set()

    def wait(self, tick: int) -> bool:
        """Waits for a tick's time; whether it is still wanted."""
        return not self.over.wait(max(0.0, self._started_s + tick * self._every_s - time.monotonic()))

    def acknowledged(self, accepted: int, points: int, seconds: float) -> None:
        """Of one tick."""
        if accepted != points:
            raise BenchError(f"{accepted} of {points} points were accepted")
        self.fed.acknowledged_ms.append(seconds * 1e3)
        if len(self.fed.acknowledged_ms) == 1:
            self._parent.send("begun")

    def end(self) -> None:
        """Tells the parent."""
        self.fed.due = int((time.monotonic() - self._started_s) / self._every_s)
        self._parent.send(self.fed)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _through_gateway(parent: "Connection[Any, Any]", address: str, every_s: float) -> None:
    mix = Mix(SERVERS)
    ticks = _Ticks(parent, every_s)
    begun: list[float] = []

    def requests() -> Iterator[Any]:
        tick = 0
        while ticks.wait(tick):
            request = tick_request(mix, tick, _now_ms(), first=tick == 0)
            begun.append(time.monotonic())
            yield request
            tick += 1

    with grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        stub: Any = ingest_pb2_grpc.IngestServiceStub(channel)
        for number, answer in enumerate(stub.WriteMetrics(requests(), metadata=BEARER)):
            ticks.acknowledged(answer.accepted_points, mix.tick_points, time.monotonic() - begun[number])
    ticks.end()


def _past_gateway(parent: "Connection[Any, Any]", targets: dict[str, str], secret: str, every_s: float) -> None:
    asyncio.run(_write(_Ticks(parent, every_s), targets, secret))


async def _write(ticks: _Ticks, targets: dict[str, str], secret: str) -> None:
    mix = Mix(SERVERS)
    async with AsyncExitStack() as stack:
        cache, timeseries, metadata = [
            await stack.enter_async_context(Channel(targets[name], secret=secret))
            for name in ("cache", "timeseries", "metadata")
        ]
        writer = await stack.enter_async_context(
            FleetWriter(timeseries=[timeseries], cache=cache, metadata=metadata, clock=SystemClock())
        )
        tick = 0
        while await asyncio.to_thread(ticks.wait, tick):
            times = np.full(SERVERS, _now_ms(), np.int64)
            rows = Rows(
                metric_set_id=mix.metric_set.id, server_ids=mix.server_ids, times_ms=times, values=mix.values(tick)
            )
            batch = WriteBatch(metric_set=mix.metric_set, rows=rows, servers=mix.servers)
            begun_s = time.monotonic()
            result = await writer.write(batch)
            ticks.acknowledged(result.accepted_points, mix.tick_points, time.monotonic() - begun_s)
            tick += 1
    ticks.end()
