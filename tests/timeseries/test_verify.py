"""Verify names what is damaged, and is silent on what is whole."""

import asyncio
import dataclasses
import math
import os
import random
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import apsw
import numpy as np
import pytest

from fleet.model import MetricKind
from runtime.clock import ManualClock
from runtime.sqlite import fetch
from services.timeseries.archive.verify import Damage, Verifier
from services.timeseries.engine import Engine, block
from services.timeseries.engine.database import connect_read_only
from services.timeseries.engine.head import Chunk
from services.timeseries.engine.rollup import FIELDS, Field
from tests.timeseries.engine.model import metric_set, rows
from tests.timeseries.stores import (
    NOON,
    OTHER_SET,
    QUIET,
    SET,
    as_before_roll_ups,
    fill,
    flip,
    hide_blocks,
    ignore,
    verify,
)


async def test_verify_names_what_is_damaged_and_nothing_else(tmp_path: Path) -> None:
    await fill(tmp_path)
    verified, damaged = verify(tmp_path)
    assert damaged == []
    assert {folder: (of.partitions, of.blocks, of.points) for folder, of in verified.tiers.items()} == {
        "blocks": (2, 6, 2_700),
        "rollup-5m": (1, 3, 18),
        "rollup-1h": (1, 3, 18),
    }
    assert verified.batches == 1 and verified.bytes > 20_000
    first, second = sorted((tmp_path / "blocks").glob("*.db"))
    flip(first, "blocks", "cohort = 2", -30)
    (line,) = verify(tmp_path)[1]
    assert line.startswith(f"blocks/{first.name}: block ")
    assert line.endswith(" (server b): column memory_usage: it is not what was written (checksum or encoding)")
    flip(second, "blocks", "cohort = 1", 12)
    line = verify(tmp_path)[1][1]
    assert line.startswith(f"blocks/{second.name}: block ") and "(server a): all columns: the checksum" in line
    (hours,) = (tmp_path / "rollup-1h").glob("*.db")
    flip(hours, "blocks", "cohort = 3", -20)
    lines = verify(tmp_path)[1][2:]
    assert len(lines) == 27, "the columns of a group of a frame are checked together"
    assert lines[2].startswith(f"rollup-1h/{hours.name}: block ")
    assert lines[2].endswith(" (server c): column cpu_usage MIN: it is not what was written (checksum or encoding)")
    flip(tmp_path / "journal.db", "batches", "row_count = 1", -3)
    journal, *others = verify(tmp_path)[1]
    assert journal == "journal.db: batch 7: the checksum does not match" and len(others) == 29


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE blocks SET row_count = 49 WHERE cohort = 1", r"block \d+ \(server a\): it has 150 rows, not 49"),
        ("UPDATE blocks SET points = 1 WHERE cohort = 1", r"block \d+ \(server a\): it has 450 points, not 1"),
        ("UPDATE blocks SET cohort = 3 WHERE cohort = 1", r"block \d+ \(server c\): all columns: the checksum"),
        ("UPDATE blocks SET cohort = 9 WHERE cohort = 1", r"block \d+ \(server unknown\): its cohort 9 is not known"),
        (
            "UPDATE blocks SET first_ms = first_ms + 1 WHERE cohort = 1",
            r"block \d+ \(server a\): its times are not those",
        ),
        (
            "UPDATE blocks SET max_sequence = 2 WHERE cohort = 1",
            "its sequences are not those it is listed with, 1 to 2",
        ),
        (
            "UPDATE heads SET blocked_through = 0 WHERE cohort = 1",
            "its sequence 1 is past its head's blocked_through 0",
        ),
        ("UPDATE heads SET day = day + 1 WHERE cohort = 1", "its sequence 1 is past its head's blocked_through 0"),
        ("UPDATE heads SET day = day + 1 WHERE cohort = 1", "head of cohort 1 on day 19701: it is of another day"),
        ("UPDATE meta SET value = 3 WHERE key = 'span_days'", "no file of this tier has 3 days from day 19700 on"),
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("INSERT INTO heads VALUES (1, 19696, 1)", "head of cohort 1 on day 19696: roll-ups have no heads"),
        ("UPDATE blocks SET max_sequence = 99 WHERE cohort = 1", "its sequences are not those .* 6291456 to 99"),
        (
            "UPDATE blocks SET min_sequence = 1 WHERE cohort = 1",
            "its sequences are not those it is listed with, 1 to 6291456",
        ),
        ("UPDATE blocks SET points = 1 WHERE cohort = 1", r"block \d+ \(server a\): it has 50 points, not 1"),
        ("UPDATE blocks SET cohort = 9 WHERE cohort = 1", r"block \d+ \(server unknown\): its cohort 9 is not known"),
        ("UPDATE meta SET value = value + 8 WHERE key = 'day'", "it is the file of another day than its name says"),
        ("UPDATE meta SET value = 3 WHERE key = 'format_version'", "its format 3 is not 2"),
        ("DROP TABLE dirty", "it cannot be read: no such table: dirty"),
        ("INSERT INTO dirty VALUES (1, 9, 1702123200000, 1702123200000, 1, 0)", "mark 1: its cohort 9 is not known"),
        ("INSERT INTO dirty VALUES (1, 1, 1702123200000, 0, 1, 0)", "mark 1: its times .* are not of these days"),
        ("INSERT INTO dirty VALUES (1, 1, 0, 0, 1, 0)", "mark 1: its times .* are not of these days"),
    ],
)
async def test_verify_finds_roll_ups_whose_tables_say_something_else(tmp_path: Path, change: str, said: str) -> None:
    await fill(tmp_path)
    (path,) = (tmp_path / "rollup-5m").glob("*.db")
    with apsw.Connection(str(path)) as database:
        database.execute(change)
    database.close()
    assert any(re.search(said, line) for line in verify(tmp_path)[1])


async def test_verify_finds_a_file_under_another_name_and_rows_that_went_too_far(tmp_path: Path) -> None:
    await fill(tmp_path)
    (path,) = (tmp_path / "rollup-5m").glob("*.db")
    path.rename(path.with_name("2023-12-06.db"))
    with apsw.Connection(str(tmp_path / "journal.db")) as database:
        database.execute("INSERT INTO ended VALUES (1, 3, 99)")
    database.close()
    assert verify(tmp_path)[1] == [
        "journal.db: ended of day 3: rows went through 99, past the end 7",
        "rollup-5m/2023-12-06.db: it is the file of another day than its name says",
        "rollup-5m/2023-12-05.db: it is not there, and nothing says that it went",
    ]


def with_fields(path: Path, columns: int, change: Callable[[Chunk], None]) -> None:
    """Stores the block of server a in a partition of roll-ups anew, with other numbers and right checksums."""
    with closing(apsw.Connection(str(path))) as database:
        ((cohort, payload),) = database.execute("SELECT cohort, payload FROM blocks WHERE cohort = 1").fetchall()
        reader = block.open_payload(lambda offset, length: payload[offset : offset + length], cohort, columns)
        times, sequences = reader.keys()
        values, _ = reader.values(range(columns))
        chunk = Chunk(times_ms=times.copy(), sequences=sequences.copy(), values=np.column_stack(values))
        change(chunk)
        (made,) = block.build(chunk, cohort, 2, 1_000)
        database.execute(
            "UPDATE blocks SET payload = ?, points = ?, first_ms = ?, last_ms = ? WHERE cohort = 1",
            (made.payload, made.points, made.first_ms, made.last_ms),
        )


CONTRADICTIONS: dict[str, tuple[Field, float, str]] = {
    "no point": (Field.COUNT, 0.0, "its counts are no numbers of points"),
    "half a point": (Field.COUNT, 1.5, "its counts are no numbers of points"),
    "least": (Field.MIN, 1e9, "its first or last value is not between its least and greatest"),
    "greatest": (Field.MAX, -1e9, "its first or last value is not between its least and greatest"),
    "first": (Field.FIRST, 1e9, "its first or last value is not between its least and greatest"),
    "last": (Field.LAST, -1e9, "its first or last value is not between its least and greatest"),
    "early": (Field.FIRST_AT, -1.0, "its first and last time are not in their bucket"),
    "late": (Field.LAST_AT, 300_000.0, "its first and last time are not in their bucket"),
    "backwards": (Field.FIRST_AT, 299_999.0, "its first and last time are not in their bucket"),
    "alone": (Field.COUNT, math.nan, "it has fields without the others of their bucket"),
    "missing": (Field.MIN, math.nan, "it has fields without the others of their bucket"),
    "a gauge that grows": (Field.INCREASE, 1.0, "it has fields without the others of their bucket"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
async def test_verify_finds_fields_that_contradict_each_other(tmp_path: Path, name: str) -> None:
    await fill(tmp_path)
    (path,) = (tmp_path / "rollup-5m").glob("*.db")
    field, number, said = CONTRADICTIONS[name]

    def change(chunk: Chunk) -> None:
        chunk.values[1, 2 * FIELDS + field] = number

    with_fields(path, 3 * FIELDS, change)
    (line,) = verify(tmp_path)[1]
    assert line.startswith(f"rollup-5m/{path.name}: block ")
    assert line.endswith(f" (server a): metric memory_usage: {said}")


async def test_verify_finds_buckets_beside_their_starts(tmp_path: Path) -> None:
    await fill(tmp_path)
    (path,) = (tmp_path / "rollup-5m").glob("*.db")

    def change(chunk: Chunk) -> None:
        chunk.times_ms[0] += 60_000

    with_fields(path, 3 * FIELDS, change)
    assert any("do not begin at a multiple of 300000 ms" in line for line in verify(tmp_path)[1])


async def test_whatever_the_points_are_roll_ups_of_them_are_called_whole(tmp_path: Path) -> None:
    """Infinities that cancel, subnormals, signs of zero, counters that fall, no kind, one sample, none, late ones."""
    of_no_kind = metric_set("unsaid", kind=MetricKind.UNSPECIFIED)
    settings = dataclasses.replace(QUIET, merge_blocks=2, head_rows=16)
    values = (math.inf, -math.inf, 5e-324, -0.0, 0.0, math.nan, 1e308, -1e308, 3.25, 0.1)
    rng = random.Random(3)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        for number in range(60):
            of_set = {0: OTHER_SET, 1: of_no_kind}.get(number % 7, SET)
            times = [NOON - rng.choice((0, 1, 300_000, 3_600_000, 86_400_000)) + rng.randint(0, 9) for _ in range(9)]
            lines = [(rng.choice("ab"), time, [rng.choice(values) for _ in range(len(of_set))]) for time in times]
            await engine.append(rows(of_set, lines), metric_sets=(of_set,))
            if number % 10 == 9:
                await engine.maintain(everything=True)
        assert verify(tmp_path)[1] == [], "marks and all"
        await engine.maintain(everything=True)
        assert (await engine.status()).last_error is None
    verified, damaged = verify(tmp_path)
    assert damaged == []
    assert [of.partitions for of in verified.tiers.values()] == [2, 1, 1]
    assert all(of.points > 20 for of in verified.tiers.values())


async def test_a_store_in_a_folder_that_can_only_be_read_is_called_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite would put files beside those that it reads; tests may run as one who may write everywhere."""
    await fill(tmp_path)
    monkeypatch.setattr(os, "access", lambda _path, mode: mode != os.W_OK)
    before = sorted(tmp_path.rglob("*"))
    during: list[list[Path]] = []
    Verifier(tmp_path, lambda damage: pytest.fail(str(damage)), ignore).run()
    for path in tmp_path.rglob("*.db"):
        with closing(connect_read_only(path)) as db:
            assert fetch(db, "SELECT count(*) FROM meta") != [(0,)]
            during.append(sorted(tmp_path.rglob("*")))
    assert during == [before] * len(during) != []


async def test_partitions_from_before_there_were_roll_ups_are_called_whole(tmp_path: Path) -> None:
    await fill(tmp_path)
    as_before_roll_ups(tmp_path)
    verified, damaged = verify(tmp_path)
    assert damaged == []
    assert [of.partitions for of in verified.tiers.values()] == [2, 0, 0]


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
    in_the_index = b"\x02" + NOON.to_bytes(6, "big")
    assert in_the_index in data
    path.write_bytes(data.replace(in_the_index, b"\x09" + in_the_index[1:]))
    assert any("SQLite says" in line or "cannot be read" in line for line in verify(tmp_path)[1])
    path.write_bytes(data)
    with closing(apsw.Connection(str(tmp_path / "journal.db"))) as database:
        database.execute("UPDATE metric_sets SET metrics = replace(metrics, 'cpu_usage', 'cpu_usagf')")
    assert verify(tmp_path)[1] == ["journal.db: metric set 1: its names are not those it was stored with"]


async def test_verify_finds_blocks_that_are_listed_and_cannot_be_found(tmp_path: Path) -> None:
    await fill(tmp_path)
    hide_blocks(min((tmp_path / "blocks").glob("*.db")))
    damaged = verify(tmp_path)[1]
    assert any("SQLite says" in what for what in damaged)
    assert any("all columns: it is listed and cannot be found" in what for what in damaged)


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
    assert found == [] and [of.blocks for of in verified.tiers.values()] == [2, 2, 2]
