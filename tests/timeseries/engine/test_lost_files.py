"""Files of a store that are not there any more: it is told, what was made of them stays, what can be made again is."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import apsw
import pytest

from runtime.clock import ManualClock
from services.timeseries.engine import Aggregation, Engine, EngineSettings
from tests.timeseries.engine.damaged import COUNTS, DAY_MS, NOON, SET, SETTINGS, change_by, files, fill
from tests.timeseries.engine.model import Model, ask, assert_same, everything, rows
from tests.timeseries.stores import back_up, restore, verify

HOURS = replace(COUNTS, step_ms=3_600_000)
LATE = rows(SET, [("a", NOON + 60_000, [1.0, 2.0, 3.0])])
"""Of a bucket that was made of others."""


async def test_a_day_that_is_gone_is_told_and_its_roll_ups_stay(tmp_path: Path) -> None:
    await fill(tmp_path)
    clock, path = ManualClock(NOON + 2 * DAY_MS), files(tmp_path)[0]
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        before = [await ask(engine, COUNTS), await ask(engine, HOURS)]
    path.unlink()
    assert verify(tmp_path)[1] == [f"blocks/{path.name}: it is not there, and nothing says that it went"]
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        status = await engine.status()
        assert status.damaged == 1 and status.last_error is not None
        assert f"{path.name} is not there any more" in status.last_error.message
        assert (await engine.too_late(["a"], LATE.times_ms))[0].tolist() == [True]
        await engine.append(LATE)  # as one that slipped in
        await engine.maintain(everything=True)
        assert [await ask(engine, COUNTS), await ask(engine, HOURS)] == before
    assert verify(tmp_path)[1] == []
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        assert (await engine.status()).damaged == 0


async def test_what_the_journal_still_has_of_a_day_that_is_gone_comes_back(tmp_path: Path) -> None:
    model, settings = Model(), replace(SETTINGS, journal_keep_s=3_600.0)
    batch = rows(SET, [("a", NOON + n * 1_000, [1.0, 2.0, 3.0]) for n in range(50)])
    model.append(SET, batch)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        await engine.append(batch, metric_sets=(SET,))
        await engine.maintain(everything=True)
        assert (await engine.status()).head_points == 0
    files(tmp_path)[0].unlink()
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        assert await everything(engine) == {name: sorted(points.items()) for name, points in model.series.items()}


@pytest.mark.parametrize("folder", ["rollup-5m", "rollup-1h"])
@pytest.mark.parametrize("how", ["gone", "empty", "garbage"])
async def test_lost_roll_ups_are_made_anew_of_what_is_there(tmp_path: Path, folder: str, how: str) -> None:
    model = await fill(tmp_path)
    clock = ManualClock(NOON + 2 * DAY_MS)
    (path,) = (tmp_path / folder).glob("*.db")
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if how == "empty" else b"this is no database" * 1_000)
    assert len(verify(tmp_path)[1]) == 1
    for again in range(3):
        async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
            assert (await engine.too_late(["a"], LATE.times_ms))[0].tolist() == [False]
            for query in (COUNTS, HOURS):
                assert_same(await ask(engine, query), model.query(query), Aggregation.COUNT)
            if again:
                await engine.maintain(everything=True)
                for query in (COUNTS, HOURS):
                    assert_same(await ask(engine, query), model.query(query), Aggregation.COUNT)
    for aside in (tmp_path / folder).glob("*.unusable-*"):  # it is counted for as long as it is kept
        if not aside.name.endswith(("-wal", "-shm")):
            assert verify(tmp_path)[1] == [f"{folder}/{aside.name}: it was set aside, and what it held is left out"]
        aside.unlink()
    verified, damages = verify(tmp_path)
    assert damages == [] and verified.tiers[folder].points > 0
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        assert (await engine.status()).damaged == 0


async def test_lost_roll_ups_of_days_whose_points_went_are_not_made_of_the_few_that_came_later(tmp_path: Path) -> None:
    """What was made of them in turn stays."""
    await fill(tmp_path)
    settings = replace(SETTINGS, raw_retention_s=86_400.0, late_grace_s=0.0)
    clock = ManualClock(NOON + 2 * DAY_MS)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        await engine.maintain(everything=True)
        assert (await engine.status()).evicted_partitions == 1
        before = await ask(engine, HOURS)
    (path,) = (tmp_path / "rollup-5m").glob("*.db")
    path.unlink()
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        assert (await engine.status()).damaged == 1
        await engine.append(LATE)
        await engine.maintain(everything=True)
        assert await ask(engine, HOURS) == before
        fives = await ask(engine, COUNTS)
        assert sum(count for _, count in fives["b", "cpu_usage"]) == 50


@pytest.mark.parametrize("by_age", [True, False], ids=["by age", "by size"])
async def test_what_retention_takes_is_not_called_lost(tmp_path: Path, by_age: bool) -> None:
    await fill(tmp_path)
    settings = replace(SETTINGS, late_grace_s=0.0, raw_retention_s=86_400.0 if by_age else None)
    clock = ManualClock(NOON + 2 * DAY_MS)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        if not by_age:
            engine._store.settings = replace(settings, disk_bytes_limit=1)
        await engine._keep_up(everything=False)
        assert len(files(tmp_path)) == 1
    assert verify(tmp_path)[1] == []
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        assert (await engine.status()).damaged == 0


async def test_a_backup_knows_of_its_own_files_alone(tmp_path: Path) -> None:
    await fill(tmp_path / "live")
    clock = ManualClock(NOON + 2 * DAY_MS)
    files(tmp_path / "live")[0].write_bytes(b"this is no database" * 1_000)
    assert len(back_up(tmp_path / "live", tmp_path / "backup").left_out) == 1
    restore(tmp_path / "backup", tmp_path / "store")
    assert verify(tmp_path / "store")[1] == []
    files(tmp_path / "store")[0].unlink()
    assert len(verify(tmp_path / "store")[1]) == 1
    async with Engine.open(tmp_path / "store", clock=clock, settings=SETTINGS) as engine:
        assert (await engine.status()).damaged == 1


async def test_an_older_journal_that_knows_only_of_long_files_is_brought_up_to_date(tmp_path: Path) -> None:
    settings: EngineSettings = replace(SETTINGS, sparse_points_a_day=1_000_000)
    clock = ManualClock(NOON)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        await engine.append(LATE, metric_sets=(SET,))
        await engine.maintain(everything=True)
        ((_, first),) = [of for of in engine._store.journal.partitions if of[0] == 0]
    older = "CREATE TABLE spans (day INTEGER PRIMARY KEY, days INTEGER NOT NULL) STRICT"
    change_by(f"DROP TABLE partitions; {older}; INSERT INTO spans VALUES ({first}, 32)")(tmp_path / "journal.db")
    assert verify(tmp_path)[1] == []
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        assert engine._store.journal.partitions == {(0, first): 32}
        await engine.maintain()
        assert len(engine._store.journal.partitions) == 3
    with closing(apsw.Connection(str(tmp_path / "journal.db"))) as journal:
        assert not journal.table_exists("main", "spans")


@pytest.mark.parametrize("folder", ["blocks", "rollup-5m"])
async def test_a_backup_names_what_is_gone_and_keeps_what_was_made_of_it(tmp_path: Path, folder: str) -> None:
    model = await fill(tmp_path / "live")
    path = min((tmp_path / "live" / folder).glob("*.db"))
    path.unlink()
    assert back_up(tmp_path / "live", tmp_path / "backup").left_out == (f"{folder}/{path.name}",)
    restore(tmp_path / "backup", tmp_path / "store")
    async with Engine.open(tmp_path / "store", clock=ManualClock(NOON + 2 * DAY_MS), settings=SETTINGS) as engine:
        await engine.append(LATE)
        if folder != "blocks":
            model.append(SET, LATE)
        await engine.maintain(everything=True)
        for query in (COUNTS, HOURS):
            assert_same(await ask(engine, query), model.query(query), Aggregation.COUNT)


@pytest.mark.parametrize("folder", ["rollup-5m", "rollup-1h"])
async def test_roll_ups_that_a_backup_had_to_leave_out_are_made_anew(tmp_path: Path, folder: str) -> None:
    model = await fill(tmp_path / "live")
    (path,) = (tmp_path / "live" / folder).glob("*.db")
    path.write_bytes(b"this is no database" * 1_000)
    assert back_up(tmp_path / "live", tmp_path / "backup").left_out == (f"{folder}/{path.name}",)
    assert verify(tmp_path / "backup")[1] == []
    assert restore(tmp_path / "backup", tmp_path / "store").damaged == 0
    async with Engine.open(tmp_path / "store", clock=ManualClock(NOON + 2 * DAY_MS), settings=SETTINGS) as engine:
        assert (await engine.status()).damaged == 0
        for _ in range(2):
            for query in (COUNTS, HOURS):
                assert_same(await ask(engine, query), model.query(query), Aggregation.COUNT)
            await engine.maintain(everything=True)
    verified, damages = verify(tmp_path / "store")
    assert damages == [] and verified.tiers[folder].points > 0
