"""What users do while a store is away: senders write, people and programs read, facts are recorded.

Rows are sent as fast as they are acknowledged, a tick of 10 s after the other, in the past, so that an hour's worth
takes seconds; each value tells which it is. Readers ask the gateway as clients do and keep every latency.
"""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fleet.model import Metric, MetricSet, Rows, ServerDescriptor, WriteBatch
from fleet.writer import FleetWriter
from openmanager.fleet.v1 import history_pb2
from openmanager.gateway.v1 import ai_pb2, ai_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from openmanager.gateway.v1 import history_pb2 as public_pb2
from openmanager.gateway.v1 import history_pb2_grpc as public_grpc
from runtime.channel import Channel, calling
from runtime.errors import OpenManagerError

TICK_MS = 10_000
SERVERS = 20
METRICS = 511
POINTS_A_TICK = SERVERS * METRICS
READ_PAUSE_S = 0.02

FLEET = [
    ServerDescriptor(
        server_id=f"web-{number:02}", hostname=f"web-{number:02}", environment="staging", role="web", location="here"
    )
    for number in range(SERVERS)
]
SET = MetricSet(
    (
        *(Metric(name=name, unit="%") for name in ("cpu_usage", "memory_usage", "disk_usage")),
        *(Metric(name=f"metric_{number:03}", unit="1") for number in range(METRICS - 3)),
    )
)


class Sender:
    """Sends ticks and knows which were acknowledged."""

    def __init__(self, writer: FleetWriter, *, ticks: int) -> None:
        """`ticks`: how many there will be at most; the last one lies just before now."""
        self._writer = writer
        self.fleet = list(FLEET)
        self.start_ms = int(time.time() * 1_000) // TICK_MS * TICK_MS - ticks * TICK_MS
        self.sent_ticks = 0
        self.acknowledged: list[int] = []

    @property
    def sent_points(self) -> int:
        return self.sent_ticks * POINTS_A_TICK

    @property
    def acknowledged_points(self) -> int:
        return len(self.acknowledged) * POINTS_A_TICK

    def time_ms(self, tick: int) -> int:
        return self.start_ms + tick * TICK_MS

    async def send(self, ticks: int) -> None:
        """Sends so many ticks, each until it is acknowledged."""
        for _ in range(ticks):
            tick = self.sent_ticks
            self.sent_ticks += 1
            while not await self._acknowledges(tick):
                await asyncio.sleep(0.05)
            self.acknowledged.append(tick)

    async def _acknowledges(self, tick: int) -> bool:
        values = np.add.outer(np.arange(SERVERS) / 100, np.arange(METRICS) / 10_000) + tick
        values[:, :3] = tick % 70  # of a healthy server
        rows = Rows(
            metric_set_id=SET.id,
            server_ids=tuple(server.server_id for server in self.fleet),
            times_ms=np.full(SERVERS, self.time_ms(tick)),
            values=values,
        )
        try:
            result = await self._writer.write(WriteBatch(metric_set=SET, rows=rows, servers=tuple(self.fleet)))
        except OpenManagerError:
            return False
        assert (result.accepted_points, result.rejected_points) == (POINTS_A_TICK, 0)
        return True


@dataclass(slots=True)
class Facts:
    """AI interactions that were recorded, by id."""

    channel: Channel
    acknowledged: set[str] = field(default_factory=set)

    async def record(self) -> None:
        """Records one; an error is the test's."""
        stub = ai_pb2_grpc.AiInteractionServiceStub(self.channel.grpc)
        request = ai_pb2.RecordInteractionRequest()
        request.interaction.id = str(uuid.uuid4())
        request.interaction.session_id = "faults"
        request.interaction.query = "what is wrong?"
        async with calling("gateway"):
            answer = await stub.RecordInteraction(request)
        self.acknowledged.add(answer.interaction.id)


class Readers:
    """Programs that ask for the current state and for history, one after the other, while they are entered."""

    def __init__(self, channel: Channel, sender: Sender) -> None:
        self._fleet = fleet_pb2_grpc.FleetServiceStub(channel.grpc)
        self._history = public_grpc.HistoryServiceStub(channel.grpc)
        self._sender = sender
        self.latencies_s: list[float] = []
        self.failures: list[str] = []

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Reads while it is entered."""
        tasks = [asyncio.create_task(self._repeat(ask)) for ask in (self._server, self._list, self._range)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @contextmanager
    def phase(self) -> Iterator[list[float]]:
        """The latencies of what is asked meanwhile."""
        before, self.latencies_s = self.latencies_s, []
        try:
            yield self.latencies_s
        finally:
            self.latencies_s = [*before, *self.latencies_s]

    async def _repeat(self, ask: Callable[[], Awaitable[Any]]) -> None:
        while True:
            started = time.monotonic()
            try:
                async with calling("gateway"):
                    await ask()
            except (OpenManagerError, AssertionError) as error:
                self.failures.append(f"{ask.__name__}: {error!r}")
            self.latencies_s.append(time.monotonic() - started)
            await asyncio.sleep(READ_PAUSE_S)

    async def _server(self) -> None:
        answer = await self._fleet.GetServer(fleet_pb2.GetServerRequest(server_id=FLEET[3].server_id))
        assert len(answer.server.metrics) == METRICS

    async def _list(self) -> None:
        answer = await self._fleet.ListServers(fleet_pb2.ListServersRequest())
        assert answer.total_size == SERVERS

    async def _range(self) -> None:
        request = public_pb2.GetServerHistoryRequest(
            server_id=FLEET[5].server_id, metric=["cpu_usage"], aggregation=history_pb2.AGGREGATION_MAX
        )
        request.start_time.FromMilliseconds(self._sender.start_ms)
        request.step.FromMilliseconds(60_000)
        answer = await self._history.GetServerHistory(request)
        assert not answer.incomplete


def p99(latencies_s: list[float]) -> float:
    """Nearest rank; of at least one."""
    ordered = sorted(latencies_s)
    return ordered[math.ceil(len(ordered) * 0.99) - 1]
