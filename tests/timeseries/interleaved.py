"""A backup during which an engine does something right after each copy; and the steps that it may do."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from services.timeseries.engine import Engine, backup
from tests.timeseries.engine.model import Model, rows
from tests.timeseries.stores import DAY_MS, NOON, SET, back_up

MINUTE_MS, HOUR_MS = 60_000, 3_600_000
Step = Callable[[], Any]


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
