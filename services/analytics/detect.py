"""Detectors: what turns points into findings. The rest of the service knows only the protocol.

What must stay true of every detector:

* it is a function of the rows it was shown and of nothing else: no clock, no chance, so that a replay from saved state
  gives the same findings with the same ids;
* it judges a point of a series once: what is not later than the series' newest point is passed over. So a batch, or a
  part of one, may come again and changes nothing;
* what it keeps is bounded, and all of it is in `state`.

The first detector, `EwmaDetector`, keeps an exponentially weighted mean and variance for each headline metric of each
server. A point is abnormal when it lies many standard deviations from the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fleet.model import HEADLINE_METRICS, MetricSet
from services.analytics.cells import Cells, Flags, Floats, Integers
from services.analytics.findings import Anomaly, finding_id
from services.analytics.servers import Servers

MAX_SERVERS: Final = 50_000
"""Servers watched at once; 18 MB of state. More are not judged, counted and said once."""
MAX_MAGNITUDE: Final = 1e12
"""A value beyond is no measurement and is passed over as NaN is; its square would drown the variance."""
ABNORMAL_RATE: Final = 0.1
"""An abnormal point moves the mean by this part of what a normal one does. A level that has shifted for good is learnt
all the same: by 50 from a standard deviation of 1 in about 600 points."""
RELATIVE_FLOOR: Final = 0.01
"""Part of the mean that the standard deviation is at least taken to be."""

_TINY: Final = 1e-300
"""Keeps 0 / 0 out where a series has had no stretch yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EwmaRules:
    """When a point is abnormal and when that is worth a finding.

    Attributes:
        cold_start_points: a series is judged once it has this many.
        memory_points: the mean follows the last so many; its rate is 1 / memory_points.
        open_deviations: a point this many standard deviations from the mean is abnormal; its score is 0.5.
        close_deviations: while a finding is open, a point within this many is normal again.
        open_points: so many abnormal points in a row open a finding.
        close_points: so many normal points in a row close it.
        min_deviation: the standard deviation is at least taken to be this, in the metric's unit.
        rest_ms: no finding of a series opens within this time after the last one closed.
        silence_ms: a server that sent nothing for so long has its findings closed.
    """

    cold_start_points: int = 60
    memory_points: int = 360
    open_deviations: float = 6.0
    close_deviations: float = 3.0
    open_points: int = 3
    close_points: int = 6
    min_deviation: float = 1.0
    rest_ms: int = 600_000
    silence_ms: int = 900_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorState:
    """All that a detector knows, to be saved and handed back; the arrays are copies."""

    detector: str
    server_ids: tuple[str, ...]
    arrays: dict[str, NDArray[Any]]


class Detector(Protocol):
    """Turns rows into findings; see the module for what must hold."""

    @property
    def name(self) -> str:
        """What findings call it; at most 63 characters, never changed."""

    @property
    def learned(self) -> float:
        """Share of the watched series that are judged, 0 to 1; 0 while none is watched."""

    @property
    def unwatched_rows(self) -> int:
        """Rows so far of servers beyond the bound."""

    def columns_of(self, metric_set: MetricSet) -> Integers:
        """What the detector wants to know of a set; handed back with each of its rows. Asked once a set."""

    def observe(
        self, columns: Integers, server_ids: Sequence[str], times_ms: Integers, values: Floats, received_ms: int
    ) -> list[Anomaly]:
        """Judges rows.

        Args:
            columns: what `columns_of` said of their set.
            server_ids: n servers, each at most once; a server's rows come in order of time, over calls.
            times_ms: shape (n,).
            values: shape (n, metrics of the set); NaN means no value.
            received_ms: when they were journaled.

        Returns:
            Findings that opened, grew or closed, as they are now.
        """

    def close_silent(self, now_ms: int) -> list[Anomaly]:
        """Closes what is open of servers that were silent too long at `now_ms`, the tail's time."""

    def state(self) -> DetectorState:
        """All it knows."""

    def restore(self, state: DetectorState) -> None:
        """Takes over what `state` returned; ValueError, and nothing changed, when it is not of this detector."""


class EwmaDetector:
    """Mean and variance of the headline metrics of each server."""

    name = "ewma"

    def __init__(self, rules: EwmaRules, *, max_servers: int = MAX_SERVERS) -> None:
        self._rules = rules
        self._servers = Servers(max_servers)
        self._metrics = HEADLINE_METRICS
        self._cells = Cells.fresh(0)

    @property
    def learned(self) -> float:
        points = self._cells.points[: len(self._servers) * len(self._metrics)]
        watched = int(np.count_nonzero(points))
        return float(np.count_nonzero(points >= self._rules.cold_start_points)) / watched if watched else 0.0

    @property
    def unwatched_rows(self) -> int:
        return self._servers.refused_rows

    def columns_of(self, metric_set: MetricSet) -> Integers:
        """For each headline metric its column, -1 where the set lacks it."""
        column = {key: index for index, key in enumerate(metric_set.keys)}
        return np.array([column.get(metric, -1) for metric in self._metrics], np.int64)

    def observe(
        self, columns: Integers, server_ids: Sequence[str], times_ms: Integers, values: Floats, received_ms: int
    ) -> list[Anomaly]:
        there = columns >= 0
        if not there.any():
            return []
        servers = self._indices(server_ids, received_ms)
        cells = servers[:, None] * len(self._metrics) + np.flatnonzero(there)
        values = values[:, columns[there]]
        usable = (np.abs(values) <= MAX_MAGNITUDE) & (servers >= 0)[:, None]  # False for NaN and for infinity
        times = np.broadcast_to(times_ms[:, None], cells.shape)
        cells, values, times = cells[usable], values[usable], times[usable]
        fresh = times > self._cells.last_ms[cells]
        if not fresh.all():
            cells, values, times = cells[fresh], values[fresh], times[fresh]
        if not len(cells):
            return []
        changed = self._judge(cells, values, times)
        return [self._finding(cell) for cell in cells[changed].tolist()]

    def _judge(self, cells: Integers, values: Floats, times: Integers) -> Flags:
        """Scores and learns the points; true where a finding opened, grew or closed."""
        state, rules = self._cells, self._rules
        mean, variance, points, was_open = (
            state.mean[cells],
            state.variance[cells],
            state.points[cells],
            state.is_open[cells],
        )
        deviation = np.maximum(np.sqrt(variance), np.maximum(rules.min_deviation, RELATIVE_FLOOR * np.abs(mean)))
        distance = values - mean
        standardised = np.abs(distance) / deviation
        limit = np.where(was_open, rules.close_deviations, rules.open_deviations)
        abnormal = (standardised >= limit) & (points >= rules.cold_start_points)

        rate = np.maximum(1.0 / rules.memory_points, 1.0 / (points + 1))
        rate = np.where(abnormal, rate * ABNORMAL_RATE, rate)
        bound = rules.open_deviations * deviation
        step = np.where(abnormal, np.clip(distance, -bound, bound), distance)
        state.mean[cells] = mean + rate * step
        state.variance[cells] = (1.0 - rate) * (variance + rate * step * step)
        state.points[cells] = points + 1
        state.last_ms[cells] = times

        high = np.where(abnormal & ~was_open, state.high[cells] + 1, 0)
        calm = np.where(was_open & ~abnormal, state.calm[cells] + 1, 0)
        begins = high == 1
        state.start_ms[cells[begins]] = times[begins]
        state.start_deviation[cells[begins]] = deviation[begins]
        state.peak_score[cells[begins]] = -1.0
        state.abnormal_ms[cells[abnormal]] = times[abnormal]
        # A stretch widens the deviation it is judged by; its peak is found by what was usual before it.
        usual = state.start_deviation[cells]
        score = distance**2 / (distance**2 + (rules.open_deviations * usual) ** 2 + _TINY)
        grows = abnormal & (score > state.peak_score[cells])
        self._set_peaks(grows, cells, score, times, values, mean, rules.close_deviations * usual)

        opens = (high >= rules.open_points) & (times >= state.rest_until_ms[cells])
        closes = was_open & (calm >= rules.close_points)
        state.is_open[cells] = (was_open | opens) & ~closes
        state.rest_until_ms[cells[closes]] = times[closes] + rules.rest_ms
        state.high[cells], state.calm[cells] = high, calm
        changed: Flags = opens | closes | (grows & was_open)
        return changed

    def _set_peaks(
        self, at: Flags, cells: Integers, score: Floats, times: Integers, values: Floats, mean: Floats, spread: Floats
    ) -> None:
        state, peaks = self._cells, cells[at]
        if not len(peaks):
            return
        state.peak_score[peaks] = score[at]
        state.peak_ms[peaks] = times[at]
        state.peak_value[peaks] = values[at]
        state.peak_low[peaks] = mean[at] - spread[at]
        state.peak_high[peaks] = mean[at] + spread[at]

    def close_silent(self, now_ms: int) -> list[Anomaly]:
        state, metrics = self._cells, len(self._metrics)
        busy = np.flatnonzero(state.is_open | (state.high > 0))
        silent = busy[self._servers.heard_ms[busy // metrics] < now_ms - self._rules.silence_ms]
        closes = silent[state.is_open[silent]]
        state.is_open[silent] = False
        state.high[silent] = state.calm[silent] = 0
        state.rest_until_ms[closes] = state.last_ms[closes] + self._rules.rest_ms
        return [self._finding(cell) for cell in closes.tolist()]

    def _finding(self, cell: int) -> Anomaly:
        state = self._cells
        server, metric = divmod(cell, len(self._metrics))
        server_id, start_ms = self._servers.ids[server], int(state.start_ms[cell])
        return Anomaly(
            id=finding_id(server_id, self.name, self._metrics[metric], start_ms),
            server_id=server_id,
            metric=self._metrics[metric],
            start_ms=start_ms,
            end_ms=None if state.is_open[cell] else int(state.abnormal_ms[cell]),
            peak_ms=int(state.peak_ms[cell]),
            score=float(state.peak_score[cell]),
            value=float(state.peak_value[cell]),
            expected_low=float(state.peak_low[cell]),
            expected_high=float(state.peak_high[cell]),
            detector=self.name,
        )

    def _indices(self, server_ids: Sequence[str], received_ms: int) -> Integers:
        """The servers' places, -1 for one that is not watched; new ones get fresh cells."""
        metrics = len(self._metrics)
        if self._servers.is_full and self._servers.lacks_any(server_ids):
            keep = self._servers.forget_silent(received_ms)
            if keep is not None:
                self._cells = self._cells.select(np.repeat(keep, metrics))
        indices = self._servers.indices(server_ids, received_ms)
        if self._servers.capacity * metrics > len(self._cells.mean):
            self._cells = self._cells.grown(self._servers.capacity * metrics)
        return indices

    def state(self) -> DetectorState:
        count = len(self._servers)
        arrays = self._cells.arrays(count * len(self._metrics))
        arrays["heard_ms"] = self._servers.heard_ms[:count].copy()
        return DetectorState(detector=self.name, server_ids=tuple(self._servers.ids), arrays=arrays)

    def restore(self, state: DetectorState) -> None:
        if state.detector != self.name:
            raise ValueError(f"the state is of the detector {state.detector[:63]!r}, not {self.name!r}")
        cells = Cells.of_arrays(state.arrays, len(state.server_ids) * len(self._metrics))
        self._servers = Servers.restored(self._servers.limit, state.server_ids, state.arrays.get("heard_ms"))
        self._cells = cells
