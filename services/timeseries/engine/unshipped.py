"""Which instants a follower has not shipped yet: what a store that only has what was shipped cannot answer.

What was shipped a moment ago counts as not shipped: a store may have acknowledged points and not show them yet.
What must stay true: an acknowledged batch that is past the cursor is covered by the ranges; to look again costs what
came since the last look, and memory a few numbers a batch that waits.
"""

import threading
from collections import deque
from itertools import pairwise
from typing import Final

import apsw
import numpy as np
from numpy.typing import NDArray

from services.timeseries.engine.database import storage_error
from services.timeseries.engine.journal import JournalReader
from services.timeseries.engine.store import Store

JOIN_MS: Final = 60_000
"""Instants no further apart are one range."""
MAX_RANGES: Final = 8
"""More are put together: each is a read of its own, of us and of the store."""
VISIBLE_AFTER_S: Final = 60.0
"""VictoriaMetrics shows points 1 to 5 s after it took them, and its caches of results up to 30 s."""
_READ_BYTES: Final = 16 << 20

Ranges = list[tuple[int, int]]
"""Half-open, ascending, apart from each other; milliseconds."""


class Unshipped:
    """Looks into the journal for one follower. Thread-safe."""

    def __init__(self, store: Store, cursor: int) -> None:
        """Of a follower that has shipped everything up to a cursor, and long enough ago."""
        self._store = store
        self._lock = threading.Lock()
        self._reader = JournalReader(store.journal_path)
        self._known: deque[tuple[int, Ranges]] = deque()  # (sequence, what its rows span), ascending
        self._through = self._settled = cursor
        self._shipped: deque[tuple[float, int]] = deque()  # (when, cursor), of what is not settled

    def shipped(self, cursor: int) -> None:
        """The store has just acknowledged everything up to a cursor."""
        with self._lock:
            self._shipped.append((self._store.clock.monotonic(), cursor))

    def lost(self, cursor: int) -> None:
        """The store may have lost what came after a cursor."""
        with self._lock:
            self._shipped.clear()
            if cursor < self._settled:
                self._known.clear()  # what it dropped is read again
                self._through = self._settled = cursor

    def ranges(self) -> Ranges:
        """The instants of the rows of all batches that the store may not show."""
        with self._lock:
            settled_s = self._store.clock.monotonic() - VISIBLE_AFTER_S
            while self._shipped and self._shipped[0][0] <= settled_s:
                self._settled = self._shipped.popleft()[1]
            while self._known and self._known[0][0] <= self._settled:
                self._known.popleft()
            self._through = max(self._through, self._settled)
            try:
                self._read_on(self._store.last_sequence)
            except apsw.Error as error:
                raise storage_error(error) from error
            return joined([one for _, ranges in self._known for one in ranges])

    def _read_on(self, last: int) -> None:
        while self._through < last:
            rows = self._reader.read(self._through + 1, last, _READ_BYTES)
            if not rows:
                break
            for row in rows:
                decoded = self._store.decode(row) if row.row_count else None
                if decoded is not None:
                    self._known.append((row.sequence, _spans(decoded[1].times_ms)))
            self._through = rows[-1].sequence

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
