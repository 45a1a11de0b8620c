"""A backup during which an engine does something right after each copy; and the steps that it may do."""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime.clock import ManualClock
from services.timeseries.archive import backup
from services.timeseries.engine import Aggregation, Engine, Query
from tests.timeseries.engine.model import Model, ask, assert_same, everything, rows
from tests.timeseries.stores import DAY_MS, NOON, QUIET, SET, back_up, restore, verify

MINUTE_MS, HOUR_MS = 60_000, 3_600_000
Step = Callable[[], Any]
Plant = Callable[[pytest.MonkeyPatch], None]


class Interleaved:
    """A backup of an engine that does something after each file is copied, at exactly that moment."""

    def __init__(self, engine: Engine, store: Path, monkeypatch: pytest.MonkeyPatch | None) -> None:
        self.engine = engine
        self.store = store
        self.model = Model()
        self.appended = 0
        self.after: dict[str, Step] = {}
        self.after_each: list[Step] = []
        self.copied: list[str] = []
        self._copy = backup._copy_database
        loop = asyncio.get_running_loop()

        def copy_then_act(source: Path, target: Path, step: Callable[[int, int], None]) -> None:
            self._copy(source, target, step)
            self.copied.append(str(source.relative_to(store)))
            act = self.after_each.pop(0) if self.after_each else self.after.pop(self.copied[-1], None)
            if act is not None:
                asyncio.run_coroutine_threadsafe(act(), loop).result(10)

        if monkeypatch is not None:
            monkeypatch.setattr(backup, "_copy_database", copy_then_act)

    async def append(self, server: str, of_set: Any = SET, *, kept: bool = True, days: int = 0) -> None:
        self.appended += 1
        time_ms = NOON + self.appended * 1_000 + days * DAY_MS
        batch = rows(of_set, [(server, time_ms, [float(self.appended)] * len(of_set))])
        await self.engine.append(batch, metric_sets=(of_set,))
        if kept:
            self.model.append(of_set, batch)

    async def add(self, day: int, part: int) -> None:
        """Rows of two hours of a day, every fourth minute; the parts lie in between."""
        lines = []
        for time_ms in range(
            day * DAY_MS + 10 * HOUR_MS + part * MINUTE_MS, day * DAY_MS + 12 * HOUR_MS, 4 * MINUTE_MS
        ):
            minute = time_ms // MINUTE_MS
            lines += [(server, time_ms, [minute % 97 / 4, float(minute), minute * part % 13]) for server in "ab"]
        batch = rows(SET, lines)
        await self.engine.append(batch, metric_sets=(SET,))
        self.model.append(SET, batch)

    async def close_and_sweep(self) -> None:
        await self.engine.maintain(everything=True)

    async def back_up(self, target: Path) -> backup.Manifest:
        return await asyncio.to_thread(back_up, self.store, target)

    async def _upkeep(self, run: Step) -> None:
        await asyncio.get_running_loop().run_in_executor(self.engine._upkeep, run)

    async def close(self) -> None:
        """Heads become blocks; nothing is rolled up or swept."""
        await self._upkeep(partial(self.engine._store.close_heads, lambda: False, everything=True))

    async def roll(self, level: int) -> None:
        """The marks of one tier are worked off."""
        rollups, tier = self.engine._rollups, self.engine._store.tiers[level]

        def work() -> None:
            assert rollups._work_off(tier, rollups._grouped(tier, lambda _: True))
            assert not len(tier.marks)

        await self._upkeep(work)

    async def evict(self, level: int, day: int) -> None:
        retention, store = self.engine._retention, self.engine._store
        before = store.endings
        await self._upkeep(partial(retention._attempt, day, partial(retention._evict, store.tiers[level], force=False)))
        assert store.endings == before + 1


WINDOWS = (Aggregation.COUNT, Aggregation.SUM, Aggregation.MAX, Aggregation.LAST)


async def wrong_windows(engine: Engine, model: Model, steps: Iterable[int]) -> bool:
    for aggregation in WINDOWS:
        for step_ms in steps:
            query = Query(metrics=None, start_ms=0, end_ms=2 * NOON, step_ms=step_ms, aggregation=aggregation)
            try:
                assert_same(await ask(engine, query), model.query(query), aggregation)
            except AssertionError:
                return True
    return False


BOTH = (5 * MINUTE_MS, HOUR_MS)


async def wrong_with(tmp_path: Path, model: Model, days: Iterable[int], steps: tuple[int, ...] = BOTH) -> set[str]:
    """What is wrong with the backup once it is restored: its points, which should be those of `days`, whole; and all
    windows of whole buckets: at once, when its roll-ups are made, when its points are gone, when the 5 min are too."""
    wrong = {"damaged"} if verify(tmp_path / "backup")[1] else set()
    restore(tmp_path / "backup", tmp_path / "store")
    async with Engine.open(tmp_path / "store", clock=ManualClock(NOON), settings=QUIET) as engine:
        it = Interleaved(engine, tmp_path / "store", None)
        for name, series in model.series.items():
            wanted = {(time, value) for time, value in series.items() if time // DAY_MS in days}
            found = set((await everything(engine)).get(name, []))
            wrong |= {"missing"} if wanted - found else set()
            wrong |= {"more"} if found - wanted else set()
        wrong |= {"at once"} if await wrong_windows(engine, model, (HOUR_MS,)) else set()
        await engine.maintain(everything=True)
        wrong |= {"rolled up"} if await wrong_windows(engine, model, steps) else set()
        for level, left in ((0, steps), (1, (HOUR_MS,))):
            for day in engine._store.tiers[level].partitions.days(0, 1 << 20):
                await it.evict(level, day)
            wrong |= {f"tier {level} gone"} if await wrong_windows(engine, model, left) else set()
        status = await engine.status()
        assert (status.damaged, status.last_error) == (0, None)
    return wrong
