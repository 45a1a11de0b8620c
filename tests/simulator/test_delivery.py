"""What is made is written in order, once timeseries takes it; what does not fit is the oldest, and counted."""

import asyncio
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
from opentelemetry import trace

from fleet.model import Metric, MetricSet, RowError, Rows, WriteBatch
from fleet.writer import WriteResult
from runtime.clock import ManualClock
from runtime.errors import InvalidArgument, Unavailable
from services.simulator import delivery as delivery_module
from services.simulator.delivery import MAX_WAITING_TICKS, Delivery, Parcel, parcel_of
from tests.harness import eventually
from tests.simulator.support import FakeWriter

SET = MetricSet((Metric(name="cpu_usage"), Metric(name="memory_usage")))


def _batch(time_ms: int) -> WriteBatch:
    rows = Rows(
        metric_set_id=SET.id,
        server_ids=("a", "b"),
        times_ms=np.full(2, time_ms, dtype=np.int64),
        values=np.ones((2, 2)),
    )
    return WriteBatch(metric_set=SET, rows=rows)


def _tick(number: int, batches: int = 1) -> Parcel:
    return parcel_of(number, [_batch(number) for _ in range(batches)], trace.INVALID_SPAN)


class Bench:
    """A delivery at work on a fake writer."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.writer = FakeWriter()
        self.delivery = Delivery(self.writer, self.clock)

    async def recover(self, done: Callable[[], bool]) -> None:
        """Lets back-offs pass until `done`."""

        def step() -> bool:
            if self.clock.sleepers:
                self.clock.advance(5.0)
            return done()

        await eventually(step)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    task = asyncio.create_task(bench.delivery.run())
    yield bench
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_ticks_are_written_in_order_and_counted(bench: Bench) -> None:
    for number in range(5):
        await bench.delivery.put(_tick(number, batches=2))
    await bench.delivery.drained()
    assert bench.writer.times_ms == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    counters = bench.delivery.counters
    assert (counters.acknowledged_ticks, counters.acknowledged_points, counters.acknowledged_rows) == (5, 40, 20)
    assert counters.last_tick_time_ms == 4
    assert counters.last_error == ""


async def test_after_an_outage_nothing_is_lost_and_the_same_batches_are_sent(bench: Bench) -> None:
    bench.writer.error = Unavailable("timeseries is away")
    for number in range(MAX_WAITING_TICKS):
        await bench.delivery.put(_tick(number))
    await bench.recover(lambda: len(bench.writer.attempts) >= 4)
    assert bench.delivery.waiting_ticks == MAX_WAITING_TICKS
    assert bench.delivery.counters.last_error == "timeseries is away"
    assert bench.delivery.counters.last_error_time_ms > 0
    assert all(attempt is bench.writer.attempts[0] for attempt in bench.writer.attempts)
    bench.writer.error = None
    await bench.recover(lambda: bench.delivery.waiting_ticks == 0)
    assert bench.writer.times_ms == list(range(MAX_WAITING_TICKS))
    assert bench.delivery.counters.dropped_ticks == 0


async def test_a_longer_outage_gives_up_the_oldest_and_counts(bench: Bench) -> None:
    bench.writer.error = Unavailable("away")
    for number in range(MAX_WAITING_TICKS + 15):
        await bench.delivery.put(_tick(number))
        await asyncio.sleep(0)
    assert bench.delivery.waiting_ticks == MAX_WAITING_TICKS
    assert bench.delivery.counters.dropped_ticks == 15
    bench.writer.error = None
    await bench.recover(lambda: bench.delivery.waiting_ticks == 0)
    assert bench.writer.times_ms == list(range(15, MAX_WAITING_TICKS + 15))


async def test_large_ticks_are_bounded_by_their_bytes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "MAX_WAITING_BYTES", 3 * 32)  # a tick's values are 32 bytes
    bench.writer.error = Unavailable("away")
    for number in range(10):
        await bench.delivery.put(_tick(number))
        await asyncio.sleep(0)
    assert bench.delivery.waiting_ticks == 3
    assert bench.delivery.counters.dropped_ticks == 7


async def test_a_tick_being_written_is_not_given_up() -> None:
    clock, release = ManualClock(), asyncio.Event()

    class SlowWriter(FakeWriter):
        async def write(self, batch: WriteBatch) -> WriteResult:
            await release.wait()
            return await super().write(batch)

    writer = SlowWriter()
    delivery = Delivery(writer, clock)
    task = asyncio.create_task(delivery.run())
    await delivery.put(_tick(0))
    await asyncio.sleep(0)
    for number in range(1, MAX_WAITING_TICKS + 3):
        await delivery.put(_tick(number))
    release.set()
    await asyncio.wait_for(delivery.drained(), 5)
    assert writer.times_ms == [0, *range(4, MAX_WAITING_TICKS + 3)]
    assert delivery.counters.dropped_ticks == 3
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_refused_batch_is_given_up_and_the_rest_goes_on(bench: Bench) -> None:
    bench.writer.error = InvalidArgument("values are not rows x metrics", field="values")
    await bench.delivery.put(_tick(0))
    await bench.delivery.drained()
    counters = bench.delivery.counters
    assert (counters.acknowledged_ticks, counters.last_tick_time_ms) == (0, 0), "nobody has acknowledged it"
    bench.writer.error = None
    await bench.delivery.put(_tick(1))
    await bench.delivery.drained()
    assert bench.writer.times_ms == [1]
    assert (counters.acknowledged_ticks, counters.last_tick_time_ms, counters.refused_batches) == (1, 1, 1)
    assert "values" in bench.delivery.counters.last_error


async def test_rejected_rows_are_counted_and_said_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async def write(batch: WriteBatch) -> WriteResult:
        error = RowError(row=0, field="rows[0].time", reason="TOO_LATE", message="older than what is kept")
        return WriteResult(sequence=1, accepted_points=2, rejected_points=2, errors=(error,))

    bench.writer.write = write  # type: ignore[method-assign]
    for number in range(3):
        await bench.delivery.put(_tick(number))
    await bench.delivery.drained()
    assert bench.delivery.counters.rejected_points == 6
    assert [record.message for record in caplog.records].count("rows were rejected") == 1


async def test_a_recording_waits_for_room(bench: Bench) -> None:
    bench.writer.error = Unavailable("away")
    for number in range(MAX_WAITING_TICKS):
        await bench.delivery.put_when_room(_tick(number))
    last = asyncio.create_task(bench.delivery.put_when_room(_tick(MAX_WAITING_TICKS)))
    await bench.recover(lambda: len(bench.writer.attempts) > 2)
    assert not last.done()
    bench.writer.error = None
    await bench.recover(lambda: last.done() and bench.delivery.waiting_ticks == 0)
    assert bench.writer.times_ms == list(range(MAX_WAITING_TICKS + 1))
    assert bench.delivery.counters.dropped_ticks == 0
