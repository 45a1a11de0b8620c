"""Backup: a copy of a store made while another process writes it; and restore: putting it back.

**The order: journal, points, 5 min, 1 h, and after each file the journal again.** Each file is copied by SQLite's
online backup within one read transaction, so each copy is a moment of its file and nothing in it is torn. Between files
time passes: blocks are stored, roll-ups are made, the journal is swept, days go, batches come. What a row becomes goes
one way, and each step is durable before the next begins::

    journal ──> block, with a mark ──> 5 min bucket, with a mark ──> 1 h bucket
            then: swept            then: the mark, later the day, goes         then: the same

So whoever copies a place before the next one along this way finds each row in one of them at least:

1. *The journal first*, at a moment t1 at which its last sequence is L. A row up to L is either in this copy, or was
   swept before t1; then its block was stored before t1, and every partition is copied after t1. So no row that was
   acknowledged before the backup began can be missing. The other order loses them: a row that becomes a block after
   its partition was copied and is swept before the journal is copied is in neither.
2. *Then the partitions*, tier by tier. They may be newer than the journal's copy; a row may be in both. It counts once:
   a replay skips, for each head, the rows up to `blocked_through`, and a block and its `blocked_through` are of one
   moment.
3. *The finer tiers before the coarser.* A mark is cleared only when what was made of its rows is durable in the next
   tier. So where a copied file has no mark, the files copied later have the buckets; where it has one, the restored
   engine makes them anew, of all rows it has. The other order, as that of the names (rollup-1h before rollup-5m), loses
   buckets: made after the coarser file was copied, with the mark gone before the finer one was. Nobody notices, until
   the finer days go and with them all there is. A tier's folder is listed when its turn comes. What is made in it later
   is not needed: rows of a day without a file were in heads then, so the journal's copy has them; buckets of a file
   that was not there have their marks in the finer files, which are copied.
4. *After each file the journal again*: what it has got since L is added to the copy, in one read transaction
   (`JournalCopy.catch_up`). Without it the newer partitions would be poison: they name cohorts that the copy does not
   know, whose numbers it would give to others; and their `blocked_through`, or the sequences of their buckets, lie
   above the copy's last sequence, so that the restored engine would give such sequences again, and its next replay
   would skip acknowledged rows as blocked. Cohorts and sequences only grow, so what is read after a partition covers
   all that the partition names. And a bucket that is newer than the points of which it was copied with finds the rest
   of them in these batches: their heads mark it again.

**Days that go meanwhile.** The journal notes that a partition goes (`evictions`, `ended`) when its roll-ups are
complete and before its file is unlinked. A note belongs to a file, and the copy must have it just when it lacks that
file:

* A day that went before its turn is not in the copy, but the copied journal may have rows of it. Without the note a
  replay would bring those few back, and the day's buckets, of which the rest is gone, would be made anew of them. So
  notes of a tier are taken with each catching up until the last file of that tier is copied. What they say was made
  of the day is there: the coarser files are all copied later.
* A day that is copied and goes later is a day of the copy like any other. With the note, taken after the coarser files
  were copied, a start would unlink the file, or refuse to make the buckets for which it still has marks. So of a
  partition that is copied no note is taken any more (`settled`).
* A day that goes while it is copied, so that nobody knows which of its files was: the note changes between the catching
  up before and the one after. Then what was copied is thrown away, the note is kept, and what is there now is copied.

So the copy is the store as it is at the end, complete, but that days which went meanwhile may still be in it. (Where
the 5 min of days went whose points are in the copy with marks, which only an import of that age has, hours of them lack
points until the restored engine has worked these marks off.) Only where the journal was swept beyond L meanwhile
(nothing is swept for an hour, `journal_keep_s`, unless the journal is over its limit) there may be a hole in its run of
batches: rows acknowledged after the beginning, of which the copy has those whose blocks, or only the buckets of which,
were copied late enough. A tail tells such a hole as `missed`, and `gap_through` in `meta` says that it is no damage.
Followers keep the cursors of t1, so they may ship again what they have: harmless.

**What else must stay true.** A backup is written to PATH.partial, synced, described by manifest.json, and only then
renamed: a PATH that exists is whole. A restore checks all of it before it writes anything. It begins with a journal of
another name (`UNFINISHED_JOURNAL`), beside which an engine does not start, and gives it the right one when everything
is in place and the journal says what this store lacks; so nothing starts on half a restore.

A partition that SQLite cannot read, or that is gone, is left out and named, and the rest is still worth having; what
was made of it stays as it is (`JournalCopy.leave_out`). Rotten columns inside a readable file are copied as they are:
verify names them.
"""

import contextlib
import datetime
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import apsw

from runtime.clock import Clock
from runtime.errors import OpenManagerError
from runtime.sqlite import fetch, is_full, sync_folder
from services.timeseries.archive.journal_copy import NOT_GONE, JournalCopy
from services.timeseries.archive.manifest import (
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
    tier_files,
    write_manifest,
)
from services.timeseries.engine.database import (
    DAMAGED,
    FORMAT_VERSION,
    UNFINISHED_JOURNAL,
    connect_read_only,
    file_bytes,
    is_unreadable,
)
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.partition import day_of, partition_path
from services.timeseries.engine.settings import EngineSettings
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import RAW, TIERS

_STEP_PAGES: Final = 512
_TABLES_TRIES, _TABLES_WAIT_S = 10, 0.05
_PARTITION_TRIES: Final = 20
_ORDER: Final = tuple(range(len(TIERS)))
"""The finer tiers before the coarser."""


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
    if target.is_mount():
        raise BackupError(f"{target} is where a disk is mounted: name a new folder in it")
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
            for inside in (*(path for path in draft.rglob("*") if path.is_dir()), draft):
                sync_folder(inside)
            draft.rename(target)  # replaces an empty folder
            (target / mark).unlink()  # not before: who is killed in between must not be in the way of the next one
            sync_folder(target)
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
    journal = copy_journal(folder, draft, progress)
    names, left_out = [], []
    noted: set[tuple[int, int]] = set()
    for level in _ORDER:
        tier = TierCopy(folder, draft, level, journal, progress)
        tier.copy()
        for name, days in tier.missing().items():
            tier.left_out.append(name)
            journal.leave_out(level, days)
        names += tier.copied
        left_out += tier.left_out
        kept = tier.copied if level == RAW else tier.copied + tier.left_out
        noted.update((level, day) for name in kept if (day := day_of(Path(name))) is not None)
    identity, last_sequence = journal.finish(noted)
    created = datetime.datetime.fromtimestamp(now_ms / 1_000, datetime.UTC)
    return Manifest(
        format_version=FORMAT_VERSION,
        identity=identity,
        created_time=created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        last_sequence=last_sequence,
        files=tuple(describe(draft, name) for name in (JOURNAL_NAME, *names)),
        left_out=tuple(left_out),
    )


def copy_journal(folder: Path, draft: Path, progress: Progress) -> JournalCopy:
    """Copies the journal, before anything else; raises `apsw.Error`."""
    _copy_database(folder / JOURNAL_NAME, draft / JOURNAL_NAME, partial(progress, JOURNAL_NAME))
    return JournalCopy(folder / JOURNAL_NAME, draft / JOURNAL_NAME)


class TierCopy:
    """Copies the partitions of one tier, the journal's copy following."""

    def __init__(self, folder: Path, draft: Path, level: int, journal: JournalCopy, progress: Progress) -> None:
        self._folder, self._draft, self._level = folder, draft, level
        self._journal = journal
        self._progress = progress
        self._settled: set[int] = set()
        self.copied: list[str] = []
        self.left_out: list[str] = []

    def copy(self, without: Collection[str] = ()) -> None:
        """Copies all that are there but those named; raises `apsw.Error`."""
        names = [name for name in tier_files(self._folder, TIERS[self._level]) if name not in without]
        self._journal.catch_up(self._level, self._settled)  # with the notes of what went before it was listed
        for name in names:
            day = day_of(Path(name))
            assert day is not None
            for _ in range(_PARTITION_TRIES):
                if self._copy_partition(name, day):
                    break
            else:
                raise apsw.BusyError(f"{name} went and came again all the time")
        self._journal.catch_up(self._level, self._settled)  # with the note of one that went after its last look

    def missing(self) -> dict[str, range]:
        """The partitions that should be there and are not, as the journal has it, with their days."""
        kind, found = TIERS[self._level], {}
        for day, days in self._journal.noted(self._level).items():
            path = partition_path(self._folder / kind.folder, day)
            name = f"{kind.folder}/{path.name}"
            if not path.exists() and name not in (*self.copied, *self.left_out):  # it may have gone since
                found[name] = range(day, day + days)
        if found:  # it is noted that one goes before it does
            self._journal.catch_up(self._level, self._settled)
        return {name: days for name, days in found.items() if self._journal.gone(self._level, days.start) == NOT_GONE}

    def _copy_partition(self, name: str, day: int) -> bool:
        """Copies one, or notes why not; False: it must be tried again."""
        source, target = self._folder / name, self._draft / name
        target.parent.mkdir(mode=0o700, exist_ok=True)
        before, failed = self._journal.gone(self._level, day), None
        try:
            _wait_for_tables(source)
            _copy_database(source, target, partial(self._progress, name))
        except apsw.Error as error:
            failed = error
        self._journal.catch_up(self._level, self._settled)
        after = self._journal.gone(self._level, day)
        if failed is None and after == before and not after.going:
            self.copied.append(name)
            self._settled.update(self._days_of(target, day))
            return True
        target.unlink(missing_ok=True)
        if after.going or not source.exists():
            return True
        if after != before or failed is None:
            return False
        if not is_unreadable(failed):
            raise failed
        self.left_out.append(name)
        lost = self._days_at_most(day)
        self._settled.update(lost)
        self._journal.leave_out(self._level, lost)
        return True

    def _days_of(self, copy: Path, day: int) -> range:
        """The days of a partition."""
        with closing(connect_read_only(copy, immutable=True)) as db:
            spans = fetch(db, "SELECT value FROM meta WHERE key = 'span_days'")
        return range(day, day + (spans[0][0] if spans else TIERS[self._level].span_days))

    def _days_at_most(self, day: int) -> range:
        """The days that a partition may have that cannot say it: those that no other has."""
        kind, span = TIERS[self._level], TIERS[self._level].sparse_days
        others = [of for name in tier_files(self._folder, kind) if (of := day_of(Path(name))) not in (None, day)]
        while span > kind.span_days and (day % span or any(day <= of < day + span for of in others)):
            span //= 2
        return range(day, day + span)


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
    begun = folder / UNFINISHED_JOURNAL
    try:
        begun.touch(mode=0o600)
        sync_folder(folder)
        for file in reversed(manifest.files):  # the journal last
            _put(source, folder, file)
            progress(file.name, file.bytes, file.bytes)
        with closing(Journal(begun, may_create=False, now_ms=clock.now_ms())) as journal:
            journal.note_lack(manifest.created_ms, max(manifest.created_ms, clock.now_ms()))
        begun.rename(folder / JOURNAL_NAME)
        sync_folder(folder)
        with closing(Store(folder, settings, clock)) as store:
            points = store.partitions.points + store.heads.points
            left_out = sum(len(tier.partitions.missing) for tier in store.tiers)
            if not store.lost:
                store.note_partitions()
            return Restored(manifest=manifest, points=points, damaged=store.faults.damaged - left_out)
    except (apsw.Error, OSError, OpenManagerError) as error:
        if isinstance(error, OSError) or is_full(error):
            what = f"the restore failed: {_said(error)}. Delete what is in {folder} and try again"
            raise BackupError(what) from error
        raise BackupError(f"what was restored in {folder} does not open: {error}. Use another backup") from error


def _put(source: Path, folder: Path, file: BackedUpFile) -> None:
    """Puts a file in its place; the journal beside it."""
    target = folder / (UNFINISHED_JOURNAL if file.name == JOURNAL_NAME else file.name)
    if not target.parent.exists():
        target.parent.mkdir(mode=0o700)
        sync_folder(folder)
    with (source / file.name).open("rb") as reading, target.open("wb") as writing:
        digest, _ = digest_of(reading.read, writing.write)
        if digest != file.sha256:
            raise OSError(f"{source / file.name} changed while it was read")
        writing.flush()
        os.fsync(writing.fileno())
    sync_folder(target.parent)


def _said(error: Exception) -> str:
    if is_full(error):
        return "the disk is full"
    if isinstance(error, DAMAGED):
        return f"{error}. See `verify`, which names what is damaged"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
