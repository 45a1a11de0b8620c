"""An eviction as it lies on disk at each step: each a crash, each reopened, the day there wholly or not at all."""

import asyncio
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleet.model import Rows
from runtime.clock import ManualClock
from services.timeseries.engine import Engine, EngineSettings
from services.timeseries.engine import partition as partitions_module
from services.timeseries.engine import store as store_module
from services.timeseries.engine.head import Heads
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.retention import Retention
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import Tier
from tests.timeseries.engine.model import everything, metric_set, rows

DAY_MS = 86_400_000
DAY_S = 86_400.0
TODAY = 19_700 * DAY_MS
NOON = TODAY + DAY_MS // 2
SET = metric_set("cpu_usage", "requests_total")
KEEPING = EngineSettings(sparse_points_a_day=0, head_rows=4, maintenance_interval_s=1e9, close_group_heads=1)


class Steps:
    """Copies of a folder at each step, and what a start on each must find."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self._folder = folder
        self._copies = copies
        self.armed = False
        self.noted: dict[int, tuple[int, bool]] = {}
        self.wanted: list[int] = []
        self.cursor = 2
        self.points: list[tuple[str, Path, list[int], int]] = []

    def here(self, step: str) -> None:
        if self.armed:
            copy = self._copies / f"{len(self.points):03d}-{step}"
            shutil.copytree(self._folder, copy, ignore=shutil.ignore_patterns("*-shm"))
            self.points.append((step, copy, list(self.wanted), self.cursor))

    def around(
        self, patches: pytest.MonkeyPatch, owner: Any, name: str, then: Callable[[], None] | None = None
    ) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def crashing(*args: Any, **kwargs: Any) -> Any:
            self.here(f"before-{name}")
            answer = real(*args, **kwargs)
            if then is not None:
                then()
            self.here(f"after-{name}")
            return answer

        patches.setattr(owner, name, crashing)

    async def faults(self) -> list[str]:
        found = []
        for step, copy, wanted, cursor in self.points:
            async with Engine.open(copy, clock=ManualClock(NOON), settings=KEEPING) as engine:
                answer = (await everything(engine)).get(("a", "cpu_usage"), [])
                times = [time for time, _ in answer]
                if missing := set(wanted) - set(times):
                    found.append(f"{step}: {len(missing)} rows are missing")
                if more := set(times) - set(wanted):
                    found.append(f"{step}: {len(more)} rows came back")
                status = await engine.status()
                if status.points != 2 * len(answer):
                    found.append(f"{step}: rows are there twice")
                if status.last_sequence < 12:
                    found.append(f"{step}: a sequence would be used again")
                if await engine.register_follower("f") != cursor:
                    found.append(f"{step}: the cursor moved")
                if cursor < engine.first_sequence - 1:
                    found.append(f"{step}: the follower misses something")
        return found


async def drive(steps: Steps, folder: Path) -> None:
    """Blocks and heads of three days, one of which is evicted, comes back with new rows, and is evicted again."""
    clock, settings = ManualClock(NOON), dataclasses.replace(KEEPING, raw_retention_s=2 * DAY_S, journal_keep_s=0.0)

    def one(time: int) -> Rows:
        return rows(SET, [("a", time, [1.0, float(time)])])

    async with Engine.open(folder, clock=clock, settings=settings) as engine:
        for number in range(6):
            for time in (TODAY - 2 * DAY_MS + number, NOON + number):
                await engine.append(one(time), metric_sets=(SET,))
                steps.wanted.append(time)
            if number == 0:
                await engine.register_follower("f")
                await engine.advance_cursor("f", 2)
            if number == 3:
                await engine.maintain(everything=True)
        steps.armed = True
        clock.advance(DAY_S)
        await engine.maintain()
        steps.here("evicted")
        steps.cursor = await engine.advance_cursor("f", 4)
        await engine.maintain()
        steps.here("swept a little")
        clock.advance(-DAY_S)
        for number in (2, 9):
            time = TODAY - 2 * DAY_MS + number
            await engine.append(one(time))
            steps.wanted.append(time)
            steps.here("new rows")
            await engine.maintain(everything=True)
            steps.here("new blocks")
        steps.cursor = await engine.advance_cursor("f", engine.last_sequence - 1)
        await engine.maintain()
        steps.here("swept")
        clock.advance(DAY_S)
        await engine.maintain()
        steps.here("evicted again")
        steps.cursor = await engine.advance_cursor("f", engine.last_sequence)
        await engine.maintain()
        steps.noted = await asyncio.wrap_future(engine._writer.call(engine._store.journal.evictions))


def plant_unlink_first(patches: pytest.MonkeyPatch, steps: Steps) -> None:
    def wrong(retention: Retention, _tier: Tier, day: int, *, force: bool) -> None:
        retention._store.close_heads(lambda: False, only_day=day)
        retention._store.partitions.evict(day)
        steps.here("between")
        retention._on_writer(lambda: retention._store.forget(day, force=True))
        retention._store.partitions.release(day)

    patches.setattr(Retention, "_evict", wrong)


def plant_start_without_finishing(patches: pytest.MonkeyPatch, _: Steps) -> None:
    patches.setattr(store_module, "remove_files", lambda _path: None)


def plant_replay_what_went(patches: pytest.MonkeyPatch, _: Steps) -> None:
    real = Store._replay
    patches.setattr(Store, "_replay", lambda store, _evicted: real(store, {}))


def plant_finish_twice(patches: pytest.MonkeyPatch, _: Steps) -> None:
    patches.setattr(Journal, "finish_eviction", lambda _journal, _day: None)


def plant_heads_stay(patches: pytest.MonkeyPatch, _: Steps) -> None:
    patches.setattr(Heads, "drop", lambda _heads, _day: [])


def plant_day_for_ever(patches: pytest.MonkeyPatch, _: Steps) -> None:
    real = Journal.begin_eviction
    patches.setattr(Journal, "begin_eviction", lambda journal, day, _through: real(journal, day, 1 << 40))


PLANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch, Steps], None] | None, str]] = {
    "nothing": (None, ""),
    "unlink first": (plant_unlink_first, "missing"),
    "start without finishing": (plant_start_without_finishing, "came back"),
    "replay what went": (plant_replay_what_went, "came back"),
    "finish twice": (plant_finish_twice, "missing"),
    "heads stay": (plant_heads_stay, "came back"),
    "the day for ever": (plant_day_for_ever, "missing"),
}
IN_THE_START = ("start without finishing", "replay what went")


@pytest.mark.parametrize("bug", PLANTS)
async def test_a_crash_at_any_step_leaves_a_whole_day_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    plant, effect = PLANTS[bug]
    steps = Steps(tmp_path / "data", tmp_path / "copies")

    def gone() -> None:
        steps.wanted = [time for time in steps.wanted if time >= TODAY - DAY_MS]

    with monkeypatch.context() as patches:
        steps.around(patches, Journal, "begin_eviction", gone)
        if plant is not None:
            plant(patches, steps)
        else:
            steps.around(patches, Heads, "drop")
            steps.around(patches, Path, "unlink")
            steps.around(patches, partitions_module, "sync_folder")
            steps.around(patches, Journal, "finish_eviction")
        await drive(steps, tmp_path / "data")
        if bug not in IN_THE_START:
            patches.undo()
        faults = await steps.faults()
    if plant is None:
        assert faults == []
        assert steps.noted == {}, "what no replay can bring back need not be noted"
        assert len(steps.points) > 30
    else:
        assert any(effect in fault for fault in faults), faults
