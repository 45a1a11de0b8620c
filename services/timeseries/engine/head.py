"""Heads: the rows in memory that are in the journal and not yet in a block.

A head belongs to a UTC day and a cohort. Rows are appended as they come, out of order or not; sorting and equal times
are the reader's and the block's business. What must stay true:

* rows are applied in the order of their sequences, by one thread, holding the engine's lock; a batch is applied whole;
* a row below `size` never changes: readers hold views without copying, a full array is replaced by a larger one;
* while a chunk is being closed it stays readable here until its block is durable. A reader takes the heads first and
  looks at the blocks then: it may see a row in both places, which resolving equal times undoes, but never in none.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.settings import DAY_MS, EngineSettings

_FIRST_ROWS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Rows of one head: times_ms (int64, n), sequences (int64, n, ascending), values (float64, n x m)."""

    times_ms: NDArray[np.int64]
    sequences: NDArray[np.int64]
    values: NDArray[np.float64]

    @property
    def bytes(self) -> int:
        return self.times_ms.nbytes + self.sequences.nbytes + self.values.nbytes


class Head:
    """The growing rows of one cohort on one day."""

    __slots__ = ("_sequences", "_times", "_values", "closing", "cohort", "day", "opened_at", "size")

    def __init__(self, day: int, cohort: Cohort) -> None:
        self.day = day
        self.cohort = cohort
        self.closing: Chunk | None = None
        self._empty()

    def _empty(self) -> None:
        columns = len(self.cohort.stored_set.metric_set)
        self._times: NDArray[np.int64] = np.empty(0, np.int64)
        self._sequences: NDArray[np.int64] = np.empty(0, np.int64)
        self._values: NDArray[np.float64] = np.empty((0, columns), np.float64)
        self.size = 0
        self.opened_at = 0.0

    def append(
        self, times_ms: NDArray[np.int64], values: NDArray[np.float64], sequence: int, now: float, rows_hint: int
    ) -> int:
        """Adds rows of one batch; returns by how many bytes the arrays grew. `now` is monotonic seconds."""
        if self.size == 0:
            self.opened_at = now
        end = self.size + len(times_ms)
        grown = self._reserve(end, rows_hint) if end > len(self._times) else 0
        self._times[self.size : end] = times_ms
        self._sequences[self.size : end] = sequence
        self._values[self.size : end] = values
        self.size = end
        return grown

    def _reserve(self, rows: int, rows_hint: int) -> int:
        """Doubles the capacity, but goes no further than the size of a block where that suffices."""
        old = self._capacity_bytes()
        capacity = max(_FIRST_ROWS, 2 * len(self._times))
        capacity = max(rows, min(capacity, rows_hint) if rows <= rows_hint else capacity)
        self._times = _enlarged(self._times, capacity, self.size)
        self._sequences = _enlarged(self._sequences, capacity, self.size)
        self._values = _enlarged(self._values, capacity, self.size)
        return self._capacity_bytes() - old

    def _capacity_bytes(self) -> int:
        return self._times.nbytes + self._sequences.nbytes + self._values.nbytes

    @property
    def bytes(self) -> int:
        return self._capacity_bytes() + (self.closing.bytes if self.closing else 0)

    @property
    def first_sequence(self) -> int | None:
        """The oldest sequence that only this head (and the journal) holds."""
        if self.closing is not None:
            return int(self.closing.sequences[0])
        return int(self._sequences[0]) if self.size else None

    def active(self) -> Chunk:
        """A view of the rows that are not being closed."""
        n = self.size
        return Chunk(times_ms=self._times[:n], sequences=self._sequences[:n], values=self._values[:n])

    def chunks(self) -> list[Chunk]:
        """Views of all rows, older sequences first."""
        found = [self.closing] if self.closing is not None else []
        return [*found, self.active()] if self.size else found

    def begin_close(self) -> Chunk:
        """Freezes the rows as the chunk to be stored (or finds the one whose storing failed) and starts anew."""
        if self.closing is None:
            self.closing = self.active()
            self._empty()
        return self.closing

    def finish_close(self) -> None:
        """Drops the closing chunk, whose block is durable now."""
        self.closing = None


_T = TypeVar("_T", bound=np.generic)


def _enlarged(array: NDArray[_T], capacity: int, used: int) -> NDArray[_T]:
    larger = np.empty((capacity, *array.shape[1:]), array.dtype)
    larger[:used] = array[:used]
    return larger


@dataclass(slots=True)
class Heads:
    """All heads. Every method is called holding the engine's lock."""

    settings: EngineSettings
    by_cohort: dict[int, dict[int, Head]] = field(default_factory=dict)
    bytes: int = 0
    points: int = 0

    def __iter__(self) -> Iterator[Head]:
        for days in self.by_cohort.values():
            yield from days.values()

    def head(self, day: int, cohort: Cohort) -> Head:
        days = self.by_cohort.setdefault(cohort.id, {})
        head = days.get(day)
        if head is None:
            head = days[day] = Head(day, cohort)
        return head

    def due(self, now: float, *, everything: bool = False) -> list[Head]:
        """The heads to close, oldest first: full, aged, failed to close before, or too much memory in all."""
        waiting = sorted((h for h in self if h.size or h.closing is not None), key=lambda h: h.opened_at)
        over = 0 if everything else self.bytes - self.settings.head_bytes_limit // 2
        found = []
        for head in waiting:
            aged = head.size and now - head.opened_at >= self.settings.head_age_s
            if everything or head.closing is not None or aged or head.size >= self.settings.head_rows or over > 0:
                over -= head.bytes
                found.append(head)
        return found

    def begin_close(self, head: Head) -> Chunk:
        before = head.bytes
        chunk = head.begin_close()
        self.bytes += head.bytes - before
        return chunk

    def finish_close(self, head: Head, points: int) -> None:
        """Drops a head's closing chunk, which held so many points, and the head itself when nothing has come since."""
        before = head.bytes
        head.finish_close()
        self.bytes += head.bytes - before
        self.points -= points
        if not head.size:
            self.bytes -= head.bytes
            days = self.by_cohort[head.cohort.id]
            del days[head.day]
            if not days:
                del self.by_cohort[head.cohort.id]

    def drop(self, day: int) -> list[Head]:
        """Takes the heads of a day out; the caller counts their points and takes those off."""
        gone = [days.pop(day) for days in self.by_cohort.values() if day in days]
        for head in gone:
            self.bytes -= head.bytes
            if not self.by_cohort[head.cohort.id]:
                del self.by_cohort[head.cohort.id]
        return gone

    def floor(self, last_sequence: int) -> int:
        """The highest sequence up to which no head holds a row: the journal may be swept so far."""
        firsts = [first for head in self if (first := head.first_sequence) is not None]
        return min(firsts) - 1 if firsts else last_sequence

    def snapshot(self, cohort: Cohort, first_day: int, last_day: int) -> dict[int, list[Chunk]]:
        """Views of a cohort's rows by day."""
        days = self.by_cohort.get(cohort.id, {})
        return {day: head.chunks() for day, head in days.items() if first_day <= day <= last_day}

    def apply(
        self,
        cohorts: list[Cohort],
        times_ms: NDArray[np.int64],
        values: NDArray[np.float64],
        sequence: int,
        now: float,
        *,
        only: "set[tuple[int, int]] | None" = None,
    ) -> bool:
        """Adds a batch whose row `i` belongs to `cohorts[i]`; with `only`, just the rows of these (day, cohort id).

        Returns whether a head has become full.
        """
        full = False
        for (day, cohort), rows in _by_head(cohorts, times_ms):
            if only is not None and (day, cohort.id) not in only:
                continue
            head = self.head(day, cohort)
            part = values[rows]
            self.bytes += head.append(times_ms[rows], part, sequence, now, self.settings.head_rows)
            self.points += int(np.count_nonzero(~np.isnan(part)))
            full = full or head.size >= self.settings.head_rows
        return full


def heads_of(cohorts: list[Cohort], times_ms: NDArray[np.int64]) -> set[tuple[int, int]]:
    """The (day, cohort id) that a batch has rows for."""
    return {(day, cohort.id) for (day, cohort), _ in _by_head(cohorts, times_ms)}


def _by_head(
    cohorts: list[Cohort], times_ms: NDArray[np.int64]
) -> Iterable[tuple[tuple[int, Cohort], slice | list[int]]]:
    """Groups the rows of a batch by head; a group of neighbours is a slice, which numpy copies without gathering."""
    groups: dict[tuple[int, int], list[int]] = {}
    by_id: dict[int, Cohort] = {}
    for row, (day, cohort) in enumerate(zip((times_ms // DAY_MS).tolist(), cohorts, strict=True)):
        groups.setdefault((day, cohort.id), []).append(row)
        by_id[cohort.id] = cohort
    for (day, number), rows in groups.items():
        run = rows[-1] - rows[0] + 1 == len(rows)
        yield (day, by_id[number]), slice(rows[0], rows[-1] + 1) if run else rows
