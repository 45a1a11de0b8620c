"""An eviction as it lies on disk at each step: each a crash, each reopened, the days there wholly or not at all.

What was made of them must be there whole in any case: roll-ups outlive their points, and are never made anew of the few
that come later.
"""

import asyncio
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fleet.model import Rows
from runtime.clock import ManualClock
from services.timeseries.engine import Aggregation, Engine, EngineSettings, Query
from services.timeseries.engine import partition as partition_module
from services.timeseries.engine import store as store_module
from services.timeseries.engine.head import Heads
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.partitions import Partitions
from services.timeseries.engine.retention import Retention
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import RAW, Tier
from services.timeseries.engine.upkeep import Rollups
from tests.timeseries.engine.model import ask, everything, metric_set, rows, written

pytestmark = pytest.mark.usefixtures("unsynced")
DAY_MS, HOUR_MS, FIVE_MINUTES_MS = 86_400_000, 3_600_000, 300_000
DAY_S = 86_400.0
TODAY = 19_700 * DAY_MS
NOON = TODAY + DAY_MS // 2
SET = metric_set("cpu_usage", "requests_total")
KEEPING = EngineSettings(sparse_points_a_day=0, head_rows=4, maintenance_interval_s=1e9, close_group_heads=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Which days go: a file of one, or of several where points are few; and the age at which it goes tomorrow."""

    days_ago: tuple[int, ...]
    retention_s: float
    settings: EngineSettings

    @property
    def file_day(self) -> int:
        """The first day of the file."""
        length = 1 if self.settings.sparse_points_a_day == 0 else 32
        return (TODAY // DAY_MS - self.days_ago[0]) // length * length

    def time(self, number: int) -> int:
        return TODAY - self.days_ago[number % len(self.days_ago)] * DAY_MS + number


ONE_DAY = Span(days_ago=(2,), retention_s=2 * DAY_S, settings=KEEPING)
SEVERAL = Span(days_ago=(40, 41), retention_s=20.75 * DAY_S, settings=replace(KEEPING, sparse_points_a_day=1 << 40))


class Steps:
    """Copies of a folder at each step, and what a start on each must find."""

    def __init__(self, folder: Path, copies: Path, span: Span) -> None:
        self._folder = folder
        self._copies = copies
        self.span = span
        self.armed = False
        self.noted: dict[int, tuple[int, bool]] = {}
        self.wanted: list[int] = []
        self.rolled_up: set[int] = set()
        self.driven_out: set[int] = set()
        self.cursor = 2
        self.points: list[tuple[str, Path, list[int], set[int], int]] = []
        self.steps: Counter[str] = Counter()
        self._seen: list[tuple[str, int, int]] = []

    def here(self, step: str) -> None:
        if not self.armed:
            return
        self.steps[step] += 1
        seen = written(self._folder)
        if seen == self._seen:  # as it was at the last step
            last, copy, *_ = self.points.pop()
            step = f"{last}, {step}"
        else:
            copy, self._seen = self._copies / f"{len(self.points):03d}-{step}", seen
            shutil.copytree(self._folder, copy, ignore=shutil.ignore_patterns("*-shm"))
        self.points.append((step, copy, list(self.wanted), set(self.rolled_up), self.cursor))

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

    async def faults(self, effect: str = "") -> list[str]:
        """What is wrong with the copies; only until the effect of a bug is found, if one is looked for."""
        found: list[str] = []
        for step, copy, wanted, rolled_up, cursor in self.points:
            async with Engine.open(copy, clock=ManualClock(NOON), settings=self.span.settings) as engine:
                found.extend(f"{step}: {fault}" for fault in await self._wrong(engine, wanted, rolled_up, cursor))
            if effect and any(effect in fault for fault in found):
                break
        return found

    async def _wrong(self, engine: Engine, wanted: list[int], rolled_up: set[int], cursor: int) -> list[str]:
        found = []
        answer = (await everything(engine)).get(("a", "cpu_usage"), [])
        times = [time for time, _ in answer]
        if missing := set(wanted) - set(times):
            found.append(f"{len(missing)} rows are missing")
        if more := set(times) - set(wanted):
            found.append(f"{len(more)} rows came back")
        status = await engine.status()
        if status.points != 2 * len(answer):
            found.append("rows are there twice")
        if status.last_sequence < 12:
            found.append("a sequence would be used again")
        if await engine.cursors.register("f") != cursor:
            found.append("the cursor moved")
        if cursor < engine.first_sequence - 1:
            found.append("the follower misses something")
        await engine.maintain(everything=True)
        for step_ms in (FIVE_MINUTES_MS, HOUR_MS):
            query = Query(metrics=None, start_ms=0, end_ms=2 * NOON, step_ms=step_ms, aggregation=Aggregation.COUNT)
            windows = Counter(time // step_ms * step_ms for time in rolled_up)
            if (await ask(engine, query)).get(("a", "cpu_usage"), []) != sorted(windows.items()):
                found.append(f"roll-ups of {step_ms} ms are not those of all points")
        return found


async def drive(steps: Steps, folder: Path) -> None:
    """Blocks and heads of three days, of which the old go, come back with new rows, go again, and are driven out."""
    clock, span = ManualClock(NOON), steps.span
    settings = replace(span.settings, raw_retention_s=span.retention_s, journal_keep_s=0.0)

    def one(time: int) -> Rows:
        return rows(SET, [("a", time, [1.0, float(time)])])

    async with Engine.open(folder, clock=clock, settings=settings) as engine:

        async def append(time: int, *, rolled_up: bool = True) -> None:
            await engine.append(one(time), metric_sets=(SET,))
            steps.wanted.append(time)
            if rolled_up:
                steps.rolled_up.add(time)

        for number in range(6):
            for time in (span.time(number), NOON + number):
                await append(time)
            if number == 0:
                await engine.cursors.register("f")
                await engine.cursors.advance("f", 2)
            if number == 3:
                await engine.maintain(everything=True)
        steps.armed = True
        clock.advance(DAY_S)
        await engine.maintain()
        steps.here("evicted")
        steps.cursor = await engine.cursors.advance("f", 4)
        await engine.maintain()
        steps.here("swept a little")
        clock.advance(-DAY_S)
        for number in (2, 600_000):
            await append(
                span.time(number), rolled_up=number == 600_000
            )  # 2 slips in: what was made of its time is final
            steps.here("new rows")
            await engine.maintain(everything=True)
            steps.here("new blocks")
        steps.cursor = await engine.cursors.advance("f", engine.last_sequence - 1)
        await engine.maintain()
        steps.here("swept")
        clock.advance(DAY_S)
        await engine.maintain()
        steps.here("evicted again")
        await append(span.time(1_200_000))
        slipping = [span.time(1_200_000 + 2 * number) for number in (1, 2, 3)]
        steps.driven_out = {slipping[-1]}  # the one that comes after the last try
        late = iter(slipping)
        await drive_out(engine, steps, lambda: append(next(late)))
        steps.here("driven out")
        await engine.maintain(everything=True)
        steps.here("driven out, and all closed")
        steps.cursor = await engine.cursors.advance("f", engine.last_sequence)
        await engine.maintain()
        steps.noted = await asyncio.wrap_future(engine._writer.call(engine._store.journal.evictions))


async def drive_out(engine: Engine, steps: Steps, meanwhile: Callable[[], Any]) -> None:
    """As the disk's limit does, although rows come when all is rolled up."""
    retention, loop = engine._retention, asyncio.get_running_loop()
    evict = partial(retention._evict, engine._store.tiers[RAW], force=True)

    def complete_then_append(*args: Any) -> bool:
        made = complete(engine._rollups, *args)
        asyncio.run_coroutine_threadsafe(meanwhile(), loop).result(5)
        return made

    complete = Rollups.complete
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(engine._rollups, "complete", complete_then_append)
        assert await asyncio.to_thread(retention._attempt, steps.span.file_day, evict)


def plant_unlink_first(patches: pytest.MonkeyPatch, steps: Steps) -> None:
    def wrong(retention: Retention, tier: Tier, day: int, *, force: bool) -> None:
        days = range(day, day + tier.partitions.span_of(day))
        retention._store.close_heads(lambda: False, only_days=days)
        retention._rollups.complete(tier, day)
        tier.partitions.evict(day)
        steps.here("between")
        retention._on_writer(lambda: retention._store.forget(day, len(days), force=True))
        tier.partitions.release(day)

    patches.setattr(Retention, "_evict", wrong)


def plant_start_without_finishing(patches: pytest.MonkeyPatch, _: Steps) -> None:
    patches.setattr(store_module, "remove_files", lambda *_: None)


def plant_replay_what_went(patches: pytest.MonkeyPatch, _: Steps) -> None:
    real = Store._replay
    patches.setattr(Store, "_replay", lambda store, _evicted: real(store, {}))


def plant_finish_twice(patches: pytest.MonkeyPatch, _: Steps) -> None:
    patches.setattr(Journal, "finish_eviction", lambda _journal, _days: None)


def plant_heads_stay(patches: pytest.MonkeyPatch, _: Steps) -> None:
    patches.setattr(Heads, "drop", lambda _heads, _day: [])


def plant_day_for_ever(patches: pytest.MonkeyPatch, _: Steps) -> None:
    real = Journal.begin_eviction
    patches.setattr(Journal, "begin_eviction", lambda journal, days, _through: real(journal, days, 1 << 40))


def plant_first_day_only(patches: pytest.MonkeyPatch, _: Steps) -> None:
    real = Journal.begin_eviction
    patches.setattr(Journal, "begin_eviction", lambda journal, days, through: real(journal, days[:1], through))


def plant_before_all_is_made(patches: pytest.MonkeyPatch, _: Steps) -> None:
    patches.setattr(Rollups, "complete", lambda *_: True)
    patches.setattr(Store, "_waits", lambda *_: False)


def plant_made_anew(patches: pytest.MonkeyPatch, _: Steps) -> None:
    patches.setattr(Rollups, "_unfrozen", lambda _rollups, _target, _cohorts, made, _end: made)


PLANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch, Steps], None] | None, Span, str]] = {
    "nothing": (None, ONE_DAY, ""),
    "nothing, of several days": (None, SEVERAL, ""),
    "unlink first": (plant_unlink_first, ONE_DAY, "missing"),
    "start without finishing": (plant_start_without_finishing, ONE_DAY, "came back"),
    "replay what went": (plant_replay_what_went, ONE_DAY, "came back"),
    "finish twice": (plant_finish_twice, ONE_DAY, "missing"),
    "heads stay": (plant_heads_stay, ONE_DAY, "came back"),
    "the day for ever": (plant_day_for_ever, ONE_DAY, "missing"),
    "the first day only": (plant_first_day_only, SEVERAL, "came back"),
    "before all is made": (plant_before_all_is_made, ONE_DAY, "roll-ups"),
    "made anew": (plant_made_anew, ONE_DAY, "roll-ups"),
}
IN_THE_START = ("start without finishing", "replay what went")


@pytest.mark.parametrize("bug", PLANTS)
async def test_a_crash_at_any_step_leaves_whole_days_or_none_and_their_roll_ups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    plant, span, effect = PLANTS[bug]
    steps = Steps(tmp_path / "data", tmp_path / "copies", span)

    def gone() -> None:
        steps.wanted = [time for time in steps.wanted if time >= TODAY - DAY_MS]
        steps.rolled_up -= steps.driven_out

    with monkeypatch.context() as patches:
        steps.around(patches, Journal, "begin_eviction", gone)
        if plant is not None:
            plant(patches, steps)
        else:
            steps.around(patches, Heads, "drop")
            steps.around(patches, Path, "unlink")
            steps.around(patches, partition_module, "sync_folder")
            steps.around(patches, Journal, "finish_eviction")
            steps.around(patches, Partitions, "_store")
            steps.around(patches, Partitions, "clear")
        await drive(steps, tmp_path / "data")
        if bug not in IN_THE_START:
            patches.undo()
        faults = await steps.faults(effect)
    if plant is None:
        assert faults == [], "\n".join(faults)
        assert steps.noted == {}, "what no replay can bring back need not be noted"
        assert len(steps.points) > 30 and steps.steps["after-unlink"] >= 9
    else:
        assert any(effect in fault for fault in faults), faults
