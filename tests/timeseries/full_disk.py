"""What test_full_disk.py runs where the disk is small: `python -m tests.timeseries.full_disk FOLDER PART SCRATCH`.

PART is `engine`, in this process, or `service`, a real one that is also killed and started on the full disk.
"""

import asyncio
import sys
from pathlib import Path

import numpy as np

from fleet.codec import metric_set_to_pb, rows_to_pb
from fleet.model import MetricSet, Rows
from openmanager.fleet.v1 import history_pb2
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc
from runtime.channel import calling
from runtime.clock import ManualClock
from runtime.errors import OpenManagerError, ResourceExhausted
from services.timeseries.engine import Engine, EngineSettings
from tests.harness import eventually
from tests.harness.product import Product
from tests.harness.small_disk import fill
from tests.timeseries.engine.model import EVERYTHING, Model, assert_same, everything, metric_set, rows

NOON = 19_700 * 86_400_000 + 43_200_000
WIDE = metric_set(*(f"m{number}" for number in range(200)))
RNG = np.random.default_rng(1)
SETTINGS = EngineSettings(maintenance_interval_s=1e9, journal_keep_s=0.0, head_rows=1 << 20)
BATCHES = 400
ROOM_BYTES = 4 << 20


def noise(number: int) -> Rows:
    """40 rows that no encoding makes smaller: 64 KB."""
    lines = [("a", NOON + number * 1_000 + row, RNG.random(len(WIDE)).tolist()) for row in range(40)]
    return rows(WIDE, lines)


class Sender:
    """Appends to an engine, knows what was acknowledged, and what was refused and why."""

    def __init__(self, engine: Engine, model: Model) -> None:
        self.engine = engine
        self.model = model
        self.number = len(model.series.get(("a", "m0"), ()))
        self.refusals: list[str] = []

    async def send(self) -> bool:
        batch = noise(self.number)
        self.number += 1
        try:
            await self.engine.append(batch, metric_sets=(WIDE,))
        except ResourceExhausted as refused:
            self.refusals.append(refused.reason)
            return False
        self.model.append(WIDE, batch)
        return True

    async def compare(self) -> None:
        assert_same(await everything(self.engine), self.model.query(EVERYTHING))


async def try_engine(disk: Path) -> None:
    model, store = Model(), disk / "store"
    async with Engine.open(store, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        sender = Sender(engine, model)
        assert await sender.send()
        ballast = fill(disk, ROOM_BYTES)
        taken = sum([await sender.send() for _ in range(BATCHES)])
        assert 10 < taken < BATCHES and set(sender.refusals) == {"DISK_FULL"}, (taken, set(sender.refusals))
        await sender.compare()

        fill(disk, 0)
        await engine.maintain(everything=True)
        status = await engine.status()
        assert status.closing_fails and status.last_error is not None, status
        assert "full" in status.refusing and not engine.needs_restart, status
        assert engine.first_sequence == 1 and status.head_points == model.points, "heads and journal keep everything"
        await sender.compare()
        assert not await sender.send()
    async with Engine.open(store, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        sender = Sender(engine, model)
        await sender.compare()
        assert not await sender.send() and set(sender.refusals) == {"DISK_FULL"}, "also after a start on a full disk"
        ballast.unlink()
        assert await sender.send(), "there is room again, and nothing has to be done"
        clock = engine._store.clock
        assert isinstance(clock, ManualClock)
        clock.advance(1)
        await engine.maintain(everything=True)
        status = await engine.status()
        assert (
            not status.closing_fails
            and not status.refusing
            and status.head_points == 0
            and status.points == model.points
        ), status
        assert engine.first_sequence == engine.last_sequence + 1, "the journal is swept"
        await sender.compare()


async def try_service(disk: Path, scratch: Path) -> None:
    (disk / "data").mkdir()
    (scratch / "data").symlink_to(disk / "data")  # the log stays off the disk that gets full
    sent: dict[int, int] = {}
    refused: set[str] = set()

    async def append(product: Product, number: int, metric_sets: tuple[MetricSet, ...] = (WIDE,)) -> bool:
        request = timeseries_pb2.AppendRequest(
            batch=rows_to_pb(noise(number)), metric_sets=[metric_set_to_pb(one) for one in metric_sets]
        )
        async with product.channel("timeseries") as channel:
            try:
                async with calling("timeseries"):
                    answer = await timeseries_pb2_grpc.TimeSeriesServiceStub(channel.grpc).Append(request)
            except OpenManagerError as error:
                assert isinstance(error, ResourceExhausted), error
                refused.add(error.reason)
                return False
        sent[number] = answer.accepted_points
        return True

    async def check(product: Product) -> None:
        query = history_pb2.HistoryQuery(metrics=["m7"])
        query.start_time.FromMilliseconds(NOON)
        query.end_time.FromMilliseconds(NOON + 10_000_000)
        async with product.channel("timeseries") as channel, calling("timeseries"):
            answer = timeseries_pb2_grpc.TimeSeriesServiceStub(channel.grpc).Query(
                timeseries_pb2.QueryRequest(query=query)
            )
            times = [time async for part in answer for series in part.series for time in series.times]
        wanted = [(NOON + number * 1_000 + row) / 1_000 for number in sorted(sent) for row in range(40)]
        assert times == wanted, (len(times), len(wanted))

    async with Product(scratch, TIMESERIES_BLOCK_AGE="1s") as product:
        await product.start("timeseries")
        assert await append(product, 0)
        ballast = fill(disk, ROOM_BYTES)
        taken = sum([await append(product, number) for number in range(1, BATCHES // 2)])
        assert 10 < taken < BATCHES // 2 and refused == {"DISK_FULL"}, (taken, refused)
        await check(product)
        await product.kill("timeseries")
        fill(disk, 0)
        await product.start("timeseries")
        await check(product)
        assert not await append(product, BATCHES) and refused == {"DISK_FULL"}
        ballast.unlink()
        assert await append(product, BATCHES + 1)
        await check(product)

        async def closed() -> bool:
            return bool(list((disk / "data" / "timeseries" / "blocks").glob("*.db")))

        await eventually(closed, within_s=20)
        await check(product)


if __name__ == "__main__":
    folder, part, scratch = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    asyncio.run(try_engine(folder) if part == "engine" else try_service(folder, scratch))
