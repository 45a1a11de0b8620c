"""The power goes at random moments: what was acknowledged is there, once, whatever the disk had not written yet.

lives.py says what is run and how it is judged. Every bug that is planted below must be found by the same check.
"""

import asyncio
import dataclasses
import inspect
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import apsw
import pytest

from services.timeseries.engine import journal as journal_module
from services.timeseries.engine import partition as partition_module
from services.timeseries.engine import partitions as partitions_module
from services.timeseries.engine import store as store_module
from services.timeseries.engine.database import connect
from services.timeseries.engine.head import Heads
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.partition import Closed, Mark
from services.timeseries.engine.partitions import Partitions
from services.timeseries.engine.retention import Retention
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import Tier
from services.timeseries.engine.upkeep import Rollups
from services.timeseries.engine.writer import Append, Writer
from services.timeseries.followers.follower import Follower
from tests.harness.power import KINDS, File, Folder
from tests.timeseries.engine.lives import ALL_SETTINGS, BY_AGE, CHANCES, Plan, Tally, lives

STORES, LOSSES, FULL_LOSSES, LIVES = 3, 9, 20, 3
FULL_STORES = int(os.environ.get("POWER_STORES", "12"))
"""`make power` asks for 200; 30 took 150 s on a quiet machine and ten minutes on a busy one."""
TRIES = 60
"""Stores that live until a planted bug must have been seen; most are seen in the first."""


async def survive(folder: Path, stores: int, losses: int) -> Tally:
    """Lets stores live and asserts that none of them ever has a fault."""
    first_seed, tally = random.randrange(1 << 30), Tally()
    for seed in range(first_seed, first_seed + stores):
        rng = random.Random(seed)
        settings = ALL_SETTINGS[seed % len(ALL_SETTINGS)]
        plan = Plan(settings=settings, losses=losses, re_send=rng.random() < 0.3)
        assert await lives(folder / str(seed), rng, plan, LIVES, tally) == [], f"seed {seed}"
    assert all(tally.losses[kind] for kind in KINDS if kind != "truncate"), tally
    done = (tally.points, tally.partitions, tally.swept, 10 * tally.evictions, tally.roll_ups, 3 * tally.merges)
    assert min(done) > 10 * stores, tally
    return tally


async def test_what_was_acknowledged_survives_every_loss_of_power(tmp_path: Path) -> None:
    await survive(tmp_path, STORES, LOSSES)


@pytest.mark.full
@pytest.mark.timeout(max(900, 60 * FULL_STORES))
async def test_what_was_acknowledged_survives_many_losses(tmp_path: Path) -> None:
    tally = await survive(tmp_path, FULL_STORES, FULL_LOSSES)
    print(tally)
    assert tally.losses.total() > 15 * FULL_STORES and tally.losses["truncate"] and tally.ends and tally.refused


Plant = Callable[[pytest.MonkeyPatch], None]


def relaxed(path: Path, page_bytes: int) -> apsw.Connection:
    connection = connect(path, page_bytes)
    connection.pragma("synchronous", 1)
    return connection


def plant_normal_journal(patches: pytest.MonkeyPatch) -> None:
    patches.setattr(journal_module, "connect", relaxed)


def plant_normal_partitions(patches: pytest.MonkeyPatch) -> None:
    patches.setattr(partitions_module, "connect", relaxed)


def plant_no_folder_sync(patches: pytest.MonkeyPatch) -> None:
    for module in (journal_module, partition_module, partitions_module, store_module):
        patches.setattr(module, "sync_folder", lambda _folder: None)


def plant_no_sync_of_what_went(patches: pytest.MonkeyPatch) -> None:
    def remove(*paths: Path) -> None:
        for path in paths:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)

    for module in (partitions_module, store_module):
        patches.setattr(module, "remove_files", remove)


def nobodys(append: Append) -> "asyncio.Future[int]":
    """A promise that nobody waits for, whatever becomes of it."""
    promise: asyncio.Future[int] = asyncio.Future(loop=append.done.get_loop())
    promise.add_done_callback(asyncio.Future.exception)
    return promise


def plant_acknowledge_first(patches: pytest.MonkeyPatch) -> None:
    real = Writer._commit

    def wrong(writer: Writer, appends: list[Append]) -> None:
        for number, append in enumerate(appends, writer._store.last_sequence + 1):
            append.done.get_loop().call_soon_threadsafe(append.done.set_result, number)
        time.sleep(0.001)
        real(writer, [dataclasses.replace(append, done=nobodys(append)) for append in appends])

    patches.setattr(Writer, "_commit", wrong)


def plant_sweep_past_heads(patches: pytest.MonkeyPatch) -> None:
    patches.setattr(Heads, "floor", lambda _heads, last_sequence: last_sequence)


def plant_blocked_through_first(patches: pytest.MonkeyPatch) -> None:
    real = Partitions._store

    def wrong(partitions: Partitions, day: int, closed: Sequence[Closed], *more: Any) -> Any:
        real(partitions, day, [dataclasses.replace(head, blocks=(), touched=()) for head in closed], *more)
        return real(partitions, day, closed, *more)

    patches.setattr(Partitions, "_store", wrong)


def plant_blocks_first(patches: pytest.MonkeyPatch) -> None:
    real = Partitions._store

    def wrong(partitions: Partitions, day: int, closed: Sequence[Closed], *more: Any) -> Any:
        marks = real(partitions, day, [dataclasses.replace(head, blocked_through=0) for head in closed], *more)
        real(partitions, day, [dataclasses.replace(head, blocks=(), touched=(), replaces=()) for head in closed], *more)
        return marks

    patches.setattr(Partitions, "_store", wrong)


def plant_unlink_first(patches: pytest.MonkeyPatch) -> None:
    def wrong(retention: Retention, tier: Tier, day: int, *, force: bool) -> None:
        tier.partitions.evict(day)
        if tier.level:
            retention._on_writer(lambda: retention._store.end(tier, day, force=force))
        else:
            retention._on_writer(lambda: retention._store.forget(day, 1, force=force))
            retention._on_writer(lambda: retention._store.journal.finish_eviction([day]))
        tier.partitions.release(day)

    patches.setattr(Retention, "_evict", wrong)


def plant_mark_cleared_first(patches: pytest.MonkeyPatch) -> None:
    real = Rollups._roll_up

    def wrong(rollups: Rollups, tier: Tier, servers: list[list[Mark]], *, growing: bool) -> None:
        tier.partitions.clear([mark for marks in servers for mark in marks])
        real(rollups, tier, servers, growing=growing)

    patches.setattr(Rollups, "_roll_up", wrong)


def plant_old_blocks_first(patches: pytest.MonkeyPatch) -> None:
    real = Partitions._store

    def wrong(partitions: Partitions, day: int, closed: Sequence[Closed], *more: Any) -> Any:
        if any(part.replaces for part in closed):
            real(partitions, day, [dataclasses.replace(part, blocks=(), touched=()) for part in closed], *more)
        return real(partitions, day, [dataclasses.replace(part, replaces=()) for part in closed], *more)

    patches.setattr(Partitions, "_store", wrong)


def plant_roll_ups_last(patches: pytest.MonkeyPatch) -> None:
    """The day is noted as gone, and then what was made of it becomes durable."""
    real, forget = Partitions.store, Store.forget
    waiting: list[Callable[[], Any]] = []

    def later(partitions: Partitions, *words: Any, **options: Any) -> Any:
        frames = inspect.stack()
        if any(frame.function == "_end_made" for frame in frames) and partitions.name == "rollup-5m":
            waiting.append(lambda: real(partitions, *words, **options))
            return []
        return real(partitions, *words, **options)

    def then_all(store: Store, *words: Any, **options: Any) -> bool:
        answer = forget(store, *words, **options)
        while waiting:
            waiting.pop(0)()
        return answer

    patches.setattr(Partitions, "store", later)
    patches.setattr(Store, "forget", then_all)


def plant_cursor_first(patches: pytest.MonkeyPatch) -> None:
    real = Follower._flush

    async def wrong(follower: Follower, pending: Any) -> None:
        if pending.through:
            await follower._engine.cursors.advance(follower._backend.name, pending.through)
        await real(follower, pending)

    patches.setattr(Follower, "_flush", wrong)


def plant_replay_too_little(patches: pytest.MonkeyPatch) -> None:
    """The replay begins after the last batch that was swept past, whatever heads hold."""
    note = Journal.note_stored
    patches.setattr(Journal, "note_stored", lambda journal, _through: note(journal, journal.last_sequence))


def plant_sweep_past_followers(patches: pytest.MonkeyPatch) -> None:
    real = Store.sweep_floor
    patches.setattr(Store, "sweep_floor", lambda store, over_limit: real(store, over_limit=True))


AT_EVICTIONS = {"evict": 1.0, "finish_eviction": 1.0, "name": 0.05}
AT_SWEEPS = {"sweep": 0.5}
AFTER_SYNCS = {"sync": 0.1}
PLANTS: dict[str, tuple[Plant, str, dict[str, float]]] = {
    "synchronous NORMAL of the journal": (plant_normal_journal, "missing", CHANCES),
    "synchronous NORMAL of the partitions": (plant_normal_partitions, "missing", CHANCES),
    "no folder is synced": (plant_no_folder_sync, "missing", CHANCES),
    "an eviction's folder is not synced": (plant_no_sync_of_what_went, "came back", AT_EVICTIONS),
    "acknowledge first": (plant_acknowledge_first, "missing", CHANCES),
    "sweep past heads": (plant_sweep_past_heads, "missing", CHANCES),
    "replay too little": (plant_replay_too_little, "missing", CHANCES),
    "sweep past followers": (plant_sweep_past_followers, "never shipped", AT_SWEEPS),
    "blocked_through first": (plant_blocked_through_first, "missing", AFTER_SYNCS),
    "blocks first": (plant_blocks_first, "there twice", AFTER_SYNCS),
    "unlink first": (plant_unlink_first, "missing", AT_EVICTIONS),
    "mark cleared first": (plant_mark_cleared_first, "rolled up", {"clear": 0.2}),
    "old blocks go first": (plant_old_blocks_first, "missing", {"sync": 0.3}),
    "roll-ups after the day": (plant_roll_ups_last, "rolled up", {"begin_eviction": 1.0}),
    "cursor first": (plant_cursor_first, "never shipped", AFTER_SYNCS),
}


def deaf_to_blocks(path: Path) -> bool:
    return path.parent.name == "blocks" and path.name.endswith(("-wal", ".db"))


def deaf_to_roll_ups(path: Path) -> bool:
    return path.parent.name.startswith("rollup") and path.name.endswith(("-wal", ".db"))


def deaf_to_the_journal(path: Path) -> bool:
    return path.name == "journal.db-wal"


async def first_faults(folder: Path, plan: Plan, effect: str) -> list[str]:
    """The faults of some stores up to the first that has the effect; at most those of `TRIES` stores."""
    found: list[str] = []
    for seed in range(TRIES):
        found += await lives(folder / str(seed), random.Random(seed), plan, LIVES, Tally())
        if any(effect in fault for fault in found):
            break
    return found


@pytest.mark.parametrize("bug", PLANTS)
async def test_a_planted_bug_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    plant, effect, chances = PLANTS[bug]
    with monkeypatch.context() as patches:
        plant(patches)
        faults = await first_faults(tmp_path, Plan(settings=BY_AGE, losses=LOSSES, chances=chances), effect)
    assert any(effect in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("deaf", "effect"),
    [
        (deaf_to_blocks, "missing"),
        pytest.param(deaf_to_roll_ups, "rolled up", marks=pytest.mark.full),
        (deaf_to_the_journal, "missing"),
    ],
)
async def test_a_sync_that_is_left_out_is_found(tmp_path: Path, deaf: Callable[[Path], bool], effect: str) -> None:
    faults = await first_faults(tmp_path, Plan(settings=BY_AGE, losses=LOSSES, deaf=deaf), effect)
    assert any(effect in fault for fault in faults), faults


def test_the_disk_loses_what_it_may_and_nothing_else() -> None:
    rng, file = random.Random(1), File(b"a" * 3_000)
    file.change(100, b"b" * 2_000)
    file.change(500, None)
    file.change(1_000, b"c" * 10)
    assert file.after_loss(rng, 0.0, 1.0) == b"a" * 3_000
    assert file.after_loss(rng, 1.0, 0.0) == b"a" * 100 + b"b" * 400 + bytes(500) + b"c" * 10
    drawn = {file.after_loss(rng, 0.5, 0.5) for _ in range(1_000)}
    assert b"a" * 3_000 in drawn and len(drawn) > 30
    cut_whole = [left for left in drawn if len(left) == 3_000 and b"c" not in left]
    changes = {at for left in cut_whole for at in range(1, 3_000) if left[at] != left[at - 1]}
    assert changes == {100, 512, 1_024, 1_536, 2_048, 2_100}, "torn between sectors only"
    file.sync()
    assert file.after_loss(rng, 0.0, 1.0) == b"a" * 100 + b"b" * 400 + bytes(500) + b"c" * 10

    folder = Folder()
    folder.change({"old": file})
    folder.sync()
    folder.change({"new": File(), "old": None})
    folder.change({"later": File()})
    found = {tuple(sorted(folder.after_loss(rng, 0.5))) for _ in range(100)}
    assert found == {("old",), ("new",), ("later", "old"), ("later", "new")}, "each change wholly or not at all"
