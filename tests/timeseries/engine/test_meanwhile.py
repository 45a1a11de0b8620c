"""What goes on meanwhile: a disk that is full, blocks that cannot be stored, reads while heads become blocks."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import pytest

from fleet.model import Rows
from runtime.clock import ManualClock
from runtime.errors import ResourceExhausted
from services.timeseries.engine import Aggregation, Engine, EngineSettings, Query
from services.timeseries.engine.cache import Cache
from services.timeseries.engine.head import Heads
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.partition import Partition
from services.timeseries.engine.partitions import Partitions
from services.timeseries.engine.query import Scan
from tests.timeseries.engine.model import (
    EVERYTHING,
    Model,
    assert_same,
    everything,
    metric_set,
    rows,
)

pytestmark = pytest.mark.usefixtures("unsynced")
NOON = 19_700 * 86_400_000 + 43_200_000
HOUR_MS, FIVE_MINUTES_MS = 3_600_000, 300_000
SET = metric_set("cpu_usage", "requests_total")
SETTINGS = EngineSettings(
    sparse_points_a_day=0,
    head_rows=4,
    maintenance_interval_s=1e9,
    journal_keep_s=0.0,
    close_group_heads=1,
    merge_blocks=2,
)

PATIENT = EngineSettings(sparse_points_a_day=0, maintenance_interval_s=1e9)


def limit_pages(engine: Engine, pages: int) -> Callable[[], None]:
    """A full disk, as SQLite sees it: no page more than there are, and `pages` on top."""

    def set_limit() -> None:
        database = engine._store.journal._db
        database.pragma("max_page_count", int(database.pragma("page_count")) + pages)

    return set_limit


async def on_writer(engine: Engine, run: Callable[[], None]) -> None:
    await asyncio.wrap_future(engine._writer.call(run))


async def test_a_full_disk_refuses_keeps_what_was_acknowledged_and_recovers(tmp_path: Path) -> None:
    wide = metric_set(*(f"m{number}" for number in range(500)))
    settings = replace(SETTINGS, head_rows=1_000)  # no head closes, so that no sweep makes room
    model, refused = Model(), 0

    async def append(engine: Engine, batch: Rows) -> None:
        await engine.append(batch, metric_sets=(wide,))
        model.append(wide, batch)

    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        await append(engine, rows(wide, [("a", NOON, [1.0] * 500)]))
        await on_writer(engine, limit_pages(engine, 10))
        for number in range(200):
            batch = rows(wide, [(server, NOON + number, [float(number)] * 500) for server in "abcd"])
            try:
                await append(engine, batch)
            except ResourceExhausted as error:
                assert error.reason == "DISK_FULL"
                refused += 1
        assert refused > 100
        status = await engine.status()
        assert status.last_error is not None and "full" in status.last_error.message
        await on_writer(engine, limit_pages(engine, 1 << 20))
        await append(engine, rows(wide, [("e", NOON, [7.0] * 500)]))
        assert_same(await everything(engine), model.query(EVERYTHING))
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        assert_same(await everything(engine), model.query(EVERYTHING))


async def test_a_sweep_that_fails_is_not_told_as_rows_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody may send any more, and then nothing would take it back."""

    def full(*_: object) -> None:
        raise apsw.FullError("disk full")

    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        await engine.append(rows(SET, [("a", NOON, [1.0, 1.0])]), metric_sets=(SET,))
        with monkeypatch.context() as patches:
            patches.setattr(Journal, "sweep", full)
            with pytest.raises(ResourceExhausted):
                await engine.maintain(everything=True)
        status = await engine.status()
        assert status.refusing == ""
        assert status.last_error is not None and "full" in status.last_error.message


async def test_blocks_that_cannot_be_stored_are_stored_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        for number in range(6):
            batch = rows(SET, [("a", NOON + number, [float(number), 1.0])])
            await engine.append(batch, metric_sets=(SET,))
            model.append(SET, batch)
            if number == 3:
                with monkeypatch.context() as patches:

                    def full(*_: object) -> None:
                        raise apsw.FullError("disk full")

                    patches.setattr(Partitions, "_store", full)
                    await engine.maintain(everything=True)
                    other_days = range(NOON // 86_400_000)
                    engine._store.close_heads(lambda: False, only_days=other_days)  # as for a day that is to go
                assert (await engine.status()).closing_fails
                assert engine.first_sequence == 1, "the journal must keep what no block holds"
            assert_same(await everything(engine), model.query(EVERYTHING))
        await engine.maintain(everything=True)
        await engine.maintain(everything=True)
        status = await engine.status()
        assert not status.closing_fails and status.head_points == 0 and status.points == 12
        assert engine.first_sequence == 7
        assert_same(await everything(engine), model.query(EVERYTHING))


async def test_reads_while_blocks_close_see_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read at each step of closing, rolling up and merging, from within the thread that does it, sees all rows."""
    seen: list[tuple[str, int]] = []
    windows = [
        Query(metrics=None, start_ms=0, end_ms=2 * NOON, step_ms=step_ms, aggregation=Aggregation.COUNT)
        for step_ms in (1_000, FIVE_MINUTES_MS, HOUR_MS)
    ]
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:

        def look(step: str) -> None:
            seen.extend((step, len(result.times_ms)) for result in Scan(engine._store, EVERYTHING).results())
            for query in windows:
                seen.extend((step, int(result.values.sum())) for result in Scan(engine._store, query).results())

        def around(owner: type, name: str) -> None:
            real: Callable[..., Any] = getattr(owner, name)

            def looking(*args: Any, **kwargs: Any) -> Any:
                look(f"before {name}")
                answer = real(*args, **kwargs)
                look(f"after {name}")
                return answer

            monkeypatch.setattr(owner, name, looking)

        real_finish = Heads.finish_close

        def finish(heads: Heads, head: Any, points: int) -> None:
            real_finish(heads, head, points)
            engine._store.lock.release()
            look("dropped")
            engine._store.lock.acquire()

        around(Partitions, "_store")
        around(Partitions, "clear")
        around(Partitions, "compact")
        monkeypatch.setattr(Heads, "finish_close", finish)
        for start in (0, 9, 4):
            lines = [("a", NOON + (start + n) * 30_000, [float(n), 1.0]) for n in range(9)]
            await engine.append(rows(SET, lines), metric_sets=(SET,))
            seen.clear()
            await engine.maintain(everything=True)
            assert {count for _, count in seen} == {9 if start == 0 else 18}, "rows sent again count once"
            steps = {step for step, _ in seen}
            assert steps == {"dropped", *(f"{when} {name}" for when in ("before", "after") for name in NAMES)}


NAMES = ("_store", "clear", "compact")


@pytest.mark.parametrize("step", ["snapshot", "days", "infos"])
async def test_a_close_in_the_midst_of_a_read_hides_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """All heads close right after a read has taken one of its looks, whichever comes first."""
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=PATIENT) as engine:
        lines = [("a", NOON + day * 86_400_000 + n, [float(n), 1.0]) for day in range(2) for n in range(6)]
        await engine.append(rows(SET, lines), metric_sets=(SET,))
        owner = {"snapshot": Heads, "days": Partitions, "infos": Partition}[step]
        real: Callable[..., Any] = getattr(owner, step)
        closed: list[int] = []

        def look_then_close(*args: Any) -> Any:
            answer = real(*args)
            if not closed:
                held = engine._store.lock.locked()
                if held:
                    engine._store.lock.release()
                closed.append(engine._store.close_heads(lambda: False, everything=True))
                if held:
                    engine._store.lock.acquire()
            return answer

        if step == "infos":
            await engine.maintain(everything=True)
            engine._store.listed = Cache(1 << 20)  # the roll-ups have listed the blocks already
            await engine.append(rows(SET, [("a", NOON + 7, [7.0, 1.0])]))
            lines.append(("a", NOON + 7, [7.0, 1.0]))
        monkeypatch.setattr(owner, step, look_then_close)
        found = await everything(engine)
    assert closed[0] > 0
    assert len(found["a", "cpu_usage"]) == len(lines)
