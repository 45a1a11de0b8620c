"""The tiers: raw points, and roll-ups of 5 minutes and 1 hour, each in a folder of its own; and who answers for when.

A tier's block touches buckets of the next coarser tier. In the transaction that stores the block a `Mark` says so, and
it stays until the roll-ups of those buckets are durable. So at any moment a bucket is either right in the coarser tier,
or covered by a mark or by a head, and then it is answered from the finer one.

What must stay true:

* heads and marks are looked at in one moment (the engine's lock): a closing head leaves and its mark appears at once;
* a mark goes only when what was made of its rows is durable in the next tier, with that tier's own marks in place;
* `plan` covers a range without a gap or an overlap, and a tier serves whole buckets of its own only.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.timeseries.engine.head import Chunk
from services.timeseries.engine.partition import Mark
from services.timeseries.engine.partitions import Partitions
from services.timeseries.engine.settings import DAY_MS

RAW: Final = 0
MINUTE_MS: Final = 60_000
HOUR_MS: Final = 60 * MINUTE_MS

Ranges = list[tuple[int, int]]
"""Ranges of time [start, end), ascending, that neither overlap nor touch."""


class TierKind(NamedTuple):
    """What a tier is: its folder, the width of its buckets (0: points), and how many days a file of it spans, also
    where there are few points."""

    folder: str
    width_ms: int
    span_days: int
    sparse_days: int


TIERS: Final = (
    TierKind("blocks", 0, 1, 32),
    TierKind("rollup-5m", 5 * MINUTE_MS, 8, 8),
    TierKind("rollup-1h", HOUR_MS, 64, 64),
)
"""From the finest to the coarsest. Every width divides the next; a file's columns grow to 2,304 and 1,536 rows."""


class Marks:
    """What of a tier is not in the next one yet, by cohort. Every method is called holding the engine's lock."""

    def __init__(self, marks: Iterable[Mark]) -> None:
        self._by_cohort: dict[int, dict[tuple[int, int, int], Mark]] = {}
        self._rows: dict[tuple[int, int], int] = {}
        self._oldest_ms: dict[tuple[int, int], int] = {}
        self._count = 0
        self.add(marks)

    def __len__(self) -> int:
        return self._count

    def add(self, marks: Iterable[Mark]) -> None:
        for mark in marks:
            self._by_cohort.setdefault(mark.cohort_id, {})[mark.day, mark.life, mark.id] = mark
            self._count += 1
            group = (mark.day, mark.cohort_id)
            self._rows[group] = self._rows.get(group, 0) + mark.rows
            self._oldest_ms[group] = min(self._oldest_ms.get(group, mark.marked_ms), mark.marked_ms)

    def remove(self, marks: Iterable[Mark]) -> None:
        for mark in marks:
            of_cohort = self._by_cohort.get(mark.cohort_id, {})
            if of_cohort.pop((mark.day, mark.life, mark.id), None) is not None:
                self._count -= 1
                group = (mark.day, mark.cohort_id)
                self._rows[group] -= mark.rows
                if not self._rows[group]:
                    del self._rows[group], self._oldest_ms[group]
            if not of_cohort:
                self._by_cohort.pop(mark.cohort_id, None)

    def drop(self, day: int) -> None:
        """Forgets the marks of a partition that is gone."""
        self.remove([mark for mark in self if mark.day == day])

    def due(self, rows: int, oldest_ms: int, now_ms: int) -> list[tuple[int, int]]:
        """The partitions and cohorts with so many marked rows, or a mark that is as old, or of the future: that is one
        of a wrong clock, and must not wait for that time."""
        marked = self._oldest_ms
        return [
            group for group, count in self._rows.items() if count >= rows or not oldest_ms < marked[group] <= now_ms
        ]

    def of(self, cohort_id: int) -> Iterable[Mark]:
        return self._by_cohort.get(cohort_id, {}).values()

    def __iter__(self) -> Iterator[Mark]:
        for of_cohort in self._by_cohort.values():
            yield from of_cohort.values()


@dataclass(slots=True)
class Tier:
    """A tier of an open store; `marks` are what is not in the next tier yet."""

    level: int
    kind: TierKind
    partitions: Partitions
    retention_s: float | None
    marks: Marks = field(default_factory=lambda: Marks(()))

    @property
    def width_ms(self) -> int:
        return self.kind.width_ms


class Segment(NamedTuple):
    """A part of a range and the level that answers for it."""

    level: int
    start_ms: int
    end_ms: int


def coarsest(step_ms: int) -> int:
    """The coarsest level of which a window of that step is made of whole buckets."""
    fitting = [level for level, kind in enumerate(TIERS) if kind.width_ms and step_ms and step_ms % kind.width_ms == 0]
    return max(fitting, default=RAW)


def plan(edges_ms: Sequence[int], level: int, unsettled: Sequence[Ranges]) -> list[Segment]:
    """Who answers for a range, in order: `level` and, where it cannot, the finer ones.

    Args:
        edges_ms: its start and its end, and in between what no bucket may lie across; ascending.
        level: the coarsest that may be used.
        unsettled: for each level the ranges for which it has no right buckets, aligned to its width.
    """
    found: list[Segment] = []
    for start_ms, end_ms in pairwise(edges_ms):
        for segment in _split(start_ms, end_ms, level, unsettled):
            before = found.pop() if found and found[-1].level == segment.level else segment
            found.append(Segment(segment.level, before.start_ms, segment.end_ms))
    return found


def _split(start_ms: int, end_ms: int, level: int, unsettled: Sequence[Ranges]) -> Iterator[Segment]:
    if start_ms >= end_ms:
        return
    if level == RAW:
        yield Segment(RAW, start_ms, end_ms)
        return
    width = TIERS[level].width_ms
    first, last = -(-start_ms // width) * width, end_ms // width * width
    if first >= last:
        yield from _split(start_ms, end_ms, level - 1, unsettled)
        return
    yield from _split(start_ms, first, level - 1, unsettled)
    at = first
    for begin, end in unsettled[level]:
        low, high = max(begin, first), min(end, last)
        if low < high:
            if at < low:
                yield Segment(level, at, low)
            yield from _split(low, high, level - 1, unsettled)
            at = high
    if at < last:
        yield Segment(level, at, last)
    yield from _split(last, end_ms, level - 1, unsettled)


def unsettled_ranges(
    chunks: Iterable[Chunk],
    tiers: Sequence[Tier],
    cohort_ids: Iterable[int],
    as_points: Ranges,
    gone: Sequence[Ranges],
) -> list[Ranges]:
    """For each level the ranges for which it has no right buckets of some cohorts, given the rows in their heads, the
    ranges that are to be read `as_points`, and what has `gone` of each level before the finer one.

    Called holding the engine's lock, under which the chunks were taken.
    """
    cohorts = list(cohort_ids)
    spans = [(int(chunk.times_ms.min()), int(chunk.times_ms.max()) + 1) for chunk in chunks if len(chunk.times_ms)]
    spans += as_points
    found: list[Ranges] = [[]]
    for tier, finer in zip(tiers[1:], tiers, strict=False):
        spans.extend((mark.first_ms, mark.last_ms + 1) for cohort in cohorts for mark in finer.marks.of(cohort))
        found.append(aligned([*spans, *gone[tier.level]], tier.width_ms))
        spans = list(found[-1])
    return found


def gone_before_finer(ended: Sequence[Mapping[int, int]]) -> list[Ranges]:
    """For each level the days whose roll-ups went while the next finer tier still has all of them, as it does where the
    disk's limit came to roll-ups before the newest file of points; `ended` are the first days of what went of each."""
    found: list[Ranges] = [[]]
    for level in range(RAW + 1, len(TIERS)):
        finer = TIERS[level - 1].span_days
        days = (day for start in ended[level] for day in range(start, start + TIERS[level].span_days))
        held = (day for day in days if day // finer * finer not in ended[level - 1])
        found.append(aligned(((day * DAY_MS, (day + 1) * DAY_MS) for day in held), DAY_MS))
    return found


def aligned(spans: Iterable[tuple[int, int]], width_ms: int) -> Ranges:
    """Spans [start, end) widened to whole buckets and joined."""
    found: Ranges = []
    for start, end in sorted((start // width_ms * width_ms, -(-end // width_ms) * width_ms) for start, end in spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def without(ranges: Ranges, starts_ms: NDArray[np.int64], width_ms: int) -> Ranges:
    """Aligned ranges without the buckets that begin at `starts_ms` (ascending)."""
    found: Ranges = []
    for start, end in ranges:
        at = start
        for bucket in starts_ms[np.searchsorted(starts_ms, start) : np.searchsorted(starts_ms, end)].tolist():
            if at < bucket:
                found.append((at, bucket))
            at = bucket + width_ms
        if at < end:
            found.append((at, end))
    return found


def touched(times_ms: NDArray[np.int64], width_ms: int) -> list[tuple[int, int, int]]:
    """The runs of neighbouring buckets that rows lie in: first and last time of each, and its rows.

    More than `_MAX_RUNS` become one, so that scattered late rows do not make thousands of marks.
    """
    if not len(times_ms):
        return []
    times = np.sort(times_ms)
    numbers = times // width_ms
    begins = np.flatnonzero(np.append(True, np.diff(numbers) > 1))
    if len(begins) > _MAX_RUNS:
        begins = begins[:1]
    ends = np.append(begins[1:], len(times))
    return [(int(times[begin]), int(times[end - 1]), int(end - begin)) for begin, end in zip(begins, ends, strict=True)]


_MAX_RUNS: Final = 16
