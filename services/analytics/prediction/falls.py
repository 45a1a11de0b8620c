"""Servers that fall silent and come back: how often lately.

A server falls where two of its rows lie further apart than three of its usual distances, by the rows' own times, so
that what is late on the way is not silence. The usual distance follows the middle of the distances, by 5 % at each row,
so that the silences themselves do not become it (`silence` asks for a steady interval, which a flapping server does not
have). Rows that are all as far apart are a new interval: only the first of long distances is a fall. A server most of
whose distances are not alike sends when it likes, and does not fall: of six that sent at random, 13 hours in all, eight
findings were made without this. Where most servers fall at once it is the way to us that was interrupted, and none of
them has fallen.

What must stay true: a row that comes again is not heard; a minute counts a server's falls once.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from services.analytics.prediction import parameters as p
from services.analytics.scoring.arrays import Columns, Flags, Floats, Integers, State

_FOLLOW: Final = 1.05
_KNOWN: Final = 8
"""Distances from which on the usual one is known."""
_ABOUT: Final = 0.5
"""A distance is about the usual one if it is off by at most this part."""
_LATELY: Final = 16.0
"""Distances that count for that."""
_STEADY: Final = 0.6
"""The least part: a server that is there for a minute and away for a minute has .8, one that sends at random .4."""
_ALL_AT_ONCE: Final = 3
"""So many servers at least tell whether most fell."""
_NEVER: Final = -(1 << 60)
_FIRST: Final = 64


@dataclass(slots=True, eq=False)
class FallState(Columns):
    """Of each server: its newest row, the usual distance and how many there were, milliseconds; which part of them was
    about the usual one lately; whether the last one was long; whether it fell in the minute that goes on; how many
    falls there were lately."""

    row_ms: Integers
    usual_ms: Floats
    distances: Integers
    alike: Floats
    was_long: Flags
    fell: Flags
    falls: Floats

    SHAPES: ClassVar = {
        "row_ms": ((), np.int64, _NEVER),
        "usual_ms": ((), np.float64, 0.0),
        "distances": ((), np.int64, 0),
        "alike": ((), np.float64, 0.5),
        "was_long": ((), np.bool_, 0),
        "fell": ((), np.bool_, 0),
        "falls": ((), np.float64, 0.0),
    }


class Falls:
    """The falls of servers that are named by their place."""

    def __init__(self) -> None:
        self._state = FallState.fresh(_FIRST)

    def _make_room(self, count: int) -> None:
        own = len(self._state.row_ms)
        if count > own:
            self._state = self._state.sized(max(count, 2 * own))

    def hear(self, servers: Integers, times_ms: Integers) -> None:
        """Takes rows of servers, shape (n,), each server at most once."""
        self._make_room(int(servers.max(initial=-1)) + 1)
        state = self._state
        before = state.row_ms[servers]
        newer = times_ms > before
        known = newer & (before != _NEVER)
        state.row_ms[servers[newer]] = times_ms[newer]
        if not known.any():
            return
        servers, distance = servers[known], (times_ms - before)[known].astype(np.float64)
        usual, count = state.usual_ms[servers], state.distances[servers]
        is_long = (distance > np.maximum(p.FALL_INTERVALS * usual, p.LEAST_FALL_MS)) & (count >= _KNOWN)
        state.fell[servers] |= is_long & ~state.was_long[servers] & (state.alike[servers] >= _STEADY)
        state.alike[servers] += (np.abs(distance - usual) <= _ABOUT * usual) / _LATELY - state.alike[servers] / _LATELY
        state.was_long[servers] = is_long
        followed = np.clip(distance, usual / _FOLLOW, usual * _FOLLOW)
        state.usual_ms[servers] = np.where(count == 0, distance, followed)
        state.distances[servers] = np.minimum(count + 1, _KNOWN)

    def close_minute(self, count: int) -> Floats:
        """How many falls there were lately of each of the first `count` servers, shape (count,)."""
        self._make_room(count)
        state = self._state
        state.falls *= p.FALLS_DECAY
        heard = np.count_nonzero(state.distances)
        if heard < _ALL_AT_ONCE or 2 * np.count_nonzero(state.fell) <= heard:
            state.falls += state.fell
        state.fell[:] = False
        return state.falls[:count].copy()

    def rearrange(self, source: Integers) -> None:
        """For each server the place that it had."""
        self._make_room(int(source.max(initial=-1)) + 1)
        self._state = self._state.rearranged(source).sized(max(len(source), _FIRST))

    def arrays(self, count: int) -> State:
        """All that is known of the first `count` servers; copies."""
        return self._state.sized(count).arrays("falls.")

    @classmethod
    def of_arrays(cls, arrays: State, count: int) -> "Falls":
        """The falls that `arrays` gave; ValueError when it does not fit."""
        falls = cls()
        falls._state = FallState.of_arrays(arrays, "falls.", count).sized(max(count, _FIRST))
        return falls
