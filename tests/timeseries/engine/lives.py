"""Lives of a store on a disk whose power goes: what is run, when it is cut off, and how what is left is judged.

A life is a run of the engine on a `Disk` (tests/harness/power.py): rows come in and late, heads are closed, roll-ups
being made, blocks merged, the journal swept, files of all tiers going by age or by the limit, logs being put into their
files every few pages, and a follower shipping. At random moments the power is lost. What is left is opened by an engine
on an ordinary disk and compared with the oracle (history.py, rolled.py); one of the survivors is the store's next life.
"""

import asyncio
import contextlib
import dataclasses
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import apsw
import numpy as np

from fleet.model import MetricSet, Rows
from runtime.clock import ManualClock
from runtime.errors import Unavailable
from services.timeseries.engine import Aggregation, Engine, EngineSettings, EngineStatus
from services.timeseries.followers.backend import BackendInfo, Receipt, TaggedRows
from services.timeseries.followers.follower import Follower
from tests.harness.power import Disk
from tests.timeseries.engine.history import DAY_MS, History, Moment, rows_of
from tests.timeseries.engine.model import NAN, Answer, everything, metric_set, rows
from tests.timeseries.engine.rolled import WORKED_OUT, rolled_faults
from tests.timeseries.engine.watch import Done, Watch
from tests.timeseries.stores import verify

NOON = 19_700 * DAY_MS + DAY_MS // 2
SETS = (metric_set("cpu_usage", "requests_total", "load_1m"), metric_set("cpu_usage", "memory_usage"))
SERVERS = "abc"
SENDERS, BATCHES = 3, 25
BUSY = EngineSettings(
    head_rows=8,
    head_age_s=5_000.0,
    maintenance_interval_s=1e9,
    journal_keep_s=0.0,
    close_group_heads=2,
    sweep_rows=5,
    partition_connections=2,
    scan_cells=2_000,
    merge_blocks=3,
    merged_rows=40,
    late_grace_s=0.0,
)
"""Few points a day: a file of points spans 32 days."""
A_FILE_A_DAY: Final = dataclasses.replace(BUSY, sparse_points_a_day=0)
BY_AGE: Final = dataclasses.replace(
    A_FILE_A_DAY,
    raw_retention_s=2 * 86_400.0,
    five_minute_retention_s=5 * 86_400.0,
    hour_retention_s=20 * 86_400.0,
)
SPARSE: Final = dataclasses.replace(BUSY, raw_retention_s=2 * 86_400.0, five_minute_retention_s=50 * 86_400.0)
BY_SIZE: Final = dataclasses.replace(A_FILE_A_DAY, disk_bytes_limit=650_000)
ALL_SETTINGS: Final = (BY_AGE, BY_SIZE, SPARSE)
QUIET = EngineSettings(maintenance_interval_s=1e9)
CHECKPOINT_PAGES = 12
CHANCES: Final = {
    "write": 0.003,
    "truncate": 0.06,
    "sync": 0.015,
    "name": 0.04,
    "sync_folder": 0.05,
    "begin_eviction": 0.2,
    "evict": 0.2,
    "finish_eviction": 0.2,
    "store": 0.05,
    "sweep": 0.05,
    "end": 0.2,
    "clear": 0.02,
    "compact": 0.02,
    "_roll_up": 0.01,
    "_partition": 0.02,
    "acknowledge": 0.03,
}
"""How often the power is lost right after a change of the disk, a moment, or an acknowledgement."""
SHIPPING_S = 0.03
LATE_DAYS = (0, 0, 0, 0, 1, 2, 3, 25)
BUCKET_MS: Final = 300_000
PASSING_S = (0.5, 0.5, 0.5, 6_000.0, 6_000.0, 40_000.0, 40_000.0, 90_000.0, 900_000.0)
VERIFIED_SHARE: Final = 0.25
"""Every byte of so many survivors is read, which takes longer than all else."""
MADE_SHARE: Final = 0.1
"""Of so many survivors all that is due is done, and then they are looked at once more."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Plan:
    """What a run is like.

    Attributes:
        settings: of the engine.
        chances: when the power is lost.
        losses: of power in a life, at most.
        re_send: whether points are sent again, with other values.
        deaf: a planted bug: what is never really synced.
    """

    settings: EngineSettings
    chances: Mapping[str, float] = dataclasses.field(default_factory=lambda: CHANCES)
    losses: int = 20
    re_send: bool = False
    deaf: Callable[[Path], bool] = lambda _path: False


@dataclasses.dataclass(slots=True)
class Tally:
    """What was met: losses by the kind of change they followed, and what the survivors held."""

    losses: Counter[str] = dataclasses.field(default_factory=Counter)
    points: int = 0
    partitions: int = 0
    swept: int = 0
    evictions: int = 0
    ends: int = 0
    refused: int = 0
    excused: int = 0
    roll_ups: int = 0
    merges: int = 0


class Remote:
    """What a follower ships to: it stands elsewhere and keeps its power."""

    name = "remote"
    address = ""
    syncs = True

    def __init__(self, rng: random.Random) -> None:
        self.rows: set[tuple[str, str, int]] = set()
        self._rng = rng

    async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
        await asyncio.sleep(self._rng.random() * SHIPPING_S)  # it is somewhere else: nothing is waited for
        for part in batch:
            self.rows.update((part.metric_set.id, server, time) for server, time, _ in rows_of(part.rows))
        return Receipt(shipped=0)

    async def probe(self) -> BackendInfo:
        return BackendInfo(version="")

    async def close(self) -> None:
        pass


@dataclasses.dataclass(slots=True, kw_only=True)
class Survivor:
    """What was left of the disk, and what was known when the power went."""

    folder: Path
    kind: str
    moment: Moment
    remote: set[tuple[str, str, int]] | None = None


class Life:
    """One life of a store, from an opening to its end; the losses of power in it are kept for checking."""

    def __init__(self, folder: Path, history: History, rng: random.Random, remote: Remote | None, plan: Plan) -> None:
        self._folder = folder
        self._history = history
        self._remote = remote
        self._plan = plan
        self.survivors: list[Survivor] = []
        self._rng = rng
        self._cut_rng = random.Random(rng.random())
        self._numbering = threading.Lock()
        self._unique = len(history.sent) * 1_000
        self._followed = False
        self.refused = 0
        self.done = Done()
        self._watch = Watch(history, SETS, self._maybe, self.done)
        self._disk: Disk | None = None

    async def run(self, clock: ManualClock) -> None:
        with (
            Disk(self._folder, lambda kind, _path: self._maybe(kind), deaf=self._plan.deaf) as self._disk,
            self._watch.on(),
            _small_logs(),
        ):
            async with Engine.open(self._folder / "data", clock=clock, settings=self._plan.settings) as engine:
                senders = asyncio.gather(*(self._send(engine, clock) for _ in range(SENDERS)))
                async with contextlib.AsyncExitStack() as stack:
                    if self._remote is not None:
                        await engine.cursors.register(self._remote.name)
                        self._followed = True
                        await stack.enter_async_context(Follower(engine, self._remote, clock, random.Random(1)))
                    while not senders.done():
                        for _ in range(self._rng.randrange(1, 30)):
                            await asyncio.sleep(0)
                        clock.advance(self._rng.choice(PASSING_S))
                        await engine.maintain(everything=self._rng.random() < 0.1)
                await senders
            self._lose_power("the end")
        assert self.done.forced == self.done.said, "the engine says what went without its roll-ups"

    async def _send(self, engine: Engine, clock: ManualClock) -> None:
        """Sends as the service does: what is too late is refused before, and asked anew when days went meanwhile."""
        for _ in range(BATCHES):
            of_set, batch = self._batch(clock.now_ms())
            late, endings = await engine.too_late(batch.server_ids, batch.times_ms)
            keep = ~late & (batch.times_ms >= engine.oldest_ms)
            self.refused += int(np.count_nonzero(~keep))
            if not keep.any():
                continue
            try:
                sequence = await engine.append(batch.select(keep), metric_sets=(of_set,), endings=endings)
            except Unavailable as meanwhile:
                assert meanwhile.reason == "EVICTED_MEANWHILE", meanwhile
                continue
            self._history.acknowledged = max(self._history.acknowledged, sequence)
            self._maybe("acknowledge")

    def _batch(self, now_ms: int) -> tuple[MetricSet, Rows]:
        rng, history = self._rng, self._history
        if history.re_sent and history.sent and rng.random() < 0.2:
            of_set, earlier = rng.choice(history.sent[-40:])
            return of_set, rows(of_set, [(server, time, _values(rng, of_set)) for server, time, _ in rows_of(earlier)])
        of_set, about_ms = rng.choice(SETS), now_ms - rng.choice(LATE_DAYS) * DAY_MS
        if history.sent and rng.random() < 0.15:  # a bucket that is there already, maybe without its points
            about_ms = int(rng.choice(rng.choice(history.sent)[1].times_ms))
        lines = []
        for _ in range(rng.randrange(1, 6)):
            self._unique += 1
            assert self._unique < BUCKET_MS, "no time is drawn twice"
            lines.append((rng.choice(SERVERS), about_ms // BUCKET_MS * BUCKET_MS + self._unique, _values(rng, of_set)))
        return of_set, rows(of_set, lines)

    def _maybe(self, kind: str) -> None:
        if self._cut_rng.random() < self._plan.chances.get(kind, 0.0):
            self._lose_power(kind)

    def _lose_power(self, kind: str) -> None:
        assert self._disk is not None
        certain, followed = self._history.moment(), self._followed
        with self._numbering:  # two threads may come to such a moment at once
            if len(self.survivors) >= self._plan.losses:
                return
            folder = self._folder.with_name(f"{self._folder.name}-{len(self.survivors)}")
            survivor = Survivor(folder=folder, kind=kind, moment=certain)
            self.survivors.append(survivor)
        self._disk.lose_power(folder, self._cut_rng)
        survivor.moment = self._history.moment(certain)
        if self._remote is not None and followed:
            survivor.remote = set(self._remote.rows)


def _values(rng: random.Random, of_set: MetricSet) -> list[float]:
    return [NAN if rng.random() < 0.1 else rng.random() for _ in of_set.metrics]


@contextlib.contextmanager
def _small_logs() -> Iterator[None]:
    """Has SQLite put a log into its file after a few pages, so that this happens all the time."""

    def hook(connection: apsw.Connection) -> None:
        connection.wal_autocheckpoint(CHECKPOINT_PAGES)

    apsw.connection_hooks.append(hook)
    try:
        yield
    finally:
        apsw.connection_hooks.remove(hook)


async def _examine(
    survivor: Survivor, history: History, clock: ManualClock, rng: random.Random
) -> tuple[list[str], Answer, EngineStatus | None]:
    """The faults of what was left, and what it holds."""
    store = survivor.folder / "data"
    try:
        async with Engine.open(store, clock=clock, settings=QUIET) as engine:
            found, status = await everything(engine), await engine.status()
            faults = history.faults(found, status, survivor.moment)
            faults += await unshipped(engine, status, survivor.remote, history)
            if not faults:
                faults += await rolled_faults(engine, history, survivor.moment, some_aggregations(rng))
            if not faults and rng.random() < MADE_SHARE:
                await engine.maintain(everything=True)
                faults += await rolled_faults(engine, history, survivor.moment, some_aggregations(rng))
    except Exception as error:
        return [f"it does not start: {error!r}"], {}, None
    if faults or rng.random() < VERIFIED_SHARE:
        faults += verify(store)[1]
    faults += [f"set aside: {path.name}" for path in store.glob("*/*unusable*")]
    return faults, found, status


def some_aggregations(rng: random.Random) -> set[Aggregation]:
    """COUNT shows most, and any other comes round often enough."""
    return {Aggregation.COUNT, rng.choice(list(WORKED_OUT))}


async def unshipped(
    engine: Engine, status: EngineStatus, remote: set[tuple[str, str, int]] | None, history: History
) -> list[str]:
    """Whether all that is before the follower's cursor is in the remote store (None: no follower was registered), and
    all that comes after it can be read."""
    if remote is None:
        return []
    if not status.followers:
        return ["never shipped: the follower is not known"]
    (follower,) = status.followers
    for of_set, batch in history.sent[: follower.cursor]:
        for server, time, _ in rows_of(batch):
            if (of_set.id, server, time) not in remote:
                return [f"never shipped: {server} at {time}, but the cursor is at {follower.cursor}"]
    wanted = follower.cursor + 1
    if status.first_sequence > wanted:
        return [f"never shipped: {wanted} is not in the journal any more"]
    if wanted <= status.last_sequence:
        async for told in engine.tail(wanted):
            if told.missed or told.rows is None:
                return [f"never shipped: {told.sequence} cannot be read, or what was before it"]
            if told.sequence == status.last_sequence:
                break
    return []


async def lives(folder: Path, rng: random.Random, plan: Plan, count: int, tally: Tally) -> list[str]:
    """Runs some lives of a store in an empty folder, up to the first loss of power that leaves faults: its faults."""
    history, clock = History(re_sent=plan.re_send), ManualClock(NOON)
    remote = Remote(rng) if plan.settings.disk_bytes_limit is None else None  # that limit waits for no follower
    place = folder / "life-0"
    place.mkdir(parents=True)
    for number in range(count):
        before = list(history.evictions)
        life = Life(place, history, rng, remote, plan)
        await life.run(clock)
        new = [eviction for eviction in history.evictions if eviction not in before]
        tally.evictions += sum(eviction.tier == 0 for eviction in new)
        tally.ends += sum(eviction.tier > 0 for eviction in new)
        tally.refused += life.refused
        tally.excused += life.done.forced
        tally.roll_ups += life.done.roll_ups
        tally.merges += life.done.merges
        heir = rng.choice(life.survivors)
        for survivor in life.survivors:
            faults, found, status = await _examine(survivor, history, clock, rng)
            if faults or status is None:
                return [f"{survivor.folder.name}, lost after {survivor.kind}: {fault}" for fault in faults]
            tally.losses[survivor.kind] += 1
            tally.points += sum(map(len, found.values()))
            tally.partitions += len(list((survivor.folder / "data" / "blocks").glob("*.db")))
            tally.swept += status.first_sequence - 1
            if survivor is heir:
                holds = found, status, survivor.moment
        history.settle(*holds)
        if remote is not None and heir.remote is not None:
            remote.rows = heir.remote
        place = heir.folder.rename(folder / f"life-{number + 1}")
        for survivor in life.survivors:
            if survivor is not heir:
                shutil.rmtree(survivor.folder)
    return []
