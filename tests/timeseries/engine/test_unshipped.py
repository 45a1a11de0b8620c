"""Which instants a follower lacks."""

import asyncio
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import apsw
import pytest

from runtime.clock import ManualClock
from services.timeseries.engine import Engine, EngineSettings, unshipped
from services.timeseries.engine.cursors import SETTLED_AFTER_S
from services.timeseries.engine.unshipped import joined
from tests.timeseries.engine.model import metric_set, rows

NOON = 19_700 * 86_400_000 + 43_200_000
SET = metric_set("cpu_usage")
QUIET = EngineSettings(maintenance_interval_s=1e9, journal_keep_s=0.0)
HOUR = 3_600_000


def test_near_ranges_are_joined_and_many_are_put_together_where_the_gap_is_smallest() -> None:
    assert joined([(50, 60), (0, 10), (5, 20)], gap_ms=0) == [(0, 20), (50, 60)]
    assert joined([(0, 10), (15, 20)], gap_ms=5) == [(0, 20)]
    assert joined([(0, 1), (100, 101), (150, 151), (400, 401)], gap_ms=1, limit=3) == [(0, 1), (100, 151), (400, 401)]


async def test_ranges_shrink_with_the_cursor_and_grow_with_rows_also_late_ones(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    async with Engine.open(tmp_path, clock=clock, settings=QUIET) as engine:
        assert await engine.cursors.unshipped("store") == [], "no such follower lacks nothing"
        await engine.cursors.register("store")
        assert await engine.cursors.unshipped("store") == []

        first = await engine.append(rows(SET, [("a", NOON, [1.0]), ("b", NOON + 10_000, [1.0])]), metric_sets=(SET,))
        second = await engine.append(rows(SET, [("a", NOON + HOUR, [1.0]), ("b", NOON - 5 * HOUR, [1.0])]))
        late, now, later = (NOON - 5 * HOUR, NOON - 5 * HOUR + 1), (NOON, NOON + 10_001), (NOON + HOUR, NOON + HOUR + 1)
        assert await engine.cursors.unshipped("store") == [late, now, later]

        await engine.cursors.advance("store", first)
        clock.advance(SETTLED_AFTER_S - 1)
        assert await engine.cursors.unshipped("store") == [late, now, later], "the store may not show it yet"
        clock.advance(1)
        assert await engine.cursors.unshipped("store") == [late, later]
        third = await engine.append(rows(SET, [("a", NOON + 3 * HOUR, [1.0])]))
        assert await engine.cursors.unshipped("store") == [late, later, (NOON + 3 * HOUR, NOON + 3 * HOUR + 1)]
        await engine.cursors.advance("store", second)
        await engine.cursors.advance("store", third)
        clock.advance(SETTLED_AFTER_S)
        assert await engine.cursors.unshipped("store") == []


async def test_what_waited_before_a_restart_is_found_after_it(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        await engine.cursors.register("store")
        await engine.append(rows(SET, [("a", NOON, [1.0])]), metric_sets=(SET,))
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        await engine.cursors.register("store")
        assert await engine.cursors.unshipped("store") == [(NOON, NOON + 1)]


async def test_what_was_shipped_just_before_a_restart_is_not_settled_after_it(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    async with Engine.open(tmp_path, clock=clock, settings=QUIET) as engine:
        await engine.cursors.register("store")
        for number in range(2):
            last = await engine.append(rows(SET, [("a", NOON + number * HOUR, [1.0])]), metric_sets=(SET,))
            clock.advance(SETTLED_AFTER_S)
            await engine.cursors.advance("store", last)
    async with Engine.open(tmp_path, clock=clock, settings=QUIET) as engine:
        assert await engine.cursors.register("store") == last
        assert await engine.cursors.unshipped("store") == [(NOON + HOUR, NOON + HOUR + 1)]
        assert engine.cursors.lost("store") == last - 1
        await engine.cursors.go_back("store", last - 1)
        await engine.cursors.advance("store", last)
        clock.advance(SETTLED_AFTER_S)
        assert await engine.cursors.unshipped("store") == []


async def test_a_look_costs_little_however_much_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store may be away for hours, and each query asks."""
    monkeypatch.setattr(unshipped, "MAX_KNOWN", 8)
    clock = ManualClock(NOON)
    async with Engine.open(tmp_path, clock=clock, settings=QUIET) as engine:
        await engine.cursors.register("store")
        sequences = [
            await engine.append(rows(SET, [("a", NOON + number * 1_000, [1.0])]), metric_sets=(SET,))
            for number in range(50)
        ]
        assert await engine.cursors.unshipped("store") == [(NOON, NOON + 49_001)]
        assert len(engine.cursors._followers["store"].unshipped._known) <= 8
        for number, sequence in enumerate(sequences):
            await engine.cursors.advance("store", sequence)
            clock.advance(SETTLED_AFTER_S)
            found = await engine.cursors.unshipped("store")
            if number < 49:
                ((start, end),) = found
                assert NOON + (number - 8) * 1_000 <= start <= NOON + (number + 1) * 1_000
                assert end == NOON + 49_001
        assert found == []


async def test_what_the_store_may_have_lost_is_unshipped_until_a_minute_after_it_was_shipped_again(
    tmp_path: Path,
) -> None:
    clock = ManualClock(NOON)
    first, second = ((NOON + number * HOUR, NOON + number * HOUR + 1) for number in range(2))
    async with Engine.open(tmp_path, clock=clock, settings=QUIET) as engine:
        await engine.cursors.register("store")
        for number in range(2):
            last = await engine.append(rows(SET, [("a", NOON + number * HOUR, [1.0])]), metric_sets=(SET,))
            await engine.cursors.advance("store", last)
            if not number:
                await engine.cursors.owe("store", engine.cursors.lost("store"))
        clock.advance(SETTLED_AFTER_S)
        assert await engine.cursors.unshipped("store") == [first, second], "the cursor goes back to before both"
    async with Engine.open(tmp_path, clock=clock, settings=QUIET) as engine:
        await engine.cursors.register("store")
        clock.advance(SETTLED_AFTER_S)
        assert await engine.cursors.unshipped("store") == [first, second], "after a restart, too"
        await engine.cursors.go_back("store", await engine.cursors.owed("store") or 0)
        await engine.cursors.advance("store", last)
        assert await engine.cursors.unshipped("store") == [first, second], "it may not show them yet"
        clock.advance(SETTLED_AFTER_S)
        assert await engine.cursors.unshipped("store") == []


async def test_who_asks_before_the_follower_has_begun_is_told_the_same(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        await engine.cursors.register("store")
        await engine.append(rows(SET, [("a", NOON, [1.0])]), metric_sets=(SET,))
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        asked = [engine.cursors.unshipped("store") for _ in range(3)]
        assert await asyncio.gather(*asked) == [[(NOON, NOON + 1)]] * 3


async def test_followers_do_not_disturb_each_other(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    async with Engine.open(tmp_path, clock=clock, settings=QUIET) as engine:
        for name in ("fast", "slow"):
            await engine.cursors.register(name)
        sequence = await engine.append(rows(SET, [("a", NOON, [1.0])]), metric_sets=(SET,))
        await engine.cursors.advance("fast", sequence)
        clock.advance(SETTLED_AFTER_S)
        assert await engine.cursors.unshipped("fast") == []
        assert await engine.cursors.unshipped("slow") == [(NOON, NOON + 1)]


async def test_what_a_store_lost_counts_as_unshipped_again(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    async with Engine.open(tmp_path, clock=clock, settings=QUIET) as engine:
        await engine.cursors.register("store")
        first = await engine.append(rows(SET, [("a", NOON, [1.0])]), metric_sets=(SET,))
        await engine.cursors.advance("store", first)
        clock.advance(SETTLED_AFTER_S)
        second = await engine.append(rows(SET, [("a", NOON + HOUR, [1.0])]))
        await engine.cursors.advance("store", second)
        settled = engine.cursors.lost("store")
        assert await engine.cursors.go_back("store", settled) == first, "a minute ago it had the first"
        clock.advance(10 * SETTLED_AFTER_S)
        assert await engine.cursors.unshipped("store") == [(NOON + HOUR, NOON + HOUR + 1)]
        assert (await engine.status()).followers[0].cursor == first


@pytest.mark.parametrize("again", [False, True], ids=["at once", "after a restart"])
async def test_what_the_journal_let_go_before_it_was_shipped_is_found_in_blocks(tmp_path: Path, again: bool) -> None:
    """At its limit the journal does not wait for a follower: what it lacks is in blocks alone, and still lacking."""
    clock, settings = ManualClock(NOON + 3 * HOUR), replace(QUIET, journal_bytes_limit=0)
    ranges = [(NOON, NOON + 1), (NOON + HOUR, NOON + HOUR + 1), (NOON + 3 * HOUR, NOON + 3 * HOUR + 1)]
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        await engine.append(rows(SET, [("a", NOON - HOUR, [1.0])]), metric_sets=(SET,))
        await engine.maintain(everything=True)
        cursor = await engine.cursors.register("store")
        for start, _ in ranges[:2]:
            await engine.append(rows(SET, [("a", start, [1.0])]))
            engine._store.close_heads(lambda: False, everything=True)
        await engine._sweep()
        assert engine.first_sequence == cursor + 3
        await engine.append(rows(SET, [("a", ranges[2][0], [1.0])]))
        if not again:
            assert await engine.cursors.unshipped("store") == ranges
            await engine.cursors.advance("store", cursor + 1)
            clock.advance(SETTLED_AFTER_S)
            assert set(ranges[1:]) <= set(await engine.cursors.unshipped("store"))
            await engine.cursors.advance("store", cursor + 2)
            clock.advance(SETTLED_AFTER_S)
            assert await engine.cursors.unshipped("store") == ranges[2:]
    if again:
        async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
            await engine.cursors.register("store")
            assert await engine.cursors.unshipped("store") == ranges


async def test_what_the_journal_let_go_at_its_limit_is_still_unshipped(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    settings = EngineSettings(
        maintenance_interval_s=1e9, journal_keep_s=0.0, journal_bytes_limit=1, sparse_points_a_day=0
    )
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        await engine.cursors.register("store")
        batch = rows(SET, [("a", NOON - 24 * HOUR, [1.0]), ("a", NOON, [1.0]), ("b", NOON + 1, [1.0])])
        last = await engine.append(batch, metric_sets=(SET,))
        clock.advance(1)
        await engine.maintain(everything=True)
        assert engine.first_sequence == last + 1, "they are in blocks alone"
        held = [(NOON - 24 * HOUR, NOON - 24 * HOUR + 1), (NOON, NOON + 2)]
        assert await engine.cursors.unshipped("store") == held
        await engine.append(rows(SET, [("a", NOON + HOUR, [1.0])]))
        assert await engine.cursors.unshipped("store") == [*held, (NOON + HOUR, NOON + HOUR + 1)]
        await engine.cursors.advance("store", last)
        clock.advance(SETTLED_AFTER_S)
        assert await engine.cursors.unshipped("store") == [(NOON + HOUR, NOON + HOUR + 1)]


async def test_a_hole_in_the_journal_of_a_backup_is_unshipped(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        await engine.cursors.register("store")
        for number in range(3):
            await engine.append(rows(SET, [("a", NOON + number * HOUR, [1.0])]), metric_sets=(SET,))
        await engine.maintain(everything=True)
    with closing(apsw.Connection(str(tmp_path / "journal.db"))) as journal:
        journal.execute("DELETE FROM batches WHERE sequence = 2")
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        await engine.cursors.register("store")
        ((start, end),) = await engine.cursors.unshipped("store")
        assert start <= NOON + HOUR < end
