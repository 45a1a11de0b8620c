"""What readers keep of blocks: bounded, never out of date, and never another file's."""

import asyncio
import random
from pathlib import Path

import pytest

from runtime.clock import ManualClock
from services.timeseries.engine import Engine, EngineSettings, Query
from services.timeseries.engine.cache import Cache
from services.timeseries.engine.partition import Partition
from tests.timeseries.engine.model import EVERYTHING, NAN, Model, ask, assert_same, everything, last, metric_set, rows

DAY_MS = 86_400_000
NOON = 19_700 * DAY_MS + DAY_MS // 2
SETS = (metric_set("a", "b"), metric_set("b", "c"))
SETTINGS = EngineSettings(sparse_points_a_day=0, head_rows=1_000, maintenance_interval_s=1e9)


def test_the_entries_used_last_are_kept_within_the_bound() -> None:
    cache: Cache[str] = Cache(100)
    for key in "abcd":
        cache.put(key, key.upper(), 25)
    assert cache.get("a") == "A"
    cache.put("e", "E", 30)
    assert [cache.get(key) for key in "abcde"] == ["A", None, None, "D", "E"] and cache.bytes == 80
    cache.put("a", "again", 40)
    assert (cache.get("a"), cache.get("d"), cache.bytes) == ("again", "D", 95)
    cache.put("huge", "H", 101)
    assert (cache.get("huge"), cache.get("a"), cache.bytes) == (None, "again", 95)


@pytest.mark.parametrize(("limit", "kept"), [(0, False), (3_000, True), (1 << 20, True)])
@pytest.mark.parametrize("seed", range(4))
async def test_overlapping_blocks_of_few_times_equal_the_oracle_whatever_is_kept(
    tmp_path: Path, seed: int, limit: int, kept: bool
) -> None:
    """Blocks and heads that overlap or touch, with equal times in one and in several, of two cohorts, read in parts."""
    rng, model, number = random.Random(seed), Model(), 0
    settings = EngineSettings(
        head_rows=1_000, maintenance_interval_s=1e9, opened_bytes_limit=limit, listed_bytes_limit=limit
    )
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        for _ in range(12):
            of_set = rng.choice(SETS)
            base, lines = rng.randrange(12), []
            for _ in range(rng.randrange(1, 6)):
                number += 1
                values = [NAN if rng.random() < 0.3 else number + column / 10 for column in range(2)]
                lines.append((rng.choice("xy"), NOON + 1_000 * (base + rng.randrange(4)), values))
            if rng.random() < 0.5:
                lines.sort(key=lambda line: line[1])
            await engine.append(rows(of_set, lines), metric_sets=(of_set,))
            model.append(of_set, rows(of_set, lines))
            if rng.random() < 0.7:
                await engine.maintain(everything=True)
            start = NOON + 1_000 * rng.randrange(10)
            for query in (EVERYTHING, Query(metrics=None, start_ms=start, end_ms=start + 1_000 * rng.randrange(1, 8))):
                assert_same(await ask(engine, query), model.query(query))
            assert await last(engine) == model.last()
        for cache in (engine._store.opened, engine._store.listed):
            assert (cache.bytes > 0) == kept and cache.bytes <= limit


async def test_what_is_kept_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        lines = [("x", NOON + second * 1_000, [1.0, 2.0]) for second in range(50)]
        await engine.append(rows(SETS[0], lines), metric_sets=(SETS[0],))
        await engine.maintain(everything=True)
        found = await everything(engine)

        def never(*_: object) -> None:
            raise AssertionError("the list of blocks is read again")

        monkeypatch.setattr(Partition, "infos", never)
        assert await everything(engine) == found


async def test_readers_see_every_row_while_heads_become_blocks(tmp_path: Path) -> None:
    """Each row is acknowledged before it is looked for; a list of blocks that is kept too long would lack it."""
    model, done = Model(), asyncio.Event()
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:

        async def close() -> None:
            while not done.is_set():
                await engine.maintain(everything=True)

        async with asyncio.TaskGroup() as group:
            group.create_task(close(), name="close")
            for number in range(60):
                batch = rows(SETS[0], [("x", NOON + number * 1_000, [number, -number])])
                await engine.append(batch, metric_sets=(SETS[0],))
                model.append(SETS[0], batch)
                assert_same(await everything(engine), model.query(EVERYTHING))
            done.set()


async def test_a_list_that_lags_behind_a_merge_hides_nothing(tmp_path: Path) -> None:
    """Between the commit of merged blocks and the next version the kept list names blocks that are not there."""
    model = Model()
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        for number in range(3):
            batch = rows(SETS[0], [("x", NOON + number * 1_000, [number, -number])])
            await engine.append(batch, metric_sets=(SETS[0],))
            model.append(SETS[0], batch)
            await engine._close_due(everything=True)
        assert_same(await everything(engine), model.query(EVERYTHING))
        partitions = engine._store.partitions
        (day,) = partitions.days(0, 1 << 20)
        before = partitions._versions[day]
        await engine.maintain(everything=True)
        assert partitions._versions[day] > before, "the blocks were merged"
        partitions._versions[day] = before
        for _ in range(2):
            assert_same(await everything(engine), model.query(EVERYTHING))
        assert (await engine.status()).damaged == 0


async def test_a_day_that_is_made_anew_after_its_eviction_has_only_its_new_rows(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    settings = EngineSettings(
        sparse_points_a_day=0, head_rows=1_000, maintenance_interval_s=1e9, raw_retention_s=2 * 86_400.0
    )
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        for round_number in range(3):
            old = NOON - DAY_MS
            lines = [("x", old + n * 1_000, [float(round_number), NAN]) for n in range(10 * (round_number + 1))]
            await engine.append(rows(SETS[0], lines), metric_sets=(SETS[0],))
            await engine.maintain(everything=True)
            found = await everything(engine)
            assert list(found) == [("x", "a")] and len(found["x", "a"]) == len(lines)
            assert {value for _, value in found["x", "a"]} == {float(round_number)}
            clock.advance(3 * 86_400)
            await engine.maintain()
            assert await everything(engine) == {} and await last(engine) == {}
            clock.advance(-3 * 86_400)
