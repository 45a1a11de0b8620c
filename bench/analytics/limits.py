"""Judging numbers that have limits of their own instead of a rival, as lines of the table that rivals are in.

What must stay true: zero is a number (no false alarm is the best there is), and what is not a number is void.
"""

import math

from bench.api.judged import LIMIT, Judged, void
from bench.report import number


def at_least(row: str, work: str, unit: str, ours: float, limit: float, *, remark: str = "") -> Judged:
    """So much or more."""
    return _judged(row, work, unit, LIMIT, ours, limit, at_most=False, remark=remark)


def at_most(row: str, work: str, unit: str, ours: float, limit: float, *, remark: str = "") -> Judged:
    """So much or less."""
    return _judged(row, work, unit, LIMIT, ours, limit, at_most=True, remark=remark)


def between(row: str, work: str, unit: str, ours: float, low: float, high: float, *, remark: str = "") -> Judged:
    """From one limit to another; beside it stands the one that is nearer."""
    is_high = ours > (low + high) / 2
    return _judged(
        row, work, unit, f"{low:g} to {high:g}", ours, high if is_high else low, at_most=is_high, remark=remark
    )


def _judged(
    row: str, work: str, unit: str, yardstick: str, ours: float, limit: float, *, at_most: bool, remark: str
) -> Judged:
    if not math.isfinite(ours):
        return void(row, work, f"measured {ours} {unit}")
    met = ours <= limit if at_most else ours >= limit
    return Judged(
        row=row,
        work=work,
        yardstick=yardstick,
        unit=unit,
        ours=ours,
        theirs=limit,
        ratio=ours / limit,
        bound=1.0,
        at_most=at_most,
        met=met,
        note="" if met else f"misses: {number(ours)} instead of {number(limit)}",
        remark=remark,
    )
