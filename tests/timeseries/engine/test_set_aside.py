"""Files that are set aside while the engine works on them: what was made of them stays, and new ones lose nothing."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.clock import ManualClock
from services.timeseries.engine import Aggregation, Engine, Query
from services.timeseries.engine.merge import Merger
from services.timeseries.engine.partition import Mark, UnusablePartitionError
from services.timeseries.engine.partitions import Partitions
from services.timeseries.engine.tiers import Tier
from services.timeseries.engine.upkeep import Rollups
from tests.timeseries.engine.damaged import COUNTS, DAY_MS, NOON, SET, SETTINGS, files
from tests.timeseries.engine.model import Model, ask, assert_same, everything, rows


@pytest.mark.parametrize("again", [False, True], ids=["at once", "after a restart"])
async def test_what_was_made_of_a_lost_day_stays_and_its_marks_stop_nobody(tmp_path: Path, again: bool) -> None:
    """Its file is set aside, and rows come for it: for a bucket that was made of others, and for one that was not."""
    model, clock = Model(), ManualClock(NOON + 2 * DAY_MS)
    counts = Query(metrics=None, start_ms=0, end_ms=1 << 62, step_ms=300_000, aggregation=Aggregation.COUNT)

    async def put(engine: Engine, *times: int, known: bool = True) -> None:
        batch = rows(SET, [("a", time, [1.0, 2.0, 3.0]) for time in times])
        await engine.append(batch, metric_sets=(SET,))
        if known:
            model.append(SET, batch)

    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        await put(engine, *range(NOON, NOON + 30_000, 1_000))
        await engine.maintain(everything=True)
        await put(engine, NOON + 600_000, NOON + 3_600_000)
        engine._store.close_heads(lambda: False, everything=True)
        assert len(engine._store.tiers[0].marks) == 2
        engine._store.partitions.close()  # whoever has it open would not notice
        path = files(tmp_path)[0]
        path.with_name(f"{path.name}-wal").unlink(missing_ok=True)
        path.write_bytes(b"this is no database" * 1_000)
        await put(engine, NOON + 60_000, known=False)  # of a bucket whose other points are lost
        await put(engine, NOON + 7_200_000, NOON + DAY_MS)
        if not again:
            await engine.maintain(everything=True)
            assert len(engine._store.tiers[0].marks) == 0
    if again:
        async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
            await engine.maintain(everything=True)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        assert [path.name for path in (tmp_path / "blocks").glob("*unusable*.db*")] == []
        assert len(list((tmp_path / "blocks").glob("*unusable-1"))) == 1
        assert len(engine._store.tiers[0].marks) == 0
        if not again:  # else the journal still had them when it was replayed
            for series in model.series.values():
                del series[NOON + 600_000], series[NOON + 3_600_000]
        found = await ask(engine, counts)
        assert_same(found, model.query(counts), Aggregation.COUNT)


async def test_a_file_that_is_set_aside_amid_a_merge_costs_the_new_one_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of the blocks that were to be replaced are given again in the new file."""
    merged, calls, many = Merger._merged, [0], range(NOON + 10, NOON + 160)  # two blocks of each server
    async with Engine.open(tmp_path, clock=ManualClock(NOON + DAY_MS), settings=SETTINGS) as engine:
        store = engine._store

        async def put(*times: int) -> None:
            for server in "ab":
                await engine.append(rows(SET, [(server, t, [1.0, 2.0, 3.0]) for t in times]), metric_sets=(SET,))

        def then_lost(*words: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == 2:
                store.partitions._set_aside(NOON // DAY_MS, UnusablePartitionError("planted"))
                store.close_heads(lambda: False, everything=True)
            return merged(*words, **options)

        for n in range(3):
            await put(NOON + n)
            store.close_heads(lambda: False, everything=True)
        engine._close_wanted = asyncio.Event()  # nobody waits for this one: what comes now stays in the heads
        await put(*many)
        monkeypatch.setattr(Merger, "_merged", then_lost)
        engine._merger.run(everything=True)
        assert calls[0] >= 2
        found = await everything(engine)
    assert {name: [time for time, _ in series] for name, series in found.items() if name[1] == "cpu_usage"} == {
        (server, "cpu_usage"): list(many) for server in "ab"
    }


async def test_a_file_that_is_set_aside_amid_roll_ups_costs_the_new_one_no_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of the marks that are done are given again in the new file, to rows that no roll-up has."""
    clear, model, late = Partitions.clear, Model(), NOON + 3_600_000
    async with Engine.open(tmp_path, clock=ManualClock(NOON + DAY_MS), settings=SETTINGS) as engine:
        store = engine._store

        async def put(start: int) -> None:
            batch = rows(SET, [("a", start + n, [1.0, 2.0, 3.0]) for n in range(40)])
            await engine.append(batch, metric_sets=(SET,))
            model.append(SET, batch)

        def lost_before(partitions: Partitions, marks: list[Mark]) -> None:
            if partitions is store.partitions and store.heads.bytes:
                partitions._set_aside(NOON // DAY_MS, UnusablePartitionError("planted"))
                store.close_heads(lambda: False, everything=True)
            clear(partitions, marks)

        await put(NOON)
        store.close_heads(lambda: False, everything=True)
        await put(late)
        monkeypatch.setattr(Partitions, "clear", lost_before)
        engine._rollups.run(everything=True)
        assert store.heads.bytes == 0
        assert_same(await ask(engine, COUNTS), model.query(COUNTS), Aggregation.COUNT)
        await engine.maintain(everything=True)
        assert len(store.tiers[0].marks) == 0
        assert_same(await ask(engine, COUNTS), model.query(COUNTS), Aggregation.COUNT)


def _spoil(engine: Engine, path: Path) -> None:
    engine._store.partitions.close()  # whoever has it open would not notice
    path.with_name(f"{path.name}-wal").unlink(missing_ok=True)
    path.write_bytes(b"this is no database" * 1_000)


@pytest.mark.parametrize("by_age", [True, False], ids=["by age", "by size"])
async def test_a_day_that_goes_and_is_found_unusable_leaves_its_roll_ups_as_they_are(
    tmp_path: Path, by_age: bool
) -> None:
    """Its heads become blocks first, in a new file, and from those few rows nothing may be made anew."""
    late_row = rows(SET, [("a", NOON + 60_000, [1.0, 2.0, 3.0])])
    settings = replace(SETTINGS, late_grace_s=0.0, raw_retention_s=5 * 86_400.0 if by_age else None)
    clock = ManualClock(NOON + DAY_MS)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        for day in range(2):
            lines = [("a", NOON + day * DAY_MS + n, [1.0, 2.0, 3.0]) for n in range(40)]
            await engine.append(rows(SET, lines), metric_sets=(SET,))
        await engine.maintain(everything=True)
        before = await ask(engine, COUNTS)
        await engine.append(late_row)
        _spoil(engine, files(tmp_path)[0])
        clock.advance(5 * 86_400)
        if not by_age:
            engine._store.settings = replace(settings, disk_bytes_limit=1)
        await engine._keep_up(everything=False)
        assert len(list((tmp_path / "blocks").glob("*unusable-1"))) == 1
        assert engine._retention.evicted > 0
        assert_same(await ask(engine, COUNTS), before)


async def test_a_file_that_is_set_aside_amid_roll_ups_leaves_those_that_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the rows of a bucket does not make it anew."""
    due = Rollups._due
    async with Engine.open(tmp_path, clock=ManualClock(NOON + DAY_MS), settings=SETTINGS) as engine:
        store = engine._store

        async def put(*times: int) -> None:
            await engine.append(rows(SET, [("a", time, [1.0, 2.0, 3.0]) for time in times]), metric_sets=(SET,))

        def then_lost(rollups: Rollups, tier: Tier, **options: Any) -> Any:
            found = due(rollups, tier, **options)
            if store.heads.bytes:
                store.partitions._set_aside(NOON // DAY_MS, UnusablePartitionError("planted"))
                store.close_heads(lambda: False, everything=True)
            return found

        await put(*range(NOON, NOON + 40))
        await engine.maintain(everything=True)
        before = await ask(engine, COUNTS)
        await put(NOON + 60_000)
        store.close_heads(lambda: False, everything=True)
        await put(NOON + 60_001)
        monkeypatch.setattr(Rollups, "_due", then_lost)
        for _ in range(2):
            engine._upkeep_once(everything=True)
        assert store.heads.bytes == 0 and len(store.tiers[0].marks) == 0
        assert_same(await ask(engine, COUNTS), before)


async def test_what_a_start_finds_lost_of_many_days_stays_as_it_is_on_each_of_them(tmp_path: Path) -> None:
    """The few rows that come for any day of it make nothing anew."""
    settings, days = replace(SETTINGS, sparse_points_a_day=1_000_000), (0, 1, 7)
    start = NOON // DAY_MS // 32 * 32 * DAY_MS
    clock = ManualClock(start + 9 * DAY_MS)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        for day in days:
            lines = [("a", start + day * DAY_MS + n, [1.0, 2.0, 3.0]) for n in range(40)]
            await engine.append(rows(SET, lines), metric_sets=(SET,))
        await engine.maintain(everything=True)
        before = await ask(engine, COUNTS)
        (path,) = files(tmp_path)
        _spoil(engine, path)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        lines = [("a", start + day * DAY_MS + 60_000, [1.0, 2.0, 3.0]) for day in days]
        assert (await engine.too_late(["a"] * len(days), rows(SET, lines).times_ms))[0].tolist() == [False] * len(days)
        await engine.append(rows(SET, lines))
        await engine.maintain(everything=True)
        assert len(list((tmp_path / "blocks").glob("*unusable-1"))) == 1
        assert_same(await ask(engine, COUNTS), before)


async def test_what_a_start_finds_lost_is_noted_by_it(tmp_path: Path) -> None:
    """It may be the only thing that it does: the next one does not find the file any more."""
    clock = ManualClock(NOON + DAY_MS)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        lines = [("a", NOON + n, [1.0, 2.0, 3.0]) for n in range(40)]
        await engine.append(rows(SET, lines), metric_sets=(SET,))
        await engine.maintain(everything=True)
        before = await ask(engine, COUNTS)
        await engine.append(rows(SET, [("a", NOON + 60_000, [1.0, 2.0, 3.0])]))
        _spoil(engine, files(tmp_path)[0])
    for _ in range(2):
        async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
            assert len(list((tmp_path / "blocks").glob("*unusable-1"))) == 1
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        await engine.maintain(everything=True)
        assert_same(await ask(engine, COUNTS), before)


@pytest.mark.parametrize("tier", ["blocks", "rollup-5m", "rollup-1h"])
async def test_a_file_that_is_set_aside_is_told_for_as_long_as_it_is_kept(tmp_path: Path, tier: str) -> None:
    """What it held is missing in every answer, and nobody would know."""
    clock = ManualClock(NOON + DAY_MS)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        lines = [("a", NOON + n, [1.0, 2.0, 3.0]) for n in range(40)]
        await engine.append(rows(SET, lines), metric_sets=(SET,))
        await engine.maintain(everything=True)
        (path,) = (tmp_path / tier).glob("*.db")
        for of in engine._store.tiers:
            of.partitions.close()
        path.with_name(f"{path.name}-wal").unlink(missing_ok=True)
        path.write_bytes(b"this is no database" * 1_000)
        await engine.append(rows(SET, [("a", NOON + 3_600_000, [1.0, 2.0, 3.0])]))
        await engine.maintain(everything=True)
        (aside,) = (tmp_path / tier).glob("*unusable-1")
        assert (await engine.status()).damaged == 1
    for kept in (True, False):
        if not kept:
            aside.unlink()
        async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
            await engine.maintain(everything=True)
            assert (await engine.status()).damaged == int(kept)


@pytest.mark.parametrize("tier", ["rollup-5m", "rollup-1h"])
async def test_roll_ups_that_are_lost_are_made_again_of_the_points_and_refuse_no_row(tmp_path: Path, tier: str) -> None:
    """The hour that goes on had been made of its first part, which was all that it ever had after that."""
    model, clock = Model(), ManualClock(NOON)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:

        async def put(*minutes: int) -> None:
            batch = rows(SET, [("a", NOON + minute * 60_000, [1.0, 2.0, 3.0]) for minute in minutes])
            late, endings = await engine.too_late(batch.server_ids, batch.times_ms)
            assert not late.any()
            await engine.append(batch, metric_sets=(SET,), endings=endings)
            model.append(SET, batch)

        async def compare() -> None:
            for step_ms in (300_000, 3_600_000):
                query = replace(COUNTS, step_ms=step_ms)
                assert_same(await ask(engine, query), model.query(query), Aggregation.COUNT)

        await put(*range(20))
        await engine.maintain(everything=True)
        (path,) = (tmp_path / tier).glob("*.db")
        for of in engine._store.tiers:
            of.partitions.close()
        path.with_name(f"{path.name}-wal").unlink(missing_ok=True)
        path.write_bytes(b"this is no database" * 1_000)
        await put(25)
        await engine.maintain(everything=True)
        assert len(list((tmp_path / tier).glob("*unusable-1"))) == 1
        await put(30)
        await compare()
        await engine.maintain(everything=True)
        await engine.maintain(everything=True)
        assert not any(len(of.marks) for of in engine._store.tiers)
        await compare()
