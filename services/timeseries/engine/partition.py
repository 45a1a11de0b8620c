"""blocks/YYYY-MM-DD.db: the blocks of some UTC days, a file each, so that retention can unlink them.

A file of raw points spans one day, one of roll-ups several; it is named, and known here, by the first of them. The
tables are drawn in docs/formats/block.md; which files there are is the business of `partitions`. What must stay true:

* a block, the `blocked_through` of its head and the marks of the roll-up buckets it touches are stored in one
  transaction of the same file, so a replay after a crash finds either all of it or nothing;
* blocks are replaced by what they are merged into in one transaction; a block's number is never given twice, so that a
  reader that has listed it finds that block or none;
* a partition belongs to the journal whose identity it carries; any other is refused, since cohort numbers would lie.
"""

import datetime
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import apsw

from runtime.errors import FailedPrecondition
from runtime.sqlite import Transaction, fetch, sync_folder
from services.timeseries.engine.block import Block, BlockReader, open_payload
from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.database import truncate_log
from services.timeseries.engine.frame import FrameReader
from services.timeseries.engine.payload import Opened
from services.timeseries.engine.settings import DAY_MS

_log = logging.getLogger(__name__)
PARTITION_VERSION: Final = 2
READABLE_VERSIONS: Final = (1, 2)
"""1 had no table `dirty`; it is brought up to date when it is opened, all of it marked for its roll-ups."""

EPOCH: Final = datetime.date(1970, 1, 1)
_ASIDE: Final = ".unusable-"

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

    def __init__(self, number: int) -> None:
        super().__init__(f"block {number} is gone")
        self.number = number


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Rows of a cohort, first_ms to last_ms inclusive, that are not in the next tier's roll-ups yet.

    Attributes:
        id: its number in the partition of `day`.
        day: the partition's first day; `life` tells the file from one made anew, which gives the numbers again.
        rows: about how many rows.
        marked_ms: when, UTC epoch milliseconds.
    """

    id: int
    day: int
    life: int
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
        rows = integers(
            self.db,
            "SELECT id, first_ms, last_ms, row_count, length(payload) FROM blocks"
            " WHERE cohort = ? AND first_ms < ? AND last_ms >= ? ORDER BY first_ms",
            (cohort_id, end_ms, start_ms),
        )
        return [
            BlockInfo(id=number, life=self.life, first_ms=first, last_ms=last, rows=count, bytes=size)
            for number, first, last, count, size in rows
        ]

    def cohorts_between(self, after: int, through: int) -> list[int]:
        """The cohorts that have a block with sequences of `(after, through]`, those with newer rows last."""
        rows = integers(
            self.db,
            "SELECT cohort FROM blocks WHERE max_sequence > ? AND min_sequence <= ?"
            " GROUP BY cohort ORDER BY max(max_sequence)",
            (after, through),
        )
        return [cohort_id for (cohort_id,) in rows]

    def points_between(self, after: int, through: int) -> int:
        """The points of those blocks, which may have others, too."""
        ((points,),) = fetch(
            self.db,
            "SELECT total(points) FROM blocks WHERE max_sequence > ? AND min_sequence <= ?",
            (after, through),
        )
        return int(points)

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
                raise BlockGoneError(info.id) from error
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


def integers(db: apsw.Connection, query: str, bindings: Sequence[int] = ()) -> list[Any]:
    """Rows of numbers. Raises UnusablePartitionError where there is something else: SQLite gives of a torn row what is
    there, whatever its table says."""
    rows = fetch(db, query, bindings)
    if not all(type(number) is int for row in rows for number in row):
        raise UnusablePartitionError("a row of it has something else where a number was")
    return rows


def prepare(db: apsw.Connection, identity: str, day: int, span_days: int) -> None:
    """Makes the tables of a new file, checks and brings up to date those of one that is there.

    Raises UnusablePartitionError: it is of no format or belongs to another journal. FailedPrecondition: a newer program
    wrote it, which can still read it.
    """
    if not db.table_exists("main", "meta"):
        with Transaction(db):
            db.execute(_SCHEMA)
            db.execute(_DIRTY)
            db.executemany(
                "INSERT INTO meta VALUES (?, ?)",
                [
                    ("format_version", PARTITION_VERSION),
                    ("identity", identity),
                    ("day", day),
                    ("span_days", span_days),
                ],
            )
    meta = dict(fetch(db, "SELECT key, value FROM meta"))
    version = meta.get("format_version")
    if isinstance(version, int) and version > PARTITION_VERSION:
        path = Path(db.filename)
        raise FailedPrecondition(
            f"{path.parent.name}/{path.name} has format {version}, this program reads up to {PARTITION_VERSION}: "
            "start the newer version again"
        )
    if version not in READABLE_VERSIONS:
        raise UnusablePartitionError(f"format {version} is not {PARTITION_VERSION}")
    if meta.get("identity") != identity:
        raise UnusablePartitionError("it belongs to another journal")
    if not db.table_exists("main", "dirty"):
        with Transaction(db):
            db.execute(_DIRTY)
            db.execute(_UPGRADE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """What a file holds: its days (None: it is from before files said so), points, the highest sequence and cohort of
    its blocks, and what is to be merged."""

    span_days: int | None
    points: int
    sequence: int
    cohort: int
    piles: dict[int, Pile]


def census(db: apsw.Connection, short_below: int) -> Census:
    """Looks through a file; raises UnusablePartitionError, and what SQLite does."""
    spans = integers(db, "SELECT value FROM meta WHERE key = 'span_days'")
    ((points, sequence, cohort_id),) = integers(
        db, "SELECT CAST(total(points) AS INTEGER), ifnull(max(max_sequence), 0), ifnull(max(cohort), 0) FROM blocks"
    )
    return Census(
        span_days=spans[0][0] if spans else None,
        points=points,
        sequence=sequence,
        cohort=cohort_id,
        piles=count_piles(db, short_below),
    )


def count_piles(db: apsw.Connection, short_below: int) -> dict[int, Pile]:
    """Of cohorts of several blocks: whether they were merged before is not known, so all count as new."""
    piles: dict[int, Pile] = {}
    several = "SELECT cohort FROM blocks GROUP BY cohort HAVING count(*) > 1"
    for cohort_id, rows in integers(db, f"SELECT cohort, row_count FROM blocks WHERE cohort IN ({several})"):  # noqa: S608
        piles.setdefault(cohort_id, Pile()).add(rows, short_below)
    return piles


MARK: Final = "id, cohort, first_ms, last_ms, row_count, marked_ms"
"""The columns of table `dirty` that `mark_of` takes."""


def mark_of(partition: Partition, row: tuple[int, int, int, int, int, int]) -> Mark:
    """A row of table `dirty` of a partition."""
    of_row = dict(zip(("id", "cohort_id", "first_ms", "last_ms", "rows", "marked_ms"), row, strict=True))
    return Mark(day=partition.day, life=partition.life, **of_row)


def insert(db: apsw.Connection, part: Closed) -> int:
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


def marked(partition: Partition, part: Closed, now_ms: int) -> Iterator[Mark]:
    """Stores a mark for each run of buckets that a part touches; gives them."""
    for first_ms, last_ms, rows in part.touched:
        ((number,),) = fetch(
            partition.db,
            "INSERT INTO dirty (cohort, first_ms, last_ms, row_count, marked_ms) VALUES (?, ?, ?, ?, ?) RETURNING id",
            (part.cohort_id, first_ms, last_ms, rows, now_ms),
        )
        yield mark_of(partition, (number, part.cohort_id, first_ms, last_ms, rows, now_ms))


def of_days(db: apsw.Connection, days: range) -> list[Closed]:
    """What the blocks of a file have of some days, for `marked`; they are not stored again."""
    found = integers(
        db,
        "SELECT cohort, max(min(first_ms), ?1), min(max(last_ms), ?2 - 1), sum(row_count) FROM blocks"
        " WHERE first_ms < ?2 AND last_ms >= ?1 GROUP BY cohort",
        (days.start * DAY_MS, days.stop * DAY_MS),
    )
    return [Closed(cohort_id=of, blocks=(), touched=[(first, last, rows)]) for of, first, last, rows in found]


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


def move_aside(path: Path) -> Path:
    """Gives a partition and its logs another name, durably; returns that."""
    number = 1
    while (aside := path.with_name(f"{path.name}{_ASIDE}{number}")).exists():
        number += 1
    for suffix in ("", "-wal", "-shm"):
        file = path.with_name(path.name + suffix)
        if file.exists():
            file.rename(aside.with_name(aside.name + suffix))
    sync_folder(path.parent)
    return aside


def files_aside(folder: Path) -> list[Path]:
    """The files of a folder that were set aside and are still there, without their logs."""
    return sorted(path for path in folder.glob(f"*{_ASIDE}*") if path.suffix[-1:].isdigit())


def days_aside(folder: Path) -> list[int]:
    """Their first days."""
    found = {day_of(Path(path.name.partition(_ASIDE)[0])) for path in files_aside(folder)}
    return sorted(day for day in found if day is not None)


def day_of(path: Path) -> int | None:
    """The first day of a partition by the name of its file; None: it is no partition's name."""
    try:
        return (datetime.date.fromisoformat(path.stem) - EPOCH).days
    except ValueError:
        return None
