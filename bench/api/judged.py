"""From what was measured to a judged table: ours, the yardstick, their ratio, what it must be, how much it misses."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.report import number

NOTHING: Final = "-"
LIMIT: Final = "limit"
"""The yardstick of rows that have none: what they may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One line of the table.

    Attributes:
        row: which row of the bench it belongs to.
        work: what was done.
        yardstick: what the same was done with.
        unit: of `ours` and `theirs`.
        ratio: ours to theirs; None: not measured, or void.
        bound: what the ratio must be at least, or at most (`at_most`).
        met: whether it is; None without a ratio.
        note: by how much it is missed, why it was not measured, or why it is void.
        remark: what else a reader should see beside it.
    """

    row: str
    work: str
    yardstick: str
    unit: str
    ours: float | None
    theirs: float | None
    ratio: float | None
    bound: float
    at_most: bool
    met: bool | None
    note: str = ""
    remark: str = ""

    @property
    def must(self) -> str:
        """The bound in words."""
        return f"{'<=' if self.at_most else '>='} {self.bound:.3g}x"


def judge(
    row: str,
    work: str,
    yardstick: str,
    unit: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    bound: float,
    *,
    at_most: bool = False,
    remark: str = "",
) -> Judged:
    """Compares what was measured in each round; all of it is positive, or something was not measured at all.

    Told are the medians and the median of the rounds' ratios, which is not always the ratio of the medians: the turns
    of a round follow one another, and what else the machine does then is in both.
    """
    if min(*ours, *theirs) <= 0:
        return void(row, work, f"measured {ours} and {theirs} {unit}")
    ratio = statistics.median(mine / its for mine, its in zip(ours, theirs, strict=True))
    met = ratio <= bound if at_most else ratio >= bound
    missed = ratio / bound if at_most else bound / ratio
    note = "" if met else f"misses: {ratio:.2f}x instead of {bound:.3g}x ({100 * (missed - 1):.0f} %)"
    return Judged(
        row=row,
        work=work,
        yardstick=yardstick,
        unit=unit,
        ours=statistics.median(ours),
        theirs=statistics.median(theirs),
        ratio=ratio,
        bound=bound,
        at_most=at_most,
        met=met,
        note=note,
        remark=remark,
    )


def within(row: str, work: str, unit: str, ours: float, limit: float, *, remark: str = "") -> Judged:
    """Something that may be so much and no more."""
    return judge(row, work, LIMIT, unit, [ours], [limit], 1.0, at_most=True, remark=remark)


def absent(row: str, work: str, why: str) -> Judged:
    """What could not be measured here."""
    return _without(row, work, f"not measured: {why}")


def void(row: str, work: str, why: str) -> Judged:
    """What was measured and means nothing, since something went wrong."""
    return _without(row, work, f"void: {why}")


def _without(row: str, work: str, note: str) -> Judged:
    return Judged(
        row=row,
        work=work,
        yardstick=NOTHING,
        unit=NOTHING,
        ours=None,
        theirs=None,
        ratio=None,
        bound=0.0,
        at_most=False,
        met=None,
        note=note,
    )


def table(found: list[Judged]) -> str:
    """As Markdown, for a terminal and docs/benchmarks.md."""
    head = "| work | yardstick | unit | ours | yardstick's | ratio | must be | |"
    lines = [head, "|---|---|---|---:|---:|---:|---:|---|"]
    for row in found:
        verdict = "; ".join(filter(None, (row.note or "met", row.remark)))
        ratio, must = ("", "") if row.ratio is None else (f"{row.ratio:.2f}x", row.must)
        numbers = f"{number(row.ours)} | {number(row.theirs)} | {ratio} | {must}"
        lines.append(f"| {row.work} | {row.yardstick} | {row.unit} | {numbers} | {verdict} |")
    return "\n".join(lines)
