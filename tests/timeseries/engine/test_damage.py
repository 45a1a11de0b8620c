"""Bytes that rot on disk: what they held is counted and left out, everything else is answered."""

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import pytest

from runtime.clock import ManualClock
from runtime.errors import DataLoss, OpenManagerError, Unavailable
from services.timeseries.engine import Aggregation, Engine, EngineSettings, Query, block
from services.timeseries.engine import journal as journal_module
from services.timeseries.engine.merge import Merger
from services.timeseries.engine.partition import BlockGoneError, BlockInfo, Mark, Partition, UnusablePartitionError
from services.timeseries.engine.partitions import Partitions
from services.timeseries.engine.tiers import Tier
from services.timeseries.engine.upkeep import Rollups
from tests.timeseries import stores
from tests.timeseries.engine.model import EVERYTHING, Model, ask, assert_same, everything, metric_set, rows

NOON = 19_700 * 86_400_000 + 43_200_000
DAY_MS = 86_400_000
SET = metric_set("cpu_usage", "requests_total", "memory_usage")
SETTINGS = EngineSettings(sparse_points_a_day=0, maintenance_interval_s=1e9, journal_keep_s=0.0, head_rows=50)


async def fill(folder: Path) -> Model:
    """Three servers, two days, everything in blocks and the journal empty."""
    model, rng, clock = Model(), random.Random(1), ManualClock(NOON)
    async with Engine.open(folder, clock=clock, settings=SETTINGS) as engine:
        for day in range(2):
            for server in "abc":
                lines = [
                    (server, NOON + day * DAY_MS + n * 1_000, [rng.random(), n, rng.gauss(5, 1)]) for n in range(50)
                ]
                await engine.append(rows(SET, lines), metric_sets=(SET,))
                model.append(SET, rows(SET, lines))
        clock.advance(1)
        await engine.maintain(everything=True)
    return model


def files(folder: Path) -> list[Path]:
    return sorted((folder / "blocks").glob("*.db"))


async def test_one_damaged_column_leaves_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "FRAME_ROWS", 0)  # of a frame a group of columns is lost
    model = await fill(tmp_path)
    path = files(tmp_path)[0]
    with apsw.Connection(str(path)) as database:
        size, payload = database.execute("SELECT length(payload), payload FROM blocks LIMIT 1").fetchone()
    data = bytearray(path.read_bytes())
    at = data.index(payload[-40:])
    data[at + 20] ^= 0xFF
    path.write_bytes(data)
    with caplog.at_level(logging.ERROR):
        async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
            found = await everything(engine)
            assert await everything(engine) == found
            status = await engine.status()
    assert size > 40
    wanted = model.query(EVERYTHING)
    lost = [name for name in wanted if found.get(name) != wanted[name]]
    assert lost == [("a", "memory_usage")]
    assert len(found["a", "memory_usage"]) == 50
    assert status.damaged == 1 and status.last_error is not None
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 1


@pytest.mark.parametrize("seed", range(6))
async def test_any_damage_to_a_partition_stops_nobody(tmp_path: Path, seed: int) -> None:
    """Values that come back are right ones, the other day is whole, and new rows can be written."""
    model = await fill(tmp_path)
    rng = random.Random(seed)
    path = files(tmp_path)[0]
    data = bytearray(path.read_bytes())
    if seed == 0:
        data[:100] = b"this is no database" * 5 + b"     "
    elif seed == 1:
        del data[len(data) // 2 :]
    else:
        for _ in range(40):
            at = rng.randrange(8_192, len(data))
            data[at : at + 64] = bytes(rng.randrange(256) for _ in range(64))
    path.write_bytes(data)
    wanted = model.query(EVERYTHING)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        found = await everything(engine)
        for name, series in found.items():
            points = dict(wanted[name])
            assert all(points.get(time) == value for time, value in series)
            assert {time for time in points if time >= NOON + DAY_MS} <= {time for time, _ in series}
        assert found != wanted
        assert (await engine.status()).damaged > 0
        await engine.last_values()
        batch = rows(SET, [("a", NOON + 7, [1.0, 2.0, 3.0])])
        await engine.append(batch)
        await engine.maintain(everything=True)
        status = await engine.status()
        assert status.head_points == 0 or status.closing_fails
        assert (NOON + 7, 1.0) in (await everything(engine))["a", "cpu_usage"]
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        assert (NOON + 7, 1.0) in (await everything(engine))["a", "cpu_usage"]


@pytest.mark.parametrize("value", ["'x'", "CAST(x'96c2' AS TEXT)", "x'00'"])
@pytest.mark.parametrize("column", ["row_count", "max_sequence", "cohort"])
async def test_a_torn_row_costs_its_partition_and_no_start(tmp_path: Path, column: str, value: str) -> None:
    """SQLite gives what is there, whatever the table says that it is."""
    await fill(tmp_path)
    with closing(apsw.Connection(str(files(tmp_path)[0]))) as database:
        _change_schema(database, "blocks", "STRICT", "")
        database.execute(f"UPDATE blocks SET {column} = {value} WHERE id = (SELECT min(id) FROM blocks)")
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        found = await everything(engine)
        times = {time for series in found.values() for time, _ in series}
        assert {time for time in times if time > NOON + DAY_MS / 2} == {NOON + DAY_MS + n * 1_000 for n in range(50)}
        assert (await engine.status()).damaged > 0


async def test_a_torn_mark_is_counted_and_costs_no_start(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        await engine.append(rows(SET, [("a", NOON + n, [1.0, 2.0, 3.0]) for n in range(50)]), metric_sets=(SET,))
        await engine.maintain()
    with closing(apsw.Connection(str(files(tmp_path)[0]))) as database:
        _change_schema(database, "dirty", "STRICT", "")
        database.execute("INSERT INTO dirty VALUES (99, 1, ?, ?, 'x', 0)", (NOON, NOON))
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        assert (await engine.status()).damaged == 1


async def test_blocks_that_cannot_be_found_by_their_number_cost_their_partition(tmp_path: Path) -> None:
    model = await stores.fill(tmp_path)
    stores.hide_blocks(files(tmp_path)[0])
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=stores.QUIET) as engine, asyncio.timeout(60):
        found = await everything(engine)
        assert (await engine.status()).damaged == 1
    for name, series in found.items():
        other_day = [point for point in model.query(EVERYTHING)[name] if point[0] >= NOON + DAY_MS]
        assert series[-len(other_day) :] == other_day


async def test_a_block_that_is_listed_and_is_never_there_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking for what it was merged into would never end."""
    model = await fill(tmp_path)
    reader = Partition.reader
    with closing(apsw.Connection(str(files(tmp_path)[0]))) as database:
        ((number,),) = database.execute("SELECT min(id) FROM blocks")

    def without(partition: Partition, info: BlockInfo, *rest: Any) -> object:
        if (partition.day, info.id) == (NOON // DAY_MS, number):
            raise BlockGoneError(info.id)
        return reader(partition, info, *rest)

    monkeypatch.setattr(Partition, "reader", without)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine, asyncio.timeout(60):
        found = await everything(engine)
        assert await everything(engine) == found
        wanted = model.query(EVERYTHING)
        changed = {server for server, metric in wanted if found.get((server, metric)) != wanted[server, metric]}
        assert len(changed) == 1 and (await engine.status()).damaged == 1
        (server,) = changed
        assert [time for time, _ in found[server, "cpu_usage"]] == [NOON + DAY_MS + n * 1_000 for n in range(50)]


def _change_schema(database: apsw.Connection, table: str, old: str, new: str) -> None:
    """Lets a table hold what no table of ours may."""
    ((text,),) = database.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (table,)).fetchall()
    assert old in text
    database.pragma("writable_schema", 1)
    database.execute("UPDATE sqlite_schema SET sql = ? WHERE name = ?", (text.replace(old, new), table))
    database.execute("PRAGMA writable_schema = RESET")


@pytest.mark.parametrize("torn", [False, True])
async def test_a_damaged_journal_batch_is_counted_and_the_others_replayed(tmp_path: Path, torn: bool) -> None:
    model = Model()
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        for number in range(5):
            batch = rows(SET, [("a", NOON + number, [number, 1.0, 2.0])])
            await engine.append(batch, metric_sets=(SET,))
            if number != 2:
                model.append(SET, batch)
    database = apsw.Connection(str(tmp_path / "journal.db"))
    (payload,) = database.execute("SELECT payload FROM batches WHERE sequence = 3").fetchone()
    if torn:  # it ends before the payload's column does: SQLite reads NULL, whatever the table says
        _change_schema(database, "batches", "payload BLOB NOT NULL", "payload BLOB")
    broken = None if torn else payload[:-1] + bytes([payload[-1] ^ 1])
    database.execute("UPDATE batches SET payload = ? WHERE sequence = 3", (broken,))
    database.close()
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        assert_same(await everything(engine), model.query(EVERYTHING))
        assert (await engine.status()).damaged == 1
        sequences = []
        async for told in engine.tail(1):
            sequences.append((told.sequence, told.rows is not None))
            if told.sequence == 5:
                break
        assert sequences == [(1, True), (2, True), (3, False), (4, True), (5, True)]


async def test_blocks_of_another_journal_are_refused(tmp_path: Path) -> None:
    await fill(tmp_path / "one")
    await fill(tmp_path / "two")
    day = files(tmp_path / "one")[0]
    day.write_bytes((tmp_path / "two" / "blocks" / day.name).read_bytes())
    async with Engine.open(tmp_path / "one", clock=ManualClock(NOON), settings=SETTINGS) as engine:
        found = await everything(engine)
        assert {len(series) for series in found.values()} == {50}
        assert (await engine.status()).damaged == 1
    journal = tmp_path / "two" / "journal.db"
    for rest in (lambda: journal.write_bytes(b""), journal.unlink):
        rest()
        with pytest.raises(DataLoss, match=f"{journal} cannot be read .*missing or empty.*restore a backup"):
            async with Engine.open(tmp_path / "two", clock=ManualClock(NOON), settings=SETTINGS):
                pass


def _overwrite(path: Path) -> None:
    path.write_bytes(b"?" * 100 + path.read_bytes()[100:])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _garble(path: Path) -> None:
    with closing(apsw.Connection(str(path))) as db:
        db.execute("UPDATE metric_sets SET metrics = substr(metrics, 3)")


async def test_blocks_of_a_series_that_the_journal_has_lost_become_no_others(tmp_path: Path) -> None:
    await fill(tmp_path)
    _change("DELETE FROM cohorts WHERE id > 1")(tmp_path / "journal.db")
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        assert (await engine.status()).damaged == 1
        await engine.append(rows(SET, [("z", NOON, [1.0, 2.0, 3.0])]))
        await engine.maintain(everything=True)
        found = await everything(engine)
        assert {server for server, _ in found} == {"a", "z"}
        assert found["z", "cpu_usage"] == [(NOON, 1.0)] and len(found["a", "cpu_usage"]) == 100


async def test_blocks_of_a_series_that_the_journal_has_lost_stop_no_upkeep(tmp_path: Path) -> None:
    """They are to be rolled up, merged and shipped, and nothing says whose they are."""
    clock = ManualClock(NOON)
    lines = {server: [(server, NOON + n, [1.0, 2.0, 3.0]) for n in range(40)] for server in "ab"}
    settings = replace(SETTINGS, raw_retention_s=86_400.0)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        for _ in range(2):
            for server in "ba":
                await engine.append(rows(SET, lines[server]), metric_sets=(SET,))
            engine._store.close_heads(lambda: False, everything=True)
        await engine._sweep()
        assert engine.first_sequence == 5
    _change("DELETE FROM cohorts WHERE id = 2")(tmp_path / "journal.db")
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        await engine.maintain(everything=True)
        shipped = [part.rows.server_ids[0] async for part in engine.cursors.unsent(0, 4)]
        assert shipped == ["b"]
        found = await ask(engine, COUNTS)
        assert found["b", "cpu_usage"] == [(NOON, 40.0)]
        await engine.append(rows(SET, [("b", NOON + 2 * DAY_MS, [1.0, 2.0, 3.0])]))
        clock.advance(3 * 86_400)
        await engine.maintain(everything=True)
        days = engine._store.partitions.days(0, 1 << 20)
        assert days == [NOON // DAY_MS + 2], "the day of both has gone by its age"


async def test_a_batch_of_a_series_that_the_journal_has_lost_stops_the_start(tmp_path: Path) -> None:
    """It was acknowledged and is whole: left out it would be swept before long."""
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        await engine.append(rows(SET, [("a", NOON, [1.0, 2.0, 3.0])]), metric_sets=(SET,))
    _change("DELETE FROM cohorts")(tmp_path / "journal.db")
    with pytest.raises(DataLoss, match=r"batch 1 is of a series that is not named in it.*restore a backup"):
        async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS):
            pass


def _change(statement: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with closing(apsw.Connection(str(path))) as db:
            db.execute(statement)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        _overwrite,
        _cut,
        _garble,
        _change("DELETE FROM meta WHERE key = 'swept_through'"),
        _change("PRAGMA ignore_check_constraints = 1; UPDATE meta SET value = 'x' WHERE key = 'swept_through'"),
        _change("INSERT INTO ended VALUES (7, 1, 1)"),
    ],
    ids=["overwritten", "cut", "a name", "a number", "a text for a number", "a tier"],
)
async def test_a_journal_that_cannot_be_read_is_named_with_the_way_out(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    await fill(tmp_path)
    journal = tmp_path / "journal.db"
    damage(journal)
    with pytest.raises(DataLoss, match=rf"{journal} cannot be read \(.*restore a backup"):
        async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS):
            pass


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (apsw.SQLITE_FULL, "the disk of .* is full: make room and start again"),
        (apsw.SQLITE_CANTOPEN, "the store in .* cannot be opened: "),
    ],
)
async def test_why_a_store_does_not_open_is_said_of_the_store_and_of_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    def failing(*_: object) -> None:
        raise apsw.exception_for(code)

    monkeypatch.setattr(journal_module, "connect", failing)
    with pytest.raises(OpenManagerError, match=said):
        async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS):
            pass


@pytest.mark.parametrize(("code", "passes"), [(apsw.SQLITE_IOERR_READ, False), (apsw.SQLITE_IOERR_SHMSIZE, True)])
async def test_a_bad_sector_is_left_out_and_a_failure_that_may_pass_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, passes: bool
) -> None:
    model = await fill(tmp_path)

    def failing(*_: object) -> None:
        raise apsw.exception_for(code)

    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        with monkeypatch.context() as patches:
            patches.setattr(Partition, "reader", failing)
            if passes:
                with pytest.raises(Unavailable):
                    await everything(engine)
            else:
                assert await everything(engine) == {}
        assert (await engine.status()).damaged == (0 if passes else 2)
        assert_same(await everything(engine), model.query(EVERYTHING))


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


COUNTS = Query(metrics=None, start_ms=0, end_ms=1 << 62, step_ms=300_000, aggregation=Aggregation.COUNT)


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
