"""How much a follower lacks: exact, and told without reading all of it each time."""

import asyncio
import random
from pathlib import Path

import pytest

from runtime.clock import ManualClock
from services.timeseries.engine import Engine, EngineSettings, backlog
from tests.timeseries.engine.model import metric_set, rows

NOON = 19_700 * 86_400_000 + 43_200_000
SET = metric_set("cpu_usage")
QUIET = EngineSettings(maintenance_interval_s=1e9, journal_keep_s=0.0)


async def append(engine: Engine, sizes: list[int]) -> None:
    """A batch of each number of points."""
    at = NOON + engine.last_sequence
    batches = [rows(SET, [(f"s{row}", at + number, [1.0]) for row in range(size)]) for number, size in enumerate(sizes)]
    await asyncio.gather(*(engine.append(batch, metric_sets=(SET,)) for batch in batches))


async def test_what_a_follower_lacks_is_exact_wherever_it_is_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "GROUP_BATCHES", 7)
    rng = random.Random(1)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        await engine.cursors.register("slow")
        await engine.cursors.register("store")
        for _ in range(60):
            action = rng.random()
            cursor = (await engine.status()).followers[1].cursor
            if action < 0.4:
                await append(engine, [rng.randint(1, 4) for _ in range(rng.choice((1, 3, 20)))])
            elif action < 0.7:
                await engine.cursors.advance("store", rng.randint(cursor, engine.last_sequence))
            elif action < 0.8:
                engine.cursors.lost("store")
                await engine.cursors.go_back("store", rng.randint(engine.first_sequence - 1, max(cursor, 1)))
            elif action < 0.9:
                slow = (await engine.status()).followers[0].cursor
                await engine.cursors.advance("slow", rng.randint(slow, cursor) if slow < cursor else slow)
            else:
                await engine.maintain(everything=True)
            followers = (await engine.status()).followers
            for follower in followers:
                kept = [row.points for row in engine._store.journal.rows(follower.cursor)]
                assert (follower.batches, follower.points) == (len(kept), sum(kept))
                assert (follower.oldest_ms is None) == (not kept)


async def test_what_waits_is_not_read_again_each_time_that_somebody_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The status asks every two seconds, and after an outage of an hour the journal may hold gigabytes."""
    monkeypatch.setattr(backlog, "GROUP_BATCHES", 10)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        await engine.cursors.register("store")
        steps = 0

        def count() -> bool:
            nonlocal steps
            steps += 1
            return False

        engine._tails._reader._db.set_progress_handler(count, 1)

        async def asked() -> int:
            await engine.status()
            before = steps
            await engine.status()
            return steps - before

        await append(engine, [1] * 30)
        few = await asked()
        for _ in range(20):
            await append(engine, [1] * 60)
        assert await asked() < 2 * few


async def test_after_a_start_what_is_not_counted_yet_is_taken_to_be_like_what_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "MOST_AT_ONCE", 10)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        await engine.cursors.register("store")
        await append(engine, [2] * 30 + [5] * 10)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        told = [(await engine.status()).followers[0].points for _ in range(4)]
        assert told[0] == 80
        assert told[-1] == 110
