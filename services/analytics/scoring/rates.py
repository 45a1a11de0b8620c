"""Counters become rates.

What must stay true: a counter that falls was reset, and its rate is unknown then (NaN), not negative and not the whole
new count; a missing sample makes the next rate one over the longer time; a gauge passes as it is.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from services.analytics.scoring.arrays import Columns, Flags, Floats, State

MAX_SPAN_S: Final = 3_600.0
"""Over a longer silence no rate is given: it would be the mean of what nobody saw."""
_NEVER: Final = -1e18


@dataclass(slots=True, eq=False)
class RateState(Columns):
    """The last value of each series, and when it was."""

    value: Floats
    when_s: Floats

    SHAPES: ClassVar = {"value": ((), np.float64, 0.0), "when_s": ((), np.float64, _NEVER)}


class Rates:
    """Turns those of N series that are counters into rates a second."""

    def __init__(self, is_counter: Flags) -> None:
        self.is_counter = is_counter
        self.state = RateState.fresh(len(is_counter))

    def update(self, time_s: float | Floats, values: Floats) -> Floats:
        """The values of one window with counters as rates; NaN where a rate is not known.

        Args:
            time_s: when the values were, of all or of each, seconds since the epoch.
            values: shape (N,).
        """
        state = self.state
        known = np.isfinite(values)
        passed = time_s - state.when_s
        usable = known & (passed > 0) & (passed <= MAX_SPAN_S) & (values >= state.value)
        rates = np.where(usable, values - state.value, np.nan) / np.where(usable, passed, 1.0)
        np.copyto(state.value, values, where=known)
        np.copyto(state.when_s, time_s, where=known)
        return np.where(self.is_counter, rates, values)

    def arrays(self) -> State:
        """All that is known."""
        return self.state.arrays("rates.") | {"is_counter": self.is_counter.copy()}

    def restore(self, arrays: State) -> None:
        """Takes over what `arrays` gave; ValueError, and nothing changed, when it does not fit."""
        is_counter = arrays.get("is_counter")
        if is_counter is None or is_counter.dtype != np.bool_ or is_counter.ndim != 1:
            raise ValueError("the array is_counter is not one of flags")
        self.state = RateState.of_arrays(arrays, "rates.", len(is_counter))
        self.is_counter = is_counter.copy()
