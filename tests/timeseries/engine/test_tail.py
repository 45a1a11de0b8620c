"""The journal as others see it: the tail in order, resumed and live; what a sweep may take; sequences for ever."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from fleet.model import ServerDescriptor
from runtime.clock import ManualClock
from runtime.errors import FailedPrecondition, InvalidArgument
from services.timeseries.engine import Engine, EngineSettings, TailBatch
from tests.timeseries.engine.model import everything, metric_set, rows

NOON = 19_700 * 86_400_000 + 43_200_000
SET = metric_set("cpu_usage")
OTHER = metric_set("memory_usage")
SETTINGS = EngineSettings(maintenance_interval_s=1e9, journal_keep_s=60.0, sweep_rows=3, tail_read_bytes=100)
EAGER = EngineSettings(maintenance_interval_s=1e9, journal_keep_s=0.0, sweep_rows=3)


def descriptor(server: str, role: str) -> ServerDescriptor:
    return ServerDescriptor(server_id=server, hostname=f"{server}.example", role=role)


async def append(engine: Engine, number: int, server: str = "a", *told: ServerDescriptor) -> int:
    of_set = SET if number % 2 else OTHER
    batch = rows(of_set, [(server, NOON + number, [float(number)])])
    return await engine.append(batch, metric_sets=(of_set,), servers=told)


async def take(tail: AsyncIterator[TailBatch], count: int) -> list[TailBatch]:
    async with asyncio.timeout(10):
        return [await anext(tail) for _ in range(count)]


async def swept(engine: Engine, clock: ManualClock) -> None:
    clock.advance(61)
    await engine.maintain(everything=True)


async def test_the_tail_gives_every_batch_once_in_order_then_live(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        for number in range(1, 6):
            assert await append(engine, number) == number
        tail = engine.tail(1)
        found = await take(tail, 5)
        live = asyncio.create_task(take(tail, 3))
        await asyncio.gather(*(append(engine, number) for number in range(6, 9)))
        found += await live
        resumed = await take(engine.tail(4), 5)
        only_new = asyncio.create_task(take(engine.tail(), 1))
        await asyncio.sleep(0)
        await append(engine, 9)
        assert [batch.sequence for batch in await only_new] == [9]
    assert [batch.sequence for batch in found] == list(range(1, 9))
    assert [batch.sequence for batch in resumed] == list(range(4, 9))
    for batch in found:
        assert batch.rows is not None and batch.metric_set is not None and batch.missed == 0
        assert batch.rows.server_ids == ("a",) and batch.received_ms == NOON
        assert batch.rows.values[0, 0] == batch.rows.times_ms[0] - NOON
        assert batch.metric_set == (SET if batch.rows.values[0, 0] % 2 else OTHER)


async def test_descriptors_come_in_order_and_with_the_first_batch_what_was_valid_before(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        await append(engine, 1, "a", descriptor("a", "web"), descriptor("b", "db"))
        await append(engine, 2, "a", descriptor("a", "web"))
        await engine.append(servers=[descriptor("a", "cache")])
        await append(engine, 4)
        found = await take(engine.tail(1), 4)
        assert [[d.role for d in batch.descriptors] for batch in found] == [["web", "db"], [], ["cache"], []]
        assert found[2].rows is None
        resumed = await take(engine.tail(3), 2)
        assert [[d.role for d in batch.descriptors] for batch in resumed] == [["web", "db", "cache"], []]
        await append(engine, 5, "c", descriptor("c", "web"))
        clock.advance(59)
        await append(engine, 6)
        await append(engine, 7, "c", descriptor("c", "db"))
        clock.advance(2)
        await engine.maintain(everything=True)
        assert engine.first_sequence == 6, "batch 6 is kept, and what was valid before it"
        (sixth,) = await take(engine.tail(6), 1)
        assert sorted(d.role for d in sixth.descriptors) == ["cache", "db", "web"]
        await swept(engine, clock)
        await append(engine, 8)
        (after_sweep,) = await take(engine.tail(8), 1)
        assert sorted(d.role for d in after_sweep.descriptors) == ["cache", "db", "db"]
        assert engine.servers()["a"] == descriptor("a", "cache")
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        told = {"a": descriptor("a", "cache"), "b": descriptor("b", "db"), "c": descriptor("c", "db")}
        assert engine.servers() == told


async def test_a_swept_sequence_is_said_and_one_never_given_refused(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        for number in range(1, 8):
            await append(engine, number)
        reading = engine.tail(1)
        await take(reading, 1)
        await swept(engine, clock)
        assert (engine.first_sequence, engine.last_sequence) == (8, 7)
        await append(engine, 8)
        (late,) = await take(engine.tail(3), 1)
        assert (late.sequence, late.missed) == (8, 5)
        (overtaken,) = [batch for batch in await take(reading, 3) if batch.missed]
        assert overtaken.sequence == 8
        with pytest.raises(FailedPrecondition) as ahead:
            await take(engine.tail(10), 1)
        assert ahead.value.reason == "SEQUENCE_AHEAD"


async def test_a_tail_that_missed_batches_is_told_what_servers_said_in_them(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        for number in range(1, 8):
            await append(engine, number, "a", *[descriptor("a", "db")] * (number == 1))
        reading = engine.tail(1)
        await take(reading, 1)
        await append(engine, 8, "a", descriptor("a", "cache"))
        await swept(engine, clock)
        await append(engine, 9, "a")
        async with asyncio.timeout(10):
            overtaken = await anext(batch async for batch in reading if batch.missed)
        assert overtaken.descriptors == (descriptor("a", "cache"),)
        last = await append(engine, 10, "a")
        await append(engine, 11, "a", descriptor("a", "db"))
        await append(engine, 12, "a")
    with closing(apsw.Connection(str(tmp_path / "journal.db"))) as journal:  # as in a backup of a busy store
        journal.execute("DELETE FROM batches WHERE sequence = ?", (last + 1,))
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        _, behind_the_hole = await take(engine.tail(last), 2)
        assert (behind_the_hole.missed, behind_the_hole.descriptors) == (1, (descriptor("a", "db"),))


async def test_sequences_are_never_used_again(tmp_path: Path) -> None:
    clock, given = ManualClock(NOON), []
    for _ in range(3):
        async with Engine.open(tmp_path, clock=clock, settings=EAGER) as engine:
            given += [await append(engine, number) for number in range(3)]
            clock.advance(1)
            await engine.maintain(everything=True)
            assert engine.first_sequence == engine.last_sequence + 1
    assert given == list(range(1, 10))


async def test_a_sweep_leaves_what_a_head_or_a_follower_needs(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    async with Engine.open(tmp_path, clock=clock, settings=EAGER) as engine:
        assert await engine.cursors.register("influxdb") == 0
        for number in range(1, 8):
            await append(engine, number)
        clock.advance(1)
        await engine.maintain()
        assert engine.first_sequence == 1, "heads hold it"
        await engine.maintain(everything=True)
        assert engine.first_sequence == 1, "the follower holds it"
        assert await engine.cursors.advance("influxdb", 3) == 3
        assert await engine.cursors.advance("influxdb", 2) == 3, "a cursor never goes back"
        await engine.maintain()
        assert engine.first_sequence == 4
        (follower,) = (await engine.status()).followers
        assert (follower.cursor, follower.batches, follower.points, follower.oldest_ms) == (3, 4, 4, NOON)
    async with Engine.open(tmp_path, clock=clock, settings=EAGER) as engine:
        assert await engine.cursors.register("influxdb") == 3
        await engine.maintain(everything=True)
        assert [batch.sequence for batch in await take(engine.tail(4), 4)] == [4, 5, 6, 7]
        for name, sequence, field in (("nobody", 1, "name"), ("influxdb", 99, "sequence")):
            with pytest.raises(InvalidArgument) as refused:
                await engine.cursors.advance(name, sequence)
            assert refused.value.field == field
        await engine.cursors.forget("influxdb")
        await engine.maintain()
        assert engine.first_sequence == 8
        assert sum(len(series) for series in (await everything(engine)).values()) == 7


async def test_over_its_limit_the_journal_waits_for_no_follower(tmp_path: Path) -> None:
    settings = EngineSettings(maintenance_interval_s=1e9, journal_bytes_limit=350_000, sweep_rows=3)
    wide = metric_set(*(f"m{number}" for number in range(500)))
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        await engine.cursors.register("dead")
        for number in range(100):
            await engine.append(rows(wide, [("a", NOON + number, [float(number)] * 500)]), metric_sets=(wide,))
        await engine.maintain(everything=True)
        assert 20 < engine.first_sequence < 90
        (first,) = await take(engine.tail(1), 1)
        assert first.missed == engine.first_sequence - 1
        assert (await engine.status()).points == 50_000


async def test_a_clock_that_was_wrong_pins_nothing(tmp_path: Path) -> None:
    clock = ManualClock(NOON + 365 * 86_400_000)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        await append(engine, 1)
        clock.set_now_ms(NOON)
        await append(engine, 2)
        await engine.maintain(everything=True)
        assert engine.first_sequence == 2
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        clock.advance(61)
        await engine.maintain()
        assert engine.first_sequence == 3


async def test_heads_close_by_age_also_after_a_restart(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    settings = EngineSettings(maintenance_interval_s=1e9, head_age_s=100.0)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        await append(engine, 1)
        clock.advance(60)
        await engine.maintain()
        assert (await engine.status()).head_points == 1
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        clock.advance(39)
        await engine.maintain()
        assert (await engine.status()).head_points == 1
        clock.advance(2)
        await engine.maintain()
        assert (await engine.status()).head_points == 0
