"""The data as it lies on disk at every step of a row's way: each step a crash, each reopened, each row there once.

The folder is copied at each step, as `kill -9` would leave it, and every copy is opened by an engine of its own. The
same check must find the bugs that are planted: that is what shows it is worth something.
"""

import asyncio
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

from fleet.model import Rows
from runtime.clock import ManualClock
from runtime.errors import ResourceExhausted
from services.timeseries.engine import Engine, EngineSettings
from services.timeseries.engine.head import Heads
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.partition import Closed, Mark, Partition, Partitions
from services.timeseries.engine.query import Scan
from services.timeseries.engine.writer import Append, Writer
from tests.timeseries.engine.model import EVERYTHING, Model, assert_same, everything, metric_set, rows

NOON = 19_700 * 86_400_000 + 43_200_000
SET = metric_set("cpu_usage", "requests_total")
SETTINGS = EngineSettings(
    sparse_points_a_day=0, head_rows=4, maintenance_interval_s=1e9, journal_keep_s=0.0, close_group_heads=1
)

PATIENT = EngineSettings(sparse_points_a_day=0, maintenance_interval_s=1e9)


class Crashes:
    """Copies of a folder, and what was acknowledged when each was made."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self._folder = folder
        self._copies = copies
        self.model = Model()
        self.points: list[tuple[str, Path, int]] = []
        self.acknowledged: list[tuple[int, int]] = []
        self._pending: Append | None = None

    def here(self, step: str) -> None:
        copy = self._copies / f"{len(self.points):03d}-{step}"
        shutil.copytree(self._folder, copy, ignore=shutil.ignore_patterns("*-shm"))
        self.points.append((step, copy, len(self.acknowledged)))

    def around(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        """Crashes before and after every call of a method."""
        real: Callable[..., Any] = getattr(owner, name)

        def crashing(*args: Any, **kwargs: Any) -> Any:
            self.here(f"before-{name}")
            answer = real(*args, **kwargs)
            self.here(f"after-{name}")
            return answer

        monkeypatch.setattr(owner, name, crashing)

    async def faults(self) -> list[str]:
        found = []
        for step, copy, count in self.points:
            async with Engine.open(copy, clock=ManualClock(NOON), settings=SETTINGS) as engine:
                answer = await everything(engine)
                stored = {(server, time) for (server, _), series in answer.items() for time, _ in series}
                missing = {("a", time) for time, _ in self.acknowledged[:count]} - stored
                if missing:
                    found.append(f"{step}: {len(missing)} acknowledged rows are missing")
                if (await engine.status()).points != sum(len(series) for series in answer.values()):
                    found.append(f"{step}: rows are there twice")
                if engine.last_sequence < max((sequence for _, sequence in self.acknowledged[:count]), default=0):
                    found.append(f"{step}: a sequence would be used again")
        return found


async def drive(crashes: Crashes, folder: Path) -> None:
    """Twenty batches; after every fifth, heads close and the journal is swept."""
    clock = ManualClock(NOON)
    async with Engine.open(folder, clock=clock, settings=SETTINGS) as engine:
        for number in range(20):
            time = NOON + number * 1_000 - (86_400_000 if number % 7 == 3 else 0)
            batch = rows(SET, [("a", time, [number, number * 2.0]), ("b", time, [float(number), 1.0])])
            sequence = await engine.append(batch, metric_sets=(SET,))
            crashes.acknowledged.append((time, sequence))
            crashes.model.append(SET, batch)
            crashes.here("acknowledged")
            if number % 5 == 4:
                clock.advance(1)
                await engine.maintain(everything=number % 10 == 4)
                crashes.here("maintained")
        assert_same(await everything(engine), crashes.model.query(EVERYTHING))


def plant_acknowledge_first(monkeypatch: pytest.MonkeyPatch, crashes: Crashes) -> None:
    real = Writer._commit

    def wrong(writer: Writer, appends: list[Append]) -> None:
        for append in appends:
            assert append.rows is not None
            crashes.acknowledged.append((int(append.rows.times_ms[0]), 0))
        crashes.here("acknowledged-too-early")
        del crashes.acknowledged[-len(appends) :]
        real(writer, appends)

    monkeypatch.setattr(Writer, "_commit", wrong)


def plant_blocked_through_first(monkeypatch: pytest.MonkeyPatch, crashes: Crashes) -> None:
    real = Partitions._store

    def wrong(partitions: Partitions, day: int, closed: list[Closed], *more: Any) -> list[Mark]:
        ahead = [Closed(cohort_id=c.cohort_id, blocked_through=c.blocked_through, blocks=()) for c in closed]
        real(partitions, day, ahead, *more)
        crashes.here("between")
        return real(partitions, day, closed, *more)

    monkeypatch.setattr(Partitions, "_store", wrong)


def plant_block_first(monkeypatch: pytest.MonkeyPatch, crashes: Crashes) -> None:
    real = Partitions._store

    def wrong(partitions: Partitions, day: int, closed: list[Closed], *more: Any) -> list[Mark]:
        behind = [dataclasses.replace(c, blocked_through=0) for c in closed]
        marks = real(partitions, day, behind, *more)
        crashes.here("between")
        real(
            partitions,
            day,
            [Closed(cohort_id=c.cohort_id, blocked_through=c.blocked_through, blocks=()) for c in closed],
            *more,
        )
        return marks

    monkeypatch.setattr(Partitions, "_store", wrong)


def plant_sweep_too_far(monkeypatch: pytest.MonkeyPatch, _: Crashes) -> None:
    monkeypatch.setattr(Heads, "floor", lambda _heads, last_sequence: last_sequence)


def plant_forget_the_sequence(monkeypatch: pytest.MonkeyPatch, _: Crashes) -> None:
    real = Journal.sweep

    def wrong(journal: Journal, *args: Any) -> int:
        count = real(journal, *args)
        journal._db.execute("UPDATE meta SET value = 0 WHERE key = 'swept_through'")
        return count

    monkeypatch.setattr(Journal, "sweep", wrong)


def plant_replay_everything(monkeypatch: pytest.MonkeyPatch, _: Crashes) -> None:
    monkeypatch.setattr(Partitions, "blocked_through", lambda _partitions, _day: {})


PLANTS = {
    "nothing": (None, ""),
    "acknowledge first": (plant_acknowledge_first, "missing"),
    "blocked_through first": (plant_blocked_through_first, "missing"),
    "block first": (plant_block_first, "twice"),
    "sweep too far": (plant_sweep_too_far, "missing"),
    "forget the sequence": (plant_forget_the_sequence, "used again"),
    "replay everything": (plant_replay_everything, "twice"),
}


@pytest.mark.parametrize("bug", PLANTS)
async def test_a_crash_at_any_step_keeps_each_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    plant, effect = PLANTS[bug]
    folder = tmp_path / "data"
    crashes = Crashes(folder, tmp_path / "copies")
    with monkeypatch.context() as patches:
        if plant is None:
            crashes.around(patches, Journal, "commit")
            crashes.around(patches, Partitions, "_store")
            crashes.around(patches, Heads, "finish_close")
            crashes.around(patches, Journal, "sweep")
        else:
            plant(patches, crashes)
        await drive(crashes, folder)
        if bug != "replay everything":  # the one bug that lies in the start, not in what was written
            patches.undo()
        faults = await crashes.faults()
    if plant is None:
        assert faults == []
        assert len(crashes.points) > 60
    else:
        assert any(effect in fault for fault in faults), faults


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
    model, refused = Model(), 0

    async def append(engine: Engine, batch: Rows) -> None:
        await engine.append(batch, metric_sets=(wide,))
        model.append(wide, batch)

    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
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
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        assert_same(await everything(engine), model.query(EVERYTHING))


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
    """A read at each step of closing, from within the closing thread, sees all rows."""
    seen: list[tuple[str, int]] = []
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:

        def look(step: str) -> None:
            seen.extend((step, len(result.times_ms)) for result in Scan(engine._store, EVERYTHING).results())

        real_store, real_finish = Partitions._store, Heads.finish_close

        def store(partitions: Partitions, day: int, closed: list[Closed]) -> None:
            look("compressed")
            real_store(partitions, day, closed)
            look("stored")

        def finish(heads: Heads, head: Any, points: int) -> None:
            real_finish(heads, head, points)
            engine._store.lock.release()
            look("dropped")
            engine._store.lock.acquire()

        monkeypatch.setattr(Partitions, "_store", store)
        monkeypatch.setattr(Heads, "finish_close", finish)
        await engine.append(rows(SET, [("a", NOON + n, [float(n), 1.0]) for n in range(9)]), metric_sets=(SET,))
        await engine.maintain(everything=True)
    assert {step for step, _ in seen} == {"compressed", "stored", "dropped"}
    assert {count for _, count in seen} == {9}


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
            await engine.append(rows(SET, [("a", NOON + 7, [7.0, 1.0])]))
            lines.append(("a", NOON + 7, [7.0, 1.0]))
        monkeypatch.setattr(owner, step, look_then_close)
        found = await everything(engine)
    assert closed[0] > 0
    assert len(found["a", "cpu_usage"]) == len(lines)
