"""The state of all watched series as columns: one cell of each array is one metric of one server.

Arrays instead of objects, because a tick of the whole fleet is then a few dozen numpy calls, however many servers there
are. What must stay true: every array has the same length; what is saved is exactly these arrays, so that a field added
here is saved too.
"""

from dataclasses import dataclass, fields
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

NEVER_MS: Final = np.iinfo(np.int64).min
"""A time before all times."""


@dataclass(slots=True, kw_only=True, eq=False)
class Cells:
    """Arrays of one length; times are milliseconds since the Unix epoch.

    Attributes:
        mean, variance: what is usual, exponentially weighted.
        points: how many were learnt.
        last_ms: time of the newest; an older or equal one is not judged again.
        high: abnormal points in a row while no finding is open.
        calm: normal points in a row while one is.
        is_open: whether a finding is open.
        rest_until_ms: no finding opens before.
        start_ms, abnormal_ms: first and last abnormal point of the stretch.
        start_deviation: the standard deviation at its start.
        peak_score, peak_ms, peak_value, peak_low, peak_high: its furthest point, and what was expected then.
    """

    mean: Floats
    variance: Floats
    points: Integers
    last_ms: Integers
    high: Integers
    calm: Integers
    is_open: Flags
    rest_until_ms: Integers
    start_ms: Integers
    abnormal_ms: Integers
    start_deviation: Floats
    peak_score: Floats
    peak_ms: Integers
    peak_value: Floats
    peak_low: Floats
    peak_high: Floats

    @classmethod
    def fresh(cls, size: int) -> Self:
        """Cells that have seen nothing."""
        arrays = {name: np.zeros(size, dtype) for name, dtype in _DTYPES.items()}
        arrays["last_ms"][:] = arrays["rest_until_ms"][:] = NEVER_MS
        return cls(**arrays)

    @classmethod
    def of_arrays(cls, arrays: dict[str, NDArray[Any]], size: int) -> Self:
        """Cells from saved arrays.

        Raises:
            ValueError: an array is missing, or not of the type or length it must have.
        """
        for name, dtype in _DTYPES.items():
            array = arrays.get(name)
            if array is None or array.dtype != dtype or array.shape != (size,):
                raise ValueError(f"the array {name} is not {size} values of {np.dtype(dtype)}")
        return cls(**{name: np.ascontiguousarray(arrays[name]) for name in _DTYPES})

    def arrays(self, size: int) -> dict[str, NDArray[Any]]:
        """Copies of the first `size` cells of each array."""
        return {name: getattr(self, name)[:size].copy() for name in _DTYPES}

    def grown(self, size: int) -> Self:
        """These cells with fresh ones after them, `size` in all."""
        more = type(self).fresh(size - len(self.mean))
        return type(self)(**{name: np.concatenate((getattr(self, name), getattr(more, name))) for name in _DTYPES})

    def select(self, keep: Flags) -> Self:
        """Only the cells where `keep` is true, in their order."""
        return type(self)(**{name: getattr(self, name)[keep] for name in _DTYPES})


_TYPES: Final[dict[object, Any]] = {Floats: np.float64, Integers: np.int64, Flags: np.bool_}
_DTYPES: Final[dict[str, Any]] = {field.name: _TYPES[field.type] for field in fields(Cells)}
