"""Backup and restore: of a store that is written all the time, killed in the middle, and with bytes that rot.

Run as a program, this file is a backup that stops in the middle, to be killed there: `python test_backup.py FOLDER
TARGET`. The process that writes is that of appending.py: blocks close and the journal is swept all the time.
"""

import asyncio
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
from services.timeseries.engine import Engine, EngineSettings, backup
from services.timeseries.engine.manifest import BackupError
from tests.timeseries import appending as writer
from tests.timeseries.engine.model import Model, everything, rows
from tests.timeseries.stores import (
    DAY_MS,
    NOON,
    OTHER_SET,
    QUIET,
    ROOT,
    SET,
    back_up,
    fill,
    goes_on,
    ignore,
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


class Interleaved:
    """A backup of an engine that does something after each file is copied, at exactly that moment."""

    def __init__(self, engine: Engine, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = engine
        self.store = store
        self.model = Model()
        self.appended = 0
        self.after: list[Callable[[], Any]] = []
        self._copy = backup._copy_database
        loop = asyncio.get_running_loop()

        def copy_then_act(source: Path, target: Path, step: Callable[[int, int], None]) -> None:
            self._copy(source, target, step)
            asyncio.run_coroutine_threadsafe(self.after.pop(0)(), loop).result(10)

        monkeypatch.setattr(backup, "_copy_database", copy_then_act)

    async def append(self, server: str, of_set: Any = SET, *, kept: bool = True, days: int = 0) -> None:
        self.appended += 1
        time_ms = NOON + self.appended * 1_000 + days * DAY_MS
        batch = rows(of_set, [(server, time_ms, [float(self.appended)] * len(of_set))])
        await self.engine.append(batch, metric_sets=(of_set,))
        if kept:
            self.model.append(of_set, batch)

    async def close_and_sweep(self) -> None:
        await self.engine.maintain(everything=True)

    async def back_up(self, target: Path) -> None:
        await asyncio.to_thread(back_up, self.store, target)


async def moves_between_the_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], *, swept: bool
) -> set[str]:
    """Rows in blocks and rows in heads; after the first copy the heads close, more comes and closes; and so on.

    Returns what is wrong with the backup; a plant is a bug put in on purpose.
    """
    settings = QUIET if swept else EngineSettings(maintenance_interval_s=1e9)
    clock = ManualClock(NOON)
    async with Engine.open(tmp_path / "live", clock=clock, settings=settings) as engine:
        it = Interleaved(engine, tmp_path / "live", monkeypatch)
        plant(monkeypatch)
        for server in "abab":
            await it.append(server)
            await it.append(server, days=1)
        await it.close_and_sweep()
        for server in "ab":
            await it.append(server)
            await it.append(server, days=1)

        async def after_first() -> None:
            clock.advance(1)
            for _ in range(3):
                await it.append("a")
            await it.append("c", OTHER_SET)
            await it.close_and_sweep()

        async def after_second() -> None:
            clock.advance(1)
            await it.append("a", kept=not swept)
            await it.append("d", OTHER_SET, days=1)
            await it.close_and_sweep()

        async def after_third() -> None:
            clock.advance(1)
            await it.append("e", days=1, kept=not swept)
            await it.close_and_sweep()

        it.after = [after_first, after_second, after_third]
        await it.back_up(tmp_path / "backup")
        assert not it.after
    wrong = {"damaged"} if verify(tmp_path / "backup")[1] else set()
    restored = restore(tmp_path / "backup", tmp_path / "store")
    async with Engine.open(tmp_path / "store", clock=clock, settings=QUIET) as engine:
        found, status = await everything(engine), await engine.status()
    for name, points in it.model.series.items():
        if points.items() - dict(found.get(name, [])).items():
            wrong.add("missing")
    assert status.points == restored.points
    if status.points != sum(map(len, found.values())):
        wrong.add("doubled")
    for (server, key), series in found.items():
        it.model.series.setdefault((server, key), {}).update(series)
    try:
        await goes_on(tmp_path / "store", it.model)
    except AssertionError:
        wrong.add("later")
    return wrong


@pytest.mark.parametrize("swept", [True, False])
async def test_rows_that_move_between_two_copies_are_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swept: bool
) -> None:
    assert await moves_between_the_copies(tmp_path, monkeypatch, ignore, swept=swept) == set()


def partitions_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the journal is copied last, when what became blocks meanwhile is swept."""
    copy, finish, live = backup._copy_database, backup._finish, []

    def all_but_the_journal(source: Path, target: Path, step: Callable[[int, int], None]) -> None:
        if source.name == "journal.db":
            live.append(source)
            apsw.Connection(str(target)).close()
        else:
            copy(source, target, step)

    def the_journal(journal: Path) -> tuple[str, int]:
        copy(live[0], journal, ignore)
        return finish(journal)

    monkeypatch.setattr(backup, "_copy_database", all_but_the_journal)
    monkeypatch.setattr(backup, "_catch_up", ignore)
    monkeypatch.setattr(backup, "_finish", the_journal)


def no_catching_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: partitions newer than the journal that names their cohorts and gives their sequences."""
    monkeypatch.setattr(backup, "_catch_up", ignore)


def no_note_of_the_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the copy's journal ends before sequences that blocks have."""
    monkeypatch.setattr(backup, "_note_hole", ignore)


@pytest.mark.parametrize(
    ("plant", "found"),
    [(partitions_first, "missing"), (no_catching_up, "later"), (no_note_of_the_hole, "later")],
)
async def test_a_wrong_order_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], found: str
) -> None:
    assert found in await moves_between_the_copies(tmp_path, monkeypatch, plant, swept=True)


async def test_a_file_that_is_no_database_is_named_and_left_out_of_a_backup(tmp_path: Path) -> None:
    model = await fill(tmp_path / "live")
    first, second = sorted((tmp_path / "live" / "blocks").glob("*.db"))
    first.write_bytes(b"this is no database" * 1_000)
    assert any(line.startswith(f"blocks/{first.name}: it cannot be read") for line in verify(tmp_path / "live")[1])
    manifest = back_up(tmp_path / "live", tmp_path / "backup")
    assert manifest.left_out == (f"blocks/{first.name}",)
    assert verify(tmp_path / "backup")[1] == []
    restored = restore(tmp_path / "backup", tmp_path / "store")
    assert restored.points == 453 and model.points == 903 and second.exists()


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


async def test_an_engine_does_not_start_on_half_a_restore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(tmp_path / "live")
    back_up(tmp_path / "live", tmp_path / "backup")
    put = backup._put

    def all_but_the_last(source: Path, target: Path, file: Any) -> None:
        if file.name == "journal.db":
            raise OSError(5, "Input/output error")
        put(source, target, file)

    monkeypatch.setattr(backup, "_put", all_but_the_last)
    with pytest.raises(BackupError, match=f"Input/output error. Delete what is in {tmp_path / 'store'} and try again"):
        restore(tmp_path / "backup", tmp_path / "store")
    with pytest.raises(DataLoss):
        async with Engine.open(tmp_path / "store", clock=ManualClock(NOON), settings=QUIET):
            pass


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
    assert not target.exists() and len(list(draft.rglob("*.db"))) == 2
    assert back_up(tmp_path / "live", target).last_sequence == 7
    assert not draft.exists() and sorted(path.name for path in target.iterdir()) == [
        "blocks",
        "journal.db",
        "manifest.json",
    ]
    assert restore(target, tmp_path / "store").points == model.points


async def test_a_backup_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(tmp_path / "live")

    def full(*_: object) -> None:
        raise apsw.FullError("database or disk is full")

    monkeypatch.setattr(backup, "_catch_up", full)
    with pytest.raises(BackupError, match="the disk is full"):
        back_up(tmp_path / "live", tmp_path / "backup")
    assert [path.name for path in tmp_path.iterdir()] == ["live"]


async def test_places_that_are_taken_or_wrong_are_refused(tmp_path: Path) -> None:
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


if __name__ == "__main__":
    catch_up = backup._catch_up
    backup._catch_up = stop_in_the_middle
    back_up(Path(sys.argv[1]), Path(sys.argv[2]))
