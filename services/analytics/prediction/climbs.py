"""Resources that climb to their limit: by robust slopes of the recent past, against how they climb as a rule.

Each resource is looked at on three scales, rings of 16 points of 2, 5 and 10 minutes. The slopes between points four
apart are the possible futures: their median says when the limit is reached, their tenth and ninetieth part how sure
that is, and the part of them that reach it within the horizon how likely.

A day's wave and a disk that fills and is cleaned climb, too. So the highest and steepest climb of each day is
remembered, and a climb that is neither higher nor steeper than they were foretells nothing. One that went to the limit
is not remembered: a failure is never usual, however often it comes.

What must stay true: a minute without a value leaves its resource as it was but for points that stay empty; nothing
here depends on how many resources there are or in which order.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from services.analytics.prediction import parameters as p
from services.analytics.scoring.arrays import Columns, Flags, Floats, Integers, State

_SCALES: Final = len(p.SCALES)
_MINUTES: Final = np.array(p.SCALES, np.float64)
_REACH: Final = np.minimum(p.HORIZON_MINUTES, p.REACH * p.POINTS * _MINUTES)[:, None]
"""How many minutes each scale looks ahead."""
_DAY: Final = 1_440
_STALE: Final = 15
"""A resource that was not measured for so many minutes foretells nothing."""
_NEVER: Final = -(1 << 40)


@dataclass(slots=True, eq=False)
class ClimbState(Columns):
    """Of each resource: sum and number of values of the point that is being made, the points (row 0 the newest); its
    newest value and in which minute it was; whether it climbs, from which low, to which high, how steep at most
    (percent a minute); the remembered climbs, which of them is the newest, and since when."""

    sums: Floats
    counts: Floats
    points: Floats
    value: Floats
    minute: Integers
    rising: Flags
    low: Floats
    high: Floats
    steep: Floats
    heights: Floats
    steeps: Floats
    newest: Integers
    newest_minute: Integers

    SHAPES: ClassVar = {
        "sums": ((_SCALES,), np.float64, 0.0),
        "counts": ((_SCALES,), np.float64, 0.0),
        "points": ((_SCALES, p.POINTS), np.float64, np.nan),
        "value": ((), np.float64, np.nan),
        "minute": ((), np.int64, _NEVER),
        "rising": ((), np.bool_, 0),
        "low": ((), np.float64, np.nan),
        "high": ((), np.float64, np.nan),
        "steep": ((_SCALES,), np.float64, 0.0),
        "heights": ((p.REMEMBERED,), np.float64, -np.inf),
        "steeps": ((_SCALES, p.REMEMBERED), np.float64, 0.0),
        "newest": ((), np.int64, -1),
        "newest_minute": ((), np.int64, _NEVER),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ClimbWindow:
    """What one minute foretells, shape (R,) each.

    Attributes:
        probability: that the limit is reached within the horizon, 0 to 1.
        value: the newest value, percent; NaN before the first.
        slope: percent a minute.
        minutes, soonest, latest: until the limit is reached, and the 80 % interval; NaN where nothing is foretold,
            `latest` infinite where it may never be; 0 where it is reached.
    """

    probability: Floats
    value: Floats
    slope: Floats
    minutes: Floats
    soonest: Floats
    latest: Floats


class Climbs:
    """The climbs of R resources."""

    def __init__(self, state: ClimbState, buckets: Integers) -> None:
        """`buckets`: the point that is being made on each scale, counted from the epoch; -1 before the first."""
        self.state = state
        self.buckets = buckets
        self._slopes = _Slopes.of(state.points)
        self._usual = _Usual.of(state)

    @classmethod
    def fresh(cls, size: int) -> "Climbs":
        """Climbs that have seen nothing."""
        return cls(ClimbState.fresh(size), np.full(_SCALES, -1, np.int64))

    def update(self, minute: int, values: Floats) -> ClimbWindow:
        """Takes one minute; takes .6 ms of processor time for 320 resources on a busy machine, .2 at best.

        Args:
            minute: since the epoch, later than the one before.
            values: shape (R,), percent; NaN is no value.
        """
        state = self.state
        present = np.isfinite(values)
        if self._collect(minute, values, present):
            self._slopes = _Slopes.of(state.points)
        np.copyto(state.value, values, where=present)
        np.copyto(state.minute, minute, where=present)
        if self._follow(minute, values, present):
            self._usual = _Usual.of(state)
        return self._foretell(minute)

    def _collect(self, minute: int, values: Floats, present: Flags) -> bool:
        """Whether a point was made."""
        state, made = self.state, False
        for scale, minutes in enumerate(p.SCALES):
            bucket, before = minute // minutes, int(self.buckets[scale])
            if bucket != before:
                if before >= 0:
                    self._close(scale, bucket - before)
                    made = True
                self.buckets[scale] = bucket
            state.sums[scale] += np.where(present, values, 0.0)
            state.counts[scale] += present
        return made

    def _close(self, scale: int, passed: int) -> None:
        """Makes a point, and empty ones of those that were passed over."""
        state, points = self.state, self.state.points[scale]
        shift = min(passed, p.POINTS)
        points[shift:] = points[:-shift].copy()
        points[:shift] = np.nan
        if passed <= p.POINTS:
            counts = state.counts[scale]
            points[passed - 1] = np.where(counts > 0, state.sums[scale], np.nan) / np.maximum(counts, 1.0)
        state.sums[scale] = 0.0
        state.counts[scale] = 0.0

    def _follow(self, minute: int, values: Floats, present: Flags) -> bool:
        """Follows where climbs begin and end; whether one ended."""
        state, middle = self.state, self._slopes.middle
        first = present & np.isnan(state.low)
        np.copyto(state.low, values, where=first)
        np.copyto(state.high, values, where=first)
        np.copyto(state.high, values, where=present & state.rising & (values > state.high))
        np.copyto(state.low, values, where=present & ~state.rising & (values < state.low))
        np.copyto(state.steep, middle, where=middle > state.steep)
        over = np.flatnonzero(present & state.rising & (values <= state.high - p.TURN))
        begins = np.flatnonzero(present & ~state.rising & (values >= state.low + p.TURN))
        if len(over):
            self._remember(minute, over[state.high[over] < p.LIMIT])
            state.low[over] = values[over]
            state.rising[over] = False
            state.steep[:, over] = 0.0
        state.high[begins] = values[begins]
        state.rising[begins] = True
        return bool(len(over))

    def _remember(self, minute: int, over: Integers) -> None:
        state = self.state
        new = over[minute - state.newest_minute[over] >= _DAY]
        state.newest[new] = (state.newest[new] + 1) % p.REMEMBERED
        state.newest_minute[new] = minute
        state.heights[state.newest[new], new] = -np.inf
        state.steeps[:, state.newest[new], new] = 0.0
        place = state.newest[over]
        state.heights[place, over] = np.maximum(state.heights[place, over], state.high[over])
        state.steeps[:, place, over] = np.maximum(state.steeps[:, place, over], state.steep[:, over])

    def _foretell(self, minute: int) -> ClimbWindow:
        state, slopes, usual = self.state, self._slopes, self._usual
        left = p.LIMIT - state.value
        recent = minute - state.minute < _STALE
        as_usual = (state.value <= usual.height + p.HIGHER) & (slopes.middle <= p.STEEPER * usual.steep)
        reaching = (slopes.ordered >= (left / _REACH)[:, None]).sum(axis=1)
        told = (slopes.known >= p.LEAST_PAIRS) & ~as_usual & (left > 0) & recent
        shares = np.where(told, reaching / np.maximum(slopes.known, 1), 0.0)
        scale = _SCALES - 1 - np.argmax(shares[::-1], axis=0)  # the longer one where they say the same
        every = np.arange(len(left))
        probability = np.interp(shares[scale, every], p.SHARES, p.RELIABILITY)
        likely = probability > 0
        failed = (left <= 0) & state.rising & (state.low <= p.LIMIT - p.DEEP) & recent
        return ClimbWindow(
            probability=np.where(failed, 1.0, probability),
            value=state.value.copy(),
            slope=slopes.middle[scale, every],
            minutes=_time(left, slopes.middle[scale, every], likely, failed),
            soonest=_time(left, slopes.fast[scale, every] * (1.0 + p.MARGIN), likely, failed),
            latest=_time(left, slopes.slow[scale, every] * (1.0 - p.MARGIN), likely, failed),
        )

    def rearranged(self, source: Integers) -> "Climbs":
        """These for other resources: for each the place that it had, -1 for a new one."""
        return Climbs(self.state.rearranged(source), self.buckets.copy())

    def arrays(self) -> State:
        """All that is known; copies."""
        return self.state.arrays("climbs.") | {"climb_buckets": self.buckets.copy()}

    @classmethod
    def of_arrays(cls, arrays: State, size: int) -> "Climbs":
        """The climbs that `arrays` gave; ValueError when it does not fit."""
        buckets = arrays.get("climb_buckets")
        if buckets is None or buckets.shape != (_SCALES,) or buckets.dtype != np.int64:
            raise ValueError(f"the array climb_buckets is not {_SCALES} values of int64")
        state = ClimbState.of_arrays(arrays, "climbs.", size)
        if ((state.newest < -1) | (state.newest >= p.REMEMBERED)).any():
            raise ValueError("the array climbs.newest has a place that is not there")
        return cls(state, buckets.copy())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slopes:
    """What the points say, shape (scales, R): the slopes of pairs, percent a minute, in order, NaN last, shape
    (scales, pairs, R); how many are known; their median, tenth and ninetieth part."""

    ordered: Floats
    known: Integers
    middle: Floats
    slow: Floats
    fast: Floats

    @classmethod
    def of(cls, points: Floats) -> "_Slopes":
        ordered = np.sort((points[:, : -p.LAG] - points[:, p.LAG :]) / (p.LAG * _MINUTES[:, None, None]), axis=1)
        known = np.isfinite(ordered).sum(axis=1)
        slow, middle, fast = (_part(ordered, known, part) for part in (0.1, 0.5, 0.9))
        return cls(ordered=ordered, known=known, middle=middle, slow=slow, fast=fast)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Usual:
    """How high climbs are as a rule, shape (R,), and how steep, (scales, R)."""

    height: Floats
    steep: Floats

    @classmethod
    def of(cls, state: ClimbState) -> "_Usual":
        heights, steeps = np.sort(state.heights, axis=0), np.sort(state.steeps, axis=1)
        few = np.isfinite(state.heights).sum(axis=0) < p.FEW
        return cls(height=np.where(few, heights[-1], heights[-2]), steep=np.where(few, steeps[:, -1], steeps[:, -2]))


def _part(ordered: Floats, known: Integers, part: float) -> Floats:
    """The value below which a part of each column of (scales, pairs, R) lies; NaN where nothing is known."""
    place = part * np.maximum(known - 1, 0)
    below = place.astype(np.int64)
    above = np.minimum(below + 1, np.maximum(known - 1, 0))
    low, high = (np.take_along_axis(ordered, at[:, None], 1)[:, 0] for at in (below, above))
    between: Floats = low + (place - below) * (high - low)
    return between


def _time(left: Floats, slope: Floats, likely: Flags, failed: Flags) -> Floats:
    """Minutes until what is left is gone."""
    rises = likely & (slope > 0)
    minutes = np.where(likely, np.inf, np.nan)
    np.divide(left, slope, out=minutes, where=rises)
    return np.where(failed, 0.0, minutes)
