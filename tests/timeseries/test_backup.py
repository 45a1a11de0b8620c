"""Backup and restore: of a store that is written all the time, killed in the middle, and with bytes that rot.

Run as a program, this file is a backup that stops in the middle, to be killed there: `python test_backup.py FOLDER
TARGET`; with a number it kills itself when it syncs a folder for that time. The process that writes is that of
appending.py: blocks close and the journal is swept all the time.
"""

import asyncio
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from runtime.clock import ManualClock
from runtime.errors import DataLoss
from services.timeseries.archive import backup
from services.timeseries.archive.journal_copy import JournalCopy
from services.timeseries.archive.manifest import BackupError, describe
from services.timeseries.engine import Aggregation, Engine, Query
from tests.timeseries import appending as writer
from tests.timeseries.engine.model import ask, assert_same
from tests.timeseries.stores import (
    NOON,
    QUIET,
    ROOT,
    as_before_roll_ups,
    back_up,
    fill,
    restore,
    verify,
)

ROUNDS = 5


@contextmanager
def appending(store: Path) -> Iterator[list[int]]:
    """A process that appends without end; the list grows with the numbers of the acknowledged batches."""
    process = subprocess.Popen(
        [sys.executable, writer.__file__, str(store), "0"],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
    )
    acknowledged: list[int] = []
    assert process.stdout is not None
    lines = process.stdout
    acknowledged.append(int(lines.readline()))
    reader = threading.Thread(target=lambda: acknowledged.extend(map(int, lines)))
    reader.start()
    try:
        yield acknowledged
    finally:
        process.kill()
        process.wait()
        reader.join()
        lines.close()


async def wrong_rounds(tmp_path: Path, rng: random.Random, rounds: int) -> list[str]:
    """What is wrong with backups made while another process writes, at random moments and of random slowness."""
    copy, checks, wrong = backup._copy_database, [], []

    def slow_copy(source: Path, target: Path, step: Callable[[int, int], None]) -> None:
        copy(source, target, step)
        time.sleep(rng.random() * 0.1)

    with pytest.MonkeyPatch.context() as patch, appending(tmp_path / "live") as acknowledged:
        patch.setattr(backup, "_copy_database", slow_copy)
        for number in range(rounds):
            await asyncio.sleep(rng.random() * 0.1)  # the moment is the random input, nothing is waited for
            before = set(acknowledged)
            manifest = await asyncio.to_thread(back_up, tmp_path / "live", tmp_path / f"backup-{number}")
            assert manifest.last_sequence >= len(before) and not manifest.left_out
            checks.append((number, before))
        wrong += (await asyncio.to_thread(verify, tmp_path / "live"))[1]
    tried = max(acknowledged) + 10
    later = set(range(tried, tried + 30))
    for number, before in checks:
        wrong += verify(tmp_path / f"backup-{number}")[1]
        store = tmp_path / f"store-{number}"
        assert restore(tmp_path / f"backup-{number}", store).damaged == 0
        wrong += await writer.check(store, before, tried)
        async with Engine.open(store, clock=ManualClock(NOON), settings=QUIET) as engine:
            for more in later:
                await engine.append(writer.batch(writer.spread(more)), metric_sets=(writer.SET,))
        wrong += [f"later: {fault}" for fault in await writer.check(store, before | later, tried + 30)]
    return wrong


async def test_a_backup_under_constant_writes_has_all_that_was_acknowledged_once(tmp_path: Path) -> None:
    rng = random.Random()
    seed = rng.randrange(1 << 30)
    rng.seed(seed)
    assert await wrong_rounds(tmp_path, rng, ROUNDS) == [], f"seed {seed}"


async def test_a_file_that_is_no_database_is_named_and_left_out_of_a_backup(tmp_path: Path) -> None:
    model = await fill(tmp_path / "live")
    first, second = sorted((tmp_path / "live" / "blocks").glob("*.db"))
    first.write_bytes(b"this is no database" * 1_000)
    assert any(line.startswith(f"blocks/{first.name}: it cannot be read") for line in verify(tmp_path / "live")[1])
    manifest = back_up(tmp_path / "live", tmp_path / "backup")
    assert manifest.left_out == (f"blocks/{first.name}",)
    assert verify(tmp_path / "backup")[1] == []
    restored = restore(tmp_path / "backup", tmp_path / "store")
    assert restored.points == 1353 and model.points == 2703 and second.exists()


async def test_a_backup_from_before_there_were_roll_ups_is_restored(tmp_path: Path) -> None:
    """It has version 1 in manifest and partitions; the roll-ups are made when it is opened."""
    model = await fill(tmp_path / "live")
    backup_of = tmp_path / "backup"
    back_up(tmp_path / "live", backup_of)
    as_before_roll_ups(backup_of)
    fields = json.loads((backup_of / "manifest.json").read_text())
    assert fields["manifest_version"] == 2, "so that older programs refuse what they cannot read"
    files = [
        dataclasses.asdict(describe(backup_of, file["name"]))
        for file in fields["files"]
        if "rollup" not in file["name"]
    ]
    (backup_of / "manifest.json").write_text(json.dumps({**fields, "manifest_version": 1, "files": files}))
    assert verify(backup_of)[1] == []
    assert restore(backup_of, tmp_path / "store").points == model.points
    async with Engine.open(tmp_path / "store", clock=ManualClock(NOON), settings=QUIET) as engine:
        status = await engine.status()
        assert status.unrolled_marks == 6
        for _ in range(2):
            for step in (300_000, 3_600_000):
                query = Query(metrics=None, start_ms=0, end_ms=2 * NOON, step_ms=step, aggregation=Aggregation.MAX)
                assert_same(await ask(engine, query), model.query(query), Aggregation.MAX)
            await engine.maintain(everything=True)
        assert (await engine.status()).unrolled_marks == 0
    verified, damaged = verify(tmp_path / "store")
    assert damaged == [] and verified.tiers["rollup-1h"].points == 18


async def test_a_damaged_backup_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    await fill(tmp_path / "live")
    back_up(tmp_path / "live", tmp_path / "backup")
    path = min((tmp_path / "backup" / "blocks").glob("*.db"))
    whole = path.read_bytes()

    def refused(said: str) -> None:
        with pytest.raises(BackupError, match=said):
            restore(tmp_path / "backup", tmp_path / "store")
        assert list((tmp_path / "store").iterdir()) == []
        assert verify(tmp_path / "backup")[0].damages

    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(f"is damaged, nothing was restored; use another backup. blocks/{path.name}: its checksum")
    path.write_bytes(whole[:-1])
    refused("bytes were written|were written")
    path.unlink()
    refused("No such file")
    path.write_bytes(whole)
    manifest = tmp_path / "backup" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[:100])
    refused("cannot be read")
    manifest.write_text(json.dumps({**json.loads(text), "files": [{"name": "../x", "bytes": 1, "sha256": ""}]}))
    refused("does not name the files")
    manifest.unlink()
    with pytest.raises(BackupError, match="no finished backup"):
        restore(tmp_path / "backup", tmp_path / "store")


@pytest.mark.parametrize("reached", ["journal.db", "blocks"])
async def test_an_engine_does_not_start_on_half_a_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached: str
) -> None:
    await fill(tmp_path / "live")
    back_up(tmp_path / "live", tmp_path / "backup")
    put = backup._put

    def all_but_the_last(source: Path, target: Path, file: Any) -> None:
        if file.name.startswith(reached):
            raise OSError(5, "Input/output error")
        put(source, target, file)

    monkeypatch.setattr(backup, "_put", all_but_the_last)
    with pytest.raises(BackupError, match=f"Input/output error. Delete what is in {tmp_path / 'store'} and try again"):
        restore(tmp_path / "backup", tmp_path / "store")
    with pytest.raises(DataLoss, match="was cut off: delete what is in it and restore again"):
        async with Engine.open(tmp_path / "store", clock=ManualClock(NOON), settings=QUIET):
            pass


async def test_a_young_backup_that_is_cut_off_in_its_only_file_starts_as_no_new_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is in a block yet, so no partition says that there should be a journal."""
    async with Engine.open(tmp_path / "live", clock=ManualClock(NOON), settings=QUIET) as engine:
        await engine.append(writer.batch(writer.spread(1)), metric_sets=(writer.SET,))
    assert len(back_up(tmp_path / "live", tmp_path / "backup").files) == 1

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        restore(tmp_path / "backup", tmp_path / "store")
    monkeypatch.undo()
    with pytest.raises(DataLoss, match="was cut off"):
        async with Engine.open(tmp_path / "store", clock=ManualClock(NOON), settings=QUIET):
            pass


async def test_a_restore_for_which_there_is_no_room_blames_no_backup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may be full only when the store is opened."""
    await fill(tmp_path / "live")
    back_up(tmp_path / "live", tmp_path / "backup")

    def full(*_: object) -> None:
        raise apsw.FullError("database or disk is full")

    monkeypatch.setattr(backup, "Store", full)
    wanted = f"the restore failed: the disk is full. Delete what is in {tmp_path / 'store'} and try again"
    with pytest.raises(BackupError, match=wanted):
        restore(tmp_path / "backup", tmp_path / "store")


async def test_a_store_that_starts_after_a_restore_knows_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the restore was killed: the service asks a store that follows for what came after the backup."""
    await fill(tmp_path / "live")
    back_up(tmp_path / "live", tmp_path / "backup")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(backup, "Store", killed)
    with pytest.raises(KeyboardInterrupt):
        restore(tmp_path / "backup", tmp_path / "store")
    async with Engine.open(tmp_path / "store", clock=ManualClock(NOON), settings=QUIET) as engine:
        assert engine.lacks_ms == (NOON, NOON)


async def test_a_backup_killed_at_its_end_is_in_the_way_of_no_other(tmp_path: Path) -> None:
    """Everything is copied and described, and not yet in its place."""
    model = await fill(tmp_path / "live")
    target = tmp_path / "backup"
    process = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, __file__, str(tmp_path / "live"), str(target), "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
        check=False,
    )
    assert process.returncode == -signal.SIGKILL and not target.exists()
    back_up(tmp_path / "live", target)
    assert verify(target)[1] == []
    assert restore(target, tmp_path / "store").points == model.points


async def test_a_backup_killed_in_the_middle_leaves_nothing_in_its_place(tmp_path: Path) -> None:
    model = await fill(tmp_path / "live")
    target, draft = tmp_path / "backup", tmp_path / "backup.partial"
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path / "live"), str(target)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
    )
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == b"in the middle\n"
    with pytest.raises(BackupError, match="another backup is writing"):
        back_up(tmp_path / "live", target)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not target.exists() and [path.name for path in draft.rglob("*.db")] == ["journal.db"]
    assert back_up(tmp_path / "live", target).last_sequence == 7
    assert not draft.exists() and sorted(path.name for path in target.iterdir()) == [
        "blocks",
        "journal.db",
        "manifest.json",
        "rollup-1h",
        "rollup-5m",
    ]
    assert restore(target, tmp_path / "store").points == model.points


async def test_a_backup_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(tmp_path / "live")

    def full(*_: object) -> None:
        raise apsw.FullError("database or disk is full")

    monkeypatch.setattr(JournalCopy, "catch_up", full)
    with pytest.raises(BackupError, match="the disk is full"):
        back_up(tmp_path / "live", tmp_path / "backup")
    assert [path.name for path in tmp_path.iterdir()] == ["live"]


async def test_places_that_are_taken_or_wrong_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "live"
    await fill(store)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter").write_text("mine")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "letter").write_text("mine")
    for target, said in {
        tmp_path / "taken": "not an empty folder",
        tmp_path / "taken" / "letter": "not an empty folder",
        tmp_path / "other": "holds something that no backup left there",
        tmp_path / "none" / "backup": "there is no folder",
        store / "backup": "lies in the store itself",
    }.items():
        with pytest.raises(BackupError, match=said):
            back_up(store, target)
    with monkeypatch.context() as patch, pytest.raises(BackupError, match="is where a disk is mounted: name a new"):
        patch.setattr(Path, "is_mount", lambda path: path == tmp_path / "disk")  # it cannot be renamed to
        back_up(store, tmp_path / "disk")
    with pytest.raises(BackupError, match="there is no store"):
        back_up(tmp_path / "taken", tmp_path / "backup")
    with pytest.raises(BackupError, match="no store and no backup"):
        verify(tmp_path / "taken")
    assert (tmp_path / "other.partial" / "letter").exists()
    (tmp_path / "empty").mkdir()
    back_up(store, tmp_path / "empty")
    with pytest.raises(BackupError, match="is not empty"):
        restore(tmp_path / "empty", tmp_path / "taken")


def stop_in_the_middle(*_: object) -> None:
    print("in the middle", flush=True)
    time.sleep(60)


def killed_at(call: int) -> Callable[[Path], None]:
    calls = iter(range(1, call + 1))

    def sync(_folder: Path) -> None:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    return sync


if __name__ == "__main__":
    if sys.argv[3:]:
        backup.sync_folder = killed_at(int(sys.argv[3]))  # type: ignore[attr-defined]
    else:
        JournalCopy.catch_up = stop_in_the_middle  # type: ignore[method-assign]
    back_up(Path(sys.argv[1]), Path(sys.argv[2]))
