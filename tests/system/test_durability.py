"""Promise 1: an acknowledged point is on disk, once, whatever is killed and when."""

import asyncio
import math
import random
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import grpc
import pytest

from openmanager.fleet.v1 import metric_pb2
from openmanager.gateway.v1 import history_pb2, history_pb2_grpc, ingest_pb2, ingest_pb2_grpc
from runtime.channel import calling
from runtime.errors import OpenManagerError, Unavailable
from tests.harness import eventually
from tests.harness.commands import require_command
from tests.harness.product import Product

START_S = 1_750_000_000
METRICS = [metric_pb2.Metric(name=f"m{index}", kind=metric_pb2.METRIC_KIND_GAUGE) for index in range(7)]
SERVERS = ("alpha", "beta", "gamma")
ROUNDS = 4
EVERYTHING = ("timeseries", "cache", "metadata", "gateway")


class Sender:
    """Writes numbered ticks through the gateway, remembers the acknowledged ones, and sends the others again."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self._task: asyncio.Task[None] | None = None
        self.tick = 0
        self.acknowledged: dict[int, tuple[float, float]] = {}
        """Tick -> when it was sent and when it was acknowledged, in seconds since the epoch."""

    def request(self, tick: int, *, with_metrics: bool) -> ingest_pb2.WriteMetricsRequest:
        request = ingest_pb2.WriteMetricsRequest(metrics=METRICS if with_metrics else ())
        for number, server in enumerate(SERVERS):
            row = request.rows.add(server_id=server)
            row.time.seconds = START_S + tick
            request.values.extend(value_of(tick, number, column) for column in range(len(METRICS)))
        return request

    async def reaches(self, count: int) -> None:
        """Waits until so many ticks are acknowledged."""

        def reached() -> bool:
            assert self._task is not None
            if self._task.done():
                raise RuntimeError("the sender gave up") from self._task.exception()
            return len(self.acknowledged) >= count

        await eventually(reached, within_s=60)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="sender")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        """Until cancelled. A tick is followed by the next only when it is acknowledged."""
        while True:
            try:
                async with self._product.channel("gateway") as channel, calling("gateway"):
                    await self._stream(ingest_pb2_grpc.IngestServiceStub(channel.grpc))
            except (OpenManagerError, asyncio.InvalidStateError):  # the latter: written to a stream that has ended
                await asyncio.sleep(0.05)

    async def _stream(self, stub: ingest_pb2_grpc.IngestServiceStub) -> None:
        stream = stub.WriteMetrics()
        first = True
        try:
            while True:
                sent = time.time()
                await stream.write(self.request(self.tick, with_metrics=first))
                response = await stream.read()
                if not isinstance(response, ingest_pb2.WriteMetricsResponse):  # the end of the stream
                    code = await stream.code()
                    assert code == grpc.StatusCode.UNAVAILABLE, (code, await stream.details())
                    raise Unavailable("the stream was cut")
                assert response.accepted_points == len(SERVERS) * len(METRICS)
                self.acknowledged[self.tick] = (sent, time.time())
                self.tick += 1
                first = False
        finally:
            stream.cancel()


def value_of(tick: int, server: int, column: int) -> float:
    return tick + server / 8 + math.sqrt(column)


async def stored(product: Product) -> dict[str, list[tuple[float, float]]]:
    """Every stored point by server and metric."""
    request = history_pb2.QueryHistoryRequest(metrics=[metric.name for metric in METRICS])
    request.start_time.seconds = START_S
    request.end_time.seconds = START_S + 1_000_000
    found: dict[str, list[tuple[float, float]]] = {}
    async with product.channel("gateway") as channel, calling("gateway"):
        messages: AsyncIterator[history_pb2.QueryHistoryResponse]
        messages = history_pb2_grpc.HistoryServiceStub(channel.grpc).QueryHistory(request)
        async for message in messages:
            for series in message.series:
                points = found.setdefault(f"{series.server_id}/{series.metric}", [])
                points.extend(zip(series.times, series.values, strict=True))
    return found


def check(found: dict[str, list[tuple[float, float]]], acknowledged: set[int], sent: int) -> None:
    """Acknowledged ticks are there once with their value; the one in flight may be; nothing else is."""
    for number, server in enumerate(SERVERS):
        for column, metric in enumerate(METRICS):
            points = found[f"{server}/{metric.name}"]
            ticks = [round(time - START_S) for time, _ in points]
            assert len(ticks) == len(set(ticks)), "a point is doubled"
            assert acknowledged <= set(ticks), f"missing: {sorted(acknowledged - set(ticks))[:5]}"
            assert set(ticks) <= set(range(sent + 1)), "a point nobody sent"
            assert all(value == value_of(tick, number, column) for tick, (_, value) in zip(ticks, points, strict=True))


@pytest.mark.parametrize(
    ("victims", "rounds"),
    [
        pytest.param(("timeseries",), ROUNDS, id="timeseries", marks=pytest.mark.full),
        pytest.param(EVERYTHING, 2, id="everything"),  # a round takes 3 to 7 s
        pytest.param(EVERYTHING, 2 * ROUNDS, id="everything-again-and-again", marks=pytest.mark.full),
    ],
)
async def test_kill_9_loses_and_doubles_nothing(tmp_path: Path, victims: tuple[str, ...], rounds: int) -> None:
    rng = random.Random(7)
    async with Product(tmp_path) as product:
        await product.start(*EVERYTHING)
        async with Sender(product) as sender:
            for _ in range(rounds):
                await sender.reaches(len(sender.acknowledged) + rng.randrange(5, 60))
                await product.kill(*victims)
                await product.start(*victims)
            await sender.reaches(len(sender.acknowledged) + 5)
        check(await stored(product), set(sender.acknowledged), sender.tick)


async def test_a_sync_returns_before_each_acknowledgement(tmp_path: Path) -> None:
    """What kill -9 cannot show, since the page cache survives it: a journal sync ran between sending and answer.

    One batch is in flight at a time, so every batch needs a sync of its own, which begins after the batch was sent
    and has returned when its answer arrives.
    """
    strace = require_command("strace")
    trace = tmp_path / "trace"
    async with Product(tmp_path) as product:
        prefix = (strace, "-D", "-f", "-ttt", "-T", "-y", "-e", "trace=fsync,fdatasync", "-o", str(trace))
        await product.start("timeseries", prefix=prefix)
        await product.start("cache", "metadata", "gateway")
        async with Sender(product) as sender:
            await sender.reaches(30)
        process = product.running["timeseries"].pid
    await eventually(lambda: re.search(rf"^{process} .*exited with 0", trace.read_text(), re.MULTILINE), within_s=20)
    syncs = journal_syncs(trace.read_text())
    assert unsynced(list(sender.acknowledged.values()), syncs) == []


Interval = tuple[float, float]
_SYNC = re.compile(r"^(\d+) +(\d+\.\d+) f(?:data)?sync\(\d+<[^>]*journal\.db[^>]*>(.*)$")
_RESUMED = re.compile(r"^(\d+) +(\d+\.\d+) <\.\.\. f(?:data)?sync resumed>.* = 0 <")
_TOOK = re.compile(r"\) += 0 <(\d+\.\d+)>$")


def journal_syncs(trace: str) -> list[Interval]:
    """When each successful sync of the journal began and returned, in seconds since the epoch."""
    syncs: list[Interval] = []
    begun: dict[str, float] = {}
    for line in trace.splitlines():
        if match := _SYNC.match(line):
            thread, started, rest = match[1], float(match[2]), match[3]
            if "<unfinished" in rest:
                begun[thread] = started
            elif took := _TOOK.search(rest):
                syncs.append((started, started + float(took[1])))
        elif (match := _RESUMED.match(line)) and match[1] in begun:
            syncs.append((begun.pop(match[1]), float(match[2])))
    return syncs


def unsynced(batches: list[Interval], syncs: list[Interval]) -> list[Interval]:
    """The batches, as (sent, answered), during which no sync began and returned."""
    return [
        (sent, answered)
        for sent, answered in batches
        if not any(sent <= began and returned <= answered for began, returned in syncs)
    ]


def test_the_checker_sees_an_answer_that_came_before_its_sync() -> None:
    trace = """\
7 100.1 fdatasync(9</d/journal.db-wal>) = 0 <0.200000>
8 101.1 fdatasync(9</d/journal.db-wal> <unfinished ...>
8 101.3 <... fdatasync resumed>) = 0 <0.200000>
7 102.1 fsync(9</d/other.db>) = 0 <0.200000>"""
    syncs = journal_syncs(trace)
    assert syncs == [(100.1, pytest.approx(100.3)), (101.1, 101.3)]
    assert unsynced([(100.0, 100.4), (101.0, 101.4)], syncs) == []
    assert unsynced([(100.0, 100.2), (101.2, 101.4), (102.0, 103.0)], syncs) == [
        (100.0, 100.2),
        (101.2, 101.4),
        (102.0, 103.0),
    ]
