"""Roll-ups are made of what marks say is not in them yet.

A mark says which buckets of the next tier are out of date. They are made anew of everything the finer tier
holds for them (never by adding to what is there), stored with that tier's own marks, and only then the mark goes. A
crash in between makes them once more. Buckets that a head has rows of are left: its block will mark them again.

What must stay true: nothing here holds the engine's lock over I/O, nor makes appends or reads wait; a bucket of a day
whose points are gone is never made anew of the few that came later (`frozen.py`). Runs in the upkeep thread.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from fleet.model import MetricKind
from services.timeseries.engine import block, rollup
from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.frozen import frozen_starts
from services.timeseries.engine.head import Chunk
from services.timeseries.engine.partition import Closed, Mark, PartitionGoneError
from services.timeseries.engine.rollup import FIELDS, Buckets, Field
from services.timeseries.engine.scan import Frame, Sources, bucket_points, frame, points, sources
from services.timeseries.engine.settings import DAY_MS, MAX_TIME_MS
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import RAW, TIERS, Ranges, Tier, aligned, touched, without

_log = logging.getLogger(__name__)
Bools = NDArray[np.bool_]


class UpkeepStoppedError(Exception):
    """The engine closes."""


@dataclass(slots=True)
class _Holding:
    """A cohort's rows of a range in a tier: where they are, and what they are once read."""

    source: Sources
    counters: Bools = field(init=False)

    def __post_init__(self) -> None:
        metrics = self.source.cohort.stored_set.metric_set.metrics
        self.counters = np.array([metric.kind is not MetricKind.GAUGE for metric in metrics], np.bool_)


class Rollups:
    """Makes the buckets that marks ask for."""

    def __init__(self, store: Store, stopping: Callable[[], bool]) -> None:
        self._store = store
        self._stopping = stopping
        self._generation = max(tier.partitions.found_sequence for tier in store.tiers[RAW + 1 :])

    def run(self, *, everything: bool = False) -> None:
        """Makes the roll-ups that are due (or all), the finer tier's first; a failure is noted and tried again."""
        for tier in self._store.tiers[:-1]:
            self._work_off(tier, self._due(tier, everything=everything))

    def complete(self, tier: Tier, day: int) -> bool:
        """Makes all roll-ups of one partition, those that are still to come into it first; returns whether nothing of
        it is left to be made; what comes into heads meanwhile is the caller's business."""
        days = range(day, day + tier.partitions.span_of(day))
        return all(
            self._work_off(source, self._grouped(source, lambda mark: mark.overlaps(days)), growing=True)
            for source in self._store.tiers[max(RAW, tier.level - 1) : tier.level + 1]
        )

    def _work_off(self, tier: Tier, servers: list[list[Mark]], *, growing: bool = False) -> bool:
        """Makes what the marks of each server in one partition ask for, and drops them, some servers at once; returns
        whether all of it was done."""
        done, group_size = True, self._store.settings.close_group_heads
        self._generation = rollup.next_generation(self._store.last_sequence, self._generation)
        for day, of_day in groupby(servers, key=lambda marks: marks[0].day):
            listed = list(of_day)
            for at in range(0, len(listed), group_size):
                if self._stopping():
                    return False
                try:
                    self._roll_up(tier, listed[at : at + group_size], growing=growing)
                except UpkeepStoppedError:
                    return False
                except Exception as error:
                    done = False
                    name = f"{tier.kind.folder}/{tier.partitions.path(day).name}"
                    self._store.faults.note(f"roll-ups of {name} failed: {error}")
                    _log.warning("roll-ups of %s could not be made, will try again", name, exc_info=error)
        return done

    def _due(self, tier: Tier, *, everything: bool) -> list[list[Mark]]:
        """Marks to be worked off, by partition and server: with many rows, or old ones."""
        settings, now_ms = self._store.settings, self._store.clock.now_ms()
        oldest_ms = now_ms - int(settings.head_age_s * 1_000)
        enough = settings.head_rows if tier.level == RAW else 2 * TIERS[tier.level + 1].width_ms // tier.width_ms

        if everything:
            return self._grouped(tier, lambda _: True)
        with self._store.lock:  # no look at each mark: a fleet of 20,000 servers that spills has half a million
            cohorts = self._store.catalog.cohorts_by_id
            due = {(day, cohorts[number].server_id) for day, number in tier.marks.due(enough, oldest_ms, now_ms)}
            of = {
                (day, server): [
                    mark
                    for cohort in self._store.catalog.cohorts_of[server]
                    for mark in tier.marks.of(cohort.id)
                    if mark.day == day
                ]
                for day, server in due
            }
        return [of[group] for group in sorted(of)]

    def _grouped(self, tier: Tier, wanted: Callable[[Mark], bool]) -> list[list[Mark]]:
        with self._store.lock:
            cohorts = self._store.catalog.cohorts_by_id
            marks = [(mark.day, cohorts[mark.cohort_id].server_id, mark) for mark in tier.marks if wanted(mark)]
        marks.sort(key=lambda entry: entry[:2])
        return [[mark for *_, mark in of] for _, of in groupby(marks, key=lambda entry: entry[:2])]

    def _roll_up(self, tier: Tier, servers: list[list[Mark]], *, growing: bool) -> None:
        """Makes and stores the buckets that the marks of some servers in one partition ask for; drops the marks.

        With `growing` those that a head has rows of too, with these: the head may be dropped before it is a block.
        Nothing is stored while it is to be noted (`Store.end_lost`) that the partition's rows so far are lost.
        """
        store, target = self._store, self._store.tiers[tier.level + 1]
        closed: dict[int, list[Closed]] = {}
        for marks in servers:
            for day, part in self._made(tier, target, marks, growing=growing):
                closed.setdefault(day, []).append(part)
        with store.lock:
            if any(of is tier and servers[0][0].day in days for of, days in store.lost):
                raise PartitionGoneError("it was set aside, what was made of it stays")
        clock = store.clock
        for day, parts in closed.items():
            stored = target.partitions.store(day, parts, clock.now_ms(), at=clock.monotonic())
            if target.level + 1 < len(TIERS):
                with store.lock:
                    target.marks.add(stored)
        gone = [mark for marks in servers for mark in marks]
        with contextlib.suppress(PartitionGoneError):
            tier.partitions.clear(gone)
        with store.lock:
            tier.marks.remove(gone)

    def _made(self, tier: Tier, target: Tier, marks: list[Mark], *, growing: bool) -> Iterator[tuple[int, Closed]]:
        """The buckets that the marks of one server ask for, with the first day of the partition they belong to."""
        store = self._store
        width = target.width_ms
        with store.lock:
            cohorts = list(store.catalog.cohorts_of[store.catalog.cohorts_by_id[marks[0].cohort_id].server_id])
            heads = [store.heads.snapshot(cohort, 0, MAX_TIME_MS // DAY_MS) for cohort in cohorts]
        ranges = aligned(((mark.first_ms, mark.last_ms + 1) for mark in marks), width)
        times = [chunk.times_ms for days in heads for of_day in days.values() for chunk in of_day]
        if tier.level == RAW and times and not growing:
            ranges = without(ranges, np.unique(np.concatenate(times) // width) * width, width)
        for start, end in self._slices(cohorts, ranges, tier):
            self._check()
            day = target.partitions.start_of(start // DAY_MS)
            for part in self._make(tier, target, cohorts, start, end):
                yield day, part

    def _slices(self, cohorts: list[Cohort], ranges: Ranges, tier: Tier) -> Iterator[tuple[int, int]]:
        """Ranges cut so that the cells of one fit into `scan_cells`, at edges of buckets and of the target's files."""
        target = self._store.tiers[tier.level + 1]
        file_ms = target.kind.span_days * DAY_MS
        for start, end in ranges:
            cells = sum(
                found.rows * found.columns
                for found in (sources(self._store, cohort, start, end, tier.level) for cohort in cohorts)
            )
            pieces = -(-cells // self._store.settings.scan_cells) or 1
            length = max(target.width_ms, (end - start) // pieces // target.width_ms * target.width_ms)
            at = start
            while at < end:
                stop = min(end, at + length, (at // file_ms + 1) * file_ms)
                yield at, stop
                at = stop

    def _make(self, tier: Tier, target: Tier, cohorts: list[Cohort], start: int, end: int) -> list[Closed]:
        """The buckets of one server in [start, end), which lies in one partition of the target."""
        found = {cohort.id: sources(self._store, cohort, start, end, tier.level) for cohort in cohorts}
        there = [_Holding(source) for source in found.values() if source.rows]
        made: list[tuple[Cohort, Buckets]] = []
        taken: set[str] = set()
        for holding in reversed(there):  # the newest cohort that has a metric keeps its buckets
            cohort = holding.source.cohort
            keys = [key not in taken for key in cohort.stored_set.columns]
            taken.update(cohort.stored_set.columns)
            if any(keys):
                buckets = self._buckets(tier, holding, [other for other in there if other is not holding], target)
                fields = np.where(np.array(keys)[None, :, None], buckets.fields, np.nan)
                made.append((cohort, self._unfrozen(target, cohorts, Buckets(buckets.starts_ms, fields), end)))
        closed = (self._closed(cohort, buckets, target) for cohort, buckets in made)
        return [part for part in closed if part.blocks]

    def _buckets(self, tier: Tier, holding: _Holding, others: list[_Holding], target: Tier) -> Buckets:
        """The buckets of all metrics of a cohort, with the rows that other cohorts have of them."""
        columns = holding.source.cohort.stored_set.columns
        shared = [other for other in others if not columns.keys().isdisjoint(other.source.cohort.stored_set.columns)]
        rows = frame(self._store, holding.source, range(holding.source.columns), self._check)
        if rows.distinct and not shared:
            times, matrix = rows.times_ms, np.array(rows.columns).T
        else:
            times, matrix = self._joined(tier, holding, rows, shared)
        if tier.level == RAW:
            return rollup.from_points(times, matrix, holding.counters, target.width_ms)
        finer = Buckets(times, matrix.reshape(len(times), len(holding.counters), FIELDS))
        return rollup.from_buckets(finer, holding.counters, target.width_ms)

    def _joined(
        self, tier: Tier, holding: _Holding, rows: Frame, shared: list[_Holding]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Metric by metric, equal times resolved by sequence, on the union of all their times."""
        frames = {holding.source.cohort.id: (holding.source.cohort, rows)}
        for other in shared:
            read = frame(self._store, other.source, range(other.source.columns), self._check)
            frames[other.source.cohort.id] = (other.source.cohort, read)
        width = 1 if tier.level == RAW else FIELDS
        series = []
        for key in holding.source.cohort.stored_set.columns:
            holders = [
                (read, cohort.stored_set.columns[key])
                for cohort, read in frames.values()
                if key in cohort.stored_set.columns
            ]
            if tier.level == RAW:
                times, values = points(holders)
                series.append((times, [values]))
            else:
                wide = [(read, range(at * FIELDS, (at + 1) * FIELDS)) for read, at in holders]
                series.append(bucket_points(wide))
        times = np.unique(np.concatenate([of for of, _ in series]))
        matrix = np.full((len(times), len(series) * width), np.nan)
        for at, (of, fields) in enumerate(series):
            places = np.searchsorted(times, of)
            for place, values in enumerate(fields):
                matrix[places, at * width + place] = values
        return times, matrix

    def _unfrozen(self, target: Tier, cohorts: list[Cohort], made: Buckets, end: int) -> Buckets:
        """Without the buckets that stay what they are, since their points are gone."""
        if not len(made.starts_ms):
            return made
        frozen = frozen_starts(self._store, cohorts, target.level, int(made.starts_ms[0]), end)
        kept = ~np.isin(made.starts_ms, frozen)
        return Buckets(made.starts_ms[kept], made.fields[kept])

    def _closed(self, cohort: Cohort, buckets: Buckets, target: Tier) -> Closed:
        some = ~np.isnan(buckets.fields[:, :, Field.COUNT]).all(axis=1)
        buckets = Buckets(buckets.starts_ms[some], buckets.fields[some])
        if not len(buckets.starts_ms):
            return Closed(cohort_id=cohort.id, blocks=())
        chunk = Chunk(
            times_ms=buckets.starts_ms,
            sequences=np.full(len(buckets.starts_ms), self._generation, np.int64),
            values=buckets.columns,
        )
        coarser = target.level + 1
        return Closed(
            cohort_id=cohort.id,
            blocks=block.build(chunk, cohort.id, self._store.settings.merged_rows),
            touched=touched(chunk.times_ms, TIERS[coarser].width_ms) if coarser < len(TIERS) else (),
        )

    def _check(self) -> None:
        if self._stopping():
            raise UpkeepStoppedError
