"""The scores of servers are a series of the history, and nothing that is judged again."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from fleet.codec import metric_set_from_pb
from runtime.channel import Channel
from runtime.clock import SystemClock
from runtime.errors import OpenManagerError
from services.analytics import checkpoint, scores
from services.analytics.core import Analysis
from services.analytics.fleet_detector import FleetDetector
from services.analytics.follow import TailFollower
from services.analytics.outbox import Outbox
from services.analytics.scores import METRIC, Scored, ScoreWriter
from tests.analytics.fakes import (
    SECRET,
    SERVERS,
    FakeTimeSeries,
    Shown,
    at_ms,
    fleet_ticks,
    same_state,
    serving,
    trained_snapshot,
)
from tests.analytics.fakes import written as on_disk
from tests.analytics.test_checkpoint import batches, fed, found
from tests.harness import eventually


@asynccontextmanager
async def judging() -> AsyncIterator[tuple[FakeTimeSeries, Analysis]]:
    """An analysis that follows a history and writes its scores there."""
    fake = FakeTimeSeries()
    fake.echoes = True
    async with serving(fake) as address, Channel(address, secret=SECRET) as channel:
        writer = ScoreWriter(channel, SystemClock())
        analysis = Analysis(Shown().detector, Outbox(), SystemClock(), writer)
        analysis.restore(trained_snapshot())

        async def again(run: Any) -> None:
            while True:
                try:
                    await run()
                except OpenManagerError:
                    await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(again(run)) for run in (TailFollower(channel, analysis).follow, writer.run)]
        yield fake, analysis
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def written(fake: FakeTimeSeries) -> dict[tuple[str, int], float]:
    """The points that were written, each once."""
    points: dict[tuple[str, int], float] = {}
    for batch in fake.written:
        for row, value in zip(batch.rows, batch.values, strict=True):
            key = row.server_id, row.time.seconds * 1_000
            assert key not in points
            points[key] = value
    return points


async def test_each_minute_of_each_server_is_a_point_and_is_not_judged() -> None:
    ticks = 40
    async with judging() as (fake, analysis):
        await eventually(lambda: fake.streams == 1)
        for rows in fleet_ticks(ticks):
            fake.append(rows)
            await eventually(lambda: analysis.next_sequence == len(fake.journal) + 1)  # its scores come between
        await eventually(lambda: len(fake.written) == ticks - 2)
        await eventually(lambda: analysis.next_sequence == len(fake.journal) + 1)
        points = written(fake)
        (metric,) = metric_set_from_pb(fake.sets[fake.written[0].metric_set_id]).metrics
        assert (metric.name, metric.unit) == (METRIC, "1")
        assert set(points) == {(server, at_ms(tick)) for server in SERVERS for tick in range(ticks - 2)}
        assert all(0 <= score < 1 for score in points.values())
        broken = [points["server-0", at_ms(tick)] for tick in range(20, 30)]
        usual = [points["server-0", at_ms(tick)] for tick in range(15)]
        assert min(broken[:2]) > 0.5 > max(usual)
        assert (analysis.counters.batches, analysis.counters.lost_batches) == (ticks, 0)
        alone = await fed(ticks)
        assert found(analysis) == found(alone)
        same_state(analysis.detector.state(), alone.detector.state())


async def test_scores_wait_for_timeseries_and_the_oldest_go_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scores, "MAX_WAITING", 7)
    fake = FakeTimeSeries()
    fake.append(fleet_ticks(1)[0])
    fake.is_away = True
    async with serving(fake) as address, Channel(address, secret=SECRET) as channel:
        writer = ScoreWriter(channel, SystemClock())
        with pytest.raises(OpenManagerError):
            writer.put([Scored(start_ms=0, server_ids=("a",), scores=np.array([0.5]))])
            await writer.run()
        writer.put(Scored(start_ms=n * 60_000, server_ids=("a", "b"), scores=np.array([0.1, n / 10])) for n in range(5))
        writer.put([Scored(start_ms=9, server_ids=(), scores=np.array([]))])
        assert "are lost" in caplog.text
        fake.is_away = False
        task = asyncio.create_task(writer.run())
        await eventually(lambda: len(fake.written) == 3)
        task.cancel()
        assert [batch.rows[0].time.seconds for batch in fake.written] == [120, 180, 240]
        assert list(fake.written[-1].values) == [0.1, 0.4]


async def test_a_batch_that_was_interrupted_by_the_end_costs_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.analytics.core.YIELD_AFTER_S", 0.0)
    points: list[list[tuple[int, tuple[str, ...], list[float]]]] = []
    async with Channel("127.0.0.1:1", secret=SECRET) as channel:
        for is_interrupted in (False, True):
            writer = ScoreWriter(channel, SystemClock())
            analysis = Analysis(Shown().detector, Outbox(), SystemClock(), writer)
            for batch in batches(10):
                if is_interrupted:
                    applying = asyncio.create_task(analysis.apply(batch))
                    await asyncio.sleep(0)
                    applying.cancel()
                    await asyncio.wait([applying])
                    assert applying.cancelled()
                    left = checkpoint.decode(on_disk(await analysis.snapshot()))
                    writer = ScoreWriter(channel, SystemClock())
                    analysis = Analysis(FleetDetector(), Outbox(), SystemClock(), writer)
                    analysis.restore(left)
                await analysis.apply(batch)
            points.append([(one.start_ms, one.server_ids, one.scores.tolist()) for one in writer.all()])
    assert points[0] == points[1]
    assert len(points[0]) == 8
