"""How days go: by age, and, oldest first, when the disk's limit is reached.

A day of points (a head for each cohort, a file) goes in durable steps::

    its heads become blocks, and its roll-ups are made        or, by age, it stays until that is done
    journal: evictions(day, through, unlinked 0), ended        from here on the day is gone, whatever happens
    unlink day.db, -wal, -shm; sync the folder                 its bytes are the file system's
    journal: evictions(day, through, unlinked 1)               a file made for that day from now on is a new one

A crash before the second leaves all of the day; after it the start does what was not done yet, and the replay skips the
day's rows up to `through`. The note lives in the journal because `blocked_through`, which otherwise keeps a replay from
applying rows twice, goes with the file. It is a sequence for a day, and no water mark of time: were our clock a year
ahead for a minute, days would be lost, but the rows that come after it are not too late for ever.

A file of roll-ups goes by its own age once the next tier has all of it, and nothing more is to come into it; a crash
in between only leaves it until the next time. Rows for a day whose points are gone are taken where no roll-up has been
made of them (`frozen.py`): so what is older than the retention can be imported. Such a day stays for `late_grace_s`
after its last rows, and goes again.

What must stay true: rows with a higher sequence than `through` are never taken with the day; taking rows never waits
for anything here; the journal keeps its sequences and followers their cursors: what a follower has not shipped yet is
still in the journal when its day goes, and is swept unshipped only as the last resort, which its tail tells as missed.
Runs in the upkeep thread.
"""

import datetime
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from services.timeseries.engine.partition import EPOCH, PartitionGoneError, UnusablePartitionError
from services.timeseries.engine.settings import DAY_MS, MAX_TIME_MS
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import RAW, Tier
from services.timeseries.engine.upkeep import Rollups

PRESSED: Final = 0.8
"""From this share of `disk_bytes_limit` on the status warns."""
RELIEVED: Final = 0.75
"""The warning ends below this share."""

_MAX_DAY: Final = MAX_TIME_MS // DAY_MS
_JOURNAL_SHARE: Final = 0.5
"""Heads close early, as the last resort, only while the journal is larger than this share of the limit: short blocks
are dear."""

_TRIES: Final = 3
"""Rows may come for a day between the making of its roll-ups and its end: then once more, and then without theirs."""

_log = logging.getLogger(__name__)


class Retention:
    """`on_writer` runs something between two commits and returns its answer; `stopping` ends work between two days."""

    def __init__(
        self,
        store: Store,
        rollups: Rollups,
        on_writer: Callable[[Callable[[], Any]], Any],
        stopping: Callable[[], bool],
    ) -> None:
        self._store = store
        self._rollups = rollups
        self._on_writer = on_writer
        self._stopping = stopping
        self._unfinished: dict[tuple[int, int], range] = {}
        """Level and first day -> the days of what is noted to be gone and has its file still."""
        self._kept_from_day = 0
        self.evicted = 0
        self.evicted_unshipped: dict[str, int] = {}
        self.pressed = False
        self.over = False

    @property
    def oldest_ms(self) -> int:
        """The first instant that rows may have at all: of the oldest roll-ups that age leaves, and, while the limit is
        near, of the first day that the limit has left."""
        day = self._kept_from_day if self.pressed else 0
        return max(day, self._first_day(self._store.tiers[-1])) * DAY_MS

    @property
    def aged_ms(self) -> int:
        """Rows before this instant are for days whose points, or roll-ups, may be gone."""
        with self._store.lock:
            ended_ms = self._store.ended_ms
        return max(ended_ms, self._first_day(self._store.tiers[RAW]) * DAY_MS)

    @property
    def oldest_day(self) -> datetime.date | None:
        """The oldest day that has rows."""
        starts = self._starts(self._store.tiers[RAW])
        return EPOCH + datetime.timedelta(days=starts[0]) if starts else None

    def held_from_ms(self, level: int) -> int:
        """From this instant on a tier has all rows that were ever taken, here or, before this store was made, by
        another, but for what was imported since for days before the store's first; the end of time when there are
        none."""
        tier = self._store.tiers[level]
        starts = self._starts(self._store.tiers[RAW]) + self._starts(tier)
        with self._store.lock:
            ended = list(self._store.ended[level])
        span_of = (lambda _day: 1) if level == RAW else tier.partitions.span_of
        ends = [day + span_of(day) for day in ended]
        return max(max([min(starts, default=_MAX_DAY), *ends]) * DAY_MS, self._store.journal.whole_from_ms)

    def end_lost(self) -> None:
        """Has lost roll-ups made anew, and what was made of other lost files stay as it is; before any roll-up is made
        of what is left of them."""
        for tier, days in list(self._store.lost):
            try:
                if not self._store.make_again(tier, days):
                    self._on_writer(partial(self._store.end_lost, tier, days))
            except Exception as error:
                self._note(f"the loss of {tier.partitions.path(days.start).name} could not be noted", error)

    def evict_aged(self) -> None:
        """Takes what is older than its tier's retention as a whole, and ends what failed to end before."""
        for level, day in sorted(self._unfinished):
            self._attempt(day, partial(self._finish, self._store.tiers[level]))
        for tier in self._store.tiers:
            first = self._first_day(tier)
            for day in self._starts(tier):
                if self._stopping():
                    return
                if day + tier.partitions.span_of(day) <= first and self._may_go(tier, day):
                    self._attempt(day, partial(self._evict, tier, force=False))

    def keep_limit(self) -> None:
        """Takes the oldest days until journal and blocks are within `disk_bytes_limit`, then what else can be given."""
        limit = self._store.settings.disk_bytes_limit
        if limit is None:
            return
        try:
            if self._store.disk_bytes > limit:
                self._shrink_journal()
            evicted = True
            while evicted and self._store.disk_bytes > limit and (following := self._next()) is not None:
                if self._stopping():
                    return
                tier, day = following
                span = tier.partitions.span_of(day)
                evicted = self._attempt(day, partial(self._evict, tier, force=True))
                if tier.level == RAW:
                    self._kept_from_day = max(self._kept_from_day, day + span)
            if evicted and self._store.disk_bytes > limit:
                self._last_resort(limit)
        except Exception as error:
            self._note("the disk's limit could not be kept", error)
        self._observe(limit)

    def _starts(self, tier: Tier) -> list[int]:
        """The first days of what has a file, or would have one if its heads were blocks, ascending."""
        starts = set(tier.partitions.days(0, _MAX_DAY))
        if tier.level == RAW:
            with self._store.lock:
                days = {head.day for head in self._store.heads}
            starts.update(tier.partitions.start_of(day) for day in days)
        return sorted(starts)

    def _first_day(self, tier: Tier) -> int:
        """The first day that a tier's age leaves."""
        if tier.retention_s is None:
            return 0
        return max(0, self._store.clock.now_ms() - int(tier.retention_s * 1_000)) // DAY_MS

    def _next(self) -> tuple[Tier, int] | None:
        """What goes next for the limit: the oldest day of points, then the oldest roll-ups, the finer ones first; but
        neither of today, nor a later one, nor the newest that has rows."""
        for tier in self._store.tiers:
            starts = self._starts(tier)
            end = min([self._store.clock.now_ms() // DAY_MS, *starts[-1:]])
            for day in starts:
                if day + tier.partitions.span_of(day) <= end:
                    return tier, day
        return None

    def _may_go(self, tier: Tier, day: int) -> bool:
        """Whether the rows of an old day have not come lately, as those of an import do."""
        store = self._store
        latest = tier.partitions.stored_at(day)
        if tier.level == RAW:
            days = range(day, day + tier.partitions.span_of(day))
            with store.lock:
                opened = [head.opened_at for head in store.heads if head.day in days and head.size]
            latest = max([latest, *opened])
        return store.clock.monotonic() - latest >= store.settings.late_grace_s

    def _attempt(self, day: int, step: Callable[[int], None]) -> bool:
        try:
            step(day)
        except Exception as error:
            self._note(f"{self._store.partitions.path(day).name} could not be evicted", error)
            return False
        return True

    def _note(self, text: str, error: Exception) -> None:
        self._store.faults.note(f"{text}: {error}")
        _log.warning("%s, will try again", text, exc_info=error)

    def _evict(self, tier: Tier, day: int, *, force: bool) -> None:
        before = tier.partitions.bytes
        days = range(day, day + tier.partitions.span_of(day))
        made = self._end_made(tier, days, tries=_TRIES if force else 1)
        if not made and (not force or self._stopping()):
            return
        if not made:
            self._end(tier, days, force=True)
        self.evicted += 1
        given_back = (before - tier.partitions.bytes) >> 20
        name = f"{tier.kind.folder}/{tier.partitions.path(day).name}"
        _log.info("%s is evicted, %d MiB are given back", name, given_back)
        if not made:
            self._store.faults.note(f"{name} went without all of its roll-ups")

    def _end_made(self, tier: Tier, days: range, *, tries: int) -> bool:
        """Makes all roll-ups of a partition and takes it, unless rows come for it each time or they cannot be made."""
        for _ in range(tries):
            if tier.level == RAW:
                self._store.close_heads(self._stopping, only_days=days)
                self.end_lost()  # the file may have been found to be unusable just now
            if tier is not self._store.tiers[-1] and not self._rollups.complete(tier, days.start):
                return False
            if self._end(tier, days, force=False):
                return True
        return False

    def _end(self, tier: Tier, days: range, *, force: bool) -> bool:
        store, day = self._store, days.start
        if tier.level == RAW:
            with store.moving:
                unshipped = self._unshipped(day)
                if not self._on_writer(partial(store.forget, day, len(days), force=force)):
                    return False
                self._count_unshipped(day, unshipped)
                self._unfinished[tier.level, day] = days
                self._finish(tier, day)
        else:
            if not self._on_writer(partial(store.end, tier, day, force=force)):
                return False
            self._unfinished[tier.level, day] = days
            self._finish(tier, day)
        return True

    def _unshipped(self, day: int) -> dict[str, int]:
        """By follower, the points of a day that it has not shipped and that are in blocks alone."""
        cursors, swept = self._on_writer(self._store.journal.followers), self._store.swept_through
        behind = {name: cursor for name, cursor in cursors.items() if cursor < swept}
        if not behind:
            return {}
        try:
            with self._store.partitions.lend(day) as partition:
                points = {name: partition.points_between(cursor, swept) for name, cursor in behind.items()}
        except (PartitionGoneError, UnusablePartitionError):
            return {}  # it has no file that can be read: there is nothing to count
        return {name: count for name, count in points.items() if count}

    def _count_unshipped(self, day: int, points: dict[str, int]) -> None:
        for name, count in points.items():
            self.evicted_unshipped[name] = self.evicted_unshipped.get(name, 0) + count
            text = f"{self._store.partitions.path(day).name} went before {name} had shipped up to {count} points of it"
            self._store.faults.note(text)
            _log.error("%s", text)

    def _finish(self, tier: Tier, day: int) -> None:
        tier.partitions.evict(day)
        if tier.level == RAW:
            self._on_writer(partial(self._store.journal.finish_eviction, self._unfinished[RAW, day]))
        tier.partitions.release(day)
        del self._unfinished[tier.level, day]

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
        over, share = used > limit and self._next() is None, used / limit
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
