"""The minutes that are still open: what came in each, series by series.

A minute is open until 15 s after its end by the tail's time. Of a gauge the mean counts, of a counter its last value
and when that was, to the millisecond: over the whole minute instead, a tick that is missing at its end would look like
a fall of all counters of the server.

What must stay true: a row counts once however often it comes, by the second it is of (a second row of a server in one
second is passed over); rows of closed minutes, and of minutes too far ahead, are left to the caller to count.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray

from services.analytics.scoring.arrays import Columns, Flags, Floats, Integers
from services.analytics.scoring.series import MAX_MAGNITUDE

WINDOW_MS: Final = 60_000
GRACE_MS: Final = 15_000
SLOTS: Final = 4
"""Minutes that can be open at once: rows up to 165 s ahead of the tail's time are taken."""
_FIRST: Final = 1_024


@dataclass(slots=True, eq=False)
class _Amounts(Columns):
    """Of each minute and series: the sum and number of a gauge's values; a counter's last value, and its place in the
    minute in milliseconds + 1. 0: none yet."""

    amount: Floats
    mark: NDArray[np.int32]

    SHAPES: ClassVar = {"amount": ((SLOTS,), np.float64, 0.0), "mark": ((SLOTS,), np.int32, 0)}


@dataclass(slots=True, eq=False)
class _Seen(Columns):
    """Of each minute and stream: a bit for each second that a row was of."""

    seconds: Integers

    SHAPES: ClassVar = {"seconds": ((SLOTS,), np.int64, 0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Minute:
    """A closed minute, shape (N,) each: values with NaN for none, and when they were, seconds since the epoch."""

    start_ms: int
    values: Floats
    when_s: Floats


class OpenWindows:
    """Collects rows of streams in the cells of their series."""

    def __init__(self) -> None:
        self._amounts = _Amounts.fresh(_FIRST)
        self._seen = _Seen.fresh(_FIRST)
        self._used: Flags = np.zeros(SLOTS, np.bool_)
        self._first_ms: int | None = None
        """The first minute that is not closed; None before the first batch."""

    def due(self, now_ms: int) -> int:
        """How many minutes with rows end at a time of the tail."""
        return len(self._ending(now_ms))

    def _ending(self, now_ms: int) -> list[int]:
        first_ms, end_ms = self._first_ms, _first_open(now_ms)
        if first_ms is None or end_ms <= first_ms:
            return []
        starts = range(first_ms, min(end_ms, first_ms + SLOTS * WINDOW_MS), WINDOW_MS)
        return [start_ms for start_ms in starts if self._used[_slot(start_ms)]]

    def close(self, now_ms: int, order: Integers, is_counter: Flags) -> list[Minute]:
        """The minutes with rows that end at a time of the tail, oldest first; they are closed.

        Args:
            now_ms: the time.
            order: the cells that are wanted, shape (N,).
            is_counter: which of them are counters'.
        """
        self._make_room(int(order.max(initial=0)) + 1)
        minutes = [self._take(start_ms, order, is_counter) for start_ms in self._ending(now_ms)]
        end_ms = _first_open(now_ms)
        self._first_ms = end_ms if self._first_ms is None else max(self._first_ms, end_ms)
        return minutes

    def _take(self, start_ms: int, order: Integers, is_counter: Flags) -> Minute:
        slot = _slot(start_ms)
        amount, mark = self._amounts.amount[slot][order], self._amounts.mark[slot][order].astype(np.float64)
        values = np.where(is_counter, amount, amount / np.maximum(mark, 1.0))
        values[mark == 0] = np.nan
        when_s = start_ms / 1000.0 + np.where(is_counter, np.maximum(mark - 1.0, 0.0) / 1000.0, 0.0)
        self._amounts.amount[slot] = 0.0
        self._amounts.mark[slot] = 0
        self._seen.seconds[slot] = 0
        self._used[slot] = False
        return Minute(start_ms=start_ms, values=values, when_s=when_s)

    def fresh(self, streams: Integers, times_ms: Integers) -> tuple[Flags, Flags]:
        """Which rows are to be added, and which lie outside of the open minutes; the others came before.

        Args:
            streams: shape (n,), each once.
            times_ms: shape (n,).
        """
        assert self._first_ms is not None, "close comes first"
        minutes = times_ms // WINDOW_MS
        first = self._first_ms // WINDOW_MS
        untimely = (minutes < first) | (minutes >= first + SLOTS)
        slots, bits = minutes % SLOTS, np.int64(1) << (times_ms % WINDOW_MS // 1000)
        end = int(streams.max(initial=-1)) + 1
        if end > self._seen.seconds.shape[1]:
            self._seen = self._seen.sized(2 * end)
        is_new = ~untimely & (self._seen.seconds[slots, streams] & bits == 0)
        self._seen.seconds[slots[is_new], streams[is_new]] |= bits[is_new]
        self._used[slots[is_new]] = True
        return is_new, untimely

    def add(self, cells: slice | Integers, times_ms: Integers, values: Floats, gauges: int, cell_count: int) -> None:
        """Adds rows that are of one minute.

        Args:
            cells: a slice of n * m, or shape (n, m).
            times_ms: shape (n,).
            values: shape (n, m); NaN means no value.
            gauges: how many of the m columns are gauges; they come first.
            cell_count: how many cells there are.
        """
        self._make_room(cell_count)
        slot = _slot(int(times_ms[0]))
        amounts, marks = self._amounts.amount[slot], self._amounts.mark[slot]
        place = (times_ms % WINDOW_MS + 1).astype(np.int32)
        if isinstance(cells, slice):
            _fold(amounts[cells].reshape(values.shape), marks[cells].reshape(values.shape), place, values, gauges)
            return
        amount, mark = amounts[cells], marks[cells]
        _fold(amount, mark, place, values, gauges)
        amounts[cells], marks[cells] = amount, mark

    def _make_room(self, cell_count: int) -> None:
        own = self._amounts.amount.shape[1]
        if cell_count > own:
            self._amounts = self._amounts.sized(max(cell_count, 2 * own))

    def streams_in_use(self, count: int) -> Flags:
        """Which of the first `count` streams had a row in an open minute."""
        in_use: Flags = np.zeros(count, np.bool_)
        seconds = self._seen.seconds[:, :count]
        in_use[: seconds.shape[1]] = (seconds != 0).any(axis=0)
        return in_use

    def compact(self, keep_cells: Flags, keep_streams: Flags) -> None:
        """Forgets the others, as the registry does."""
        cells, streams = np.flatnonzero(keep_cells), np.flatnonzero(keep_streams)
        self._amounts = self._amounts.sized(len(keep_cells)).rearranged(cells).sized(max(len(cells), _FIRST))
        self._seen = self._seen.sized(len(keep_streams)).rearranged(streams).sized(max(len(streams), _FIRST))

    def arrays(self, cell_count: int, stream_count: int) -> dict[str, NDArray[Any]]:
        """All that is known; copies."""
        first_ms = -1 if self._first_ms is None else self._first_ms
        return (
            self._amounts.sized(cell_count).arrays("windows.")
            | self._seen.sized(stream_count).arrays("windows.")
            | {"windows_used": self._used.copy(), "windows_first": np.array([first_ms], np.int64)}
        )

    @classmethod
    def restored(cls, arrays: dict[str, NDArray[Any]], cell_count: int, stream_count: int) -> Self:
        """The windows that `arrays` gave; ValueError when it does not fit."""
        used, first = arrays.get("windows_used"), arrays.get("windows_first")
        if used is None or used.shape != (SLOTS,) or used.dtype != np.bool_:
            raise ValueError(f"the array windows_used is not {SLOTS} flags")
        if first is None or first.shape != (1,) or first.dtype != np.int64:
            raise ValueError("the array windows_first is not 1 value of int64")
        windows = cls()
        windows._amounts = _Amounts.of_arrays(arrays, "windows.", cell_count).sized(max(cell_count, _FIRST))
        windows._seen = _Seen.of_arrays(arrays, "windows.", stream_count).sized(max(stream_count, _FIRST))
        windows._used = used.copy()
        windows._first_ms = None if first[0] < 0 else int(first[0])
        return windows


def _fold(amount: Floats, mark: NDArray[np.int32], place: NDArray[np.int32], values: Floats, gauges: int) -> None:
    """Takes rows into the amounts and marks of their series, in place; shape (n, m) each, `place` (n,)."""
    known = np.abs(values) <= MAX_MAGNITUDE  # False for NaN and infinity
    if gauges:
        seen = known[:, :gauges]
        amount[:, :gauges] += np.where(seen, values[:, :gauges], 0.0)
        mark[:, :gauges] += seen
    if gauges < values.shape[1]:
        places = np.broadcast_to(place[:, None], values[:, gauges:].shape)
        newer = known[:, gauges:] & (places > mark[:, gauges:])
        np.copyto(amount[:, gauges:], values[:, gauges:], where=newer)
        np.copyto(mark[:, gauges:], places, where=newer)


def _first_open(now_ms: int) -> int:
    """The first minute that is open at a time of the tail."""
    return (now_ms - GRACE_MS) // WINDOW_MS * WINDOW_MS


def _slot(start_ms: int) -> int:
    return start_ms // WINDOW_MS % SLOTS
