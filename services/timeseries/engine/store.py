"""The engine without an event loop: what is in memory, what is on disk, and how rows move from one to the other.

Three threads use it: the writer commits and applies batches, one worker closes heads, readers read. `lock` guards the
catalog and the heads and is held for microseconds, never over I/O. What must stay true:

* a row is applied after its commit and before its acknowledgement, so what is acknowledged is durable and readable;
* the replay at start begins after `stored_through`, up to which no head needed a row when it was noted, and skips, for
  each head, the rows up to its durable `blocked_through`, and of an evicted day those that were there when it went;
* the journal is swept only up to `sweep_floor`, below which no head and no follower needs a row.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

import apsw

from fleet.model import count_points
from runtime.clock import Clock
from runtime.sqlite import sync_folder
from services.timeseries.engine import batch as batch_codec
from services.timeseries.engine import block
from services.timeseries.engine.cache import Cache
from services.timeseries.engine.catalog import Catalog, Cohort
from services.timeseries.engine.database import (
    UNFINISHED_JOURNAL,
    file_bytes,
    unfinished_restore,
    unreadable_journal,
)
from services.timeseries.engine.faults import Faults
from services.timeseries.engine.head import Chunk, Head, Heads, heads_of
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.journal_reader import JournalRow
from services.timeseries.engine.partition import (
    BlockInfo,
    Closed,
    PartitionGoneError,
    UnusablePartitionError,
    days_aside,
    partition_path,
    remove_files,
)
from services.timeseries.engine.partitions import Partitions
from services.timeseries.engine.payload import Opened
from services.timeseries.engine.settings import DAY_MS, EngineSettings
from services.timeseries.engine.tiers import RAW, TIERS, Ranges, Tier, gone_before_finer, touched

_log = logging.getLogger(__name__)
_BLOCK_ROWS_FACTOR: Final = 2
"""A chunk becomes one block up to so many times `head_rows`; a longer one, as of an import, is cut."""
_NO_COHORT: Final = 1 << 48
"""So many are never given: a number from here on is of a damaged block."""


class Store:
    """Opens a folder and brings the heads back; raises `apsw.Error` or OpenManagerError."""

    def __init__(self, folder: Path, settings: EngineSettings, clock: Clock) -> None:
        self.settings = settings
        self.clock = clock
        self.lock = threading.Lock()
        self.faults = Faults(clock, settings.faults_remembered)
        self.close_failing = False
        self.opened: Cache[Opened] = Cache(settings.opened_bytes_limit)
        self.listed: Cache[tuple[BlockInfo, ...]] = Cache(settings.listed_bytes_limit)
        self.moving = threading.Lock()
        """Held while heads become blocks, or a day goes."""
        if not folder.exists():
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
        self.journal_path = folder / "journal.db"
        if not self.journal_path.exists() and (folder / UNFINISHED_JOURNAL).exists():
            raise unfinished_restore(folder)
        orphans = any(any((folder / kind.folder).glob("*.db")) for kind in TIERS)
        with self._journal_is_to_blame():
            self.journal = Journal(self.journal_path, may_create=not orphans, now_ms=clock.now_ms())
        try:
            self.endings = 0
            self.lost: list[tuple[Tier, range]] = []
            """What was set aside, and is still to be noted with `end_lost`."""
            self.ended: list[dict[int, int]] = [{} for _ in TIERS]
            self._gone: tuple[int, list[Ranges]] = (-1, [])
            with self._journal_is_to_blame():
                self.catalog: Catalog = self.journal.load()
                evictions = self.journal.evictions()
                unfinished = [day for day, (_, unlinked) in evictions.items() if not unlinked]
                remove_files(*(partition_path(folder / "blocks", day) for day in unfinished))
                self.journal.finish_eviction(unfinished)
                for tier, day, through in self.journal.ended():
                    self.ended[tier][day] = through
            self.tiers = self._open_tiers(folder)
            self.partitions = self.tiers[RAW].partitions
            self._give_no_number_again()
            self.heads = Heads(settings)
            self.last_sequence = self.journal.last_sequence
            self.swept_through = self.journal.swept_through
            self._replay({day: through for day, (through, _) in evictions.items()})
            with suppress(apsw.Error):  # the upkeep tries again; a full disk must not keep it from starting
                for of_tier, days in list(self.lost):
                    if not self.make_again(of_tier, days):
                        self.end_lost(of_tier, days)
        except BaseException:
            self.journal.close()
            raise

    @contextmanager
    def _journal_is_to_blame(self) -> Iterator[None]:
        """For what is no error of SQLite: a text or a number of its tables is not what was written."""
        try:
            yield
        except (ValueError, TypeError, LookupError) as error:
            raise unreadable_journal(self.journal_path, error) from error

    def _give_no_number_again(self) -> None:
        """Blocks of a series that a damaged journal does not name any more must not become those of a new one."""
        found, named = max(tier.partitions.found_cohort for tier in self.tiers), self.catalog.last_cohort
        if named < found < _NO_COHORT:
            self.faults.damage("journal", found, f"there are blocks of series up to {found}, it names those to {named}")
            self.catalog.last_cohort = found

    def _open_tiers(self, folder: Path) -> list[Tier]:
        settings = self.settings
        retentions = (settings.raw_retention_s, settings.five_minute_retention_s, settings.hour_retention_s)
        tiers = []
        for level, (kind, retention_s) in enumerate(zip(TIERS, retentions, strict=True)):
            partitions = Partitions(
                folder / kind.folder,
                self.journal.identity,
                settings.partition_connections,
                noted={day: days for (of, day), days in self.journal.partitions.items() if of == level},
                span_days=kind.span_days,
                sparse_days=kind.sparse_days,
                sparse_points=settings.sparse_points_a_day,
                short_below=settings.head_rows // 2,
            )
            tiers.append(Tier(level=level, kind=kind, partitions=partitions, retention_s=retention_s))
        for tier in tiers:
            tier.partitions.on_lost = partial(self._lost_now, tier)
        named = self.catalog.cohorts_by_id
        for tier in tiers[:-1]:  # of a series that a damaged journal does not name any more nothing can be made
            tier.marks.add(mark for mark in tier.partitions.marks() if mark.cohort_id in named)
        for tier in tiers:
            partitions = tier.partitions
            for day, why in partitions.found_unusable.items():
                if tier.level == RAW:  # it is set aside when rows come for it
                    self.faults.damage(f"partition of {partitions.name}", day, why)
                else:
                    self._lost(tier, range(day, day + partitions.span_of(day)), why)
            for day, span in partitions.missing.items():
                self._lost(tier, range(day, day + span), f"{partitions.path(day).name} is not there any more")
            for day in days_aside(folder / tier.kind.folder):
                self.faults.damage(f"partition of {partitions.name}", day, "it was set aside")
        return tiers

    def _lost(self, tier: Tier, days: range, why: str = "it is set aside, what it held is lost") -> None:
        """A file cannot be used any more and is set aside, or is gone: the numbers of its marks will be given again."""
        self.faults.damage(f"partition of {tier.partitions.name}", days.start, why)
        with self.lock:
            tier.marks.drop(days.start)
            self.lost.append((tier, days))

    def _lost_now(self, tier: Tier, days: range) -> None:
        """As `_lost`, while it runs: what can be made anew is read from what it is made of from this moment on."""
        self._lost(tier, days)
        with suppress(apsw.Error):  # the upkeep tries again
            self.make_again(tier, days)

    def make_again(self, tier: Tier, days: range) -> bool:
        """Has a file of roll-ups that was lost made anew of what the finer tier has; whether that is all there was, so
        that nothing of it is final. Durable, but for `lost`, which a start fills again. In the upkeep thread."""
        if tier.level == RAW:
            return False
        finer, whole = self.tiers[tier.level - 1], True
        span = finer.kind.span_days
        with self.lock:
            ended = set(self.ended[finer.level])
        for first in range(days.start, days.stop, span):
            if first in ended:
                whole = False
                continue
            for day in finer.partitions.days(first, first + span - 1):
                try:
                    marks = finer.partitions.mark(day, range(first, first + span), self.clock.now_ms())
                except (PartitionGoneError, UnusablePartitionError):
                    whole = False
                    continue
                with self.lock:
                    finer.marks.add(mark for mark in marks if mark.cohort_id in self.catalog.cohorts_by_id)
        if whole:
            with self.lock:
                self.lost.remove((tier, days))
        return whole

    def end_lost(self, tier: Tier, days: range) -> None:
        """Notes durably that what was made of a file that was set aside, or is gone, is final: it must not be made anew
        of the rows that come later, or are still in the journal. In the writer's thread, or before there is one."""
        for day in days if tier.level == RAW else days[:1]:
            self.journal.end(tier.level, day, self.last_sequence)
            with self.lock:
                self.ended[tier.level][day] = self.last_sequence
        self.journal.note_stored(0)  # so that what the journal still has of it comes back with the next start
        with self.lock:
            self.endings += 1
            self.lost.remove((tier, days))

    def _replay(self, evicted: Mapping[int, int]) -> None:
        blocked: dict[int, dict[int, int]] = {}
        now, now_ms = self.clock.monotonic(), self.clock.now_ms()
        for row in self.journal.rows(self.journal.stored_through if self.partitions.all_usable else 0):
            if row.row_count == 0:
                continue
            decoded = self.decode(row)
            if decoded is None:
                continue
            cohorts, arrays = decoded
            only = set()
            for day, cohort_id in heads_of(cohorts, arrays.times_ms):
                if day not in blocked:
                    blocked[day] = dict(self.partitions.blocked_through(day))
                if row.sequence > max(blocked[day].get(cohort_id, 0), evicted.get(day, 0)):
                    only.add((day, cohort_id))
            opened_at = now - max(0, now_ms - row.received_ms) / 1_000
            self.heads.apply(cohorts, arrays.times_ms, arrays.values, row.sequence, opened_at, only=only)

    def decode(self, row: JournalRow) -> tuple[list[Cohort], batch_codec.Batch] | None:
        """The rows of a journaled batch with their cohorts; None, counted, when it is damaged.

        Raises:
            DataLoss: the batch is whole, and the journal does not say whose it is.
        """
        try:
            arrays = batch_codec.decode(row.payload)
        except batch_codec.CorruptBatchError as error:
            self.faults.damage("journal batch", row.sequence, str(error))
            return None
        cohorts, set_number = self.catalog.cohorts, row.metric_set or 0
        try:
            return [cohorts[server, set_number] for server in arrays.servers.tolist()], arrays
        except KeyError as error:
            why = f"batch {row.sequence} is of a series that is not named in it"
            raise unreadable_journal(self.journal_path, why) from error

    def close_heads(
        self, stopping: Callable[[], bool], *, everything: bool = False, only_days: range | None = None
    ) -> int:
        """Turns the heads that are due, or all, or those of some days, into blocks; returns how many.

        A failure is noted, leaves the rows in the heads and the journal, and is tried again the next time.
        """
        closed, failed = 0, False
        with self.moving:
            with self.lock:
                due = self.heads.due(self.clock.monotonic(), everything=everything or only_days is not None)
            if only_days is not None:
                due = [head for head in due if head.day in only_days]
            if self.partitions.is_empty:
                self.partitions.expect(_points_a_day(due))
            for day, heads in self._by_file(due):
                for start in range(0, len(heads), self.settings.close_group_heads):
                    if stopping():
                        return closed
                    group = heads[start : start + self.settings.close_group_heads]
                    try:
                        self._close_group(day, group)
                    except Exception as error:
                        failed = True
                        self.faults.note(f"blocks of {self.partitions.path(day).name} could not be stored: {error}")
                        _log.warning("blocks of day %d could not be stored, will try again", day, exc_info=error)
                    else:
                        closed += len(group)
            if failed or only_days is None:  # of some days only it says nothing of the others
                self.close_failing = failed
        return closed

    def _by_file(self, heads: list[Head]) -> Iterator[tuple[int, list[Head]]]:
        """Heads by the first day of the partition they belong to, which is asked for when those before are stored: it
        may depend on what they have made. (`groupby` asks one head ahead.)"""
        in_order, at = sorted(heads, key=lambda head: head.day), 0
        while at < len(in_order):
            first, day = at, self.partitions.start_of(in_order[at].day)
            while at < len(in_order) and self.partitions.start_of(in_order[at].day) == day:
                at += 1
            yield day, in_order[first:at]

    def _close_group(self, day: int, heads: list[Head]) -> None:
        opened_at = max(head.opened_at for head in heads)
        with self.lock:
            chunks = [(head, self.heads.begin_close(head)) for head in heads]
        closed = [self._compressed(head, chunk) for head, chunk in chunks]
        marks = self.partitions.store(day, closed, self.clock.now_ms(), at=opened_at)
        points = [count_points(chunk.values) for _, chunk in chunks]
        with self.lock:
            self.tiers[RAW].marks.add(marks)
            for (head, _), count in zip(chunks, points, strict=True):
                self.heads.finish_close(head, count)

    def _compressed(self, head: Head, chunk: Chunk) -> Closed:
        rows_limit = _BLOCK_ROWS_FACTOR * self.settings.head_rows
        return Closed(
            cohort_id=head.cohort.id,
            blocks=block.build(chunk, head.cohort.id, rows_limit),
            blocked_through=int(chunk.sequences[-1]),
            head_day=head.day,
            touched=touched(chunk.times_ms, TIERS[RAW + 1].width_ms),
        )

    def sweep_floor(self, *, over_limit: bool) -> int:
        """The highest sequence that no head, and unless the journal is too large no follower, needs any more."""
        with self.lock:
            floor = self.heads.floor(self.last_sequence)
        return floor if over_limit else min([floor, *self.journal.followers().values()])

    def sweep(self, *, urgent: bool = False) -> int:
        """Deletes one run of journal rows that nobody needs; returns how many. In the writer's thread.

        What is urgent is as over the journal's limit: followers and tails are not waited for.
        """
        over_limit = urgent or self.journal.used_bytes > self.settings.journal_bytes_limit
        keep_ms, now_ms = int(self.settings.journal_keep_s * 1_000), self.clock.now_ms()
        kept = range(0) if over_limit else range(now_ms - keep_ms, now_ms + keep_ms)
        swept = self.journal.sweep(self.sweep_floor(over_limit=over_limit), kept, self.settings.sweep_rows)
        self.swept_through = self.journal.swept_through
        self.journal.shrink()
        self._note_stored()
        return swept

    def _note_stored(self) -> None:
        """Has the next replay begin where heads do: what is kept for tails and followers is up to 8 GiB. Reading all of
        that took 84 s on a busy machine, what the heads of 20,000 servers held 4."""
        with self.lock:
            through = self.heads.floor(self.last_sequence)
        if through > self.journal.stored_through and self.partitions.all_usable:
            self.journal.note_stored(through)

    def note_partitions(self) -> None:
        """Has a start know which partitions there are: of one that is gone, or cannot be read any more, what was made
        of each day stays. In the writer's thread, while none is on its way out."""
        with self.lock:
            there = {(tier.level, days.start): len(days) for tier, days in self.lost}  # until `end_lost` has noted it
        there |= {(tier.level, day): days for tier in self.tiers for day, days in tier.partitions.spans.items()}
        self.journal.note_partitions(there)

    def forget(self, first: int, days: int, *, force: bool) -> bool:
        """Notes durably that all points so far of a partition's days are gone, and drops their heads. In the writer's
        thread.

        Unless it is forced, nothing is done, and False returned, while a row is in a head or not rolled up.
        """
        gone = range(first, first + days)
        if not force and self._waits(self.tiers[RAW], gone):
            return False
        self.journal.begin_eviction(gone, self.last_sequence)
        with self.lock:
            heads = [head for day in gone for head in self.heads.drop(day)]
            self.tiers[RAW].marks.drop(first)
            self.ended[RAW].update(dict.fromkeys(gone, self.last_sequence))
            self.endings += 1
        chunks = [chunk for head in heads for chunk in head.chunks()]
        points = sum(count_points(chunk.values) for chunk in chunks)
        with self.lock:
            self.heads.points -= points
        return True

    @property
    def ended_ms(self) -> int:
        """Rows before this instant may be of roll-ups that stay as they are: what they were made of went."""
        spans = zip(self.ended[:-1], TIERS, strict=False)
        return max(max(ended, default=-kind.span_days) + kind.span_days for ended, kind in spans) * DAY_MS

    def gone_before_finer(self) -> list[Ranges]:
        """See `tiers`. Called holding the lock."""
        endings, ranges = self._gone
        if endings != self.endings:
            ranges = gone_before_finer(self.ended)
            self._gone = self.endings, ranges
        return ranges

    def _waits(self, tier: Tier, days: range) -> bool:
        """Whether rows of a partition's days are in heads, or not in the roll-ups that it holds or that it feeds."""
        with self.lock:
            return any(head.day in days for head in self.heads) or any(
                mark.overlaps(days) for of in self.tiers[: tier.level + 1] for mark in of.marks
            )

    def end(self, tier: Tier, day: int, *, force: bool) -> bool:
        """Notes durably that a partition of roll-ups is gone. In the writer's thread.

        Unless it is forced, nothing is done, and False returned, while something is to come into it or is not in the
        next tier: the buckets of that would be frozen without it.
        """
        if not force and self._waits(tier, range(day, day + tier.partitions.span_of(day))):
            return False
        self.journal.end(tier.level, day, self.last_sequence)
        with self.lock:
            tier.marks.drop(day)
            self.ended[tier.level][day] = self.last_sequence
            self.endings += 1
        return True

    @property
    def disk_bytes(self) -> int:
        """Size of the journal and of all partitions."""
        return file_bytes(self.journal_path) + sum(tier.partitions.bytes for tier in self.tiers)

    def close(self) -> None:
        """Closes the files; what is in the heads is in the journal."""
        for tier in self.tiers:
            tier.partitions.close()
        self.journal.close()


def _points_a_day(heads: list[Head]) -> float:
    """About how many points a day heads get that have these rows; a single instant counts as a minute."""
    points, first, last = 0, 1 << 62, 0
    for head in heads:
        for chunk in head.chunks():
            points += chunk.values.size
            first, last = min(first, int(chunk.times_ms.min())), max(last, int(chunk.times_ms.max()))
    return points * DAY_MS / max(last - first, 60_000)
