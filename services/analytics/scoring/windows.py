"""Rows become windows: one each, or one-minute means where rows come faster.

What must stay true: what comes out for a row depends on the rows up to it; the sampling interval is followed, not asked
for, and one late or missing row does not change it; a window's time is later than that of the window before.
"""

from collections import deque
from statistics import median
from typing import Final

import numpy as np

from services.analytics.scoring import parameters as p
from services.analytics.scoring.arrays import Floats

_GAPS: Final = 9
"""The sampling interval is the median of the last so many."""
_FAST_S: Final = 0.75 * p.MIN_WINDOW_S
"""Rows closer than this are averaged; the margin keeps a minute's jitter out."""
_LEAST_STEP_S: Final = 1.0
"""Apart from the window before, where rows are not later than it (a clock set back)."""


class Windows:
    """Collects the rows of one file."""

    def __init__(self, width: int) -> None:
        self._gaps: deque[float] = deque(maxlen=_GAPS)
        self._last_row_s: float | None = None
        self._last_s = -np.inf
        self._minute: float | None = None
        self._sums: Floats = np.zeros(width)
        self._counts: Floats = np.zeros(width)

    def add(self, time_s: float, values: Floats) -> list[tuple[float, Floats]]:
        """The windows that are complete with this row: (start, values), at most two."""
        if self._last_row_s is not None:
            self._gaps.append(time_s - self._last_row_s)
        self._last_row_s = time_s
        is_fast = bool(self._gaps) and median(self._gaps) < _FAST_S
        minute = time_s // p.MIN_WINDOW_S * p.MIN_WINDOW_S
        complete = []
        if self._minute is not None and (minute != self._minute or not is_fast):
            complete.append(self._close())
        if not is_fast:
            complete.append(self._stamped(time_s, values))
            return complete
        self._minute = minute
        there = np.isfinite(values)
        self._sums += np.where(there, values, 0.0)
        self._counts += there
        return complete

    def _close(self) -> tuple[float, Floats]:
        assert self._minute is not None
        means = np.where(self._counts > 0, self._sums / np.maximum(self._counts, 1.0), np.nan)
        window = self._stamped(self._minute, means)
        self._minute = None
        self._sums[:] = 0.0
        self._counts[:] = 0.0
        return window

    def _stamped(self, time_s: float, values: Floats) -> tuple[float, Floats]:
        self._last_s = max(time_s, self._last_s + _LEAST_STEP_S)
        return self._last_s, values
