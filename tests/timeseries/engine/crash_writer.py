"""The process that crash.py kills: a whole engine under load, and notes of what it did that outlive it.

`python -m tests.timeseries.engine.crash_writer FOLDER FIRST NOW_MS SEED KIND [PLANT]` appends to the engine in
FOLDER/data as fast as it can, from batch number FIRST on, while time flies: a day passes in `DAY_S`. So heads close,
the journal is swept, days go by age or by the disk's limit, late rows bring old days back, and a follower ships, all
the time, and whatever else `Engine.maintain` does runs too: its settings must be turned on in `KINDS`, and its method
named in `PHASES`, so that the process can be made to die in the middle of it.

Notes are lines of FOLDER/notes, each written before or after the fact as its letter says:

    o / O sequence                  about to open the engine / open, at this sequence
    s number now_ms kept            about to commit a batch, less the rows that were too late
    a number sequence               it is acknowledged
    e / E tier day days through     about to note durably that days of a tier go / noted, and of roll-ups gone
    x day days                      the limit takes these days without all of their roll-ups
    F / r [[set, server, time]..]   the follower is registered / these rows are in the remote store
    > phase / < phase               a phase begins / ends

SEED draws how it dies: by a hand of its own a little after a phase has begun, or by its parent's. A planted bug that
does harm only while it is between two steps ends the process there: a kill from outside would have to meet the moment.
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
from runtime.errors import Unavailable
from services.timeseries.engine import Engine, EngineSettings
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.merge import Merger
from services.timeseries.engine.partition import Closed, Mark
from services.timeseries.engine.partitions import Partitions
from services.timeseries.engine.retention import Retention
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import TIERS, Tier
from services.timeseries.engine.upkeep import Rollups
from services.timeseries.engine.writer import Append, Writer
from services.timeseries.followers.backend import BackendInfo, Receipt, TaggedRows
from services.timeseries.followers.follower import Follower
from tests.timeseries.engine.history import DAY_MS, rows_of
from tests.timeseries.engine.model import NAN, metric_set, rows

SETS: Final = (metric_set("cpu_usage", "requests_total", "load_1m"), metric_set("cpu_usage", "memory_usage"))
SERVERS: Final = ("a", "b")
SENDERS: Final = 2
DAY_S: Final = 0.15
LATE_DAYS: Final = (0, 0, 0, 0, 0, 0, 1, 2)
SLOT_MS: Final = 1_000_000
"""Times within this are told apart by the numbers of batches, so that no point is sent twice."""
MOST_ROWS: Final = 5

BUSY: Final = EngineSettings(
    head_rows=20,
    head_age_s=0.25,
    maintenance_interval_s=0.01,
    journal_keep_s=0.0,
    close_group_heads=4,
    sweep_rows=7,
    partition_connections=3,
    merge_blocks=3,
    merged_rows=60,
    late_grace_s=0.0,
)
A_FILE_A_DAY: Final = dataclasses.replace(BUSY, sparse_points_a_day=0)
KINDS: Final = {
    "age": dataclasses.replace(
        A_FILE_A_DAY,
        raw_retention_s=86_400.0,
        five_minute_retention_s=3 * 86_400.0,
        hour_retention_s=10 * 86_400.0,
    ),
    "size": dataclasses.replace(A_FILE_A_DAY, disk_bytes_limit=1_000_000),
    "sparse": dataclasses.replace(BUSY, raw_retention_s=86_400.0, five_minute_retention_s=3 * 86_400.0),
}
PHASES: Final[dict[str, tuple[type, str]]] = {
    "replay": (Store, "_replay"),
    "commit": (Journal, "commit"),
    "close": (Store, "close_heads"),
    "store blocks": (Partitions, "store"),
    "sweep": (Store, "sweep"),
    "evict": (Retention, "_evict"),
    "unlink": (Partitions, "evict"),
    "roll up": (Rollups, "_roll_up"),
    "clear marks": (Partitions, "clear"),
    "merge": (Merger, "_partition"),
    "compact": (Partitions, "compact"),
    "end": (Journal, "end"),
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
    address = ""
    syncs = True

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
        keys = [(part.metric_set.id, server, at) for part in batch for server, at, _ in rows_of(part.rows)]
        self._notes.add("r", json.dumps(keys, separators=(",", ":")))
        return Receipt(shipped=len(keys))

    async def probe(self) -> BackendInfo:
        return BackendInfo(version="")

    async def close(self) -> None:
        pass


def note_evictions(notes: Notes) -> None:
    begin_eviction, end, evict, forget, end_of_store = (
        Journal.begin_eviction,
        Journal.end,
        Partitions.evict,
        Store.forget,
        Store.end,
    )
    going: dict[tuple[str, int], tuple[int, int, int, int]] = {}

    def begin(journal: Journal, days: Sequence[int], through: int) -> None:
        notes.add("e", 0, days[0], len(days), through)
        begin_eviction(journal, days, through)
        notes.add("E", 0, days[0], len(days), through)

    def begin_end(journal: Journal, tier: int, day: int, through: int) -> None:
        going[TIERS[tier].folder, day] = words = (tier, day, TIERS[tier].span_days, through)
        notes.add("e", *words)
        end(journal, tier, day, through)

    def evicted(partitions: Partitions, day: int) -> None:
        evict(partitions, day)
        if words := going.pop((partitions.name, day), None):
            notes.add("E", *words)

    def forgotten(store: Store, first: int, days: int, *, force: bool) -> bool:
        if force:
            notes.add("x", first, days)
        return forget(store, first, days, force=force)

    def ended(store: Store, tier: Tier, day: int, *, force: bool) -> bool:
        if force:
            notes.add("x", day, tier.kind.span_days)
        return end_of_store(store, tier, day, force=force)

    for owner, name, method in (
        (Journal, "begin_eviction", begin),
        (Journal, "end", begin_end),
        (Partitions, "evict", evicted),
        (Store, "forget", forgotten),
        (Store, "end", ended),
    ):
        setattr(owner, name, method)


def note_batches(notes: Notes, pending: dict[int, tuple[int, int, str]]) -> None:
    """Notes what is committed, in its order, by what `pending` has of the identity of its rows."""
    stage = Writer._stage

    def staged(writer: Writer, append: Append, *more: Any) -> Any:
        answer = stage(writer, append, *more)
        notes.add("s", *pending[id(append.rows)])
        return answer

    setattr(Writer, "_stage", staged)  # noqa: B010  a method that is none to the type checker


def note_phases(notes: Notes, rng: random.Random) -> None:
    """Has the phases noted, and this process die after one has begun for the n-th time, or not by itself."""
    aim = rng.choice(list(PHASES)) if rng.random() < AIMED_SHARE else None
    begins_left = [rng.randrange(1, 12) if aim != "replay" else 1]
    dies_after_s = rng.random() * DIES_WITHIN_S

    def die_soon() -> None:
        time.sleep(dies_after_s)
        die()

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            notes.add(">", name)
            if name == aim:
                begins_left[0] -= 1
                if begins_left[0] == 0:
                    threading.Thread(target=die_soon, daemon=True).start()
            try:
                return real(*args, **options)
            finally:
                notes.add("<", name)

        return noted

    for name, (owner, method) in PHASES.items():
        setattr(owner, method, noting(name, getattr(owner, method)))


def die() -> None:
    """Ends this process at once, as its parent would."""
    os.kill(os.getpid(), signal.SIGKILL)


def acknowledge_first(writer: Writer, appends: list[Append]) -> None:
    """A planted bug: the senders are answered, and a moment later the commit is made."""
    for number, append in enumerate(appends, writer._store.last_sequence + 1):
        append.done.get_loop().call_soon_threadsafe(append.done.set_result, number)
    time.sleep(0.02)
    commit(
        writer, [dataclasses.replace(append, done=asyncio.Future(loop=append.done.get_loop())) for append in appends]
    )


def sweep_past_heads(store: Store, *, over_limit: bool) -> int:
    """A planted bug: what only heads hold leaves the journal."""
    return store.last_sequence


def replay_everything(_partitions: Partitions, _day: int) -> dict[int, int]:
    """A planted bug: a start does not see what is in blocks already."""
    return {}


def clear_first(_rollups: Rollups, tier: Tier, servers: list[list[Mark]], *, growing: bool) -> None:
    """A planted bug: the marks go, and then what they ask for would be stored."""
    tier.partitions.clear([mark for marks in servers for mark in marks])
    die()


def old_blocks_first(partitions: Partitions, day: int, closed: Sequence[Closed], *more: Any) -> Any:
    """A planted bug: blocks go, and then what they are merged into would be stored."""
    if any(part.replaces for part in closed):
        store(partitions, day, [dataclasses.replace(part, blocks=(), touched=()) for part in closed], *more)
        die()
    return store(partitions, day, closed, *more)


commit, store = Writer._commit, Partitions._store
PLANTS: Final[dict[str, tuple[type, str, Callable[..., Any]]]] = {
    "acknowledge first": (Writer, "_commit", acknowledge_first),
    "sweep past heads": (Store, "sweep_floor", sweep_past_heads),
    "replay everything": (Partitions, "blocked_through", replay_everything),
    "marks go first": (Rollups, "_roll_up", clear_first),
    "old blocks go first": (Partitions, "_store", old_blocks_first),
}


async def run(folder: Path, first: int, clock: FlyingClock, kind: str, notes: Notes) -> None:
    numbers = iter(range(first, 1 << 60))
    pending: dict[int, tuple[int, int, str]] = {}
    note_batches(notes, pending)

    async def one_sender(engine: Engine) -> None:
        for number in numbers:
            now_ms = clock.now_ms()
            of_set, rows_sent = batch(number, now_ms)
            late, endings = await engine.too_late(rows_sent.server_ids, rows_sent.times_ms)
            keep = ~late & (rows_sent.times_ms >= engine.oldest_ms)
            if not keep.any():
                continue
            kept = rows_sent.select(keep)
            pending[id(kept)] = number, now_ms, "".join(map(str, keep.astype(int)))
            try:
                sequence = await engine.append(kept, metric_sets=(of_set,), endings=endings)
            except Unavailable as meanwhile:
                assert meanwhile.reason == "EVICTED_MEANWHILE", meanwhile
                continue
            finally:
                del pending[id(kept)]
            notes.add("a", number, sequence)

    notes.add("o")
    async with Engine.open(folder / "data", clock=clock, settings=KINDS[kind]) as engine:
        notes.add("O", engine.last_sequence)
        senders = asyncio.gather(*(one_sender(engine) for _ in range(SENDERS)))
        if kind == "size":  # whose limit waits for no follower
            await senders
        await engine.cursors.register(Remote.name)
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
