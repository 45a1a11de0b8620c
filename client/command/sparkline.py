"""A series in one line of text."""

import math
from typing import Final

import numpy as np

from client.history import Floats

BARS: Final = "▁▂▃▄▅▆▇█"
ASCII_BARS: Final = "_.-=+*%#"


def sparkline(times: Floats, values: Floats, *, start: float, end: float, width: int, bars: str = BARS) -> str:
    """One character for each of `width` equal parts of `[start, end)`: the mean of its values, or a blank."""
    finite = np.isfinite(values) & (times >= start) & (times < end)
    if width < 1 or end <= start or not finite.any():
        return " " * max(width, 0)
    cells = np.minimum(((times[finite] - start) * (width / (end - start))).astype(np.int64), width - 1)
    counts = np.bincount(cells, minlength=width)
    low, high = float(values[finite].min()), float(values[finite].max())
    scale = high - low
    if not math.isfinite(scale):
        scale = 0.0
    parts = (values[finite] - low) / scale if scale > 0 else np.full(int(finite.sum()), 0.5)
    sums = np.bincount(cells, weights=parts, minlength=width)
    levels = sums / np.maximum(counts, 1) * (len(bars) - 1)
    return "".join(bars[round(float(level))] if count else " " for level, count in zip(levels, counts, strict=True))
