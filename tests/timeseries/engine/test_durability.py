"""The data as it lies on disk at every step of a row's way: each step a crash, each reopened, each row there once.

The folder is copied at each step, as `kill -9` would leave it, and every copy is opened by an engine of its own. The
same check must find the bugs that are planted: that is what shows it is worth something.
"""

import asyncio
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.clock import ManualClock
from services.timeseries.engine import Aggregation, Engine, EngineSettings, Query, upkeep
from services.timeseries.engine.head import Heads
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.partition import Closed, Mark
from services.timeseries.engine.partitions import Partitions
from services.timeseries.engine.tiers import Tier
from services.timeseries.engine.upkeep import Rollups
from services.timeseries.engine.writer import Append, Writer
from tests.timeseries.engine.model import (
    EVERYTHING,
    Answer,
    Model,
    ask,
    assert_same,
    everything,
    metric_set,
    rows,
    written,
)

pytestmark = pytest.mark.usefixtures("unsynced")
NOON = 19_700 * 86_400_000 + 43_200_000
DAY_MS, HOUR_MS, FIVE_MINUTES_MS = 86_400_000, 3_600_000, 300_000
SET = metric_set("cpu_usage", "requests_total")
SETTINGS = EngineSettings(
    sparse_points_a_day=0,
    head_rows=4,
    maintenance_interval_s=1e9,
    journal_keep_s=0.0,
    close_group_heads=1,
    merge_blocks=2,
)


async def counted(engine: Engine, step_ms: int) -> Answer:
    query = Query(metrics=None, start_ms=0, end_ms=2 * NOON, step_ms=step_ms, aggregation=Aggregation.COUNT)
    return await ask(engine, query)


def count(answer: Answer, step_ms: int) -> Answer:
    """The windows of all points."""
    found: Answer = {}
    for name, series in answer.items():
        windows = Counter(time // step_ms * step_ms for time, _ in series)
        found[name] = sorted((start, float(points)) for start, points in windows.items())
    return found


class Crashes:
    """Copies of a folder, and what was acknowledged when each was made."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self._folder = folder
        self._copies = copies
        self.model = Model()
        self.points: list[tuple[str, Path, int]] = []
        self.acknowledged: list[tuple[int, int]] = []
        self.steps: Counter[str] = Counter()
        self._seen: list[tuple[str, int, int]] = []

    def here(self, step: str) -> None:
        self.steps[step] += 1
        seen = written(self._folder)
        if seen == self._seen:  # as it was at the last step, with more acknowledged at most
            last, copy, _ = self.points[-1]
            self.points[-1] = (f"{last}, {step}", copy, len(self.acknowledged))
            return
        copy, self._seen = self._copies / f"{len(self.points):03d}-{step}", seen
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

    async def faults(self, effect: str = "") -> list[str]:
        """What is wrong with the copies; only until the effect of a bug is found, if one is looked for."""
        found: list[str] = []
        for step, copy, acknowledged in self.points:
            async with Engine.open(copy, clock=ManualClock(NOON), settings=SETTINGS) as engine:
                found.extend(f"{step}: {fault}" for fault in await self._wrong(engine, acknowledged))
            if effect and any(effect in fault for fault in found):
                break
        return found

    async def _wrong(self, engine: Engine, acknowledged: int) -> list[str]:
        """What is wrong with one: with its rows, and with roll-ups of the rows that are there, at once and later."""
        found, answer = [], await everything(engine)
        stored = {(server, time) for (server, _), series in answer.items() for time, _ in series}
        if missing := {("a", time) for time, _ in self.acknowledged[:acknowledged]} - stored:
            found.append(f"{len(missing)} acknowledged rows are missing")
        if (await engine.status()).points != sum(len(series) for series in answer.values()):
            found.append("rows are there twice")
        if engine.last_sequence < max((sequence for _, sequence in self.acknowledged[:acknowledged]), default=0):
            found.append("a sequence would be used again")
        for when in ("", ", once all is made"):
            for step_ms, tier in ((FIVE_MINUTES_MS, "5 min"), (HOUR_MS, "1 h")):
                if await counted(engine, step_ms) != count(answer, step_ms):
                    found.append(f"roll-ups of {tier} are not those of the points{when}")
            await asyncio.to_thread(engine._rollups.run, everything=True)
        return found


async def drive(crashes: Crashes, folder: Path) -> None:
    """Sixteen batches; after some, heads close, blocks are rolled up and merged, and the journal is swept."""
    clock, everything_at = ManualClock(NOON), {4: True, 9: False, 12: False, 14: False, 15: True}
    async with Engine.open(folder, clock=clock, settings=SETTINGS) as engine:
        engine._notify = lambda **_: None  # type: ignore[method-assign]  # heads close below only
        for number in range(16):
            time = NOON + number * 100_000 - (DAY_MS if number in (3, 10) else 0)
            batch = rows(SET, [("a", time, [number, number * 2.0]), ("b", time, [float(number), 1.0])])
            sequence = await engine.append(batch, metric_sets=(SET,))
            crashes.acknowledged.append((time, sequence))
            crashes.model.append(SET, batch)
            crashes.here("acknowledged")
            if number in everything_at:
                clock.advance(1)
                await engine.maintain(everything=everything_at[number])
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


Split = Callable[[Closed], tuple[Closed, Closed]]


def in_two(monkeypatch: pytest.MonkeyPatch, crashes: Crashes, split: Split, folder: str = "") -> None:
    """Each part of a transaction of a partition (of one tier) becomes two, in two transactions."""
    real = Partitions._store

    def wrong(partitions: Partitions, day: int, closed: list[Closed], *more: Any) -> list[Mark]:
        if folder not in partitions.name:
            return real(partitions, day, closed, *more)
        parts = [split(part) for part in closed]
        marks = real(partitions, day, [first for first, _ in parts], *more)
        crashes.here("between")
        return marks + real(partitions, day, [second for _, second in parts], *more)

    monkeypatch.setattr(Partitions, "_store", wrong)


def plant_blocked_through_first(monkeypatch: pytest.MonkeyPatch, crashes: Crashes) -> None:
    in_two(monkeypatch, crashes, lambda c: (replace(c, blocks=(), touched=(), replaces=()), c))


def plant_block_first(monkeypatch: pytest.MonkeyPatch, crashes: Crashes) -> None:
    in_two(monkeypatch, crashes, lambda c: (replace(c, blocked_through=None), replace(c, blocks=(), touched=())))


def plant_mark_later(monkeypatch: pytest.MonkeyPatch, crashes: Crashes) -> None:
    in_two(monkeypatch, crashes, lambda c: (replace(c, touched=()), replace(c, blocks=(), replaces=())), "blocks")


def plant_coarser_mark_later(monkeypatch: pytest.MonkeyPatch, crashes: Crashes) -> None:
    """The mark that the 5 min need comes after that of the points went, which would have made them once more."""
    store, clear, later = Partitions._store, Partitions.clear, []

    def without_marks(partitions: Partitions, day: int, closed: list[Closed], *more: Any) -> list[Mark]:
        if partitions.name == "rollup-5m":
            later.append((partitions, day, [replace(c, blocks=(), replaces=()) for c in closed], *more))
            closed = [replace(c, touched=()) for c in closed]
        return store(partitions, day, closed, *more)

    def clear_then_mark(partitions: Partitions, marks: list[Mark]) -> None:
        clear(partitions, marks)
        crashes.here("between")
        while later:
            store(*later.pop())

    monkeypatch.setattr(Partitions, "_store", without_marks)
    monkeypatch.setattr(Partitions, "clear", clear_then_mark)


def plant_delete_what_is_merged_first(monkeypatch: pytest.MonkeyPatch, crashes: Crashes) -> None:
    in_two(monkeypatch, crashes, lambda c: (replace(c, blocks=(), touched=()), replace(c, replaces=())))


def plant_delete_what_is_merged_later(monkeypatch: pytest.MonkeyPatch, crashes: Crashes) -> None:
    in_two(monkeypatch, crashes, lambda c: (replace(c, replaces=()), replace(c, blocks=(), touched=())))


def plant_clear_the_mark_first(monkeypatch: pytest.MonkeyPatch, crashes: Crashes) -> None:
    real = Rollups._roll_up

    def wrong(rollups: Rollups, tier: Tier, servers: list[list[Mark]], *, growing: bool) -> None:
        tier.partitions.clear([mark for marks in servers for mark in marks])
        crashes.here("between")
        real(rollups, tier, servers, growing=growing)

    monkeypatch.setattr(Rollups, "_roll_up", wrong)


def plant_add_to_buckets(monkeypatch: pytest.MonkeyPatch, _: Crashes) -> None:
    """Only what marks name is looked at, and taken for all there is of a bucket."""
    monkeypatch.setattr(upkeep, "aligned", lambda spans, _width: list(spans))


def plant_sweep_too_far(monkeypatch: pytest.MonkeyPatch, _: Crashes) -> None:
    monkeypatch.setattr(Heads, "floor", lambda _heads, last_sequence: last_sequence)


def plant_forget_the_sequence(monkeypatch: pytest.MonkeyPatch, _: Crashes) -> None:
    real = Journal.sweep

    def wrong(journal: Journal, *args: Any) -> int:
        swept = real(journal, *args)
        journal._db.execute("UPDATE meta SET value = 0 WHERE key = 'swept_through'")
        return swept

    monkeypatch.setattr(Journal, "sweep", wrong)


def plant_replay_everything(monkeypatch: pytest.MonkeyPatch, _: Crashes) -> None:
    monkeypatch.setattr(Partitions, "blocked_through", lambda _partitions, _day: {})


PLANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch, Crashes], None] | None, str]] = {
    "nothing": (None, ""),
    "acknowledge first": (plant_acknowledge_first, "missing"),
    "blocked_through first": (plant_blocked_through_first, "missing"),
    "block first": (plant_block_first, "twice"),
    "mark later": (plant_mark_later, "5 min are not those"),
    "coarser mark later": (plant_coarser_mark_later, "1 h are not those"),
    "clear the mark first": (plant_clear_the_mark_first, "once all is made"),
    "delete what is merged first": (plant_delete_what_is_merged_first, "missing"),
    "delete what is merged later": (plant_delete_what_is_merged_later, "twice"),
    "add to buckets": (plant_add_to_buckets, "once all is made"),
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
            crashes.around(patches, Partitions, "clear")
            crashes.around(patches, Partitions, "compact")
            crashes.around(patches, Heads, "finish_close")
            crashes.around(patches, Journal, "sweep")
        else:
            plant(patches, crashes)
        await drive(crashes, folder)
        if bug != "replay everything":  # the one bug that lies in the start, not in what was written
            patches.undo()
        faults = await crashes.faults(effect)
    if plant is None:
        assert faults == []
        steps = crashes.steps
        assert steps["after-_store"] > 30 and steps["after-clear"] > 10 and steps["after-compact"] > 2
        assert len(crashes.points) > 60
    else:
        assert any(effect in fault for fault in faults), faults
