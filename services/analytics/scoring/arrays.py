"""State as named arrays of which the last axis is the series (or servers).

What must stay true: what is saved is every field, so that one added is saved too; arrays of another shape or type are
refused as a whole.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
State = dict[str, NDArray[Any]]


@dataclass(slots=True, eq=False)
class Columns:
    """Base of a state; a subclass names its arrays and says how they begin."""

    SHAPES: ClassVar[dict[str, tuple[tuple[int, ...], Any, float]]]
    """For each field the axes before the last, the type, and the value it begins with."""

    @classmethod
    def fresh(cls, size: int) -> Self:
        """State that has seen nothing."""
        return cls(**{name: np.full((*axes, size), start, dtype) for name, (axes, dtype, start) in cls.SHAPES.items()})

    @classmethod
    def of_arrays(cls, arrays: State, prefix: str, size: int) -> Self:
        """The state that `arrays` gave.

        Raises:
            ValueError: an array is missing, or not of the type or shape it must have.
        """
        own = {}
        for name, (axes, dtype, _) in cls.SHAPES.items():
            array = arrays.get(prefix + name)
            if array is None or array.dtype != dtype or array.shape != (*axes, size):
                raise ValueError(f"the array {prefix}{name} is not {(*axes, size)} values of {np.dtype(dtype)}")
            own[name] = array.copy()
        return cls(**own)

    def arrays(self, prefix: str) -> State:
        """Copies of all arrays."""
        return {prefix + name: getattr(self, name).copy() for name in self.SHAPES}

    def rearranged(self, source: Integers) -> Self:
        """For each place of the new state the place in this one that it goes on from, -1 for a fresh one."""
        new, known = type(self).fresh(len(source)), source >= 0
        for name in self.SHAPES:
            getattr(new, name)[..., known] = getattr(self, name)[..., source[known]]
        return new

    def sized(self, size: int) -> Self:
        """The first `size` places of this state, with fresh ones after its own where it has fewer."""
        new = type(self).fresh(size)
        for name in self.SHAPES:
            own = getattr(self, name)[..., :size]
            getattr(new, name)[..., : own.shape[-1]] = own
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(getattr(self, name).nbytes for name in self.SHAPES)
