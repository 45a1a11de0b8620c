"""What a server said of itself in the course of time: the descriptor that was valid when a row was written.

A follower tags a row with the descriptor valid at its sequence. The rows of a block have their sequences too, so that
whoever ships them later, from blocks, can give them the same tags. What must stay true: where the answer is not certain
that is said.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleet.model import ServerDescriptor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Told:
    """The descriptors of one server, at least one; `sequences[i]` (int64, ascending) is where `descriptors[i]` came.

    `is_cut`: there were more before the first, which are forgotten.
    """

    sequences: NDArray[np.int64]
    descriptors: tuple[ServerDescriptor, ...]
    is_cut: bool

    @classmethod
    def of(cls, listed: Sequence[tuple[int, ServerDescriptor]], is_cut: bool) -> "Told":
        sequences = np.array([sequence for sequence, _ in listed], np.int64)
        return cls(sequences=sequences, descriptors=tuple(descriptor for _, descriptor in listed), is_cut=is_cut)

    def at(self, sequences: NDArray[np.int64]) -> tuple[tuple[ServerDescriptor | None, ...], NDArray[np.bool_]]:
        """For each row's sequence what was valid (None: nothing had been told), and whether that is only likely: what
        was said before the first descriptor that is kept is taken to be the same."""
        places = self.sequences.searchsorted(sequences, side="right") - 1
        early = places < 0
        if self.is_cut:
            return tuple(map(self.descriptors.__getitem__, np.maximum(places, 0).tolist())), early
        known = (*self.descriptors, None)  # so that -1 is None
        return tuple(map(known.__getitem__, places.tolist())), np.zeros(len(sequences), np.bool_)
