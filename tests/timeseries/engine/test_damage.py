"""Bytes that rot on disk: what they held is counted and left out, everything else is answered."""

import asyncio
import logging
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest

from runtime.clock import ManualClock
from runtime.errors import Unavailable
from services.timeseries.engine import Engine, block
from services.timeseries.engine.partition import BlockGoneError, BlockInfo, Partition
from tests.timeseries import stores
from tests.timeseries.engine.damaged import DAY_MS, NOON, SET, SETTINGS, change_schema, files, fill
from tests.timeseries.engine.model import EVERYTHING, assert_same, everything, rows


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
        change_schema(database, "blocks", "STRICT", "")
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
        change_schema(database, "dirty", "STRICT", "")
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


@pytest.mark.parametrize(("code", "passes"), [(apsw.SQLITE_IOERR_READ, False), (apsw.SQLITE_IOERR_LOCK, True)])
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
