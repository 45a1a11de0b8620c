"""Figures of a store that need more than one look at it: how fast it usually answers, when its disk will be full.

What must stay true: memory is bounded; a figure is told only when it was really measured for long enough.
"""

import math
from collections import deque
from typing import Final

import numpy as np

LATENCY_SPAN_S: Final = 300.0
LATENCIES_KEPT: Final = 600
"""That long of probes of a store that is degraded, one every 0.5 s."""
SAMPLE_INTERVAL_S: Final = 60.0
SAMPLES_KEPT: Final = 1_440
"""A day of samples of the free space."""
MIN_SPAN_S: Final = 600.0
MAX_DAYS: Final = 3_650.0
"""A disk that is full in more than ten years does not fill."""
_DAY_S: Final = 86_400.0


class Latencies:
    """The latencies, in ms, of the last LATENCY_SPAN_S."""

    def __init__(self) -> None:
        self._latest: deque[tuple[float, float]] = deque(maxlen=LATENCIES_KEPT)  # when, monotonic, and how long

    def add(self, now_s: float, latency_ms: float) -> None:
        """Counts one."""
        self._latest.append((now_s, latency_ms))

    def percentile(self, now_s: float, percent: float) -> float:
        """The least of them that so many in a hundred do not exceed (nearest rank); 0 without any."""
        while self._latest and now_s - self._latest[0][0] > LATENCY_SPAN_S:
            self._latest.popleft()
        if not self._latest:
            return 0.0
        rank = math.ceil(len(self._latest) * percent / 100)
        return sorted(latency_ms for _, latency_ms in self._latest)[max(rank, 1) - 1]


class FreeSpace:
    """The free bytes of a disk over the last day, one sample a minute."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=SAMPLES_KEPT)
        self.days_left: float | None = None
        """At the rate of those samples, by least squares; None: not known yet, or it does not fill."""

    def add(self, now_s: float, free_bytes: int) -> None:
        """Looks again, at most once a minute."""
        if self._samples and now_s - self._samples[-1][0] < SAMPLE_INTERVAL_S:
            return
        self._samples.append((now_s, free_bytes))
        self.days_left = self._days_left()

    def _days_left(self) -> float | None:
        times_s, free = np.array(self._samples, np.float64).T
        if times_s[-1] - times_s[0] < MIN_SPAN_S:
            return None
        about_s = times_s - times_s.mean()
        bytes_per_s = float(about_s @ (free - free.mean()) / (about_s @ about_s))
        if bytes_per_s >= 0:
            return None
        days = float(free[-1]) / -bytes_per_s / _DAY_S
        return days if days <= MAX_DAYS else None
