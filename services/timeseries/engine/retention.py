"""How days go: by age, and, oldest first, when the disk's limit is reached.

A day (a head for each cohort, a file) goes in three durable steps::

    journal: evictions(day, through, unlinked 0)     from here on the day is gone, whatever happens
    unlink day.db, -wal, -shm; sync the folder        its bytes are the file system's
    journal: evictions(day, through, unlinked 1)      a file made for that day from now on is a new one

A crash before the first leaves all of the day; after it the start does what was not done yet, and the replay skips the
day's rows up to `through`. The note lives in the journal because `blocked_through`, which otherwise keeps a replay from
applying rows twice, goes with the file. It is a sequence for a day, and no water mark of time: were our clock a year
ahead for a minute, days would be lost, but the rows that come after it are not too late for ever.

What must stay true: rows with a higher sequence than `through` are never taken with the day; taking rows never waits
for anything here; the journal keeps its sequences and followers their cursors: what a follower has not shipped yet is
still in the journal when its day goes, and is swept unshipped only as the last resort, which its tail tells as missed.
Runs in the thread that closes heads, so a day never goes while its heads become blocks.
"""

import datetime
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from services.timeseries.engine.partition import EPOCH
from services.timeseries.engine.settings import DAY_MS, MAX_TIME_MS
from services.timeseries.engine.store import Store

PRESSED: Final = 0.8
"""From this share of `disk_bytes_limit` on the status warns."""
RELIEVED: Final = 0.75
"""The warning ends below this share."""

_MAX_DAY: Final = MAX_TIME_MS // DAY_MS
_JOURNAL_SHARE: Final = 0.5
"""Heads close early, as the last resort, only while the journal is larger than this share of the limit: short blocks
are dear."""

_log = logging.getLogger(__name__)


class Retention:
    """`on_writer` runs something between two commits and returns its answer; `stopping` ends work between two days."""

    def __init__(
        self, store: Store, on_writer: Callable[[Callable[[], Any]], Any], stopping: Callable[[], bool]
    ) -> None:
        self._store = store
        self._on_writer = on_writer
        self._stopping = stopping
        self._unfinished: set[int] = set()
        self._kept_from_day = 0
        self.evicted = 0
        self.pressed = False
        self.over = False

    @property
    def oldest_ms(self) -> int:
        """The first instant that rows may have: of the oldest day that age leaves, and, while the limit is near, of
        the first day that the limit has left."""
        day = self._kept_from_day if self.pressed else 0
        return max(day, self._first_day_of_age()) * DAY_MS

    @property
    def oldest_day(self) -> datetime.date | None:
        """The oldest day that has rows."""
        days = self._days()
        return EPOCH + datetime.timedelta(days=days[0]) if days else None

    def evict_aged(self) -> None:
        """Takes the days that are older than `raw_retention_s` as a whole, and ends what failed to end before."""
        for day in sorted(self._unfinished):
            self._attempt(day, self._finish)
        first = self._first_day_of_age()
        for day in [day for day in self._days() if day < first]:
            if self._stopping():
                return
            self._attempt(day, self._evict)

    def keep_limit(self) -> None:
        """Takes the oldest days until journal and blocks are within `disk_bytes_limit`, then what else can be given."""
        limit = self._store.settings.disk_bytes_limit
        if limit is None:
            return
        try:
            if self._store.disk_bytes > limit:
                self._shrink_journal()
            evicted = True
            while evicted and self._store.disk_bytes > limit and (day := self._next_day()) is not None:
                if self._stopping():
                    return
                evicted = self._attempt(day, self._evict)
                self._kept_from_day = max(self._kept_from_day, day + 1)
            if evicted and self._store.disk_bytes > limit:
                self._last_resort(limit)
        except Exception as error:
            self._note("the disk's limit could not be kept", error)
        self._observe(limit)

    def _days(self) -> list[int]:
        """The days that have a file or a head, ascending."""
        with self._store.lock:
            days = {head.day for head in self._store.heads}
        return sorted(days.union(self._store.partitions.days(0, _MAX_DAY)))

    def _first_day_of_age(self) -> int:
        retention_s = self._store.settings.raw_retention_s
        if retention_s is None:
            return 0
        return max(0, self._store.clock.now_ms() - int(retention_s * 1_000)) // DAY_MS

    def _next_day(self) -> int | None:
        """The oldest day, but neither today, a later one, nor the newest that has rows."""
        days = self._days()
        end = min([self._store.clock.now_ms() // DAY_MS, *days[-1:]])
        return next((day for day in days if day < end), None)

    def _attempt(self, day: int, step: Callable[[int], None]) -> bool:
        try:
            with self._store.moving:
                step(day)
        except Exception as error:
            self._note(f"{self._store.partitions.path(day).name} could not be evicted", error)
            return False
        return True

    def _note(self, text: str, error: Exception) -> None:
        self._store.faults.note(f"{text}: {error}")
        _log.warning("%s, will try again", text, exc_info=error)

    def _evict(self, day: int) -> None:
        before = self._store.partitions.bytes
        self._on_writer(partial(self._store.forget, day))
        self._unfinished.add(day)
        self._finish(day)
        self.evicted += 1
        given_back = (before - self._store.partitions.bytes) >> 20
        _log.info("%s is evicted, %d MiB are given back", self._store.partitions.path(day).name, given_back)

    def _finish(self, day: int) -> None:
        self._store.partitions.evict(day)
        self._on_writer(partial(self._store.journal.finish_eviction, day))
        self._store.partitions.release(day)
        self._unfinished.discard(day)

    def _shrink_journal(self) -> None:
        while not self._stopping() and self._on_writer(partial(self._store.journal.shrink, urgent=True)):
            pass
        self._on_writer(self._store.journal.truncate_log)

    def _last_resort(self, limit: int) -> None:
        """No day may go: the journal keeps only what heads need, and heads need less of it."""
        self._sweep_journal()
        if self._store.disk_bytes > limit and self._on_writer(self._journal_bytes) > _JOURNAL_SHARE * limit:
            self._store.close_heads(self._stopping, everything=True)
            self._sweep_journal()

    def _journal_bytes(self) -> int:
        return self._store.journal.used_bytes

    def _sweep_journal(self) -> None:
        rows = self._store.settings.sweep_rows
        while not self._stopping() and self._on_writer(partial(self._store.sweep, urgent=True)) >= rows:
            pass
        self._shrink_journal()

    def _observe(self, limit: int) -> None:
        used = self._store.disk_bytes
        over, share = used > limit and self._next_day() is None, used / limit
        if over and not self.over:
            _log.error("journal and blocks, %d MiB, are over disk_bytes_limit, and no day may go", used >> 20)
        self.over = over
        if not self.pressed and share >= PRESSED:
            _log.warning(
                "journal and blocks are at %.0f %% of disk_bytes_limit; at 100 %% the oldest days go", share * 100
            )
            self.pressed = True
        elif self.pressed and share < RELIEVED:
            _log.info("journal and blocks are at %.0f %% of disk_bytes_limit again", share * 100)
            self.pressed = False
