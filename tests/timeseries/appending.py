"""A process that appends without end, for what must work beside one: `python appending.py FOLDER FIRST`.

It appends to the engine in FOLDER as fast as it can, with blocks closing and being merged, roll-ups being made
and the journal being swept all the time, and
prints the number of each batch once it is acknowledged.
"""

import asyncio
import os
import sys
from pathlib import Path

from fleet.model import Rows
from runtime.clock import ManualClock, SystemClock
from services.timeseries.engine import Engine, EngineSettings
from tests.timeseries.engine.model import everything, metric_set, rows

SET = metric_set("cpu_usage", "requests_total", "memory_usage")
SERVERS = ("a", "b", "c")
SETTINGS = EngineSettings(
    sparse_points_a_day=0,
    head_rows=20,
    maintenance_interval_s=0.01,
    journal_keep_s=0.0,
    close_group_heads=2,
    sweep_rows=7,
    merge_blocks=3,
    merged_rows=200,
)
DAY_MS = 86_400_000


def value(server: str, time_ms: int, column: int) -> float:
    return float(hash((ord(server), time_ms, column)) % 1_000_003) / 8


def batch(time_ms: int) -> Rows:
    return rows(SET, [(server, time_ms, [value(server, time_ms, c) for c in range(len(SET))]) for server in SERVERS])


def spread(number: int) -> int:
    """The time of a batch: mostly in order, every fifth a day earlier, so that two partitions are written."""
    return 10 * DAY_MS + number * 1_000 - (DAY_MS if number % 5 == 0 else 0)


async def append_forever(folder: Path, first: int) -> None:
    numbers = iter(range(first, 1 << 40))

    async def one_sender(engine: Engine) -> None:
        for number in numbers:
            await engine.append(batch(spread(number)), metric_sets=(SET,))
            os.write(1, f"{number}\n".encode())

    async with Engine.open(folder, clock=SystemClock(), settings=SETTINGS) as engine:
        await asyncio.gather(*(one_sender(engine) for _ in range(4)))


async def check(folder: Path, acknowledged: set[int], tried: int) -> list[str]:
    """What is wrong: acknowledged rows that are missing, rows that are wrong, rows that are there twice."""
    async with Engine.open(folder, clock=ManualClock(), settings=SETTINGS) as engine:
        found = await everything(engine)
        status = await engine.status()
    wrong = []
    stored = 0
    for server in SERVERS:
        for column, key in enumerate(SET.keys):
            points = dict(found.get((server, key), []))
            stored += len(points)
            missing = [n for n in acknowledged if points.get(spread(n)) != value(server, spread(n), column)]
            if missing:
                wrong.append(f"{server} {key}: {len(missing)} acknowledged rows are missing, first {missing[0]}")
            possible = {spread(n) for n in range(tried)}
            if points.keys() - possible:
                wrong.append(f"{server} {key}: rows that nobody sent")
    if status.points != stored:
        wrong.append(f"{status.points} points are stored for {stored} different ones")
    if status.damaged:
        wrong.append(f"{status.damaged} damaged")
    return wrong


if __name__ == "__main__":
    asyncio.run(append_forever(Path(sys.argv[1]), int(sys.argv[2])))
