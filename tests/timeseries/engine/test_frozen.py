"""Buckets whose points are gone are answered, and what comes beside the end of a day is in them, or it is said."""

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fleet.codec import rows_to_pb
from openmanager.timeseries.v1.timeseries_pb2 import AppendRequest
from runtime.clock import ManualClock
from runtime.errors import Unavailable
from services.timeseries.engine import Aggregation, Engine, EngineSettings, Query
from services.timeseries.engine.upkeep import Rollups
from services.timeseries.wire import decode
from tests.timeseries.engine.model import Model, ask, assert_same, metric_set, rows

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
TODAY = 19_704 * DAY_MS
SET = metric_set("cpu_usage")
SETTINGS = EngineSettings(
    sparse_points_a_day=0, maintenance_interval_s=1e9, raw_retention_s=2 * 86_400.0, late_grace_s=0.0
)


async def append(engine: Engine, model: Model, times: Sequence[int]) -> None:
    batch = rows(SET, [("a", time, [1.0]) for time in times])
    late, endings = await engine.too_late(batch.server_ids, batch.times_ms)
    assert not late.any()
    await engine.append(batch, metric_sets=(SET,), endings=endings)
    model.append(SET, batch)


async def assert_counted(engine: Engine, model: Model) -> None:
    for step_ms in (300_000, HOUR_MS):
        query = Query(metrics=None, start_ms=0, end_ms=TODAY, step_ms=step_ms, aggregation=Aggregation.COUNT)
        assert_same(await ask(engine, query), model.query(query), Aggregation.COUNT)


async def test_rows_around_a_bucket_whose_points_are_gone_do_not_hide_it(tmp_path: Path) -> None:
    """What an import waits with, in a head or under a mark, spans buckets that only the roll-ups have."""
    model, begin = Model(), TODAY - 10 * DAY_MS
    async with Engine.open(tmp_path, clock=ManualClock(TODAY), settings=SETTINGS) as engine:
        await append(engine, model, [begin + 12 * HOUR_MS])
        await engine.maintain(everything=True)
        assert not list((tmp_path / "blocks").glob("*.db"))
        await append(engine, model, [begin, begin + 23 * HOUR_MS])
        await assert_counted(engine, model)
        await append(engine, model, [begin + 600_000 * number + 60_000 for number in range(40, 90) if number != 72])
        engine._store.close_heads(lambda: False, everything=True)
        assert len(engine._store.tiers[0].marks) == 1, "so many runs are one"
        await assert_counted(engine, model)
        await engine.maintain(everything=True)
        await assert_counted(engine, model)


@pytest.mark.parametrize("ceaseless", [False, True])
async def test_what_comes_while_the_limit_takes_a_day_is_rolled_up_or_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ceaseless: bool
) -> None:
    model, begin, loop = Model(), TODAY - DAY_MS, asyncio.get_running_loop()
    complete, called = Rollups.complete, [0]
    async with Engine.open(tmp_path, clock=ManualClock(TODAY), settings=SETTINGS) as engine:

        def then_more(rollups: Rollups, *words: Any) -> bool:
            answer = complete(rollups, *words)
            called[0] += 1
            if ceaseless or called[0] == 1:
                late = append(engine, model, [begin + called[0] * 2 * HOUR_MS])
                asyncio.run_coroutine_threadsafe(late, loop).result()
            return answer

        monkeypatch.setattr(Rollups, "complete", then_more)
        await append(engine, model, range(begin, begin + HOUR_MS, 60_000))
        evict = partial(engine._retention._evict, engine._store.tiers[0], force=True)
        assert await asyncio.to_thread(engine._retention._attempt, begin // DAY_MS, evict)
        assert not list((tmp_path / "blocks").glob("*.db"))
        said = (await engine.status()).last_error
        if ceaseless:
            assert said is not None and said.message.endswith("went without all of its roll-ups")
        else:
            assert said is None
            await assert_counted(engine, model)


async def test_rows_of_a_day_that_goes_before_they_are_journaled_are_judged_again(tmp_path: Path) -> None:
    """As the limit takes a day that was not old when they were looked at."""
    model, begin, clock = Model(), TODAY - DAY_MS, ManualClock(TODAY)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        await append(engine, model, range(begin, begin + HOUR_MS, 60_000))
        both, of_today = (rows(SET, [("a", time, [1.0]) for time in times]) for times in ([begin + 1, TODAY], [TODAY]))
        judged = [
            await decode(AppendRequest(batch=rows_to_pb(batch)), engine.metric_set, clock.now_ms(), engine)
            for batch in (both, of_today)
        ]
        await asyncio.to_thread(engine._retention._evict, engine._store.tiers[0], begin // DAY_MS, force=True)
        assert not list((tmp_path / "blocks").glob("*.db"))
        with pytest.raises(Unavailable) as refused:
            await engine.append(judged[0].rows, endings=judged[0].endings)
        assert refused.value.reason == "EVICTED_MEANWHILE"
        await engine.append(judged[1].rows, endings=judged[1].endings)
        model.append(SET, of_today)
        query = Query(metrics=None, start_ms=0, end_ms=1 << 62, step_ms=300_000, aggregation=Aggregation.COUNT)
        assert_same(await ask(engine, query), model.query(query), Aggregation.COUNT)


async def test_an_engine_that_closes_takes_no_day_without_its_roll_ups(tmp_path: Path) -> None:
    model, begin = Model(), TODAY - DAY_MS
    async with Engine.open(tmp_path, clock=ManualClock(TODAY), settings=SETTINGS) as engine:
        await append(engine, model, range(begin, begin + HOUR_MS, 60_000))
        engine._store.close_heads(lambda: False, everything=True)
        engine._closing.set()
        evict = partial(engine._retention._evict, engine._store.tiers[0], force=True)
        await asyncio.to_thread(engine._retention._attempt, begin // DAY_MS, evict)
    async with Engine.open(tmp_path, clock=ManualClock(TODAY), settings=SETTINGS) as engine:
        await assert_counted(engine, model)
