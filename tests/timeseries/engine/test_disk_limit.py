"""The hard limit of the disk: the oldest days go, the newest rows are taken, and it is told."""

import asyncio
import dataclasses
import logging
from pathlib import Path

import apsw
import pytest

from runtime.clock import ManualClock
from runtime.errors import ResourceExhausted, Unavailable
from services.timeseries.engine import Aggregation, Engine, Query
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.store import Store
from services.timeseries.servicer import probe
from tests.timeseries.engine.days import DAY_MS, KEEPING, NOON, SET, TODAY, WIDE, noise, of_day
from tests.timeseries.engine.model import EVERYTHING, Model, ask, assert_same, everything, rows


async def test_over_the_limit_the_oldest_days_go_and_rows_are_taken(tmp_path: Path) -> None:
    limit = 6_000_000
    settings = dataclasses.replace(KEEPING, head_rows=200, journal_keep_s=0.0, disk_bytes_limit=limit)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        first = noise(0, 0)
        await engine.append(first, metric_sets=(WIDE,))
        model, stop = Model(), asyncio.Event()
        model.append(WIDE, first)

        async def load() -> None:
            at = 50
            while not stop.is_set():
                batch = noise(0, at, count=1)
                await engine.append(batch)
                model.append(WIDE, batch)
                at += 1

        loading = asyncio.create_task(load())
        days: list[str] = []
        for day in range(-6, 0):
            for at in range(0, 1_000, 100):
                await engine.append(noise(day, at, count=100))
            await engine.maintain(everything=True)
            before = sorted({*days, f"2023-12-{9 + day:02d}", "2023-12-09"})
            days = sorted(path.stem for path in (tmp_path / "blocks").glob("*.db"))
            assert days == before[-len(days) :], "the oldest went"
            assert (await engine.status()).disk_bytes <= limit + 1_000_000, "and what came in meanwhile"
        stop.set()
        await loading
        status = await engine.status()
        assert status.evicted_partitions >= 7 - len(days) > 0 and not status.disk_over_limit
        today = Query(metrics=None, start_ms=TODAY, end_ms=TODAY + DAY_MS)
        assert len(model.series) == 200 and status.last_error is None
        assert_same(await ask(engine, today), model.query(today))


async def test_the_limit_is_kept_although_the_journal_cannot_be_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk a sweep may find no room, and what makes some is a day that goes."""

    def full(*_: object) -> None:
        raise apsw.FullError("disk full")

    settings = dataclasses.replace(KEEPING, disk_bytes_limit=1)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        for day in (-1, 0):
            await engine.append(of_day(day), metric_sets=(SET,))
        await engine._close_due(everything=True)
        monkeypatch.setattr(Journal, "sweep", full)
        with pytest.raises(ResourceExhausted):
            await engine._keep_up(everything=False)
        assert [path.stem for path in (tmp_path / "blocks").glob("*.db")] == ["2023-12-09"]


async def test_today_alone_over_the_limit_sweeps_the_journal_and_is_shown(tmp_path: Path) -> None:
    limit = 1_000_000
    settings = dataclasses.replace(KEEPING, head_rows=100, disk_bytes_limit=limit, sweep_rows=7)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        model = Model()
        assert await engine.cursors.register("away") == 0
        for at in range(0, 2_000, 50):
            batch = noise(0, at)
            await engine.append(batch, metric_sets=(WIDE,))
            model.append(WIDE, batch)
            if at % 500 == 0:
                await engine.maintain()
        await engine.maintain()
        status = await engine.status()
        assert status.disk_over_limit and status.evicted_partitions == 0
        assert "today's rows alone need more" in (await probe(engine)).degraded
        assert_same(await everything(engine), model.query(EVERYTHING))
        assert status.journal_bytes < limit and engine.first_sequence >= 40, "what no head needs is swept"
        first = engine.first_sequence
        await engine.append(noise(0, 3_000))
        async for batch in engine.tail(1):
            assert batch.missed == first - 1, "the follower is told"
            break


async def test_the_warning_comes_once_and_ends_a_little_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = dataclasses.replace(KEEPING, disk_bytes_limit=1_000)
    caplog.set_level(logging.INFO, logger="services.timeseries.engine.retention")
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        shown = []
        for use in (799, 800, 790, 760, 810, 750, 749, 790, 801, 100):
            monkeypatch.setattr(Store, "disk_bytes", property(lambda _store, use=use: use))
            await engine.maintain()
            shown.append((await engine.status()).disk_pressed)
            degraded = (await probe(engine)).degraded
            assert ("TIMESERIES_DISK_LIMIT" in degraded) == shown[-1]
        assert shown == [False, True, True, True, True, True, False, False, True, False]
        told = [record.levelname for record in caplog.records]
        assert told == ["WARNING", "INFO", "WARNING", "INFO"]


async def test_days_that_the_limit_took_are_too_late_while_it_is_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(KEEPING, disk_bytes_limit=1_000)
    rest = 900
    yesterday = tmp_path / "blocks" / "2023-12-08.db"
    monkeypatch.setattr(Store, "disk_bytes", property(lambda _store: rest + 500 * yesterday.exists()))
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        for day in (-1, 0):
            await engine.append(of_day(day), metric_sets=(SET,))
        assert engine.oldest_ms == 0
        await engine.maintain(everything=True)
        assert not yesterday.exists() and engine.oldest_ms == TODAY
        rest = 700
        await engine.maintain()
        assert engine.oldest_ms == 0, "there is room again"


async def test_where_roll_ups_go_before_the_points_that_they_were_made_of_the_points_answer(tmp_path: Path) -> None:
    """Of few points the newest file has 32 days, and stays; the roll-ups of its first days have files of their own."""
    start = NOON // (32 * DAY_MS) * 32 * DAY_MS
    settings = dataclasses.replace(KEEPING, sparse_points_a_day=1 << 40)
    model, clock = Model(), ManualClock(start + 20 * DAY_MS)

    async def compare(engine: Engine) -> None:
        for aggregation in (Aggregation.COUNT, Aggregation.MAX, Aggregation.AVG):
            for step_ms in (300_000, 900_000, 3_600_000, DAY_MS):
                query = Query(metrics=None, start_ms=0, end_ms=1 << 62, step_ms=step_ms, aggregation=aggregation)
                assert_same(await ask(engine, query), model.query(query), aggregation)

    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        for day in (1, 10, 20):
            lines = [("a", start + day * DAY_MS + n * 60_000, [float(n % 7), float(n)]) for n in range(-30, 30)]
            await engine.append(rows(SET, lines), metric_sets=(SET,))
            model.append(SET, rows(SET, lines))
        await engine.maintain(everything=True)
        await compare(engine)
        endings = engine.endings
        engine._store.settings = dataclasses.replace(settings, disk_bytes_limit=1)
        await engine.maintain()
        assert len(list((tmp_path / "blocks").glob("*.db"))) == len(list((tmp_path / "rollup-5m").glob("*.db"))) == 1
        await compare(engine)
        late = rows(SET, [("a", start + DAY_MS + 90_000, [1.0, 1.0])])  # the hour would never have it
        assert (late.times_ms < engine.aged_ms).all()
        assert (await engine.too_late(late.server_ids, late.times_ms))[0].all()
        with pytest.raises(Unavailable, match="days went"):
            await engine.append(late, endings=endings)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        await compare(engine)
