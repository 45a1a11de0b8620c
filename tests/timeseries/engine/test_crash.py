"""kill -9 of a real process at random moments: every acknowledged row is there, once.

Run as a program, this file is that process: `python test_crash.py FOLDER FIRST_TIME [PLANT]` appends rows to the
engine in FOLDER as fast as it can, with blocks closing and the journal being swept all the time, and prints the time
of each batch once it is acknowledged. A plant is a bug put in on purpose, which the check must find.
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from fleet.model import Rows
from runtime.clock import ManualClock, SystemClock
from services.timeseries.engine import Engine, EngineSettings
from services.timeseries.engine.writer import Append, Writer
from tests.timeseries.engine.model import everything, metric_set, rows

SET = metric_set("cpu_usage", "requests_total", "memory_usage")
SERVERS = ("a", "b", "c")
SETTINGS = EngineSettings(
    head_rows=20, maintenance_interval_s=0.01, journal_keep_s=0.0, close_group_heads=2, sweep_rows=7
)
ROUNDS = 10
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


def acknowledge_first(writer: Writer, appends: list[Append]) -> None:
    """The planted bug: the future is resolved, then a moment passes (here: until the kill), then the commit is made."""
    for append in appends:
        append.done.get_loop().call_soon_threadsafe(append.done.set_result, 0)
    time.sleep(0.02 if writer._store.last_sequence < 3 else 60)
    silent = [
        Append(rows=a.rows, metric_sets=a.metric_sets, servers=a.servers, done=asyncio.Future(loop=a.done.get_loop()))
        for a in appends
    ]
    commit(writer, silent)


commit = Writer._commit


def run_and_kill(folder: Path, first: int, after_s: float, plant: str = "") -> list[int]:
    """Returns the numbers of the batches that the process saw acknowledged before it was killed."""
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder), str(first), plant],
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline())]
    time.sleep(after_s)  # the moment of the kill is the random input of this test, nothing is waited for
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split(b"\n")[:-1]
    process.stdout.close()
    process.wait()
    return acknowledged + [int(line) for line in rest]


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


async def test_every_acknowledged_row_is_there_once_after_kill_9(tmp_path: Path) -> None:
    rng = random.Random()
    seed = rng.randrange(1 << 30)
    rng.seed(seed)
    acknowledged: set[int] = set()
    first = 0
    for _ in range(ROUNDS):
        numbers = await asyncio.to_thread(run_and_kill, tmp_path, first, rng.random() * 0.3)
        acknowledged.update(numbers)
        first = max(numbers) + 10
        assert await check(tmp_path, acknowledged, first) == [], f"seed {seed}"
    assert len(list((tmp_path / "blocks").glob("*.db"))) == 2


async def test_an_acknowledgement_before_the_commit_is_found(tmp_path: Path) -> None:
    numbers = await asyncio.to_thread(run_and_kill, tmp_path, 0, 0.2, "acknowledge-first")
    assert any("missing" in fault for fault in await check(tmp_path, set(numbers), max(numbers) + 10))


if __name__ == "__main__":
    if "acknowledge-first" in sys.argv:
        Writer._commit = acknowledge_first  # type: ignore[method-assign,assignment]
    asyncio.run(append_forever(Path(sys.argv[1]), int(sys.argv[2])))
