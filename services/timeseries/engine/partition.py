"""blocks/YYYY-MM-DD.db: the blocks of one UTC day, a file each, so that retention can unlink a whole day.

The tables are drawn in docs/formats/block.md. What must stay true:

* a block and the `blocked_through` of its head are stored in one transaction of the same file, so a replay after a
  crash finds either both or none;
* a partition belongs to the journal whose identity it carries; any other is refused, since cohort numbers would lie;
* few files stay open: connections are lent to one thread at a time and the least recently used idle ones are closed;
* a day that was evicted is not made anew by a reader, and a connection to the file that is gone is never lent again,
  not even when rows make a new file for that day;
* a file that is no usable database any more when it is to be written is set aside under another name, never
  deleted, and a new one begun.
"""

import datetime
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import apsw

from services.timeseries.engine.block import Block, BlockReader
from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.database import (
    DAMAGED,
    FORMAT_VERSION,
    PARTITION_PAGE_BYTES,
    Transaction,
    connect,
    fetch,
    file_bytes,
    sync_folder,
)

_log = logging.getLogger(__name__)
EPOCH: Final = datetime.date(1970, 1, 1)

_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE heads (cohort INTEGER PRIMARY KEY, blocked_through INTEGER NOT NULL) STRICT;
CREATE TABLE blocks (id INTEGER PRIMARY KEY, cohort INTEGER NOT NULL, first_ms INTEGER NOT NULL,
    last_ms INTEGER NOT NULL, row_count INTEGER NOT NULL, points INTEGER NOT NULL, min_sequence INTEGER NOT NULL,
    max_sequence INTEGER NOT NULL, payload BLOB NOT NULL) STRICT;
CREATE INDEX blocks_by_cohort ON blocks (cohort, first_ms);
"""


class UnusablePartitionError(Exception):
    """A file that is not a partition of this engine, or can no longer be read as one."""


class PartitionGoneError(Exception):
    """The file was evicted; a reader goes on without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The blocks of one head's chunk, and the sequence up to which the head's rows are in blocks with it."""

    cohort_id: int
    blocked_through: int
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInfo:
    """What a partition says of a block without reading its payload; `life` tells the file from one made anew."""

    id: int
    life: int
    first_ms: int
    last_ms: int
    rows: int


class Partition:
    """A lent connection to one day's file; `life` counts the files of that day that are gone."""

    def __init__(self, day: int, life: int, db: apsw.Connection) -> None:
        self.day = day
        self.life = life
        self.db = db
        self._blob: apsw.Blob | None = None

    def infos(self, cohort_id: int, start_ms: int, end_ms: int) -> list[BlockInfo]:
        """The blocks of a cohort that have rows in `[start_ms, end_ms)`, by first time."""
        rows = fetch(
            self.db,
            "SELECT id, first_ms, last_ms, row_count FROM blocks"
            " WHERE cohort = ? AND first_ms < ? AND last_ms >= ? ORDER BY first_ms",
            (cohort_id, end_ms, start_ms),
        )
        return [
            BlockInfo(id=number, life=self.life, first_ms=first, last_ms=last, rows=count)
            for number, first, last, count in rows
        ]

    def reader(self, info: BlockInfo, cohort: Cohort) -> BlockReader:
        """A reader of one block's columns; using it ends with the next call. Raises CorruptBlockError."""
        if self._blob is None:
            self._blob = self.db.blob_open("main", "blocks", "payload", info.id, False)
        else:
            self._blob.reopen(info.id)
        blob = self._blob

        def read(offset: int, length: int) -> bytes:
            if offset > blob.length():
                return b""
            blob.seek(offset)
            return blob.read(length)

        return BlockReader(read, cohort.id, len(cohort.stored_set.metric_set))

    def done(self) -> None:
        """Ends the snapshot that an open blob holds."""
        if self._blob is not None:
            self._blob.close(True)
            self._blob = None


class Partitions:
    """All partition files of a folder. Thread-safe."""

    def __init__(self, folder: Path, identity: str, idle_limit: int) -> None:
        self._folder = folder
        self._identity = identity
        self._idle_limit = idle_limit
        self._lock = threading.Lock()
        self._names = threading.Lock()  # held while a file is opened by its name, or unlinked; taken before `_lock`
        self._idle: list[tuple[int, apsw.Connection]] = []  # least recently used first
        self._lives: dict[int, int] = {}
        self._doomed: set[int] = set()
        if not folder.exists():
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
        self._points: dict[int, int] = {}
        self._days = {day for path in folder.glob("*.db") if (day := _day_of(path)) is not None}
        self._points.update({day: self._count_points(day) for day in list(self._days)})

    def days(self, first: int, last: int) -> list[int]:
        """The days in `[first, last]` that have a file, ascending."""
        with self._lock:
            return sorted(day for day in self._days if first <= day <= last)

    def path(self, day: int) -> Path:
        return partition_path(self._folder, day)

    @property
    def points(self) -> int:
        """Points in all readable blocks."""
        with self._lock:
            return sum(self._points.values())

    @property
    def bytes(self) -> int:
        """Size on disk of all partitions."""
        with self._lock:
            days = list(self._days)
        return sum(file_bytes(self.path(day)) for day in days)

    @contextmanager
    def lend(self, day: int, *, life: int | None = None, create: bool = False) -> Iterator[Partition]:
        """A connection to a day's file, with `life` to that very file; with `create` one is made where there is none.

        Raises UnusablePartitionError, PartitionGoneError.
        """
        partition = self._take(day, life) or self._open(day, life, create=create)
        try:
            yield partition
        except DAMAGED as error:
            partition.done()
            partition.db.close()
            raise UnusablePartitionError(f"{self.path(day).name}: {error}") from error
        except BaseException:
            partition.done()
            partition.db.close()
            raise
        partition.done()
        self._give_back(partition)

    def _take(self, day: int, life: int | None) -> Partition | None:
        with self._lock:
            now = self._lives.get(day, 0)
            for at in range(len(self._idle) - 1, -1, -1):
                if self._idle[at][0] == day and life in (None, now):
                    return Partition(day, now, self._idle.pop(at)[1])
        return None

    def _give_back(self, partition: Partition) -> None:
        with self._lock:
            if partition.life == self._lives.get(partition.day, 0):
                self._idle.append((partition.day, partition.db))
                count = max(0, len(self._idle) - self._idle_limit)
                surplus, self._idle = [db for _, db in self._idle[:count]], self._idle[count:]
            else:
                surplus = [partition.db]
        for old in surplus:
            old.close()  # SQLite leaves the log of a moved file's name alone: it may be the new file's

    def _open(self, day: int, life: int | None, *, create: bool) -> Partition:
        with self._names:
            with self._lock:
                now = self._lives.get(day, 0)
                if life not in (None, now) or (day not in self._days and not create):
                    raise PartitionGoneError(self.path(day).name)
                if day in self._doomed:
                    raise OSError(f"{self.path(day).name} is being evicted")
            return Partition(day, now, self._connect(day, create=create))

    def _connect(self, day: int, *, create: bool) -> apsw.Connection:
        path = self.path(day)
        new = not path.exists()
        if not create and (new or path.stat().st_size == 0):
            raise PartitionGoneError(path.name)
        try:
            db = connect(path, PARTITION_PAGE_BYTES)
            try:
                if not create and not fetch(db, "SELECT 1 FROM sqlite_schema LIMIT 1"):
                    raise PartitionGoneError(path.name)
                if not db.table_exists("main", "meta"):
                    with Transaction(db):
                        self._create(db, day)
                self._check(db)
            except BaseException:
                db.close()
                raise
        except DAMAGED as error:
            raise UnusablePartitionError(f"{path.name}: {error}") from error
        if new:
            sync_folder(self._folder)
        with self._lock:
            self._days.add(day)
            self._points.setdefault(day, 0)
        return db

    def _create(self, db: apsw.Connection, day: int) -> None:
        if not db.table_exists("main", "meta"):
            db.execute(_SCHEMA)
            db.executemany(
                "INSERT INTO meta VALUES (?, ?)",
                [("format_version", FORMAT_VERSION), ("identity", self._identity), ("day", day)],
            )

    def _check(self, db: apsw.Connection) -> None:
        meta = dict(fetch(db, "SELECT key, value FROM meta"))
        if meta.get("format_version") != FORMAT_VERSION:
            raise UnusablePartitionError(f"format {meta.get('format_version')} is not {FORMAT_VERSION}")
        if meta.get("identity") != self._identity:
            raise UnusablePartitionError("it belongs to another journal")

    def _count_points(self, day: int) -> int:
        """The points of a day's file at start. One whose making was cut off, by a full disk or a loss of power, holds
        nothing; it goes, since making it now might fail too, and with it the start."""
        try:
            with self.lend(day) as partition:
                ((points,),) = fetch(partition.db, "SELECT total(points) FROM blocks")
        except PartitionGoneError:
            self._days.discard(day)
            remove_files(self.path(day))
            return 0
        except UnusablePartitionError as error:
            _log.error("a partition cannot be read and is left out: %s", error)
            return 0
        return int(points)

    def blocked_through(self, day: int) -> Mapping[int, int]:
        """For each cohort of a day the sequence up to which its rows are in blocks."""
        if not self.days(day, day):
            return {}
        try:
            with self.lend(day) as partition:
                return dict(fetch(partition.db, "SELECT cohort, blocked_through FROM heads"))
        except UnusablePartitionError as error:
            self._set_aside(day, error)
            return {}

    def store(self, day: int, closed: Sequence[Closed]) -> None:
        """Stores blocks and advances their heads in one transaction; returns after the sync, raises `apsw.Error`."""
        try:
            self._store(day, closed)
        except UnusablePartitionError as error:
            self._set_aside(day, error)
            self._store(day, closed)

    def _store(self, day: int, closed: Sequence[Closed]) -> None:
        with self.lend(day, create=True) as partition, Transaction(partition.db):
            for head in closed:
                partition.db.executemany(
                    "INSERT INTO blocks (cohort, first_ms, last_ms, row_count, points, min_sequence, max_sequence,"
                    " payload) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    [
                        (
                            head.cohort_id,
                            b.first_ms,
                            b.last_ms,
                            b.rows,
                            b.points,
                            b.min_sequence,
                            b.max_sequence,
                            b.payload,
                        )
                        for b in head.blocks
                    ],
                )
                partition.db.execute(
                    "INSERT INTO heads VALUES (?1, ?2) ON CONFLICT DO UPDATE SET blocked_through = ?2",
                    (head.cohort_id, head.blocked_through),
                )
        with self._lock:
            self._points[day] += sum(block.points for head in closed for block in head.blocks)

    def evict(self, day: int) -> None:
        """Gives a day's file back to the file system; returns when that is durable, raises OSError.

        Who reads it at this moment keeps what was lent and may finish; nobody writes to the day until `release`.
        """
        with self._lock:
            self._doomed.add(day)
        self._forget(day)
        with self._names:
            remove_files(self.path(day))

    def release(self, day: int) -> None:
        """Lets a file be made again for an evicted day."""
        with self._lock:
            self._doomed.discard(day)

    def _forget(self, day: int) -> None:
        """Makes a day's file unknown and closes its idle connections; lent ones are closed when they come back."""
        with self._lock:
            stale = [db for known, db in self._idle if known == day]
            self._idle = [(known, db) for known, db in self._idle if known != day]
            self._lives[day] = self._lives.get(day, 0) + 1
            self._days.discard(day)
            self._points.pop(day, None)
        for db in stale:
            db.close()

    def _set_aside(self, day: int, error: Exception) -> None:
        path = self.path(day)
        self._forget(day)
        number = 1
        while (aside := path.with_name(f"{path.name}.unusable-{number}")).exists():
            number += 1
        for suffix in ("", "-wal", "-shm"):
            file = path.with_name(path.name + suffix)
            if file.exists():
                file.rename(aside.with_name(aside.name + suffix))
        sync_folder(self._folder)
        _log.error("a partition cannot be used (%s); it is set aside as %s", error, aside.name)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for _, db in idle:
            db.close()


def partition_path(folder: Path, day: int) -> Path:
    """The file of a day."""
    return folder / f"{EPOCH + datetime.timedelta(days=day):%Y-%m-%d}.db"


def remove_files(path: Path) -> None:
    """Unlinks a partition with its log; returns when that is durable. Some or all of it may be gone already."""
    if not path.parent.exists():
        return
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    sync_folder(path.parent)


def _day_of(path: Path) -> int | None:
    try:
        return (datetime.date.fromisoformat(path.stem) - EPOCH).days
    except ValueError:
        return None
