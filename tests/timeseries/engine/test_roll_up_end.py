"""Roll-ups go only when all that was acknowledged for them is in the next tier, and what is made of it is frozen."""

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from runtime.clock import ManualClock
from services.timeseries.engine import Aggregation, Engine, EngineSettings, Query
from services.timeseries.engine import partitions as partitions_module
from services.timeseries.engine.partition import remove_files
from services.timeseries.engine.store import Store
from tests.timeseries.engine.model import Model, ask, assert_same, metric_set, rows

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
TODAY = 19_704 * DAY_MS
SET = metric_set("cpu_usage")
pytestmark = pytest.mark.usefixtures("unsynced")
SETTINGS = EngineSettings(
    sparse_points_a_day=0,
    maintenance_interval_s=1e9,
    raw_retention_s=2 * 86_400.0,
    five_minute_retention_s=20 * 86_400.0,
)


@pytest.mark.parametrize("waits", ["in its head", "in its block"])
@pytest.mark.parametrize("plant", [False, True])
async def test_rows_that_came_in_time_are_in_the_hours_although_the_five_minutes_are_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: str, plant: bool
) -> None:
    """The second part of an import comes just before the 5 min that were made of the first are old enough to go.

    Planted: they go with what is to come into them not made, as its hour is frozen.
    """
    if plant:
        monkeypatch.setattr(Store, "_waits", lambda *_: False)
        monkeypatch.setattr("services.timeseries.engine.upkeep.Rollups.complete", lambda *_: True)
    clock, model = ManualClock(TODAY), Model()
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:

        async def append(times: range) -> None:
            batch = rows(SET, [("a", time, [1.0]) for time in times])
            late, endings = await engine.too_late(batch.server_ids, batch.times_ms)
            assert not late.any()
            await engine.append(batch, metric_sets=(SET,), endings=endings)
            model.append(SET, batch)

        begin = TODAY - 100 * DAY_MS
        await append(range(begin, begin + HOUR_MS, 60_000))
        await engine.maintain(everything=True)
        clock.advance(SETTINGS.late_grace_s - 10)
        await append(range(begin + 30_000, begin + HOUR_MS, 60_000))
        if waits == "in its block":
            engine._store.close_heads(lambda: False, everything=True)
        clock.advance(20)
        await engine.maintain()
        clock.advance(3 * SETTINGS.late_grace_s)
        await engine.maintain(everything=True)
        clock.advance(3 * SETTINGS.late_grace_s)
        await engine.maintain(everything=True)
        assert list((tmp_path / "blocks").glob("*.db")) == list((tmp_path / "rollup-5m").glob("*.db")) == []
        query = Query(metrics=None, start_ms=0, end_ms=TODAY, step_ms=HOUR_MS, aggregation=Aggregation.COUNT)
        answer = await ask(engine, query)
        if plant:
            assert answer["a", "cpu_usage"][0][1] == 60
        else:
            assert_same(answer, model.query(query), Aggregation.COUNT)


async def test_rows_that_cannot_become_a_block_are_rolled_up_before_their_day_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk's limit takes a day whose heads cannot close; their buckets have rows of blocks too."""
    async with Engine.open(tmp_path, clock=ManualClock(TODAY), settings=SETTINGS) as engine:
        store, retention, day = engine._store, engine._retention, TODAY // DAY_MS - 1
        begin = day * DAY_MS
        await engine.append(rows(SET, [("a", begin + n * 60_000, [1.0]) for n in range(60)]), metric_sets=(SET,))
        store.close_heads(lambda: False, everything=True)
        await engine.append(rows(SET, [("a", begin + n * 300_000 + 1, [1.0]) for n in range(12)]))
        monkeypatch.setattr(Store, "close_heads", lambda *_, **__: 0)
        evict = partial(retention._evict, store.tiers[0], force=True)
        assert await asyncio.to_thread(retention._attempt, day, evict)
        await engine.maintain(everything=True)
        query = Query(metrics=None, start_ms=0, end_ms=TODAY, step_ms=HOUR_MS, aggregation=Aggregation.COUNT)
        assert await ask(engine, query) == {("a", "cpu_usage"): [(begin, 72.0)]}


async def test_roll_ups_whose_file_cannot_be_unlinked_at_first_go_later_and_make_room_for_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a restart its bytes would be nobody's, and what is imported for its days would never be rolled up."""
    clock, begin = ManualClock(TODAY), TODAY - 10 * DAY_MS
    settings = replace(SETTINGS, late_grace_s=0.0)

    def fails(*paths: Path) -> None:
        if any(path.parent.name == "rollup-5m" for path in paths):
            raise OSError("the disk is strange today")
        remove_files(*paths)

    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        times = range(begin, begin + HOUR_MS, 60_000)
        await engine.append(rows(SET, [("a", time, [1.0]) for time in times]), metric_sets=(SET,))
        await engine.maintain(everything=True)
        clock.advance(30 * 86_400)
        with monkeypatch.context() as patches:
            patches.setattr(partitions_module, "remove_files", fails)
            await engine.maintain(everything=True)
        await engine.maintain(everything=True)
        assert list((tmp_path / "rollup-5m").glob("*")) == []
        late = rows(SET, [("a", time + 5 * HOUR_MS, [1.0]) for time in times])
        assert not (await engine.too_late(late.server_ids, late.times_ms))[0].any()
        await engine.append(late)
        await engine.maintain(everything=True)
        await engine.maintain(everything=True)
        query = Query(metrics=None, start_ms=0, end_ms=TODAY, step_ms=HOUR_MS, aggregation=Aggregation.COUNT)
        assert await ask(engine, query) == {("a", "cpu_usage"): [(begin, 60.0), (begin + 5 * HOUR_MS, 60.0)]}
        assert list((tmp_path / "blocks").glob("*.db")) == [], "the imported rows are in the hours, and gone"
