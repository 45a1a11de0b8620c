"""Servers that are not well: how thick their abnormal minutes come, and how many of their counters of errors run away.

A server that has been like that for a while is not nearer to failing than one that has just begun: anomalies count by
how much thicker they are than in the hours before.

What must stay true: minutes in which a server was not judged change nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from services.analytics.prediction import parameters as p
from services.analytics.scoring.arrays import Columns, Flags, Floats, Integers, State


@dataclass(slots=True, eq=False)
class SymptomState(Columns):
    """Of each server, 0 to 1: which part of the last minutes and of the last hours was abnormal, and which part of its
    counters of errors ran away in the last minutes."""

    lately: Floats
    before: Floats
    errors: Floats

    SHAPES: ClassVar = {
        "lately": ((), np.float64, 0.0),
        "before": ((), np.float64, 0.0),
        "errors": ((), np.float64, 0.0),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class SymptomWindow:
    """What one minute foretells, shape (S,) each: the probabilities of failing for anomalies and for errors alone, and
    the shares that they are made of."""

    anomalies: Floats
    errors: Floats
    lately: Floats
    before: Floats


class Symptoms:
    """The symptoms of S servers."""

    def __init__(self, state: SymptomState) -> None:
        self.state = state

    def update(self, abnormal: Flags, judged: Flags, owners: Integers, growing: Flags, counts: Flags) -> SymptomWindow:
        """Takes one minute.

        Args:
            abnormal: which servers were far from usual, shape (S,).
            judged: which could be judged, shape (S,).
            owners: the server of each counter of errors, shape (E,).
            growing: which of these run away, shape (E,).
            counts: which of these could be judged, shape (E,).
        """
        state, size = self.state, len(judged)
        number = np.bincount(owners[counts], minlength=size)
        share = np.bincount(owners[growing & counts], minlength=size) / np.maximum(number, 1)
        state.lately += p.LATELY * judged * (abnormal - state.lately)
        state.before += p.BEFORE * judged * (abnormal - state.before)
        state.errors += p.LATELY * (number > 0) * (share - state.errors)
        thicker = np.where(judged, state.lately - state.before, 0.0)
        return SymptomWindow(
            anomalies=np.interp(thicker, *p.ANOMALIES),
            errors=np.interp(np.where(share > 0, state.errors, 0.0), *p.ERRORS),
            lately=state.lately.copy(),
            before=state.before.copy(),
        )

    def arrays(self) -> State:
        """All that is known; copies."""
        return self.state.arrays("symptoms.")
