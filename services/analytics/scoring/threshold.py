"""The level above which a server's score is an alarm, held so that it is passed about as often as is asked for.

Each opening raises a server's level by a part, each quiet hour lowers it a little: over weeks the rate is the one asked
for whatever the scores are like, on each server (Robbins and Monro). Measured, learnt without labels: .55 to 1.67
false alarms a day on each of nine servers; a quantile of the history, tried first, gave 0 to 1.9.

What must stay true: the level stays between two quantiles of the server's own half-hour maxima, so that a long incident
does not carry it off and a silent server does not bring it to nothing; levels are of the score's logarithm; a day has
24 windows at least: two of those that come every six hours would be half of all, and a level that most are above.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from services.analytics.scoring import parameters as p
from services.analytics.scoring.arrays import Columns, Flags, Floats, State

_BINS: Final = 100
_LOW: Final = math.log(0.02)
_WIDTH: Final = (math.log(60.0) - _LOW) / _BINS
"""The histogram's bins are of 8 % each."""
_NEVER: Final = -1e18
_LEAST: Final = 1e-9


@dataclass(slots=True, eq=False)
class ThresholdState(Columns):
    """Of each server: its level, what is passed as often by the history alone, and the maxima of half-hours: of the one
    that goes on, and of those before."""

    level: Floats
    usual: Floats
    highest: Floats
    above_s: Floats
    since_s: Floats
    histogram: Floats

    SHAPES: ClassVar = {
        "level": ((), np.float64, math.inf),
        "usual": ((), np.float64, math.log(p.SERVER_ALARM)),
        "highest": ((), np.float64, 0.0),
        "above_s": ((), np.float64, _NEVER),
        "since_s": ((), np.float64, _NEVER),
        "histogram": ((_BINS,), np.float64, 0.0),
    }


class Thresholds:
    """The alarm levels of S servers."""

    def __init__(self, size: int) -> None:
        self.state = ThresholdState.fresh(size)
        self._half_hour = math.nan
        self._last_s = math.nan

    def update(self, time_s: float, step_s: float, scores: Floats, judged: Flags) -> Flags:
        """Which servers are above their level; learns from those that are judged.

        Args:
            time_s: start of the window, seconds since the epoch.
            step_s: the sampling interval.
            scores: shape (S,).
            judged: which of them mean something.
        """
        state = self.state
        if not math.isnan(self._half_hour) and time_s // p.OPENING_S != self._half_hour:
            self._close_half_hour(min(max(p.OPENING_S, step_s), p.HOUR_S))
        slow = min(p.HOUR_S / step_s, 1.0)
        passed_s = 0.0 if math.isnan(self._last_s) else slow * min(time_s - self._last_s, 2 * step_s)
        self._half_hour, self._last_s = time_s // p.OPENING_S, time_s
        np.copyto(state.since_s, time_s, where=judged & (state.since_s == _NEVER))
        logs = np.log(np.maximum(scores, _LEAST))
        # a day of half-hours must have been seen before a level means anything
        ready = judged & (slow * (time_s - state.since_s) >= p.LEARN_S)
        above: Flags = ready & (logs > state.level)
        opens = above & (time_s - state.above_s >= max(p.OPENING_S, p.OPENING_WINDOWS * step_s))
        np.copyto(state.above_s, time_s, where=above)
        state.level += np.where(ready, p.THRESHOLD_STEP * (opens - p.ALARMS_PER_DAY * passed_s / p.DAY_S), 0.0)
        np.maximum(state.highest, scores, out=state.highest, where=judged)
        return above

    def levels(self) -> Floats:
        """The alarm level of each server; infinite where there is none yet."""
        levels: Floats = np.exp(self.state.level)
        return levels

    def usual(self) -> Floats:
        """The score that each server's history passed as often; that of a usual server where a day is not yet known.

        Steadier than the level, which goes up and down with every alarm."""
        usual: Floats = np.exp(self.state.usual)
        return usual

    def _close_half_hour(self, length_s: float) -> None:
        state = self.state
        seen = state.highest > 0
        bins = ((np.log(np.maximum(state.highest, _LEAST)) - _LOW) / _WIDTH).astype(np.int64)
        state.histogram[:, seen] *= 1.0 - length_s / p.THRESHOLD_MEMORY_S
        state.histogram[np.clip(bins, 0, _BINS - 1), np.arange(len(bins))] += seen
        state.highest[:] = 0.0
        often = self._passed(p.ALARMS_PER_DAY * length_s / p.DAY_S)
        known = state.histogram.sum(axis=0) * length_s >= 0.95 * p.DAY_S
        np.copyto(state.usual, often, where=seen & known)
        least, most = (self._passed(rate * length_s / p.DAY_S) for rate in p.THRESHOLD_RATES)
        begin = np.where(np.isfinite(state.level), state.level, often)
        np.copyto(state.level, np.clip(begin, least, most), where=seen)

    def _passed(self, share: float) -> Floats:
        """The logarithm that was passed in that share of half-hours, interpolated inside a bin."""
        histogram = self.state.histogram
        from_above = np.cumsum(histogram[::-1], axis=0)[::-1]
        wanted = from_above[0] * min(share, 1.0)
        # the highest bin from which on at least so many lie
        place = np.maximum((from_above >= np.maximum(wanted, _LEAST)).sum(axis=0) - 1, 0)
        columns = np.arange(histogram.shape[1])
        inside = np.maximum(histogram[place, columns], _LEAST)
        part = np.clip((from_above[place, columns] - wanted) / inside, 0.0, 1.0)
        passed: Floats = _LOW + _WIDTH * (place + part)
        return passed

    def arrays(self) -> State:
        """All that is known."""
        return self.state.arrays("threshold.") | {"threshold_clock": np.array([self._half_hour, self._last_s])}

    def restore(self, arrays: State, size: int) -> None:
        """Takes over what `arrays` gave; ValueError, and nothing changed, when it does not fit."""
        clock = arrays.get("threshold_clock")
        if clock is None or clock.shape != (2,) or clock.dtype != np.float64:
            raise ValueError("the array threshold_clock is not 2 values of float64")
        self.state = ThresholdState.of_arrays(arrays, "threshold.", size)
        self._half_hour, self._last_s = float(clock[0]), float(clock[1])
