"""blocks/YYYY-MM-DD.db: the blocks of some UTC days, a file each, so that retention can unlink them.

A file of raw points spans one day, one of roll-ups several; it is named, and known here, by the first of them. The
tables are drawn in docs/formats/block.md. What must stay true:

* a block, the `blocked_through` of its head and the marks of the roll-up buckets it touches are stored in one
  transaction of the same file, so a replay after a crash finds either all of it or nothing;
* blocks are replaced by what they are merged into in one transaction; a block's number is never given twice, so that a
  reader that has listed it finds that block or none;
* a partition belongs to the journal whose identity it carries; any other is refused, since cohort numbers would lie;
* few files stay open: connections are lent to one thread at a time and the least recently used idle ones are closed;
* a day that was evicted is not made anew by a reader, and a connection to the file that is gone is never lent again,
  not even when rows make a new file for that day;
* a file that is no usable database any more when it is to be written is set aside under another name, never
  deleted, and a new one begun.
"""

import datetime
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import apsw

from services.timeseries.engine.block import Block, BlockReader, open_payload
from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.database import (
    DAMAGED,
    PARTITION_PAGE_BYTES,
    SPARSE_PAGE_BYTES,
    Transaction,
    connect,
    fetch,
    file_bytes,
    sync_folder,
    truncate_log,
)
from services.timeseries.engine.frame import FrameReader
from services.timeseries.engine.payload import Opened
from services.timeseries.engine.settings import DAY_MS

_log = logging.getLogger(__name__)
PARTITION_VERSION: Final = 2
READABLE_VERSIONS: Final = (1, 2)
"""1 had no table `dirty`; it is brought up to date when it is opened, all of it marked for its roll-ups."""

EPOCH: Final = datetime.date(1970, 1, 1)

_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE heads (cohort INTEGER NOT NULL, day INTEGER NOT NULL, blocked_through INTEGER NOT NULL,
    PRIMARY KEY (cohort, day)) STRICT, WITHOUT ROWID;
CREATE TABLE blocks (id INTEGER PRIMARY KEY, cohort INTEGER NOT NULL, first_ms INTEGER NOT NULL,
    last_ms INTEGER NOT NULL, row_count INTEGER NOT NULL, points INTEGER NOT NULL, min_sequence INTEGER NOT NULL,
    max_sequence INTEGER NOT NULL, payload BLOB NOT NULL) STRICT;
CREATE INDEX blocks_by_cohort ON blocks (cohort, first_ms);
"""

_DIRTY: Final = """
CREATE TABLE dirty (id INTEGER PRIMARY KEY AUTOINCREMENT, cohort INTEGER NOT NULL, first_ms INTEGER NOT NULL,
    last_ms INTEGER NOT NULL, row_count INTEGER NOT NULL, marked_ms INTEGER NOT NULL) STRICT
"""

_UPGRADE: Final = """
ALTER TABLE heads RENAME TO old_heads;
CREATE TABLE heads (cohort INTEGER NOT NULL, day INTEGER NOT NULL, blocked_through INTEGER NOT NULL,
    PRIMARY KEY (cohort, day)) STRICT, WITHOUT ROWID;
INSERT INTO heads SELECT cohort, (SELECT value FROM meta WHERE key = 'day'), blocked_through FROM old_heads;
DROP TABLE old_heads;
INSERT INTO dirty (cohort, first_ms, last_ms, row_count, marked_ms)
    SELECT cohort, min(first_ms), max(last_ms), sum(row_count), 0 FROM blocks GROUP BY cohort;
UPDATE meta SET value = 2 WHERE key = 'format_version'
"""


class UnusablePartitionError(Exception):
    """A file that is not a partition of this engine, or can no longer be read as one."""


class PartitionGoneError(Exception):
    """The file was evicted; a reader goes on without it."""


@dataclass(slots=True)
class Pile:
    """What was stored of a cohort in a partition since its blocks were merged; short blocks are under `short_rows`."""

    blocks: int = 0
    rows: int = 0
    short_blocks: int = 0
    short_rows: int = 0

    def add(self, rows: int, short_below: int) -> None:
        self.blocks += 1
        self.rows += rows
        if rows < short_below:
            self.short_blocks += 1
            self.short_rows += rows


class BlockGoneError(Exception):
    """A block that was listed has been merged into another since; a reader lists again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Rows of a cohort, first_ms to last_ms inclusive, that are not in the next tier's roll-ups yet.

    Attributes:
        id: its number in the partition of `day`.
        day: the partition's first day.
        rows: about how many rows.
        marked_ms: when, UTC epoch milliseconds.
    """

    id: int
    day: int
    cohort_id: int
    first_ms: int
    last_ms: int
    rows: int
    marked_ms: int

    def overlaps(self, days: range) -> bool:
        """Whether some of the rows may be of these days."""
        return self.first_ms < days.stop * DAY_MS and self.last_ms >= days.start * DAY_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """Blocks of one cohort to be stored together.

    Attributes:
        cohort_id: whose they are.
        blocks: what to store.
        blocked_through: the sequence up to which the head's rows are in blocks with these; None: they are no head's.
        head_day: the head's day.
        touched: ranges of time, inclusive, whose roll-up buckets are out of date with these, each with its rows.
        replaces: numbers of blocks that go because these hold their rows.
        final: there is nothing to gain from merging these again.
    """

    cohort_id: int
    blocks: Sequence[Block]
    blocked_through: int | None = None
    head_day: int = 0
    touched: Sequence[tuple[int, int, int]] = ()
    replaces: Sequence[int] = ()
    final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInfo:
    """What a partition says of a block without reading its payload; `life` tells the file from one made anew."""

    id: int
    life: int
    first_ms: int
    last_ms: int
    rows: int
    bytes: int


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
            "SELECT id, first_ms, last_ms, row_count, length(payload) FROM blocks"
            " WHERE cohort = ? AND first_ms < ? AND last_ms >= ? ORDER BY first_ms",
            (cohort_id, end_ms, start_ms),
        )
        return [
            BlockInfo(id=number, life=self.life, first_ms=first, last_ms=last, rows=count, bytes=size)
            for number, first, last, count, size in rows
        ]

    def reader(
        self, info: BlockInfo, cohort: Cohort, columns: int | None = None, opened: Opened | None = None
    ) -> BlockReader | FrameReader:
        """A reader of one block's columns; using it ends with the next call. Raises BlockGoneError, CorruptBlockError.

        Args:
            info: the block.
            cohort: whose it is.
            columns: how many it has; None: as many as the cohort has metrics.
            opened: what reading the block began with before.
        """
        try:
            if self._blob is None:
                self._blob = self.db.blob_open("main", "blocks", "payload", info.id, False)
            else:
                self._blob.reopen(info.id)
        except apsw.SQLError as error:
            self.done()
            if not fetch(self.db, "SELECT 1 FROM blocks WHERE id = ?", (info.id,)):
                raise BlockGoneError(str(info.id)) from error
            raise
        blob = self._blob

        def read(offset: int, length: int) -> bytes:
            if offset > blob.length():
                return b""
            blob.seek(offset)
            return blob.read(length)

        return open_payload(read, cohort.id, len(cohort.stored_set.metric_set) if columns is None else columns, opened)

    def truncate_log(self) -> None:
        """Puts the log into the file and gives its bytes back; does nothing while somebody reads."""
        truncate_log(self.db)

    def done(self) -> None:
        """Ends the snapshot that an open blob holds."""
        if self._blob is not None:
            self._blob.close(True)
            self._blob = None


class Partitions:
    """All partition files of a folder. Thread-safe."""

    def __init__(
        self,
        folder: Path,
        identity: str,
        idle_limit: int,
        *,
        span_days: int = 1,
        sparse_days: int | None = None,
        sparse_points: int = 0,
        short_below: int = 0,
    ) -> None:
        """Opens every file once.

        Args:
            folder: made if it is not there.
            identity: of the journal.
            idle_limit: connections kept open.
            span_days: days of a file.
            sparse_days: days of a file where there are few points; None: as many.
            sparse_points: few are under so many a day; such files also have small pages.
            short_below: blocks of fewer rows are counted as short in their `Pile`.
        """
        self._folder = folder
        self._sparse_days = sparse_days or span_days  # times a power of two
        self._sparse_points = sparse_points
        self._expected = math.inf
        self._short_below = short_below
        self._piles: dict[int, dict[int, Pile]] = {}
        self._stored_at: dict[int, float] = {}
        self.span_days = span_days
        self._identity = identity
        self._idle_limit = idle_limit
        self._lock = threading.Lock()
        self._names = threading.Lock()  # held while a file is opened by its name, or unlinked; taken before `_lock`
        self._idle: list[tuple[int, apsw.Connection]] = []  # least recently used first
        self._lives: dict[int, int] = {}
        self._versions: dict[int, int] = {}
        self._doomed: dict[int, range] = {}  # the days of each file that is being evicted
        if not folder.exists():
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
        self._points: dict[int, int] = {}
        self.found_sequence = 0
        """The highest of all rows that were there at the start."""
        self._spans = {day: span_days for path in folder.glob("*.db") if (day := day_of(path)) is not None}
        for day in list(self._spans):
            self._points[day] = self._look_into(day)

    def expect(self, points_a_day: float) -> None:
        """Says how many points are to come, for the first partition: a later one is made like the newest."""
        with self._lock:
            self._expected = points_a_day

    @property
    def is_empty(self) -> bool:
        """Whether there is no partition."""
        with self._lock:
            return not self._spans

    def start_of(self, day: int) -> int:
        """The first day of the partition that a day belongs to, or would belong to if it were stored now."""
        with self._lock:
            return self._place(day)[0]

    def span_of(self, day: int) -> int:
        """How many days the partition that begins with `day` has, or would have."""
        with self._lock:
            return self._place(day)[1]

    def _place(self, day: int) -> tuple[int, int]:
        """The first day and the days of a day's partition; a new one is as long as its neighbours leave room."""
        spans, days = self._spans, self._sparse_days
        while days >= self.span_days:
            start = day // days * days
            if day < start + spans.get(start, 0):
                return start, spans[start]
            days //= 2
        days = self._sparse_days if self._is_sparse() else self.span_days
        while days > self.span_days and any(day // days == other // days for other in spans):
            days //= 2
        return day // days * days, days

    def _is_sparse(self) -> bool:
        """Whether few points a day are to be expected: as few as the newest partition has."""
        newest = max(self._spans, default=None)
        expected = self._expected if newest is None else self._points.get(newest, 0) / self._spans[newest]
        return expected < self._sparse_points

    def days(self, first: int, last: int) -> list[int]:
        """The (first days of) partitions that have a file and a day in `[first, last]`, ascending."""
        with self._lock:
            return sorted(day for day, span in self._spans.items() if day <= last and first < day + span)

    @property
    def name(self) -> str:
        """Of the folder."""
        return self._folder.name

    def version(self, day: int) -> tuple[int, int] | None:
        """The life of a day's file, and how often blocks were stored in it; None: it has none.

        It changes before `store` returns: a list of blocks read after it was asked for lacks nothing while it is the
        same.
        """
        with self._lock:
            return (self._lives.get(day, 0), self._versions.get(day, 0)) if day in self._spans else None

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
            days = list(self._spans)
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
                if life not in (None, now) or (day not in self._spans and not create):
                    raise PartitionGoneError(self.path(day).name)
                if any(day in days for days in self._doomed.values()):
                    raise OSError(f"{self.path(day).name} is being evicted")
            return Partition(day, now, self._connect(day, create=create))

    def _connect(self, day: int, *, create: bool) -> apsw.Connection:
        path, span_days = self.path(day), self.span_of(day)
        new = not path.exists()
        if not create and (new or path.stat().st_size == 0):
            raise PartitionGoneError(path.name)
        try:
            with self._lock:
                sparse = self._is_sparse()
            db = connect(path, SPARSE_PAGE_BYTES if sparse else PARTITION_PAGE_BYTES)
            try:
                if not create and not fetch(db, "SELECT 1 FROM sqlite_schema LIMIT 1"):
                    raise PartitionGoneError(path.name)
                if not db.table_exists("main", "meta"):
                    with Transaction(db):
                        self._create(db, day, span_days)
                self._check(db)
                if not db.table_exists("main", "dirty"):
                    with Transaction(db):
                        self._upgrade(db)
            except BaseException:
                db.close()
                raise
        except DAMAGED as error:
            raise UnusablePartitionError(f"{path.name}: {error}") from error
        if new:
            sync_folder(self._folder)
        with self._lock:
            self._spans.setdefault(day, span_days)
            self._points.setdefault(day, 0)
        return db

    def _create(self, db: apsw.Connection, day: int, span_days: int) -> None:
        if not db.table_exists("main", "meta"):
            db.execute(_SCHEMA)
            db.execute(_DIRTY)
            db.executemany(
                "INSERT INTO meta VALUES (?, ?)",
                [
                    ("format_version", PARTITION_VERSION),
                    ("identity", self._identity),
                    ("day", day),
                    ("span_days", span_days),
                ],
            )

    def _upgrade(self, db: apsw.Connection) -> None:
        if not db.table_exists("main", "dirty"):
            db.execute(_DIRTY)
            db.execute(_UPGRADE)

    def _check(self, db: apsw.Connection) -> None:
        meta = dict(fetch(db, "SELECT key, value FROM meta"))
        if meta.get("format_version") not in READABLE_VERSIONS:
            raise UnusablePartitionError(f"format {meta.get('format_version')} is not {PARTITION_VERSION}")
        if meta.get("identity") != self._identity:
            raise UnusablePartitionError("it belongs to another journal")

    def _look_into(self, day: int) -> int:
        """Notes a file's span and what is to be merged in it; returns its points, 0 where it cannot be read.

        A file whose making was cut off, by a full disk or a loss of power, holds nothing; it goes, since making it now
        might fail too, and with it the start.
        """
        try:
            with self.lend(day) as partition:
                for (span_days,) in fetch(partition.db, "SELECT value FROM meta WHERE key = 'span_days'"):
                    self._spans[day] = span_days
                ((points, highest),) = fetch(partition.db, "SELECT total(points), max(max_sequence) FROM blocks")
                self.found_sequence = max(self.found_sequence, highest or 0)
                self._piles[day] = self._count_piles(partition.db)
        except PartitionGoneError:
            self._spans.pop(day, None)
            remove_files(self.path(day))
            return 0
        except UnusablePartitionError as error:
            _log.error("a partition cannot be read and is left out: %s", error)
            return 0
        return int(points)

    def _count_piles(self, db: apsw.Connection) -> dict[int, Pile]:
        """Of cohorts of several blocks: whether they were merged before is not known, so all count as new."""
        piles: dict[int, Pile] = {}
        several = "SELECT cohort FROM blocks GROUP BY cohort HAVING count(*) > 1"
        for cohort_id, rows in fetch(db, f"SELECT cohort, row_count FROM blocks WHERE cohort IN ({several})"):  # noqa: S608
            piles.setdefault(cohort_id, Pile()).add(rows, self._short_below)
        return piles

    def piles(self) -> dict[int, dict[int, Pile]]:
        """By partition and cohort, what was stored since it was merged."""
        with self._lock:
            return {day: {of: replace(pile) for of, pile in piles.items()} for day, piles in self._piles.items()}

    def stored_at(self, day: int) -> float:
        """About when rows came for a partition since the start, monotonic seconds; long ago if none did."""
        with self._lock:
            return self._stored_at.get(day, -math.inf)

    def settle(self, day: int, cohort_id: int) -> None:
        """Notes that there is nothing to merge of a cohort."""
        with self._lock:
            self._piles.get(day, {}).pop(cohort_id, None)

    def blocked_through(self, day: int) -> Mapping[int, int]:
        """For each cohort of a day the sequence up to which its rows are in blocks."""
        for start in self.days(day, day):
            try:
                with self.lend(start) as partition:
                    found = "SELECT cohort, blocked_through FROM heads WHERE day = ?"
                    return dict(fetch(partition.db, found, (day,)))
            except UnusablePartitionError as error:
                self._set_aside(start, error)
        return {}

    def marks(self) -> list[Mark]:
        """Everything that is marked as not rolled up, of all readable partitions."""
        found: list[Mark] = []
        with self._lock:
            days = sorted(self._spans)
        for day in days:
            try:
                with self.lend(day) as partition:
                    rows = fetch(partition.db, f"SELECT {_MARK} FROM dirty ORDER BY id")  # noqa: S608  names of ours
            except UnusablePartitionError:
                continue  # named when its points were counted
            found.extend(_mark(day, row) for row in rows)
        return found

    def store(
        self, day: int, closed: Sequence[Closed], now_ms: int, *, at: float | None = None, life: int | None = None
    ) -> list[Mark]:
        """Stores blocks, advances their heads, and marks what they touch, in one transaction; returns the marks.

        Args:
            day: the partition's first day.
            closed: what to store.
            now_ms: our clock.
            at: when these rows came, monotonic seconds; None: they are none that came.
            life: only into that very file, which replaced blocks belong to; None: one is made where there is none.

        Returns after the sync; raises `apsw.Error`, and with `life` PartitionGoneError and UnusablePartitionError.
        """
        if at is not None:
            with self._lock:
                self._stored_at[day] = max(at, self._stored_at.get(day, -math.inf))
        if life is not None:
            return self._store(day, closed, now_ms, life)
        try:
            return self._store(day, closed, now_ms, None)
        except UnusablePartitionError as error:
            self._set_aside(day, error)
            return self._store(day, closed, now_ms, None)

    def _store(self, day: int, closed: Sequence[Closed], now_ms: int, life: int | None) -> list[Mark]:
        marks: list[Mark] = []
        points = 0
        with self.lend(day, life=life, create=life is None) as partition, Transaction(partition.db):
            for part in closed:
                points += _insert(partition.db, part)
                marks.extend(_marked(partition.db, day, part, now_ms))
        with self._lock:
            self._versions[day] = self._versions.get(day, 0) + 1
            if day in self._points:
                self._points[day] += points
                for part in closed:
                    self._pile_up(day, part)
        return marks

    def _pile_up(self, day: int, part: Closed) -> None:
        piles = self._piles.setdefault(day, {})
        if part.replaces:
            piles.pop(part.cohort_id, None)
        if not part.final:
            pile = piles.setdefault(part.cohort_id, Pile())
            for stored in part.blocks:
                pile.add(stored.rows, self._short_below)

    def clear(self, marks: Sequence[Mark]) -> None:
        """Forgets marks of one partition, whose roll-ups are durable; raises as `lend`, and `apsw.Error`."""
        with self.lend(marks[0].day) as partition, Transaction(partition.db):
            partition.db.executemany("DELETE FROM dirty WHERE id = ?", [(mark.id,) for mark in marks])

    def compact(self, day: int) -> None:
        """Gives the free pages of a partition back to the file system; raises as `lend`, and `apsw.Error`."""
        with self.lend(day) as partition:
            if partition.db.pragma("freelist_count"):
                partition.db.execute("PRAGMA incremental_vacuum").fetchall()
            partition.truncate_log()

    def evict(self, day: int) -> None:
        """Gives a day's file back to the file system; returns when that is durable, raises OSError.

        Who reads it at this moment keeps what was lent and may finish; nobody writes to its days until `release`, for a
        start in between would unlink a file that is named after any of them.
        """
        with self._lock:
            self._doomed.setdefault(day, range(day, day + self._place(day)[1]))
        self._forget(day)
        with self._names:
            remove_files(self.path(day))

    def release(self, day: int) -> None:
        """Lets files be made again for the days of an evicted one."""
        with self._lock:
            self._doomed.pop(day, None)

    def _forget(self, day: int) -> None:
        """Makes a day's file unknown and closes its idle connections; lent ones are closed when they come back."""
        with self._lock:
            stale = [db for known, db in self._idle if known == day]
            self._idle = [(known, db) for known, db in self._idle if known != day]
            self._lives[day] = self._lives.get(day, 0) + 1
            self._spans.pop(day, None)
            self._points.pop(day, None)
            self._piles.pop(day, None)
            self._stored_at.pop(day, None)
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


_MARK: Final = "id, cohort, first_ms, last_ms, row_count, marked_ms"


def _mark(day: int, row: tuple[int, int, int, int, int, int]) -> Mark:
    number, cohort_id, first_ms, last_ms, rows, marked_ms = row
    return Mark(
        id=number, day=day, cohort_id=cohort_id, first_ms=first_ms, last_ms=last_ms, rows=rows, marked_ms=marked_ms
    )


def _insert(db: apsw.Connection, part: Closed) -> int:
    """Stores the blocks of a part and takes out what they replace, in this order; returns by how many points the
    partition grew."""
    points = sum(block.points for block in part.blocks)
    db.executemany(
        "INSERT INTO blocks (cohort, first_ms, last_ms, row_count, points, min_sequence, max_sequence, payload)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (part.cohort_id, b.first_ms, b.last_ms, b.rows, b.points, b.min_sequence, b.max_sequence, b.payload)
            for b in part.blocks
        ],
    )
    for number in part.replaces:
        for (gone,) in fetch(db, "DELETE FROM blocks WHERE id = ? RETURNING points", (number,)):
            points -= gone
    if part.blocked_through is not None:
        db.execute(
            "INSERT INTO heads VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET blocked_through = ?3",
            (part.cohort_id, part.head_day, part.blocked_through),
        )
    return points


def _marked(db: apsw.Connection, day: int, part: Closed, now_ms: int) -> Iterator[Mark]:
    for first_ms, last_ms, rows in part.touched:
        ((number,),) = fetch(
            db,
            "INSERT INTO dirty (cohort, first_ms, last_ms, row_count, marked_ms) VALUES (?, ?, ?, ?, ?) RETURNING id",
            (part.cohort_id, first_ms, last_ms, rows, now_ms),
        )
        yield _mark(day, (number, part.cohort_id, first_ms, last_ms, rows, now_ms))


def partition_path(folder: Path, day: int) -> Path:
    """The file of a day."""
    return folder / f"{EPOCH + datetime.timedelta(days=day):%Y-%m-%d}.db"


def remove_files(*paths: Path) -> None:
    """Unlinks partitions of one folder with their logs; returns when that is durable. Some may be gone already."""
    if not paths or not paths[0].parent.exists():
        return
    for path in paths:
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    sync_folder(paths[0].parent)


def day_of(path: Path) -> int | None:
    """The first day of a partition by the name of its file; None: it is no partition's name."""
    try:
        return (datetime.date.fromisoformat(path.stem) - EPOCH).days
    except ValueError:
        return None
