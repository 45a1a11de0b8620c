"""Which instants a follower has not shipped yet: what a store that only has what was shipped cannot answer.

What must stay true: an acknowledged batch that comes after the sequence asked for is covered by the ranges, also one
that the journal, over its limit, has let go: it is in blocks by then, which may span more. To look again costs what
came since the last look, and memory a few numbers a batch that waits.
"""

import threading
from collections import deque
from contextlib import suppress
from itertools import pairwise
from typing import Final

import apsw
import numpy as np
from numpy.typing import NDArray

from services.timeseries.engine.database import storage_error
from services.timeseries.engine.journal_reader import JournalReader
from services.timeseries.engine.partition import PartitionGoneError, UnusablePartitionError, integers
from services.timeseries.engine.settings import DAY_MS, MAX_TIME_MS
from services.timeseries.engine.store import Store

JOIN_MS: Final = 60_000
"""Instants no further apart are one range."""
MAX_RANGES: Final = 8
"""More are put together: each is a read of its own, of us and of the store."""
MAX_KNOWN: Final = 2_000
"""Batches that are known one by one. Of more, neighbours are put together: each look at a million took 1.6 s."""
_READ_BYTES: Final = 16 << 20
_BLOCKS_BETWEEN: Final = "SELECT DISTINCT first_ms, last_ms FROM blocks WHERE max_sequence > ? AND min_sequence <= ?"

Ranges = list[tuple[int, int]]
"""Half-open, ascending, apart from each other; milliseconds."""


class Unshipped:
    """Looks into the journal for one follower, one look at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._reader = JournalReader(store.journal_path)
        self._known: deque[tuple[int, Ranges]] = deque()  # (sequence, what rows up to it span), ascending
        self._together = 1  # so many sequences are known as one
        self._after = self._through = 0  # the known batches are those between

    def ranges(self, after: int) -> Ranges:
        """The instants of the rows of all batches after a sequence."""
        with self._lock:
            if not self._after <= after <= self._through:
                self._known.clear()
                self._through = after
            self._after = after
            while self._known and self._known[0][0] <= after:
                self._known.popleft()
            if not self._known:
                self._together = 1
            try:
                self._read_on(self._store.last_sequence)
            except apsw.Error as error:
                raise storage_error(error) from error
            return joined([one for _, ranges in self._known for one in ranges])

    def _read_on(self, last: int) -> None:
        while self._through < last:
            rows = self._reader.read(self._through + 1, last, _READ_BYTES)
            for row in rows:
                self._pass_over(row.sequence - 1)
                decoded = self._store.decode(row) if row.row_count else None
                if decoded is not None:
                    self._know(row.sequence, _spans(decoded[1].times_ms))
                self._through = row.sequence
            if not rows:
                self._pass_over(last)

    def _pass_over(self, through: int) -> None:
        """Notes what the journal does not have any more."""
        if through > self._through:
            self._know(through, self._of_blocks(self._through, through))
            self._through = through

    def _know(self, through: int, ranges: Ranges) -> None:
        """Notes what the rows span that come after those known, up to a sequence."""
        if self._known and self._known[-1][0] // self._together == through // self._together:
            ranges = joined([*self._known.pop()[1], *ranges])
        self._known.append((through, ranges))
        if len(self._known) > MAX_KNOWN:
            self._together *= 2
            known, self._known = self._known, deque()
            for one in known:
                self._know(*one)

    def _of_blocks(self, after: int, through: int) -> Ranges:
        """What the blocks span that have rows of batches of `(after, through]`."""
        partitions, found = self._store.partitions, list[tuple[int, int]]()
        for day in partitions.days(0, MAX_TIME_MS // DAY_MS):
            with suppress(PartitionGoneError, UnusablePartitionError), partitions.lend(day) as partition:
                spans = integers(partition.db, _BLOCKS_BETWEEN, (after, through))
                found = joined([*found, *((first, last + 1) for first, last in spans)])
        return found

    def close(self) -> None:
        with self._lock:
            self._reader.close()


def _spans(times_ms: NDArray[np.int64]) -> Ranges:
    times = np.unique(times_ms)
    cuts = np.flatnonzero(np.diff(times) > JOIN_MS) + 1
    bounds = [0, *cuts.tolist(), len(times)]
    return joined([(int(times[first]), int(times[end - 1]) + 1) for first, end in pairwise(bounds)])


def joined(ranges: Ranges, *, gap_ms: int = JOIN_MS, limit: int = MAX_RANGES) -> Ranges:
    """The same instants, and those of small gaps, in as few ranges as are near each other, and at most `limit`."""
    found: Ranges = []
    for start, end in sorted(ranges):
        if found and start - found[-1][1] <= gap_ms:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    while len(found) > limit:
        gaps = [right[0] - left[1] for left, right in pairwise(found)]
        at = gaps.index(min(gaps))
        found[at : at + 2] = [(found[at][0], found[at + 1][1])]
    return found
