"""A journal whose bytes rot, or that is not the blocks' own: nothing becomes another's, and what to do is said."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import apsw
import pytest

from runtime.clock import ManualClock
from runtime.errors import DataLoss, OpenManagerError
from services.timeseries.engine import Engine
from services.timeseries.engine import journal as journal_module
from tests.timeseries.engine.damaged import COUNTS, DAY_MS, NOON, SET, SETTINGS, change_by, change_schema, files, fill
from tests.timeseries.engine.model import EVERYTHING, Model, ask, assert_same, everything, rows


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
        change_schema(database, "batches", "payload BLOB NOT NULL", "payload BLOB")
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
    change_by("DELETE FROM cohorts WHERE id > 1")(tmp_path / "journal.db")
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
    change_by("DELETE FROM cohorts WHERE id = 2")(tmp_path / "journal.db")
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
    change_by("DELETE FROM cohorts")(tmp_path / "journal.db")
    with pytest.raises(DataLoss, match=r"batch 1 is of a series that is not named in it.*restore a backup"):
        async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS):
            pass


@pytest.mark.parametrize(
    "damage",
    [
        _overwrite,
        _cut,
        _garble,
        change_by("DELETE FROM meta WHERE key = 'swept_through'"),
        change_by("PRAGMA ignore_check_constraints = 1; UPDATE meta SET value = 'x' WHERE key = 'swept_through'"),
        change_by("INSERT INTO ended VALUES (7, 1, 1)"),
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
