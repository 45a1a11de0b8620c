"""The partitions of a folder: who has a file open, and what is to be merged in it.

What must stay true:

* few files stay open: connections are lent to one thread at a time and the least recently used idle ones are closed;
* a day that was evicted is not made anew by a reader, and a connection to the file that is gone is never lent again,
  not even when rows make a new file for that day;
* a file that is no usable database any more when it is to be written is set aside under another name, never
  deleted, and a new one begun; whoever knows something of it by numbers (`on_lost`) is told before that.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import apsw

from runtime.sqlite import Transaction, fetch, give_back, sync_folder
from services.timeseries.engine.database import DAMAGED, PARTITION_PAGE_BYTES, SPARSE_PAGE_BYTES, connect, file_bytes
from services.timeseries.engine.partition import (
    MARK,
    Closed,
    Mark,
    Partition,
    PartitionGoneError,
    Pile,
    UnusablePartitionError,
    census,
    day_of,
    insert,
    integers,
    mark_of,
    marked,
    move_aside,
    of_days,
    partition_path,
    prepare,
    remove_files,
)
from services.timeseries.engine.placement import Placement

_log = logging.getLogger(__name__)


class Partitions:
    """All partition files of a folder. Thread-safe."""

    def __init__(
        self,
        folder: Path,
        identity: str,
        idle_limit: int,
        *,
        noted: Mapping[int, int] | None = None,
        span_days: int = 1,
        sparse_days: int | None = None,
        sparse_points: int = 0,
        short_below: int = 0,
    ) -> None:
        """Opens every file once.

        Args:
            folder: made if it is not there; `identity`: of the journal.
            idle_limit: connections kept open.
            noted: first day -> days, of files that were there; they may not be able to say it any more.
            span_days: days of a file.
            sparse_days: days of a file where there are few points; None: as many.
            sparse_points: few are under so many a day; such files also have small pages.
            short_below: blocks of fewer rows are counted as short in their `Pile`.
        """
        self._folder = folder
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
        self.on_lost: Callable[[range], None] = lambda _days: None
        """Called with the days of a file that is set aside, in the thread that found it unusable."""
        if not folder.exists():
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
        self.all_usable = True
        """Whether no file was found to be unusable since the start."""
        self.found_unusable: dict[int, str] = {}
        """What is wrong with those that could not be read at the start."""
        self.found_sequence = self.found_cohort = 0
        """The highest of all rows, and of all blocks, that were there at the start."""
        noted, days = noted or {}, map(day_of, folder.glob("*.db"))
        spans = {day: noted.get(day, span_days) for day in days if day is not None}
        self._placed = Placement(spans, span_days=span_days, sparse_days=sparse_days, sparse_points=sparse_points)
        for day in spans:
            self._look_into(day)
        self.missing = {day: noted[day] for day in noted if day not in self._placed.spans}
        """First day -> days, of files that were there and were gone at the start, or empty."""
        if self.missing:
            self.all_usable = False

    def expect(self, points_a_day: float) -> None:
        """Says how many points are to come, for the first partition: a later one is made like the newest."""
        with self._lock:
            self._placed.expected = points_a_day

    @property
    def is_empty(self) -> bool:
        """Whether there is no partition."""
        with self._lock:
            return not self._placed.spans

    def start_of(self, day: int) -> int:
        """The first day of the partition that a day belongs to, or would belong to if it were stored now."""
        with self._lock:
            return self._placed.place(day)[0]

    def span_of(self, day: int) -> int:
        """How many days the partition that begins with `day` has, or would have."""
        with self._lock:
            return self._placed.place(day)[1]

    def days(self, first: int, last: int) -> list[int]:
        """The (first days of) partitions that have a file and a day in `[first, last]`, ascending."""
        with self._lock:
            return self._placed.within(first, last)

    @property
    def spans(self) -> dict[int, int]:
        """First day -> days, of the partitions that have a file."""
        with self._lock:
            return dict(self._placed.spans)

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
            return (self._lives.get(day, 0), self._versions.get(day, 0)) if day in self._placed.spans else None

    def path(self, day: int) -> Path:
        return partition_path(self._folder, day)

    @property
    def points(self) -> int:
        """Points in all readable blocks."""
        with self._lock:
            return sum(self._placed.points.values())

    @property
    def bytes(self) -> int:
        """Size on disk of all partitions."""
        with self._lock:
            days = list(self._placed.spans)
        return sum(file_bytes(self.path(day)) for day in days)

    @contextmanager
    def lend(self, day: int, *, life: int | None = None, create: bool = False) -> Iterator[Partition]:
        """A connection to a day's file, with `life` to that very file; with `create` one is made where there is none.

        Raises UnusablePartitionError, PartitionGoneError.
        """
        partition = self._take(day, life) or self._open(day, life, create=create)
        try:
            yield partition
        except BaseException as error:
            partition.done()
            partition.db.close()
            if isinstance(error, DAMAGED):
                raise UnusablePartitionError(f"{self.path(day).name}: {error}") from error
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
                if life not in (None, now) or (day not in self._placed.spans and not create):
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
                sparse = self._placed.is_sparse()
            db = connect(path, SPARSE_PAGE_BYTES if sparse else PARTITION_PAGE_BYTES)
            try:
                if not create and not fetch(db, "SELECT 1 FROM sqlite_schema LIMIT 1"):
                    raise PartitionGoneError(path.name)
                prepare(db, self._identity, day, span_days)
            except BaseException:
                db.close()
                raise
        except DAMAGED as error:
            raise UnusablePartitionError(f"{path.name}: {error}") from error
        if new:
            sync_folder(self._folder)
        if create:  # a reader's may have gone since it was looked for, and stays so
            with self._lock:
                self._placed.made(day, span_days)
        return db

    def _look_into(self, day: int) -> None:
        """Notes a file's span, its points, and what is to be merged in it; nothing where it cannot be read.

        A file whose making was cut off, by a full disk or a loss of power, holds nothing; it goes, since making it now
        might fail too, and with it the start.
        """
        try:
            with self.lend(day) as partition:
                found = census(partition.db, self._short_below)
            self._placed.spans[day] = found.span_days or self._placed.spans[day]
            self._placed.points[day], self._piles[day] = found.points, found.piles
            self.found_sequence = max(self.found_sequence, found.sequence)
            self.found_cohort = max(self.found_cohort, found.cohort)
        except PartitionGoneError:
            _log.warning("%s is empty and removed: its making was cut off, or its rows are lost", self.path(day))
            self._placed.forget(day)
            remove_files(self.path(day))
        except UnusablePartitionError as error:
            self.found_unusable[day] = str(error)
            self.all_usable = False
            self._placed.points[day] = 0

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
                    return dict(integers(partition.db, found, (day,)))
            except UnusablePartitionError as error:
                self._set_aside(start, error)
        return {}

    def marks(self) -> list[Mark]:
        """Everything that is marked as not rolled up, of all readable partitions."""
        found: list[Mark] = []
        with self._lock:
            days = sorted(self._placed.spans)
        for day in days:
            try:
                with self.lend(day) as partition:
                    rows = integers(partition.db, f"SELECT {MARK} FROM dirty ORDER BY id")  # noqa: S608  names of ours
                    found.extend(mark_of(partition, row) for row in rows)
            except UnusablePartitionError as error:
                self.found_unusable.setdefault(day, str(error))
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
                points += insert(partition.db, part)
                marks.extend(marked(partition, part, now_ms))
        with self._lock:
            self._versions[day] = self._versions.get(day, 0) + 1
            if day in self._placed.points:
                self._placed.points[day] += points
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

    def mark(self, day: int, days: range, now_ms: int) -> list[Mark]:
        """Marks all rows of some days in a partition's blocks once more, in one transaction; returns the marks.

        Raises as `lend`, and `apsw.Error`.
        """
        with self.lend(day) as partition, Transaction(partition.db):
            return [mark for part in of_days(partition.db, days) for mark in marked(partition, part, now_ms)]

    def clear(self, marks: Sequence[Mark]) -> None:
        """Forgets marks of one file, whose roll-ups are durable; raises as `lend`, and `apsw.Error`."""
        with self.lend(marks[0].day, life=marks[0].life) as partition, Transaction(partition.db):
            partition.db.executemany("DELETE FROM dirty WHERE id = ?", [(mark.id,) for mark in marks])

    def compact(self, day: int) -> None:
        """Gives the free pages of a partition back to the file system; raises as `lend`, and `apsw.Error`."""
        with self.lend(day) as partition:
            give_back(partition.db)
            partition.truncate_log()

    def evict(self, day: int) -> None:
        """Gives a day's file back to the file system; returns when that is durable, raises OSError.

        Who reads it at this moment keeps what was lent and may finish; nobody writes to its days until `release`, for a
        start in between would unlink a file that is named after any of them.
        """
        with self._lock:
            self._doomed.setdefault(day, range(day, day + self._placed.place(day)[1]))
        self._forget(day)
        with self._names:
            remove_files(self.path(day))

    def release(self, day: int) -> None:
        """Lets files be made again for the days of an evicted one."""
        with self._lock:
            self._doomed.pop(day, None)

    def _forget(self, day: int, *, made_again: bool = False) -> None:
        """Makes a day's file unknown and closes its idle connections; lent ones are closed when they come back."""
        with self._lock:
            stale = [db for known, db in self._idle if known == day]
            self._idle = [(known, db) for known, db in self._idle if known != day]
            self._lives[day] = self._lives.get(day, 0) + 1
            self._placed.forget(day, made_again=made_again)
            self._piles.pop(day, None)
            self._stored_at.pop(day, None)
        for db in stale:
            db.close()

    def _set_aside(self, day: int, error: Exception) -> None:
        self.all_usable = False
        days = range(day, day + self.span_of(day))
        self.on_lost(days)  # first, so that what is read without the file is known to lack it
        self._forget(day, made_again=True)
        aside = move_aside(self.path(day))
        _log.error("a partition cannot be used (%s); it is set aside as %s", error, aside.name)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for _, db in idle:
            db.close()
