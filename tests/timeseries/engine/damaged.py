"""What the tests of damage have in common: a store with all its rows in blocks, and ways to harm it."""

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import apsw

from runtime.clock import ManualClock
from services.timeseries.engine import Aggregation, Engine, EngineSettings, Query
from tests.timeseries.engine.model import Model, metric_set, rows

NOON = 19_700 * 86_400_000 + 43_200_000
DAY_MS = 86_400_000
SET = metric_set("cpu_usage", "requests_total", "memory_usage")
SETTINGS = EngineSettings(sparse_points_a_day=0, maintenance_interval_s=1e9, journal_keep_s=0.0, head_rows=50)
COUNTS = Query(metrics=None, start_ms=0, end_ms=1 << 62, step_ms=300_000, aggregation=Aggregation.COUNT)


async def fill(folder: Path) -> Model:
    """Three servers, two days, everything in blocks and the journal empty."""
    model, rng, clock = Model(), random.Random(1), ManualClock(NOON)
    async with Engine.open(folder, clock=clock, settings=SETTINGS) as engine:
        for day in range(2):
            for server in "abc":
                lines = [
                    (server, NOON + day * DAY_MS + n * 1_000, [rng.random(), n, rng.gauss(5, 1)]) for n in range(50)
                ]
                await engine.append(rows(SET, lines), metric_sets=(SET,))
                model.append(SET, rows(SET, lines))
        clock.advance(1)
        await engine.maintain(everything=True)
    return model


def files(folder: Path) -> list[Path]:
    return sorted((folder / "blocks").glob("*.db"))


def change_by(statement: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with closing(apsw.Connection(str(path))) as db:
            db.execute(statement)

    return change


def change_schema(database: apsw.Connection, table: str, old: str, new: str) -> None:
    """Lets a table hold what no table of ours may."""
    ((text,),) = database.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (table,)).fetchall()
    assert old in text
    database.pragma("writable_schema", 1)
    database.execute("UPDATE sqlite_schema SET sql = ? WHERE name = ?", (text.replace(old, new), table))
    database.execute("PRAGMA writable_schema = RESET")
