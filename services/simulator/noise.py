"""Randomness that is a function of the seed and the time, and has no state.

A generator with a state would need to be run from the start to know a value, and a restarted simulator would jump to
another fleet. Here every random number is a hash of (seed, stream, server, cell of time), so that any tick can be
computed at once and in any order, and a counter can be integrated in closed form from the boot to now.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)
_UNIT: Final = 2.0**-53


class Dice:
    """Numbers in [0, 1) for rows and cells: splitmix64 of both, the seed and the stream; the rows' part is kept."""

    def __init__(self, seed: int, stream: int, rows: NDArray[np.integer]) -> None:
        start = np.uint64((seed * 0x5851F42D4C957F2D + stream * 0x14057B7EF767814F) & 0xFFFFFFFFFFFFFFFF)
        mixed = (rows.astype(np.uint64) + np.uint64(1)) * _MIX_2 + start
        self._rows = _mix(mixed ^ (mixed >> np.uint64(29)))

    def at(self, cells: NDArray[np.int64]) -> Floats:
        """Returns one number for each (row, cell) after broadcasting."""
        x = _mix(self._rows + cells.view(np.uint64) * _GOLDEN)
        return (x >> np.uint64(11)).astype(np.float64) * _UNIT


def uniform(seed: int, stream: int, rows: NDArray[np.integer], cell: int = 0) -> Floats:
    """Returns a number in [0, 1) for each row, the same for ever."""
    return Dice(seed, stream, rows).at(np.array(cell, dtype=np.int64))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


class _Lattice:
    """Random corners in time, ``periods_s`` apart, a column for each period; what lies between is the user's matter."""

    def __init__(self, seed: int, stream: int, servers: int, periods_s: tuple[float, ...]) -> None:
        self.periods_s = np.array(periods_s)
        rows = np.arange(servers)[:, None] * len(periods_s) + np.arange(len(periods_s))
        self._dice = Dice(seed, stream, rows)
        self._phases = uniform(seed, stream + 1, rows)

    def around(self, times_s: Floats | float) -> tuple[Floats, Floats, Floats]:
        """Returns how far from the corner before (0 to 1), its value, and the step to the corner after."""
        position = times_s / self.periods_s + self._phases
        cell = np.floor(position)
        index = cell.astype(np.int64)
        before, after = self._dice.at(np.stack([index, index + 1]))
        return position - cell, before, after - before


class Pulses:
    """Rates that fluctuate around 1 within [0, 2], and their integrals; one column for each period.

    A column's integral is ``t + period / 1.5 * v(t)`` where ``v`` is value noise between 0 and 1, joined by smooth
    steps: bounded, so the rate returns to its mean, and steep nowhere, so the rate is never negative.
    """

    def __init__(self, seed: int, stream: int, servers: int, periods_s: tuple[float, ...]) -> None:
        self._lattice = _Lattice(seed, stream, servers, periods_s)

    def at(self, times_s: Floats) -> tuple[Floats, Floats]:
        """Returns the rates at each server's time and their integrals from a fixed moment to it.

        Args:
            times_s: shape (servers,).

        Returns:
            Two arrays of shape (servers, periods).
        """
        x, before, step = self._lattice.around(times_s[:, None])
        rates = 1.0 + step * (4.0 * x * (1.0 - x))
        grown = self._lattice.periods_s / 1.5 * (before + step * (x * x * (3.0 - 2.0 * x)))
        return rates, times_s[:, None] + grown


class Wobble:
    """Fluctuation within [-1, 1] around 0, straight between random corners; one column for each period."""

    def __init__(self, seed: int, stream: int, servers: int, periods_s: tuple[float, ...]) -> None:
        self._lattice = _Lattice(seed, stream, servers, periods_s)

    def at(self, time_s: float) -> Floats:
        """Returns shape (servers, periods)."""
        x, before, step = self._lattice.around(time_s)
        return np.asarray(2.0 * (before + step * x) - 1.0)


class WeeklyProfiles:
    """Activity by the hour of the local week, 0 to 1, straight between the hours, and its integral.

    Args:
        hours: shape (profiles, 168), Monday 00:00 first.
        chosen: which profile each server follows, shape (servers,).
    """

    WEEK_S: Final = 7 * 86_400.0
    _MONDAY_S: Final = 4 * 86_400.0  # the Unix epoch was a Thursday

    def __init__(self, hours: Floats, chosen: NDArray[np.integer]) -> None:
        self._edges = np.concatenate([hours, hours[:, :1]], axis=1)
        means = 0.5 * (self._edges[:, :-1] + self._edges[:, 1:])
        self._sums = np.concatenate([np.zeros((len(hours), 1)), np.cumsum(means, axis=1)], axis=1) * 3600.0
        self._chosen = chosen

    def _hour(self, local_s: Floats) -> tuple[Floats, NDArray[np.int64], Floats]:
        weeks, within = np.divmod(local_s - self._MONDAY_S, self.WEEK_S)
        hour = np.minimum(within / 3600.0, 167.999999)
        index = hour.astype(np.int64)
        return weeks, index, hour - index

    def at(self, local_s: Floats) -> tuple[Floats, Floats]:
        """Returns each server's activity at its local time, and its integral from a fixed moment, shape (servers,)."""
        weeks, index, x = self._hour(local_s)
        left = self._edges[self._chosen, index]
        rise = self._edges[self._chosen, index + 1] - left
        within = self._sums[self._chosen, index] + 3600.0 * x * (left + 0.5 * x * rise)
        return left + rise * x, weeks * self._sums[self._chosen, -1] + within
