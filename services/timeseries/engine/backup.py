"""Backup: a copy of a store made while another process writes it; and restore: putting it back.

**The order: journal, partitions, journal again.** Each file is copied by SQLite's online backup within one read
transaction, so each copy is a moment of its file and nothing in it is torn. Between files time passes: blocks are
stored, the journal is swept, batches come. A row goes journal -> block -> swept, and each step is durable before the
next begins. So:

1. *The journal first*, at a moment t1 at which its last sequence is L. A row up to L is either in this copy, or was
   swept before t1; then its block was stored before t1, and every partition is copied after t1. So no row that was
   acknowledged before the backup began can be missing. The other order loses them: a row that becomes a block after
   its partition was copied and is swept before the journal is copied is in neither.
2. *Then the partitions.* They may be newer than the journal's copy; a row may be in both. It counts once: a replay
   skips, for each head, the rows up to `blocked_through`, and a block and its `blocked_through` are of one moment.
3. *Then the journal again*: what it has got since L is added to the copy, in one read transaction after each partition
   (`_catch_up`). Without it the newer partitions would be poison: they name cohorts that the copy does not know, whose
   numbers it would give to others; and their `blocked_through` lies above the copy's last sequence, so that the
   restored engine would give such sequences again, and its next replay would skip acknowledged rows as blocked.
   Cohorts and sequences only grow, so what is read after a partition covers all that the partition names.

So the copy is the store as it is at the end, complete. Only where the journal was swept beyond L meanwhile (nothing is
swept for an hour, `journal_keep_s`, unless the journal is over its limit) there may be a hole in its run of batches:
rows acknowledged after the beginning, of which the copy has those whose blocks were copied late enough. A tail tells
such a hole as `missed`, and `gap_through` in `meta` says that it is no damage. Followers keep the cursors of t1, so
they may ship again what they have: harmless.

**What else must stay true.** A backup is written to PATH.partial, synced, described by manifest.json, and only then
renamed: a PATH that exists is whole. A restore checks all of it before it writes anything, and puts the journal in
place last: an engine refuses blocks without a journal, so it cannot start on half a restore.

A partition that SQLite cannot read is left out and named, and the rest is still worth having. Rotten columns inside
a readable file are copied as they are: verify names them.
"""

import contextlib
import datetime
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import apsw

from runtime.clock import Clock
from runtime.errors import OpenManagerError
from services.timeseries.engine.database import (
    DAMAGED,
    FORMAT_VERSION,
    Transaction,
    connect_read_only,
    fetch,
    file_bytes,
    is_unreadable,
    read_only_uri,
    sync_folder,
)
from services.timeseries.engine.manifest import (
    JOURNAL_NAME,
    BackedUpFile,
    BackupError,
    Manifest,
    Progress,
    damaged_files,
    describe,
    digest_of,
    read_manifest,
    store_files,
    write_manifest,
)
from services.timeseries.engine.settings import EngineSettings
from services.timeseries.engine.store import Store

_STEP_PAGES: Final = 512
_TABLES_TRIES, _TABLES_WAIT_S = 10, 0.05


def back_up(folder: Path, target: Path, *, now_ms: int, progress: Progress) -> Manifest:
    """Copies the store in `folder`, which may be in use, to `target`, which must be empty or not there.

    Raises:
        BackupError: nothing was made; `target` is as it was.
    """
    target = target.resolve()
    check_target(folder, target, store_files(folder))
    with drafted(target, "backup") as draft:
        manifest = _copied(folder, draft, now_ms, progress)
        write_manifest(draft, manifest)
    return manifest


def check_target(folder: Path, target: Path, names: Iterable[str]) -> None:
    """Refuses a target into which the journal and the partitions `names` of a store cannot be copied."""
    if not (folder / JOURNAL_NAME).exists():
        raise BackupError(f"there is no store in {folder}: set DATA_DIR to where the service keeps its data")
    if target.is_relative_to(folder.resolve()):
        raise BackupError(f"{target} lies in the store itself: name a folder elsewhere, best on another disk")
    if not target.parent.is_dir():
        raise BackupError(f"there is no folder {target.parent}: make it, or mount what belongs there")
    if target.exists() and not (target.is_dir() and _is_empty(target)):
        raise BackupError(f"{target} is there already and not an empty folder: name a new one")
    needed = sum(file_bytes(folder / name) for name in (JOURNAL_NAME, *names))
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise BackupError(f"{target.parent} has {free} bytes free, {needed} are needed: make room, or name another")


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


@contextlib.contextmanager
def drafted(target: Path, what: str) -> Iterator[Path]:
    """An empty folder beside `target`, which it becomes, synced, when the block ends well; else it is removed.

    What a killed one left in it is removed before. Raises BackupError.
    """
    draft, mark = target.with_name(f"{target.name}.partial"), f"unfinished-{what}"
    with _claimed(draft, mark, what):
        try:
            yield draft
            (draft / mark).unlink()
            for inside in (*(path for path in draft.rglob("*") if path.is_dir()), draft):
                sync_folder(inside)
            draft.rename(target)  # replaces an empty folder
            sync_folder(target.parent)
        except (OSError, apsw.Error) as error:
            raise BackupError(f"the {what} failed and was removed: {_said(error)}") from error


@contextlib.contextmanager
def _claimed(draft: Path, mark: str, what: str) -> Iterator[None]:
    """An empty folder that nobody else writes; what a killed one left in it is removed, as it is on failure.

    The mark says that its content is ours to delete, the kernel's lock that nobody is at it.
    """
    try:
        draft.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BackupError(f"cannot write {draft}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BackupError(f"another {what} is writing {draft}: wait for it, or name another folder") from error
        if not (_is_empty(draft) or (draft / mark).exists()):
            raise BackupError(f"{draft} holds something that no {what} left there: move it away, or delete it")
        (draft / mark).touch()
        try:
            for left in draft.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != mark:
                    left.unlink()
            yield
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _copied(folder: Path, draft: Path, now_ms: int, progress: Progress) -> Manifest:
    names, left_out = copy_files(folder, draft, store_files, progress)
    identity, last_sequence = _finish(draft / JOURNAL_NAME)
    created = datetime.datetime.fromtimestamp(now_ms / 1_000, datetime.UTC)
    return Manifest(
        format_version=FORMAT_VERSION,
        identity=identity,
        created_time=created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        last_sequence=last_sequence,
        files=tuple(describe(draft, name) for name in (JOURNAL_NAME, *names)),
        left_out=tuple(left_out),
    )


def copy_files(
    folder: Path, draft: Path, choose: Callable[[Path], list[str]], progress: Progress
) -> tuple[list[str], list[str]]:
    """Copies the journal, and then the partitions that `choose` finds in the folder at that moment, the journal's copy
    following. Returns the names of those copied and of those that cannot be read; raises OSError, `apsw.Error`."""
    _copy_database(folder / JOURNAL_NAME, draft / JOURNAL_NAME, partial(progress, JOURNAL_NAME))
    copied, left_out = [], []
    for name in choose(folder):
        target = draft / name
        target.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            _wait_for_tables(folder / name)
            _copy_database(folder / name, target, partial(progress, name))
        except apsw.Error as error:
            target.unlink(missing_ok=True)
            if (folder / name).exists():  # retention may have unlinked it
                if not is_unreadable(error):
                    raise
                left_out.append(name)
        else:
            copied.append(name)
        _catch_up(folder / JOURNAL_NAME, draft / JOURNAL_NAME)
    return copied, left_out


def _wait_for_tables(path: Path) -> None:
    """A file is there a moment before its tables; one that stays without has lost them. Raises `apsw.Error`."""
    for _ in range(_TABLES_TRIES):
        with closing(connect_read_only(path)) as db:
            if db.table_exists("main", "meta"):
                return
        time.sleep(_TABLES_WAIT_S)
    raise apsw.CorruptError("it has no tables")


def _copy_database(source: Path, target: Path, step: Callable[[int, int], None]) -> None:
    """Copies one moment of a database; raises `apsw.Error`.

    The open read transaction makes all steps see that moment; without it a write between two of them would start the
    copy anew, for ever under constant writes.
    """
    with closing(connect_read_only(source)) as live, closing(apsw.Connection(str(target))) as copy:
        copy.pragma("synchronous", 0)  # synced as a whole at the end
        live.execute("BEGIN")
        ((page_bytes,),) = fetch(live, "SELECT page_size FROM pragma_page_size")
        fetch(live, "SELECT count(*) FROM sqlite_schema")
        with copy.backup("main", live, "main") as running:
            while not running.step(_STEP_PAGES):
                step((running.page_count - running.remaining) * page_bytes, running.page_count * page_bytes)
            total = running.page_count * page_bytes
        live.execute("ROLLBACK")
    step(total, total)


def _catch_up(live: Path, journal: Path) -> None:
    """Adds to the copy of the journal what the live one has got since; raises `apsw.Error`.

    A transaction reads one moment of `live`. Cohorts, sets and servers are numbered upwards and never deleted.
    """
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_URI
    with closing(apsw.Connection(str(journal), flags=flags)) as copy:
        copy.pragma("synchronous", 0)
        copy.execute("ATTACH ? AS live", (read_only_uri(live),))
        with Transaction(copy):
            last = _last_sequence(copy, "main")
            for table in ("metric_sets", "servers", "cohorts"):
                copy.execute(
                    f"INSERT INTO main.{table} SELECT * FROM live.{table}"  # noqa: S608  names of ours
                    f" WHERE id > (SELECT coalesce(max(id), 0) FROM main.{table})"
                )
            copy.execute("INSERT INTO main.descriptors SELECT * FROM live.descriptors WHERE sequence > ?", (last,))
            copy.execute("INSERT INTO main.batches SELECT * FROM live.batches WHERE sequence > ?", (last,))
            ((swept,),) = fetch(copy, "SELECT value FROM live.meta WHERE key = 'swept_through'")
            if swept > last:
                _note_hole(copy, swept)


def _note_hole(copy: apsw.Connection, swept: int) -> None:
    """Says that batches up to `swept` may be missing from the run, and keeps their sequences from being given again."""
    copy.execute("INSERT OR REPLACE INTO main.meta VALUES ('gap_through', ?)", (swept,))
    if _last_sequence(copy, "main") < swept:
        copy.execute(
            "INSERT INTO main.batches SELECT ?1, coalesce(max(received_ms), 0), NULL, 0, 0, x'' FROM main.batches",
            (swept,),
        )


def _last_sequence(db: apsw.Connection, schema: str) -> int:
    ((last,),) = fetch(
        db,
        f"SELECT max(value, coalesce((SELECT max(sequence) FROM {schema}.batches), 0))"  # noqa: S608
        f" FROM {schema}.meta WHERE key = 'swept_through'",
    )
    return int(last)


def _finish(journal: Path) -> tuple[str, int]:
    """The identity and the last sequence of the copy."""
    with closing(apsw.Connection(str(journal))) as copy:
        ((identity,),) = fetch(copy, "SELECT value FROM meta WHERE key = 'identity'")
        last_sequence = _last_sequence(copy, "main")
        copy.pragma("wal_checkpoint", "TRUNCATE")
    return str(identity), last_sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What the engine found when it opened what was restored."""

    manifest: Manifest
    points: int
    damaged: int


def restore(source: Path, folder: Path, *, settings: EngineSettings, clock: Clock, progress: Progress) -> Restored:
    """Puts a backup into the folder of a store, which is empty but for the service's lock, and opens it once.

    The caller holds that lock.

    Raises:
        BackupError: the backup is damaged, and nothing was written; or writing or opening failed.
    """
    manifest = read_manifest(source)
    there = sorted(path.name for path in folder.iterdir() if path.name != "lock")
    if there:
        raise BackupError(
            f"{folder} is not empty (it has {there[0]}): move what is in it away, or set DATA_DIR to another folder"
        )
    damaged = [f"{name}: {what}" for name, what in damaged_files(source, manifest, lambda *_: None)]
    if damaged:
        raise BackupError(f"{source} is damaged, nothing was restored; use another backup. " + "; ".join(damaged))
    try:
        for file in reversed(manifest.files):
            _put(source, folder, file)
            progress(file.name, file.bytes, file.bytes)
    except OSError as error:
        raise BackupError(f"the restore failed: {_said(error)}. Delete what is in {folder} and try again") from error
    try:
        store = Store(folder, settings, clock)
    except (apsw.Error, OpenManagerError) as error:
        raise BackupError(f"what was restored in {folder} does not open: {error}. Use another backup") from error
    with closing(store):
        points = store.partitions.points + store.heads.points
        return Restored(manifest=manifest, points=points, damaged=store.faults.damaged)


def _put(source: Path, folder: Path, file: BackedUpFile) -> None:
    target = folder / file.name
    if not target.parent.exists():
        target.parent.mkdir(mode=0o700)
        sync_folder(folder)
    draft = target.with_name(f"{target.name}.partial")
    with (source / file.name).open("rb") as reading, draft.open("xb") as writing:
        digest, _ = digest_of(reading.read, writing.write)
        if digest != file.sha256:
            raise OSError(f"{source / file.name} changed while it was read")
        writing.flush()
        os.fsync(writing.fileno())
    draft.rename(target)
    sync_folder(target.parent)


def _said(error: Exception) -> str:
    if isinstance(error, apsw.FullError):
        return "the disk is full"
    if isinstance(error, DAMAGED):
        return f"{error}. See `verify`, which names what is damaged"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
