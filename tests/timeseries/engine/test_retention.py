"""Days that go: as a whole or not at all, for good, with their bytes, and in nobody's way."""

import asyncio
import dataclasses
import datetime
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fleet.codec import metric_set_to_pb, rows_to_pb
from openmanager.timeseries.v1 import timeseries_pb2
from runtime.clock import ManualClock
from runtime.errors import Unavailable
from services.timeseries.engine import Aggregation, Engine, Query
from services.timeseries.engine import partitions as partitions_module
from services.timeseries.engine.head import Heads
from services.timeseries.engine.partition import EPOCH, Partition
from services.timeseries.engine.partitions import Partitions
from services.timeseries.servicer import TimeSeriesServicer
from services.timeseries.settings import TimeSeriesSettings
from tests.timeseries.engine.days import DAY_MS, KEEPING, NOON, SET, TODAY, WIDE, noise, of_day
from tests.timeseries.engine.model import Model, ask, assert_same, everything, last, rows

DAY_S = 86_400.0
THREE_DAYS = dataclasses.replace(KEEPING, raw_retention_s=3 * DAY_S)


def since(model: Model, oldest_ms: int) -> Model:
    """The oracle of what is left."""
    left = Model()
    left.metrics = model.metrics
    for name, series in model.series.items():
        left.series[name] = {time: value for time, value in series.items() if time >= oldest_ms}
    return left


def used(folder: Path) -> int:
    """As `du` counts."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def held_open(folder: Path) -> list[str]:
    """Deleted files of a folder whose bytes this process still holds."""
    targets = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [target for target in targets if target.startswith(str(folder)) and target.endswith("(deleted)")]


async def test_what_is_left_equals_the_oracle_before_and_after(tmp_path: Path) -> None:
    """Blocks, heads, and a day that has only a head; the day at the edge stays until its last instant is too old.

    Of the days that are gone, windows of whole roll-ups are what they were.
    """
    model, clock = Model(), ManualClock(NOON)
    cells = {-3: 48, -2: 28, -1: 48, 0: 48}

    async def compare(engine: Engine) -> None:
        left = since(model, engine.aged_ms)
        for aggregation in Aggregation:
            metrics = ("requests_total",) if aggregation is Aggregation.RATE else None
            for step_ms in (0, 60_000, 300_000, 3_600_000, DAY_MS):
                query = Query(
                    metrics=metrics, start_ms=0, end_ms=TODAY + DAY_MS * 9, step_ms=step_ms, aggregation=aggregation
                )
                wanted = (left if step_ms < 300_000 else model).query(query)
                assert_same(await ask(engine, query), wanted, aggregation if step_ms else None)
        found = {name: time for name, (time, _) in (await last(engine)).items()}
        assert found == {name: time for name, (time, _) in left.last().items()}
        kept = [day for day in cells if TODAY + day * DAY_MS >= engine.aged_ms]
        assert (await engine.status()).points == sum(cells[day] for day in kept)

    settings = dataclasses.replace(THREE_DAYS, head_rows=100, head_age_s=1e9)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        for day in (-3, -2, -1, 0):
            batch = of_day(day, count=7, value=day)
            await engine.append(batch, metric_sets=(SET,))
            model.append(SET, batch)
        await engine.maintain(everything=True)
        for day in (-3, -1, 0):
            batch = of_day(day, count=5, value=100)
            await engine.append(batch)
            model.append(SET, batch)
        assert (engine.oldest_ms, engine.aged_ms) == (0, TODAY - 3 * DAY_MS)
        await compare(engine)
        for hours, days_left in ((11, 4), (2, 3), (23, 2), (24, 1)):
            clock.advance(hours * 3_600)
            await engine.maintain()
            await compare(engine)
            status = await engine.status()
            assert (status.evicted_partitions, len(list((tmp_path / "blocks").glob("*.db")))) == (
                4 - days_left,
                days_left,
            )
        assert status.oldest_day is not None and status.oldest_day.isoformat() == "2023-12-09"
        assert (status.damaged, status.last_error) == (0, None)


async def test_the_bytes_of_a_day_are_given_back(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    settings = dataclasses.replace(THREE_DAYS, journal_keep_s=0.0, head_rows=100)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        for day in (-2, -1, 0):
            for at in range(0, 1_000, 50):
                await engine.append(noise(day, at), metric_sets=(WIDE,))
        await engine.maintain(everything=True)
        await everything(engine)  # connections of every day are in the pool now
        before = used(tmp_path / "blocks")
        clock.advance(2 * DAY_S)
        await engine.maintain()
        assert before - used(tmp_path / "blocks") > 1_400_000
        assert held_open(tmp_path) == []
        assert sorted(path.name[:13] for path in (tmp_path / "blocks").iterdir() if path.suffix == ".db") == [
            "2023-12-08.db",
            "2023-12-09.db",
        ]


async def append_as_a_client(servicer: TimeSeriesServicer, lines: list[tuple[str, int]]) -> list[int]:
    """Which rows are too late; the others are acknowledged."""
    batch = rows(SET, [(server, time, [1.0, 1.0]) for server, time in lines])
    request = timeseries_pb2.AppendRequest(batch=rows_to_pb(batch), metric_sets=[metric_set_to_pb(SET)])
    response = await servicer.Append(request, None)
    for error in response.errors:
        assert (error.field, error.reason) == (f"rows[{error.row}].time", "TOO_LATE")
    assert response.rejected_points == 2 * len(response.errors)
    assert response.accepted_points == 2 * (len(lines) - len(response.errors))
    return [error.row for error in response.errors]


async def test_rows_before_the_oldest_roll_ups_are_too_late(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    settings = dataclasses.replace(THREE_DAYS, hour_retention_s=10 * DAY_S)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        servicer, oldest = TimeSeriesServicer(engine, clock), TODAY - 10 * DAY_MS
        assert engine.oldest_ms == oldest
        assert await append_as_a_client(servicer, [("a", t) for t in (NOON, oldest - 1, oldest, 0)]) == [1, 3]
        await engine.maintain()
        stored = await everything(engine)
        assert [time for time, _ in stored["a", "cpu_usage"]] == [oldest, NOON]
        clock.advance(-365 * DAY_S)
        assert engine.oldest_ms == oldest - 365 * DAY_MS, "a clock that was ahead makes nothing too late for ever"
    async with Engine.open(tmp_path / "keeps", clock=clock, settings=KEEPING) as engine:
        assert engine.oldest_ms == 0, "without an age recordings of any time are taken"


async def test_rows_for_roll_ups_whose_points_are_gone_are_too_late(tmp_path: Path) -> None:
    """What is older than the points' age is taken, stays for a while, and is closed once it went."""
    clock, old = ManualClock(NOON), TODAY - 5 * DAY_MS
    settings = dataclasses.replace(THREE_DAYS, five_minute_retention_s=20 * DAY_S)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        servicer = TimeSeriesServicer(engine, clock)
        assert await append_as_a_client(servicer, [("a", NOON), ("a", old), ("a", old + 300_000)]) == []
        await engine.maintain(everything=True)
        clock.advance(settings.late_grace_s - 10)
        assert await append_as_a_client(servicer, [("a", old + 1)]) == [], "its day is still there"
        clock.advance(20)
        await engine.maintain()
        assert len((await everything(engine))["a", "cpu_usage"]) == 4, "since rows came lately"
        clock.advance(settings.late_grace_s)
        await engine.maintain()
        assert [time for time, _ in (await everything(engine))["a", "cpu_usage"]] == [NOON]
        again = [
            ("a", old + 2),
            ("a", old + 299_999),
            ("a", old + 300_001),
            ("a", old + 600_000),
            ("b", old),
            ("a", NOON),
        ]
        assert await append_as_a_client(servicer, again) == [0, 1, 2]
        await engine.maintain(everything=True)
        query = Query(metrics=None, start_ms=0, end_ms=TODAY, step_ms=300_000, aggregation=Aggregation.COUNT)
        answer = await ask(engine, query)
        assert answer["a", "cpu_usage"] == [(old, 2.0), (old + 300_000, 1.0), (old + 600_000, 1.0)]
        assert answer["b", "cpu_usage"] == [(old, 1.0)]


async def test_a_batch_that_was_judged_before_a_day_went_is_judged_again(tmp_path: Path) -> None:
    clock, old = ManualClock(NOON), TODAY - 5 * DAY_MS
    async with Engine.open(tmp_path, clock=clock, settings=THREE_DAYS) as engine:
        batch = rows(SET, [("a", old, [1.0, 1.0])])
        await engine.append(batch, metric_sets=(SET,))
        late, endings = await engine.too_late(batch.server_ids, batch.times_ms)
        assert not late.any()
        clock.advance(DAY_S)
        await engine.maintain()
        with pytest.raises(Unavailable) as refused:
            await engine.append(batch, endings=endings)
        assert refused.value.reason == "EVICTED_MEANWHILE"
        late, _ = await engine.too_late(batch.server_ids, batch.times_ms)
        assert late.all()


@pytest.mark.parametrize("reborn", [False, True], ids=["gone", "made-anew"])
@pytest.mark.parametrize("step", ["snapshot", "days", "infos", "reader"])
async def test_a_query_goes_on_while_its_day_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, *, reborn: bool
) -> None:
    """The day goes right after the query has taken one of its looks, and may be there again with other blocks."""
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=KEEPING) as engine:
        store, retention = engine._store, engine._retention
        for day in (-1, 0):
            await engine.append(of_day(day, count=9), metric_sets=(SET,))
        await engine.maintain(everything=True)
        yesterday = TODAY // DAY_MS - 1
        owner = {"snapshot": Heads, "days": Partitions, "infos": Partition, "reader": Partition}[step]
        real: Callable[..., Any] = getattr(owner, step)
        done: list[bool] = []
        other = rows(SET, [("z", TODAY - 9, [7.0, 7.0])])

        def look_then_evict(*args: Any) -> Any:
            answer = real(*args)
            if not done:
                done.append(True)
                held = store.lock.locked()
                if held:
                    store.lock.release()
                assert retention._attempt(yesterday, partial(retention._evict, store.tiers[0], force=False))
                if reborn:
                    asyncio.run_coroutine_threadsafe(engine.append(other), engine._loop).result(5)
                    store.close_heads(lambda: False, everything=True)
                if held:
                    store.lock.acquire()
            return answer

        with monkeypatch.context() as patches:
            patches.setattr(owner, step, look_then_evict)
            found = await everything(engine)
        assert done
        for server in "ab":
            times = {time for time, _ in found[server, "cpu_usage"]}
            today = set(of_day(0, count=9).times_ms.tolist())
            assert today <= times <= today | set(of_day(-1, count=9).times_ms.tolist())
        status = await engine.status()
        assert (status.damaged, status.last_error) == (0, None)
        assert held_open(tmp_path) == [], "what was lent is closed when it comes back"
        left = await everything(engine)
        assert {name[0] for name in left} == ({"a", "b", "z"} if reborn else {"a", "b"})
        assert len(left["a", "cpu_usage"]) == 9
        assert ((tmp_path / "blocks" / "2023-12-08.db").exists(), status.evicted_partitions) == (reborn, 1)


async def test_a_day_that_goes_while_it_is_opened_stays_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opens its file for reading must not make it known again: then it would be the oldest day, and go twice."""
    connect = partitions_module.connect
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=KEEPING) as engine:
        for day in (-1, 0):
            await engine.append(of_day(day), metric_sets=(SET,))
        await engine.maintain(everything=True)
        partitions, yesterday = engine._store.partitions, TODAY // DAY_MS - 1
        partitions.close()
        going: list[threading.Thread] = []

        def then_evict(path: Path, *more: Any) -> Any:
            if path == partitions.path(yesterday) and not going:
                going.append(threading.Thread(target=partitions.evict, args=(yesterday,)))
                going[0].start()
                while yesterday in partitions.days(yesterday, yesterday):
                    time.sleep(0.001)
            return connect(path, *more)

        monkeypatch.setattr(partitions_module, "connect", then_evict)
        await everything(engine)
        going[0].join()
        assert partitions.days(0, 1 << 20) == [TODAY // DAY_MS]
        assert (await engine.status()).oldest_day == EPOCH + datetime.timedelta(days=TODAY // DAY_MS)


async def test_closing_the_file_that_went_leaves_the_new_ones_log_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    async with Engine.open(folder, clock=ManualClock(NOON), settings=KEEPING) as engine:
        store, retention, day = engine._store, engine._retention, TODAY // DAY_MS - 1
        await engine.append(of_day(-1), metric_sets=(SET,))
        await engine.maintain(everything=True)
        with store.partitions.lend(day) as lent:
            evict = partial(retention._evict, store.tiers[0], force=False)
            assert await asyncio.to_thread(retention._attempt, day, evict)
            await engine.append(of_day(-1, count=4))
            await asyncio.to_thread(store.close_heads, lambda: False, everything=True)
            assert lent.infos(1, 0, 1 << 62), "what was lent can be read to its end"
        log = folder / "blocks" / "2023-12-08.db-wal"
        assert log.exists() and log.stat().st_size > 0
        shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*-shm"))
        assert len((await everything(engine))["a", "cpu_usage"]) == 4
    async with Engine.open(tmp_path / "copy", clock=ManualClock(NOON), settings=KEEPING) as engine:
        assert len((await everything(engine))["a", "cpu_usage"]) == 4


@pytest.mark.parametrize(("sparse_points", "old", "age_s"), [(0, -2, 2 * DAY_S), (1 << 40, -41, 20.75 * DAY_S)])
async def test_an_eviction_that_fails_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse_points: int, old: int, age_s: float
) -> None:
    """Of a file of a day, and of one of 32, in the midst of which are the rows; new ones would have a file each."""
    clock = ManualClock(NOON)
    settings = dataclasses.replace(KEEPING, raw_retention_s=age_s, sparse_points_a_day=sparse_points)
    folder = tmp_path / "data"
    async with Engine.open(folder, clock=clock, settings=settings) as engine:
        for day in (old, 0):
            await engine.append(of_day(day), metric_sets=(SET,))
        await engine.maintain(everything=True)
        clock.advance(DAY_S)

        def fails(*_: Path) -> None:
            raise OSError("the disk is strange today")

        with monkeypatch.context() as patches:
            patches.setattr(partitions_module, "remove_files", fails)
            await engine.maintain()
            clock.advance(-DAY_S)
            engine._store.partitions._placed._sparse_points = 0
            await engine.append(of_day(old, count=2))
            await engine.maintain(everything=True)
        status = await engine.status()
        assert status.closing_fails and status.last_error is not None and "evicted" in status.last_error.message
        assert len((await everything(engine))["a", "cpu_usage"]) == 3 + 2, "the new rows wait in their head"
        shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*-shm"))
        await engine.maintain()
        await engine.maintain(everything=True)
        assert not (await engine.status()).closing_fails
        assert len((await everything(engine))["a", "cpu_usage"]) == 3 + 2
    async with Engine.open(tmp_path / "copy", clock=clock, settings=settings) as engine:
        assert len((await everything(engine))["a", "cpu_usage"]) == 3 + 2


def test_settings_reach_the_engine() -> None:
    unset = TimeSeriesSettings.load({}).engine()
    assert unset.disk_bytes_limit is None
    ages = (unset.raw_retention_s, unset.five_minute_retention_s, unset.hour_retention_s)
    assert ages == (30 * DAY_S, 180 * DAY_S, 1_826 * DAY_S)
    given = TimeSeriesSettings.load({"TIMESERIES_RETENTION_RAW": "7d", "TIMESERIES_DISK_LIMIT": "10GiB"}).engine()
    assert (given.raw_retention_s, given.disk_bytes_limit) == (7 * DAY_S, 10 << 30)
    assert given.journal_bytes_limit == 5 << 30, "the journal waits for followers up to half of the limit"
