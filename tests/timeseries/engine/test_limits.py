"""Bounds have names, and what is refused leaves nothing behind."""

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.model import Metric, MetricSet, Rows, ServerDescriptor
from runtime.clock import ManualClock
from runtime.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from services.timeseries.engine import Aggregation, Engine, EngineSettings, Query
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.partition import Mark
from services.timeseries.engine.partitions import Partitions
from services.timeseries.engine.settings import MAX_TIME_MS
from tests.harness import eventually
from tests.timeseries.engine.model import EVERYTHING, Model, ask, assert_same, everything, last, metric_set, rows

NOON = 19_700 * 86_400_000 + 43_200_000
SET = metric_set("cpu_usage", "memory_usage")
SETTINGS = EngineSettings(maintenance_interval_s=1e9, waiting_bytes_limit=1_000, waiting_appends_limit=3)
QUIET = EngineSettings(maintenance_interval_s=1e9)


def one(number: int, server: str = "a") -> Rows:
    return rows(SET, [(server, NOON + number, [float(number), 1.0])])


class Gate:
    """Holds commits back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        real = Journal.commit

        def gated(journal: Journal, *args: Any) -> None:
            self.reached.set()
            assert self.open.wait(60)
            real(journal, *args)

        monkeypatch.setattr(Journal, "commit", gated)


async def test_appends_wait_over_the_bound_and_too_many_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        await engine.append(one(0), metric_sets=(SET,))
        gate = Gate(monkeypatch)
        tasks = [asyncio.create_task(engine.append(one(number))) for number in range(1, 10)]
        await asyncio.sleep(0)
        status = await engine.status()
        assert (status.waiting_appends, status.waiting_bytes) == (3, 864), "six of 144 bytes fit into 1,000"
        with pytest.raises(ResourceExhausted) as refused:
            await engine.append(one(99))
        assert refused.value.reason == "TOO_MANY_WAITING" and "waiting_appends_limit" in refused.value.message
        with pytest.raises(ResourceExhausted) as refused:
            await engine.append(rows(SET, [("a", NOON, [1.0, 1.0])] * 20))
        assert refused.value.reason == "BATCH_TOO_LARGE" and "waiting_bytes_limit" in refused.value.message
        gate.open.set()
        assert await asyncio.gather(*tasks) == list(range(2, 11)), "taken in the order of asking"
        status = await engine.status()
        assert (status.waiting_bytes, status.waiting_appends) == (0, 0)
        assert len((await everything(engine))["a", "cpu_usage"]) == 10


async def test_a_small_batch_does_not_overtake_a_large_one_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        await engine.append(one(0), metric_sets=(SET,))
        gate = Gate(monkeypatch)
        first = [asyncio.create_task(engine.append(one(number))) for number in range(1, 5)]
        large = asyncio.create_task(engine.append(rows(SET, [("a", NOON, [1.0, 1.0])] * 6)))
        small = asyncio.create_task(engine.append(one(9)))
        await asyncio.sleep(0)
        assert (await engine.status()).waiting_appends == 2, "there is room for the small one, not for the large one"
        gate.open.set()
        await asyncio.gather(*first)
        assert (await large, await small) == (6, 7)


async def test_a_cancelled_append_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        await engine.append(one(0), metric_sets=(SET,))
        model.append(SET, one(0))
        gate = Gate(monkeypatch)
        tasks = [asyncio.create_task(engine.append(one(number))) for number in range(1, 7)]
        await asyncio.to_thread(gate.reached.wait, 60)
        for number in (0, 2, 5):  # being committed, in line, waiting for room
            tasks[number].cancel()
        gate.open.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes] == [
            number in (0, 2, 5) for number in range(6)
        ]
        await engine.append(one(7))
        found = dict((await everything(engine))["a", "cpu_usage"])
        assert {NOON + number for number in (0, 2, 4, 5, 7)} <= found.keys()
        assert (await engine.status()).last_error is None
        points = (await engine.status()).points
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        assert (await engine.status()).points == points
        assert dict((await everything(engine))["a", "cpu_usage"]) == found


async def test_full_heads_hold_appends_back_until_blocks_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EngineSettings(maintenance_interval_s=1e9, head_bytes_limit=8_000)
    hold = threading.Event()
    real = Partitions._store

    def held(partitions: Partitions, *args: Any) -> list[Mark]:
        assert hold.wait(60)
        return real(partitions, *args)

    monkeypatch.setattr(Partitions, "_store", held)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:

        async def many() -> int:
            return len([await engine.append(one(number), metric_sets=(SET,)) for number in range(500)])

        task = asyncio.create_task(many())
        await eventually(lambda: engine._waiting_appends == 1 and not engine._writer.waiting_bytes, within_s=60)
        assert not task.done()
        assert (await engine.status()).head_bytes < 30_000
        hold.set()
        assert await task == 500
        assert len((await everything(engine))["a", "cpu_usage"]) == 500


@pytest.mark.parametrize("time", [-1, -(1 << 63), MAX_TIME_MS + 1, (1 << 63) - 1])
async def test_a_time_that_no_day_has_is_refused(tmp_path: Path, time: int) -> None:
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        with pytest.raises(InvalidArgument) as refused:
            await engine.append(rows(SET, [("a", NOON, [1.0, 1.0]), ("a", time, [1.0, 1.0])]), metric_sets=(SET,))
        assert refused.value.field == "rows.time"
        assert engine.last_sequence == 0
        assert await everything(engine) == {}


async def test_any_day_from_1970_to_2262_is_kept(tmp_path: Path) -> None:
    model = Model()
    days = [0, 1, 86_399_999, 86_400_000, NOON, MAX_TIME_MS - 1, MAX_TIME_MS]
    settings = dataclasses.replace(QUIET, sparse_points_a_day=0)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        for time in days:
            batch = rows(SET, [("a", time, [1.0, float(time)])])
            await engine.append(batch, metric_sets=(SET,))
            model.append(SET, batch)
        assert_same(await everything(engine), model.query(EVERYTHING))
        await engine.maintain(everything=True)
        assert_same(await everything(engine), model.query(EVERYTHING))
        names = sorted(path.name for path in (tmp_path / "blocks").glob("*.db"))
        assert names == ["1970-01-01.db", "1970-01-02.db", "2023-12-09.db", "2262-04-11.db"]
        query = Query(
            metrics=None, start_ms=-(1 << 63), end_ms=1 << 63, step_ms=86_400_000, aggregation=Aggregation.MAX
        )
        assert_same(await ask(engine, query), model.query(query), Aggregation.MAX)
        assert {time for time, _ in (await last(engine)).values()} == {MAX_TIME_MS}


@pytest.mark.parametrize(
    ("setting", "reason"),
    [("max_series", "MAX_SERIES"), ("max_points", "MAX_POINTS"), ("max_scanned_points", "MAX_SCANNED_POINTS")],
)
async def test_a_limit_of_a_query_is_named(tmp_path: Path, setting: str, reason: str) -> None:
    settings = EngineSettings(maintenance_interval_s=1e9, **{setting: 1})
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        await engine.append(rows(SET, [("a", NOON + n, [1.0, 2.0]) for n in range(5)]), metric_sets=(SET,))
        with pytest.raises(ResourceExhausted) as refused:
            await everything(engine)
        assert refused.value.reason == reason and f"{setting} = 1" in refused.value.message


async def test_columns_are_read_in_groups_when_rows_are_many(tmp_path: Path) -> None:
    settings = EngineSettings(maintenance_interval_s=1e9, scan_cells=10)
    model = Model()
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        batch = rows(SET, [("a", NOON + n, [float(n), -float(n)]) for n in range(9)])
        await engine.append(batch, metric_sets=(SET,))
        model.append(SET, batch)
        assert_same(await everything(engine), model.query(EVERYTHING))


def misfit(servers: tuple[str, ...], times: int, columns: int) -> Rows:
    values = np.zeros((1, columns))
    return Rows(metric_set_id=SET.id, server_ids=servers, times_ms=np.zeros(times, np.int64), values=values)


async def test_what_does_not_fit_together_is_refused_alone(tmp_path: Path) -> None:
    twice = MetricSet(metrics=(Metric(name="x"), Metric(name="x")))
    wrong: list[tuple[Rows | None, tuple[MetricSet, ...], str]] = [
        (misfit(("a",), 2, 2), (SET,), "values"),
        (misfit(("a",), 1, 3), (SET,), "values"),
        (misfit(("",), 1, 2), (SET,), "rows.server_id"),
        (None, (twice,), "metric_sets"),
        (rows(SET, [("\ud800", 0, [1.0, 1.0])]), (SET,), "name"),
    ]
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        with pytest.raises(FailedPrecondition) as unknown:
            await engine.append(one(1))
        assert unknown.value.reason == "METRIC_SET_UNKNOWN"
        good = [engine.append(one(number), metric_sets=(SET,)) for number in range(3)]
        bad = [engine.append(batch, metric_sets=sets) for batch, sets, _ in wrong]
        outcomes = await asyncio.gather(*bad[:2], *good, *bad[2:], return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, InvalidArgument)]
        assert [outcome.field for outcome in refused] == [field for _, _, field in wrong]
        assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [1, 2, 3]
        await engine.append(servers=[ServerDescriptor(server_id="quiet", hostname="q")])
        assert engine.knows_server("quiet") and not engine.knows_server("nobody")
        assert engine.metric_set(SET.id) == SET


async def test_after_closing_nothing_is_taken_and_a_reader_is_let_go(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        await engine.append(one(1), metric_sets=(SET,))
        tail = engine.tail(2)
        waiting = asyncio.create_task(anext(tail, None))
        await asyncio.sleep(0)
    assert await waiting is None
    for call in (engine.append(one(2)), everything(engine), engine.cursors.register("late")):
        with pytest.raises(Unavailable):
            await call
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("timeseries-")]


async def test_a_reader_that_goes_away_stops_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, hold = [], threading.Event()
    real = Partitions.lend

    def lend(partitions: Partitions, day: int, *, life: int | None = None) -> Any:
        read.append(day)
        assert hold.wait(60)
        return real(partitions, day, life=life)

    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        lines = [("a", NOON - day * 86_400_000, [1.0, 1.0]) for day in range(10)]
        await engine.append(rows(SET, lines), metric_sets=(SET,))
        await engine.maintain(everything=True)
        monkeypatch.setattr(Partitions, "lend", lend)
        reading = asyncio.create_task(everything(engine))
        await eventually(lambda: read)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        hold.set()
        await eventually(lambda: engine._readers._work_queue.empty() and not engine._scans)
        assert await engine.list_metrics()
        assert len(read) < 20
