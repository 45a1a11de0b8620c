"""The process that crash.py kills: a whole engine under load, and notes of what it did that outlive it.

`python -m tests.timeseries.engine.crash_writer FOLDER FIRST NOW_MS SEED KIND [PLANT]` appends to the engine in
FOLDER/data as fast as it can, from batch number FIRST on, while time flies: a day passes in `DAY_S`. So heads close,
the journal is swept, days go by age or by the disk's limit, late rows bring old days back, and a follower ships, all
the time, and whatever else `Engine.maintain` does runs too: its settings must be turned on in `KINDS`, and its method
named in `PHASES`, so that the process can be made to die in the middle of it.

Notes are lines of FOLDER/notes, each written before or after the fact as its letter says:

    o / O sequence                  about to open the engine / open, at this sequence
    s number now_ms / a number seq  about to append a batch / acknowledged
    e day through / E day through   about to note an eviction durably / noted
    F / r [[set, server, time]..]   the follower is registered / these rows are in the remote store
    > phase / < phase               a phase begins / ends

SEED draws how it dies: by a hand of its own a little after a phase has begun, or by its parent's.
"""

import asyncio
import dataclasses
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from fleet.model import MetricSet, Rows
from runtime.clock import SystemClock
from services.timeseries.engine import Engine, EngineSettings
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.partition import Partitions
from services.timeseries.engine.retention import Retention
from services.timeseries.engine.store import Store
from services.timeseries.engine.writer import Append, Writer
from services.timeseries.followers.follower import BackendInfo, Follower, Receipt, TaggedRows
from tests.timeseries.engine.history import DAY_MS, rows_of
from tests.timeseries.engine.model import NAN, metric_set, rows

SETS: Final = (metric_set("cpu_usage", "requests_total", "load_1m"), metric_set("cpu_usage", "memory_usage"))
SERVERS: Final = ("a", "b", "c")
SENDERS: Final = 4
DAY_S: Final = 0.12
LATE_DAYS: Final = (0, 0, 0, 0, 0, 1, 2, 3)
SLOT_MS: Final = 1_000_000
"""Times within this are told apart by the numbers of batches, so that no point is sent twice."""
MOST_ROWS: Final = 5

BUSY: Final = EngineSettings(
    head_rows=20,
    head_age_s=0.05,
    maintenance_interval_s=0.01,
    journal_keep_s=0.0,
    close_group_heads=2,
    sweep_rows=7,
    partition_connections=3,
)
KINDS: Final = {
    "age": dataclasses.replace(BUSY, raw_retention_s=2 * 86_400.0),
    "size": dataclasses.replace(BUSY, disk_bytes_limit=1_000_000),
}
PHASES: Final[dict[str, tuple[type, str]]] = {
    "replay": (Store, "_replay"),
    "commit": (Journal, "commit"),
    "close": (Store, "close_heads"),
    "store blocks": (Partitions, "store"),
    "sweep": (Store, "sweep"),
    "evict": (Retention, "_evict"),
    "unlink": (Partitions, "evict"),
}
AIMED_SHARE: Final = 0.6
DIES_WITHIN_S: Final = 0.006


class FlyingClock(SystemClock):
    """The wall clock of a world whose days take `DAY_S`; sleeping and `monotonic` are ours."""

    def __init__(self, now_ms: int) -> None:
        self._start_ms, self._start_s = now_ms, time.monotonic()

    def now_ms(self) -> int:
        return self._start_ms + int((time.monotonic() - self._start_s) * DAY_MS / DAY_S)


def batch(number: int, now_ms: int) -> tuple[MetricSet, Rows]:
    """What is sent under a number: the same for whoever asks, and no point twice."""
    rng = random.Random(number)
    of_set, slot_ms = rng.choice(SETS), (now_ms - rng.choice(LATE_DAYS) * DAY_MS) // SLOT_MS * SLOT_MS
    lines = [
        (rng.choice(SERVERS), slot_ms + (number * MOST_ROWS + row) % SLOT_MS, _values(rng, of_set))
        for row in range(rng.randrange(1, MOST_ROWS + 1))
    ]
    return of_set, rows(of_set, lines)


def _values(rng: random.Random, of_set: MetricSet) -> list[float]:
    return [NAN if rng.random() < 0.1 else rng.random() for _ in of_set.metrics]


class Notes:
    """Lines that are in the page cache, and so outlive this process, when `add` returns."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def add(self, *words: object) -> None:
        os.write(self._handle, (" ".join(map(str, words)) + "\n").encode())


class Remote:
    """What the follower ships to: the notes."""

    name = "remote"

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
        keys = [(part.metric_set.id, server, at) for part in batch for server, at, _ in rows_of(part.rows)]
        self._notes.add("r", json.dumps(keys, separators=(",", ":")))
        return Receipt(shipped=len(keys))

    async def probe(self) -> BackendInfo:
        return BackendInfo(address="", version="")

    async def close(self) -> None:
        pass


def note_evictions(notes: Notes) -> None:
    real = Journal.begin_eviction

    def begin(journal: Journal, day: int, through: int) -> None:
        notes.add("e", day, through)
        real(journal, day, through)
        notes.add("E", day, through)

    setattr(Journal, "begin_eviction", begin)  # noqa: B010  a method that is none to the type checker


def note_phases(notes: Notes, rng: random.Random) -> None:
    """Has the phases noted, and this process die after one has begun for the n-th time, or not by itself."""
    aim = rng.choice(list(PHASES)) if rng.random() < AIMED_SHARE else None
    begins_left = [rng.randrange(1, 12) if aim != "replay" else 1]
    dies_after_s = rng.random() * DIES_WITHIN_S

    def die() -> None:
        time.sleep(dies_after_s)
        os.kill(os.getpid(), signal.SIGKILL)

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            notes.add(">", name)
            if name == aim:
                begins_left[0] -= 1
                if begins_left[0] == 0:
                    threading.Thread(target=die, daemon=True).start()
            try:
                return real(*args, **options)
            finally:
                notes.add("<", name)

        return noted

    for name, (owner, method) in PHASES.items():
        setattr(owner, method, noting(name, getattr(owner, method)))


def acknowledge_first(writer: Writer, appends: list[Append]) -> None:
    """A planted bug: the senders are answered, and a moment later the commit is made."""
    for number, append in enumerate(appends, writer._store.last_sequence + 1):
        append.done.get_loop().call_soon_threadsafe(append.done.set_result, number)
    time.sleep(0.002)
    commit(
        writer, [dataclasses.replace(append, done=asyncio.Future(loop=append.done.get_loop())) for append in appends]
    )


def sweep_past_heads(store: Store, *, over_limit: bool) -> int:
    """A planted bug: what only heads hold leaves the journal."""
    return store.last_sequence


def replay_everything(_partitions: Partitions, _day: int) -> dict[int, int]:
    """A planted bug: a start does not see what is in blocks already."""
    return {}


commit = Writer._commit
PLANTS: Final[dict[str, tuple[type, str, Callable[..., Any]]]] = {
    "acknowledge first": (Writer, "_commit", acknowledge_first),
    "sweep past heads": (Store, "sweep_floor", sweep_past_heads),
    "replay everything": (Partitions, "blocked_through", replay_everything),
}


async def run(folder: Path, first: int, clock: FlyingClock, kind: str, notes: Notes) -> None:
    numbers = iter(range(first, 1 << 60))

    async def one_sender(engine: Engine) -> None:
        for number in numbers:
            now_ms = clock.now_ms()
            of_set, rows_sent = batch(number, now_ms)
            notes.add("s", number, now_ms)
            sequence = await engine.append(rows_sent, metric_sets=(of_set,))
            notes.add("a", number, sequence)

    notes.add("o")
    async with Engine.open(folder / "data", clock=clock, settings=KINDS[kind]) as engine:
        notes.add("O", engine.last_sequence)
        senders = asyncio.gather(*(one_sender(engine) for _ in range(SENDERS)))
        if kind == "size":  # whose limit waits for no follower
            await senders
        await engine.register_follower(Remote.name)
        notes.add("F")
        async with Follower(engine, Remote(notes), clock, random.Random(1)):
            await senders


def main(folder: str, first: str, now_ms: str, seed: str, kind: str, bug: str = "") -> None:
    notes = Notes(Path(folder) / "notes")
    if bug:
        setattr(*PLANTS[bug])
    note_evictions(notes)
    note_phases(notes, random.Random(int(seed)))
    asyncio.run(run(Path(folder), int(first), FlyingClock(int(now_ms)), kind, notes))


if __name__ == "__main__":
    main(*sys.argv[1:])
