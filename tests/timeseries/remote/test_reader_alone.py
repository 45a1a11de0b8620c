"""One replica whose oldest days went, and a store that has them."""

import itertools
import random
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from fleet.model import Metric
from runtime.clock import ManualClock
from services.timeseries.archive.backup import back_up, restore
from services.timeseries.engine import Aggregation, Engine, EngineSettings, Query
from services.timeseries.engine.query import SeriesResult
from services.timeseries.remote.reader import Reader
from services.timeseries.remote.replica import ThisReplica
from tests.timeseries.engine.model import Model, assert_same, rows
from tests.timeseries.remote.test_reader import NOON, SET, STORE, OracleStore


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOON)


@pytest.fixture
async def aged(tmp_path: Path, clock: ManualClock) -> AsyncIterator[tuple[Engine, OracleStore, Model, Reader]]:
    settings = EngineSettings(
        maintenance_interval_s=1e9,
        journal_keep_s=0.0,
        raw_retention_s=2 * 86_400,
        late_grace_s=0.0,
        sparse_points_a_day=0,
    )
    store, model, rng = OracleStore(), Model(), random.Random(3)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        total = 0.0
        for hour in range(6 * 24):
            lines = []
            for minute in range(0, 60, 5):
                total += rng.randint(0, 100)
                lines.append(("a", NOON + hour * 3_600_000 + minute * 60_000, [rng.random(), total]))
            batch = rows(SET, lines)
            await engine.append(batch, metric_sets=(SET,))
            model.append(SET, batch)
            store.model.append(SET, batch)
            clock.advance(3_600)
            if hour % 24 == 12:
                await engine.maintain(everything=True)
        await engine.maintain(everything=True)
        yield engine, store, model, Reader(engine, store, max_points=1_000_000)


async def answers_like(reader: Reader, model: Model, start_ms: int, aggregation: Aggregation, step_ms: int) -> None:
    """The reader gives what the model does, and all of it."""
    query = Query(
        metrics=("requests_total",),
        start_ms=start_ms,
        end_ms=NOON + 6 * 86_400_000,
        step_ms=step_ms,
        aggregation=aggregation,
    )
    answer = await reader.read(query)
    (result,) = answer.results
    found = {("a", "requests_total"): list(zip(result.times_ms.tolist(), result.values.tolist(), strict=True))}
    assert_same(found, model.query(query), aggregation if step_ms else None)
    assert answer.incomplete == []


async def test_older_than_what_is_held_comes_from_the_store(aged: tuple[Engine, OracleStore, Model, Reader]) -> None:
    engine, _, model, reader = aged
    held_ms = engine.held_from_ms(0)
    assert NOON < held_ms < NOON + 6 * 86_400_000, "the test is about days that went"
    for aggregation, step in itertools.product(Aggregation, (0, 60_000, 600_000, 7_777_000)):
        await answers_like(reader, model, NOON + 1_234_567, aggregation, step)


async def test_what_is_held_is_not_asked_of_the_store(aged: tuple[Engine, OracleStore, Model, Reader]) -> None:
    engine, store, _, reader = aged
    recent = Query(metrics=("cpu_usage",), start_ms=engine.held_from_ms(0), end_ms=NOON + 6 * 86_400_000)
    assert reader.is_here(recent)
    store.asked.clear()
    await reader.read(recent)
    assert store.asked == []


async def test_without_the_store_the_rest_is_answered_and_the_answer_says_so(
    aged: tuple[Engine, OracleStore, Model, Reader],
) -> None:
    engine, store, model, reader = aged
    store.away = True
    query = Query(metrics=("cpu_usage",), start_ms=NOON, end_ms=NOON + 6 * 86_400_000)
    answer = await reader.read(query)
    (said,) = answer.incomplete
    assert said.startswith("prometheus is away (connection refused): from 20")
    (result,) = answer.results
    assert result.times_ms[0] >= engine.held_from_ms(0)
    assert result.times_ms[-1] == max(time for time in model.series["a", "cpu_usage"])


async def test_what_a_folder_before_this_one_took_is_asked_of_the_store_also_when_late_rows_come(
    tmp_path: Path, clock: ManualClock
) -> None:
    """The disk is a new one, and the store has what was on the old one: of this day, too."""
    store, model = OracleStore(), Model()
    clock.advance(3 * 86_400)
    begun = clock.now_ms()
    for hour in range(1, 3 * 24):
        batch = rows(SET, [("a", begun - hour * 3_600_000, [1.0, 100.0 - hour])])
        model.append(SET, batch)
        store.model.append(SET, batch)
    settings = EngineSettings(maintenance_interval_s=1e9, sparse_points_a_day=0)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        await engine.cursors.register(STORE)
        reader = Reader(engine, store, max_points=1_000_000)
        for minutes in (5, 10, -2 * 24 * 60 - 1):  # the last one is late
            batch = rows(SET, [("a", begun + minutes * 60_000, [1.0, 1_000.0 + minutes])])
            await engine.append(batch, metric_sets=(SET,))
            model.append(SET, batch)
        for aggregation, step in itertools.product(Aggregation, (0, 60_000, 600_000, 7_777_000)):
            await answers_like(reader, model, NOON + 1_234_567, aggregation, step)


async def test_what_came_between_a_backup_and_its_restore_is_asked_of_the_store(
    tmp_path: Path, clock: ManualClock
) -> None:
    store, model = OracleStore(), Model()
    settings = EngineSettings(maintenance_interval_s=1e9, sparse_points_a_day=0)

    async def put(engine: Engine, hours: int, *, is_shipped: bool) -> None:
        for _ in range(hours):
            for n in range(60):
                batch = rows(
                    SET, [("a", clock.now_ms() + n * 60_000, [1.0, float(clock.now_ms() // 60_000 % 997 + n)])]
                )
                sequence = await engine.append(batch, metric_sets=(SET,))
                model.append(SET, batch)
                if is_shipped:
                    store.model.append(SET, batch)
                    await engine.cursors.advance(STORE, sequence)
            clock.advance(3_600)

    async with Engine.open(tmp_path / "lost", clock=clock, settings=settings) as engine:
        await engine.cursors.register(STORE)
        await put(engine, 2, is_shipped=False)
        back_up(tmp_path / "lost", tmp_path / "backup", now_ms=clock.now_ms(), progress=lambda *_: None)
        await put(engine, 2, is_shipped=True)
    (tmp_path / "new").mkdir()
    restore(tmp_path / "backup", tmp_path / "new", settings=settings, clock=clock, progress=lambda *_: None)
    async with Engine.open(tmp_path / "new", clock=clock, settings=settings) as engine:
        await put(engine, 2, is_shipped=False)
        reader = Reader(engine, store, max_points=1_000_000)
        for aggregation, step in itertools.product(Aggregation, (0, 60_000, 600_000, 7_777_000)):
            await answers_like(reader, model, NOON + 1_234_567, aggregation, step)
            assert all(query.end_ms > NOON + 7_200_000 for query in store.asked), "what is here is not asked for"


async def test_what_is_imported_for_long_ago_is_there_before_it_is_shipped(
    aged: tuple[Engine, OracleStore, Model, Reader],
) -> None:
    engine, _, model, reader = aged
    await engine.cursors.register(STORE)
    for days in (1, 20):  # beside what the store has, and where it has nothing
        batch = rows(SET, [("a", NOON - days * 86_400_000 + second * 1_000, [1.0, 2.0]) for second in range(90)])
        await engine.append(batch, metric_sets=(SET,))
        model.append(SET, batch)
    for aggregation, step in itertools.product(Aggregation, (0, 60_000, 7_777_000)):
        await answers_like(reader, model, NOON - 30 * 86_400_000, aggregation, step)


async def test_a_day_that_goes_while_the_store_takes_its_time_is_not_missed(
    aged: tuple[Engine, OracleStore, Model, Reader], clock: ManualClock
) -> None:
    engine, store, model, reader = aged
    held_ms = engine.held_from_ms(0)

    async def answer_slowly(query: Query, metrics: Mapping[str, Metric]) -> AsyncIterator[SeriesResult]:
        async for result in OracleStore.query(store, query, metrics):
            yield result
        if engine.held_from_ms(0) == held_ms:
            clock.advance(86_400)
            await engine.maintain(everything=True)

    store.query = answer_slowly  # type: ignore[method-assign]
    query = Query(metrics=("cpu_usage",), start_ms=NOON, end_ms=NOON + 6 * 86_400_000)
    (result,) = (await reader.read(query)).results
    assert engine.held_from_ms(0) > held_ms, "a day went"
    found = {("a", "cpu_usage"): list(zip(result.times_ms.tolist(), result.values.tolist(), strict=True))}
    assert_same(found, model.query(query))


async def test_a_day_that_goes_while_it_is_read_is_asked_of_the_store(
    aged: tuple[Engine, OracleStore, Model, Reader], clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _, model, reader = aged
    held_ms = engine.held_from_ms(0)

    async def read_late(this: ThisReplica, query: Query) -> list[SeriesResult]:
        if engine.held_from_ms(0) == held_ms:
            clock.advance(86_400)
            await engine.maintain(everything=True)
        return [result async for result in engine.query(query)]

    monkeypatch.setattr(ThisReplica, "query", read_late)
    query = Query(metrics=("cpu_usage",), start_ms=NOON, end_ms=NOON + 6 * 86_400_000)
    (result,) = (await reader.read(query)).results
    assert engine.held_from_ms(0) > held_ms, "a day went"
    found = {("a", "cpu_usage"): list(zip(result.times_ms.tolist(), result.values.tolist(), strict=True))}
    assert_same(found, model.query(query))
