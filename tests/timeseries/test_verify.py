"""Verify names what is damaged, and is silent on what is whole."""

import asyncio
import re
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from runtime.clock import ManualClock
from services.timeseries.engine import Engine
from services.timeseries.engine.verify import Damage, Verifier
from tests.timeseries.engine.model import rows
from tests.timeseries.stores import NOON, QUIET, SET, fill, flip, verify


async def test_verify_names_what_is_damaged_and_nothing_else(tmp_path: Path) -> None:
    await fill(tmp_path)
    verified, damaged = verify(tmp_path)
    assert damaged == []
    assert (verified.partitions, verified.blocks, verified.points, verified.batches) == (2, 6, 900, 1)
    assert verified.bytes > 20_000
    first, second = sorted((tmp_path / "blocks").glob("*.db"))
    flip(first, "blocks", "id = 2", -30)
    name = f"blocks/{first.name}: block 2 (server b): "
    assert verify(tmp_path)[1] == [f"{name}column memory_usage: it is not what was written (checksum or encoding)"]
    flip(second, "blocks", "id = 1", 12)
    assert verify(tmp_path)[1][1].startswith(f"blocks/{second.name}: block 1 (server a): all columns: the checksum")
    flip(tmp_path / "journal.db", "batches", "row_count = 1", -3)
    journal, *others = verify(tmp_path)[1]
    assert journal == "journal.db: batch 7: the checksum does not match" and len(others) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE blocks SET row_count = 49 WHERE id = 1", r"block 1 \(server a\): it has 50 rows, not 49"),
        ("UPDATE blocks SET points = 1 WHERE id = 1", r"block 1 \(server a\): it has 150 points, not 1"),
        ("UPDATE blocks SET cohort = 3 WHERE id = 1", r"block 1 \(server c\): all columns: the checksum"),
        ("UPDATE blocks SET cohort = 9 WHERE id = 1", r"block 1 \(server unknown\): its cohort 9 is not known"),
        ("UPDATE blocks SET first_ms = first_ms + 1 WHERE id = 1", r"block 1 \(server a\): its times are not those"),
        ("UPDATE blocks SET max_sequence = 2 WHERE id = 1", r"its sequence 2 is past its head's blocked_through 1"),
        ("UPDATE heads SET blocked_through = 99 WHERE cohort = 1", "blocked through 99, past the end 7"),
        ("UPDATE meta SET value = 'x' WHERE key = 'identity'", "it belongs to another journal"),
        ("UPDATE meta SET value = value + 1 WHERE key = 'day'", "it has rows of another day"),
        ("DROP TABLE meta", "it cannot be read"),
    ],
)
async def test_verify_finds_tables_that_say_something_else(tmp_path: Path, change: str, said: str) -> None:
    await fill(tmp_path)
    path = min((tmp_path / "blocks").glob("*.db"))
    with apsw.Connection(str(path)) as database:
        database.execute(change)
    database.close()
    assert any(re.search(said, line) for line in verify(tmp_path)[1])


async def test_verify_finds_batches_that_are_gone(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        for number in range(5):
            await engine.append(rows(SET, [("a", NOON + number, [1.0, 2.0, 3.0])]), metric_sets=(SET,))
    with apsw.Connection(str(tmp_path / "journal.db")) as database:
        database.execute("DELETE FROM batches WHERE sequence IN (2, 3)")
    database.close()
    assert verify(tmp_path)[1] == ["journal.db: batch 2: no batches between 1 and 4"]


async def test_verify_finds_an_index_that_lacks_a_block_and_a_renamed_metric(tmp_path: Path) -> None:
    """Reads go by the index, and names by the set: neither has a checksum of its own."""
    await fill(tmp_path)
    path = min((tmp_path / "blocks").glob("*.db"))
    data = path.read_bytes()
    with closing(apsw.Connection(str(path))) as database:
        page, size = (
            database.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'blocks_by_cohort'").get,
            database.pragma("page_size"),
        )
    at = data.rindex(b"\x02", (page - 1) * size, page * size)
    path.write_bytes(data[:at] + b"\x09" + data[at + 1 :])
    assert any("SQLite says" in line or "cannot be read" in line for line in verify(tmp_path)[1])
    path.write_bytes(data)
    with closing(apsw.Connection(str(tmp_path / "journal.db"))) as database:
        database.execute("UPDATE metric_sets SET metrics = replace(metrics, 'cpu_usage', 'cpu_usagf')")
    assert verify(tmp_path)[1] == ["journal.db: metric set 1: its names are not those it was stored with"]


async def test_a_store_that_grows_while_it_is_read_is_not_called_damaged(tmp_path: Path) -> None:
    """The partition that is read after the journal has blocks of a server that the journal did not know then."""
    clock, loop = ManualClock(NOON), asyncio.get_running_loop()
    async with Engine.open(tmp_path, clock=clock, settings=QUIET) as engine:

        async def append(server: str) -> None:
            await engine.append(rows(SET, [(server, NOON, [1.0, 2.0, 3.0])]), metric_sets=(SET,))
            clock.advance(1)
            await engine.maintain(everything=True)

        def grow(name: str, done: int, total: int) -> None:
            if name == "journal.db" and done == total:
                asyncio.run_coroutine_threadsafe(append("new"), loop).result(10)

        await append("a")
        found: list[Damage] = []
        verified = await asyncio.to_thread(Verifier(tmp_path, found.append, grow).run)
    assert found == [] and verified.blocks == 2
