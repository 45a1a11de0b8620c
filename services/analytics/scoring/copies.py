"""Series that say the same thing are one: bytes and percent of one disk, used and free of one memory.

Each series' departures are kept as a sketch, their sum with the same random signs for all series; the angle between two
sketches is about the correlation of the series. Of c series that are copies of each other each weighs 1 / c.

Only copies: to weigh down all that is correlated was tried and costs much (.36 of the events found at .25 false alarms
a day, for .65), as what moves together when something breaks is what an incident is known by. Fifteen copies of one
metric of a server cost .09 and .13 of recall at 1 and .25 false alarms a day without this, and less than .02 with it.

What must stay true: signs are a function of time alone; weights are found a server in each window, in turn, and of a
server with many series a part, so that no window costs more than about 2 ms and 5 MB for them: all at once 5,000 series
of one server took 1.5 s and 100 MB, 20,000 took 25 s and 2 GB.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Final

import numpy as np

from services.analytics.scoring import parameters as p
from services.analytics.scoring.arrays import Columns, Flags, Floats, Integers, Singles, State

_SIGNS: Final = 32
_TURN_WINDOWS: Final = 30
"""Each server's turn comes at least after so many windows."""
_COMPARED: Final = 1 << 18
"""Pairs of series that are compared in one window; all of a server of 512."""
_LEAST: Final = 1e-6
_MASK: Final = (1 << 64) - 1


@dataclass(slots=True, eq=False)
class CopiesState(Columns):
    """Of each series: its sketch, the mean and number of departures in it, and its weight."""

    sketch: Singles
    mean: Floats
    count: Floats
    weight: Floats

    SHAPES: ClassVar = {
        "sketch": ((_SIGNS,), np.float32, 0.0),
        "mean": ((), np.float64, 0.0),
        "count": ((), np.float64, 0.0),
        "weight": ((), np.float64, 1.0),
    }


class Copies:
    """The weights of N series that belong to servers."""

    def __init__(self, starts: Integers) -> None:
        """`starts`: the first series of each server, and behind the last."""
        self._turns = list(turns(starts))
        self.state = CopiesState.fresh(int(starts[-1]))
        self._turn = 0

    def update(self, time_s: float, step_s: float, departures: Floats, counts: Flags) -> Floats:
        """The weights in a window, found from the windows before it; shape (N,)."""
        state = self.state
        if self._turn < len(self._turns):
            self._weigh(*self._turns[self._turn])
        self._turn = (self._turn + 1) % max(len(self._turns), _TURN_WINDOWS)
        weights = state.weight.copy()
        state.count += counts
        rate = np.maximum(step_s / p.MEMORY_S, 1.0 / np.maximum(state.count, 1.0)) * counts
        apart = np.where(counts, departures - state.mean, 0.0)
        state.mean += rate * apart
        kept = np.where(counts, 1.0 - min(step_s / p.MEMORY_S, 0.5), 1.0).astype(np.float32)
        state.sketch *= kept
        state.sketch += _signs(time_s)[:, None] * apart.astype(np.float32)
        return weights

    def _weigh(self, server: slice, part: slice) -> None:
        """Finds the weights of a part of a server's series."""
        sketch = self.state.sketch[:, server]
        length = np.sqrt((sketch * sketch).sum(axis=0))
        # before enough is in them, sketches are alike by chance
        told = (length > _LEAST) & (self.state.count[server] >= p.LEARN_WINDOWS)
        unit = np.where(told, sketch / np.maximum(length, _LEAST), 0.0)
        own = unit[:, part.start - server.start : part.stop - server.start]
        alike = (own.T @ unit) ** 2 >= p.COPY_SQUARED_CORRELATION
        self.state.weight[part] = 1.0 / np.maximum(alike.sum(axis=1), 1)

    def arrays(self) -> State:
        """All that is known."""
        return self.state.arrays("copies.") | {"copies_turn": np.array([self._turn], np.int64)}

    def restore(self, arrays: State) -> None:
        """Takes over what `arrays` gave; ValueError, and nothing changed, when it does not fit."""
        turn = arrays.get("copies_turn")
        if turn is None or turn.shape != (1,) or turn.dtype != np.int64:
            raise ValueError("the array copies_turn is not 1 value of int64")
        self.state = CopiesState.of_arrays(arrays, "copies.", len(self.state.mean))
        self._turn = int(turn[0])


def turns(starts: Integers) -> Iterator[tuple[slice, slice]]:
    """For each turn a server's series and the part of them that is weighed; `starts` as in `Copies`."""
    for first, end in pairwise(starts.tolist()):
        server, size = slice(first, end), max(_COMPARED // max(end - first, 1), 1)
        for at in range(first, end, size):
            yield server, slice(at, min(at + size, end))


def _signs(time_s: float) -> Singles:
    """-1 or 1 each, by splitmix64 of the time."""
    bits = (int(time_s) * 0x9E3779B97F4A7C15) & _MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    bits ^= bits >> 31
    return np.array([1.0 if bits >> place & 1 else -1.0 for place in range(_SIGNS)], np.float32)
