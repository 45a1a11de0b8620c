"""Each series against what is usual for it, one window of all of them in a few dozen numpy calls.

Four views, each in deviations or surprise and capped, make a series' score; on single metrics their sum reached 63
where the best of them alone reached 51 (FORESIGHT):

    season   the value against the profile of its hour, weekdays and weekends apart, about a level that follows
    shift    the mean of six windows against the slow mean
    order    how rarely this level (of 15) followed the last one
    spread   the variance of twelve windows against its own slow mean, collapsed (a stuck sensor) or burst

A server is judged by `departure` instead, season and the step from the last value, which found more events of whole
servers (.87 against .63 at one false alarm a day): see ``server``.

What must stay true: everything is relative to a series' first value and to its own deviations, so that scale and shift
fall out; a missing value leaves every array of its series as it was; a constant series has no departure.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from services.analytics.scoring import parameters as p
from services.analytics.scoring.arrays import Columns, Flags, Floats, Integers, Singles, State

MAX_MAGNITUDE: Final = 1e100
"""A value beyond is no measurement and is passed over as NaN is; its square would be infinite."""
_HOURS: Final = 24
_TINY: Final = 1e-150
_NEVER: Final = -1e18
_FIRST_STEP_S: Final = 60.0
_RESTING: Final = 0.1
"""Part of its score that a resting series shows."""
_PRIOR: Final = 0.1
"""Transitions of each kind that are taken to have been seen."""


@dataclass(slots=True, eq=False)
class SeriesState(Columns):
    """What is known of each series; values are relative to `origin`, the first one."""

    origin: Floats
    count: Floats
    first_s: Floats
    last_s: Floats
    low: Floats
    high: Floats
    level: Floats
    variance: Floats
    lift: Floats
    residual_variance: Floats
    previous: Floats
    step_variance: Floats
    spread: Floats
    ring: Floats
    filled: Integers
    profile: Floats
    folds: Floats
    hour_sum: Floats
    hour_count: Floats
    last_level: Integers
    transitions: Singles
    departures_from: Singles
    rest: Integers
    told: Floats

    SHAPES: ClassVar = {
        "origin": ((), np.float64, 0.0),
        "count": ((), np.float64, 0.0),
        "first_s": ((), np.float64, _NEVER),
        "last_s": ((), np.float64, _NEVER),
        "low": ((), np.float64, 0.0),
        "high": ((), np.float64, 0.0),
        "level": ((), np.float64, 0.0),
        "variance": ((), np.float64, 0.0),
        "lift": ((), np.float64, 0.0),
        "residual_variance": ((), np.float64, 0.0),
        "previous": ((), np.float64, 0.0),
        "step_variance": ((), np.float64, 0.0),
        "spread": ((), np.float64, 0.0),
        "ring": ((p.SPREAD_WINDOWS,), np.float64, 0.0),
        "filled": ((), np.int64, 0),
        "profile": ((2 * _HOURS,), np.float64, np.nan),
        "folds": ((2 * _HOURS,), np.float32, 0),
        "hour_sum": ((), np.float64, 0.0),
        "hour_count": ((), np.float64, 0.0),
        "last_level": ((), np.int64, -1),
        "transitions": ((p.LEVELS, p.LEVELS), np.float32, 0.0),
        "departures_from": ((p.LEVELS,), np.float32, 0.0),
        "rest": ((), np.int64, 0),
        "told": ((), np.float64, 0.0),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesWindow:
    """One window of all series; shape (N,) each.

    Attributes:
        present: whether there was a value.
        views: the sum of the four views, 0 while learning or without a value.
        score: `views` from 0 to 1, .5 where an alarm is.
        rested: `score`, and near 0 for a while after an alarm was told.
        departure: season and step, softly bounded; 0 while learning or without a value.
        counts: whether it is one of its server's series: learned, there, and not always the same.
    """

    present: Flags
    views: Floats
    score: Floats
    rested: Floats
    departure: Floats
    counts: Flags


@dataclass(slots=True)
class _Step:
    """What one window's calculation hands from part to part."""

    time_s: float
    y: Floats
    present: Flags
    fresh: Flags
    rate: Floats
    trusted: Flags
    floor: Floats


class SeriesScorer:
    """Scores N series window by window."""

    def __init__(self, size: int) -> None:
        self.state = SeriesState.fresh(size)
        self.step_s = _FIRST_STEP_S
        """The sampling interval as it has been lately."""
        self._ticks = 0
        self._last_s = _NEVER
        self._hour = -1

    def __len__(self) -> int:
        return len(self.state.origin)

    def update(self, time_s: float, values: Floats) -> SeriesWindow:
        """Judges and learns one window.

        Args:
            time_s: start of the window, seconds since the epoch, later than the one before.
            values: shape (N,); NaN is no value.
        """
        state = self.state
        self._tick(time_s)
        step = self._begin(time_s, values)
        season = self._season(step)
        jump = self._jump(step)
        shift, order, deviation = self._shift_and_order(step)
        spread = self._spread(step)
        with_value = step.present & (self.learned() >= 1.0)
        views = np.minimum(season, p.CHANNEL_CAP) + np.minimum(shift, p.CHANNEL_CAP)
        views += np.minimum(order, p.CHANNEL_CAP) + np.minimum(spread, p.CHANNEL_CAP)
        views = np.where(with_value, views, 0.0)
        departure = np.where(with_value, _soft(season) + _soft(jump), 0.0)
        self._learn_level(step, deviation)
        score = views / (views + p.SERIES_ALARM)
        return SeriesWindow(
            present=step.present,
            views=views,
            score=score,
            rested=self._rested(views, score, step.present),
            departure=departure,
            counts=with_value & (state.high > state.low),
        )

    def learned(self) -> Floats:
        """How much of what must be known before judging is known of each series, 0 to 1."""
        state = self.state
        lasted = (state.last_s - state.first_s) / p.LEARN_S
        share: Floats = np.minimum(np.minimum(lasted, state.count / p.LEARN_WINDOWS), 1.0)
        return np.maximum(share, 0.0)

    def expected(self, time_s: float, deviations: float = 3.0) -> tuple[Floats, Floats]:
        """The range in which a value at that time is usual, as known now: (low, high), shape (N,) each."""
        state = self.state
        middle = state.origin + self._profile_at(time_s) + state.lift
        half = deviations * np.sqrt(state.residual_variance)
        return middle - half, middle + half

    def _tick(self, time_s: float) -> None:
        """Follows the sampling interval, not moved by a gap, and closes an hour of the profile."""
        passed = time_s - self._last_s
        if self._ticks >= 2:
            self.step_s += 0.1 * (min(passed, 2 * self.step_s) - self.step_s)
        elif self._ticks == 1:
            self.step_s = passed
        self._ticks = min(self._ticks + 1, 2)
        self._last_s = time_s
        hour = _hour_of(time_s)
        if hour != self._hour:
            if self._hour >= 0:
                self._fold(self._hour)
            self._hour = hour

    def _fold(self, hour: int) -> None:
        state = self.state
        seen = state.hour_count > 0
        mean = state.hour_sum / np.maximum(state.hour_count, 1.0)
        gain = np.maximum(p.SEASON_GAIN, 1.0 / (state.folds[hour] + 1.0))
        profile, other = state.profile[hour], (hour + _HOURS) % (2 * _HOURS)
        moved = np.where(state.folds[hour] == 0, mean, profile + gain * (mean - profile))
        np.copyto(profile, moved, where=seen)
        state.folds[hour] += seen
        np.minimum(state.folds[hour], 100.0, out=state.folds[hour])
        np.copyto(state.profile[other], moved, where=seen & (state.folds[other] == 0))
        state.hour_sum[:] = 0.0
        state.hour_count[:] = 0.0

    def _profile_at(self, time_s: float) -> Floats:
        """The profile between the middles of two hours; the slow mean where an hour has not been seen."""
        state = self.state
        middle = (p.HOUR_S - min(self.step_s, p.HOUR_S)) / 2
        place = (time_s % p.DAY_S - middle) / p.HOUR_S
        whole = math.floor(place)
        kind = _hour_of(time_s) // _HOURS * _HOURS
        before, after = state.profile[kind + whole % _HOURS], state.profile[kind + (whole + 1) % _HOURS]
        part = place - whole
        before = np.where(np.isnan(before), state.level, before)
        after = np.where(np.isnan(after), state.level, after)
        between: Floats = before + part * (after - before)
        return between

    def _begin(self, time_s: float, values: Floats) -> _Step:
        state = self.state
        present = np.abs(values) <= MAX_MAGNITUDE  # False for NaN
        new = present & (state.count == 0)
        if new.any():
            np.copyto(state.origin, values, where=new)
            np.copyto(state.first_s, time_s, where=new)
        y = np.where(present, values - state.origin, state.level)
        fresh = present & (time_s - state.last_s <= (p.FRESH_WINDOWS + 0.5) * self.step_s)
        memory_s = max(p.MEMORY_S, p.MIN_MEMORY_WINDOWS * self.step_s)
        slow = self.step_s / memory_s
        trusted = state.count > p.TRUST_WINDOWS
        np.copyto(state.last_s, time_s, where=present)
        state.count += present
        rate = np.maximum(slow, 1.0 / np.maximum(state.count, 1.0)) * present
        state.low += slow * present * (state.level - state.low)
        state.high += slow * present * (state.level - state.high)
        np.minimum(state.low, y, out=state.low, where=present)
        np.maximum(state.high, y, out=state.high, where=present)
        magnitude = np.abs(y + state.origin)
        floor = np.maximum(p.RELATIVE_FLOOR * (state.high - state.low), p.ROUNDING * magnitude) + _TINY
        return _Step(time_s, y, present, fresh, rate, trusted, floor)

    def _season(self, step: _Step) -> Floats:
        state = self.state
        residual = step.y - self._profile_at(step.time_s) - state.lift
        deviation = np.maximum(np.sqrt(state.residual_variance), step.floor)
        z: Floats = np.abs(residual) / deviation
        z = np.where(state.folds[_hour_of(step.time_s)] > 0, z, p.UNSEEN_DAY * z)
        clipped = _clipped(residual, deviation, step.trusted)
        state.residual_variance += step.rate * ((1.0 - step.rate) * clipped * clipped - state.residual_variance)
        state.lift += min(self.step_s / p.LEVEL_MEMORY_S, 0.5) * clipped * step.present
        # A value moves its hour's mean no further than all else. Whole, 18 incidents of half an hour (simulator, twenty
        # servers) were found again 7 times an hour later and 12 times a day later; so, and for another seed, never.
        state.hour_sum += np.where(step.present, step.y - (residual - clipped) - state.lift, 0.0)
        state.hour_count += step.present
        return z

    def _jump(self, step: _Step) -> Floats:
        state = self.state
        change = np.where(step.fresh, step.y - state.previous, 0.0)
        deviation = np.maximum(np.sqrt(state.step_variance), step.floor)
        clipped = _clipped(change, deviation, step.trusted)
        rate = step.rate * step.fresh
        state.step_variance += rate * ((1.0 - rate) * clipped * clipped - state.step_variance)
        np.copyto(state.previous, step.y, where=step.present)
        z: Floats = np.abs(change) / deviation
        return z

    def _shift_and_order(self, step: _Step) -> tuple[Floats, Floats, Floats]:
        state = self.state
        deviation = np.maximum(np.sqrt(state.variance), step.floor)
        self._remember(step)
        recent = state.ring[: p.SHIFT_WINDOWS].mean(axis=0)
        shift = np.where(state.filled >= p.SHIFT_WINDOWS, np.abs(recent - state.level) / deviation, 0.0)
        z = np.clip((step.y - state.level) / deviation, -50.0, 50.0)
        level = np.clip(np.floor(z / p.LEVEL_DEVIATIONS + p.LEVELS / 2), 0, p.LEVELS - 1).astype(np.int64)
        return shift, self._order(step, level), deviation

    def _remember(self, step: _Step) -> None:
        """Puts the values before those of the ring; the newest is row 0."""
        state, ring = self.state, self.state.ring
        if step.present.all():
            ring[1:] = ring[:-1].copy()
            ring[0] = step.y
        else:
            ring[1:] = np.where(step.present, ring[:-1], ring[1:])
            ring[0] = np.where(step.present, step.y, ring[0])
        after = np.where(step.fresh, np.minimum(state.filled + 1, p.SPREAD_WINDOWS), 1)
        np.copyto(state.filled, after, where=step.present)

    def _order(self, step: _Step, level: Integers) -> Floats:
        state, size = self.state, len(self)
        known = step.fresh & (state.last_level >= 0)
        places = np.arange(size)
        row = np.maximum(state.last_level, 0)
        cells = (row * p.LEVELS + level) * size + places
        rows = row * size + places
        transitions, totals = state.transitions.reshape(-1), state.departures_from.reshape(-1)
        seen, total = transitions[cells], totals[rows]
        surprise = np.log((total + _PRIOR * p.LEVELS) / (seen + _PRIOR)).astype(np.float64)
        transitions[cells] = seen + known
        totals[rows] = total + known
        full = np.flatnonzero(total + known > p.MAX_TRANSITIONS)
        if len(full):
            state.transitions[row[full], :, full] *= np.float32(0.5)
            state.departures_from[row[full], full] *= np.float32(0.5)
        np.copyto(state.last_level, level, where=step.present)
        return np.where(known, surprise, 0.0)

    def _spread(self, step: _Step) -> Floats:
        state = self.state
        variance = state.ring.var(axis=0)
        whole = step.present & (state.filled >= p.SPREAD_WINDOWS)
        least = 0.01 * step.floor * step.floor + _TINY
        ratio = np.log((variance + least) / (state.spread + least))
        usual = state.spread
        bounded = np.where(step.trusted & (usual > 0), np.minimum(variance, 4 * p.CLIP_DEVIATIONS * usual), variance)
        state.spread += step.rate * whole * (bounded - usual)
        return np.where(whole, np.abs(ratio), 0.0)

    def _learn_level(self, step: _Step, deviation: Floats) -> None:
        state = self.state
        clipped = _clipped(step.y - state.level, deviation, step.trusted)
        state.level += step.rate * clipped
        state.variance += step.rate * ((1.0 - step.rate) * clipped * clipped - state.variance)

    def _rested(self, views: Floats, score: Floats, present: Flags) -> Floats:
        state = self.state
        resting = (state.rest > 0) & (views < p.BREAK_REST * state.told)
        state.rest -= (state.rest > 0) & present
        tells = ~resting & (views >= p.SERIES_ALARM)
        np.copyto(state.rest, p.REST_WINDOWS, where=tells)
        np.copyto(state.told, views, where=tells)
        return np.where(resting, _RESTING * score, score)

    def arrays(self) -> State:
        """All that is known."""
        clock = np.array([self._last_s, self.step_s, self._ticks, self._hour], np.float64)
        return self.state.arrays("series.") | {"series_clock": clock}

    def restore(self, arrays: State, size: int) -> None:
        """Takes over what `arrays` gave; ValueError, and nothing changed, when it does not fit."""
        clock = arrays.get("series_clock")
        if clock is None or clock.shape != (4,) or clock.dtype != np.float64:
            raise ValueError("the array series_clock is not 4 values of float64")
        self.state = SeriesState.of_arrays(arrays, "series.", size)
        self._last_s, self.step_s = float(clock[0]), float(clock[1])
        self._ticks, self._hour = int(clock[2]), int(clock[3])


def _hour_of(time_s: float) -> int:
    """0 to 23 from Monday to Friday, 24 to 47 at the weekend; UTC."""
    day = math.floor(time_s / p.DAY_S)
    is_weekend = (day + 3) % 7 >= 5  # the epoch's first day was a Thursday
    return int(time_s % p.DAY_S // p.HOUR_S) + _HOURS * is_weekend


def _soft(z: Floats) -> Floats:
    bounded: Floats = z / (1.0 + z / p.SOFT_DEVIATIONS)
    return bounded


def _clipped(distance: Floats, deviation: Floats, trusted: Flags) -> Floats:
    bound = np.where(trusted, p.CLIP_DEVIATIONS * deviation, np.inf)
    return np.clip(distance, -bound, bound)
