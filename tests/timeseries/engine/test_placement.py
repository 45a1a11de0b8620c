"""In which file the rows of a day are, and that a read looks for them there."""

import dataclasses
from pathlib import Path

import pytest

from runtime.clock import ManualClock
from services.timeseries.engine import Engine, EngineSettings
from tests.timeseries.engine.model import EVERYTHING, Answer, Model, ask, assert_same, metric_set, rows

pytestmark = pytest.mark.usefixtures("unsynced")
DAY_MS = 86_400_000
FIRST = 19_712  # the first of 64 days that could be one file
SET = metric_set("cpu_usage", "requests_total")
SETTINGS = EngineSettings(maintenance_interval_s=1e9, journal_keep_s=0.0, head_rows=10_000)
ROWS = 45


class Days:
    """An engine with the rows of some days, and what it should answer of each."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.model = Model()

    async def put(self, *days: int, at: int = 0) -> None:
        for day in days:
            lines = [("a", (FIRST + day) * DAY_MS + at + n, [float(n), 1.0]) for n in range(ROWS)]
            batch = rows(SET, lines)
            await self.engine.append(batch, metric_sets=(SET,))
            self.model.append(SET, batch)

    def close(self) -> None:
        self.engine._store.close_heads(lambda: False, everything=True)
        assert self.engine._store.heads.bytes == 0

    @property
    def files(self) -> dict[int, int]:
        return {day - FIRST: span for day, span in self.engine._store.partitions._placed.spans.items()}

    async def check(self, day: int) -> Answer:
        start_ms = (FIRST + day) * DAY_MS
        query = dataclasses.replace(EVERYTHING, start_ms=start_ms, end_ms=start_ms + DAY_MS)
        assert_same(found := await ask(self.engine, query), self.model.query(query))
        return found


@pytest.mark.parametrize(
    ("sparse_points", "closed", "together", "files"),
    [
        (3 * ROWS, (0,), (0, 6), {0: 1, 6: 1}),  # the day before makes many points of few
        (3 * ROWS, (), (0, *[20] * 40), {0: 1, 16: 16}),  # and few of many
    ],
)
async def test_a_file_has_the_days_that_were_meant_although_the_one_before_changes_what_is_expected(
    tmp_path: Path, sparse_points: int, closed: tuple[int, ...], together: tuple[int, ...], files: dict[int, int]
) -> None:
    """Heads of several days become blocks in one go: where a day belongs is asked when those before it are stored."""
    settings = dataclasses.replace(SETTINGS, sparse_points_a_day=sparse_points)
    clock = ManualClock((FIRST + 40) * DAY_MS)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        days = Days(engine)
        await days.put(*closed)
        days.close()
        await days.put(*together, at=1_000)
        days.close()
        assert days.files == files
        for day in together:
            assert await days.check(day)


async def test_a_file_in_the_place_of_one_that_is_set_aside_has_its_days(tmp_path: Path) -> None:
    clock = ManualClock((FIRST + 11) * DAY_MS)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        days = Days(engine)
        await days.put(9)
        days.close()
        assert days.files == {0: 32}
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        days = Days(engine)
        await days.put(10)
        engine._store.partitions.close()  # whoever has it open would not notice
        (path,) = (tmp_path / "blocks").glob("*.db")
        path.write_bytes(b"this is no database" * 1_000)
        days.close()
        assert len(list((tmp_path / "blocks").glob("*unusable-1"))) == 1
        assert await days.check(10)
        await days.put(20)
        days.close()
        assert days.files == {0: 32}
        assert await days.check(20)
