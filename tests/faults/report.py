"""What each fault did, as a table at the end of the run: `make faults` is read, not only passed."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

COLUMNS = (
    ("store", "fault"),
    ("fault for", "down_s"),
    ("shown after", "shown_s"),
    ("points sent", "sent"),
    ("acknowledged", "acknowledged"),
    ("found", "found"),
    ("missing", "missing"),
    ("doubled", "doubled"),
    ("recovered in", "recovery_s"),
    ("reads p99", "p99_ratio"),
)


@dataclass(slots=True, kw_only=True)
class Row:
    """One fault.

    Attributes:
        fault: the store and what was done to it.
        down_s: how long that lasted.
        shown_s: until the status call showed it; None: it is not to show.
        sent: points that were sent, from the start of the test on.
        acknowledged: of those, by us.
        found: in the store, after it had caught up; facts where the store keeps facts.
        missing: acknowledged and not found, there or in the engine.
        doubled: found more than once, there or in the engine.
        recovery_s: from the end of the fault until the store had everything.
        p99_ratio: of reads through the gateway, during the fault by before it; None: not measured.
    """

    fault: str
    down_s: float = 0.0
    shown_s: float | None = None
    sent: int = 0
    acknowledged: int = 0
    found: int = 0
    missing: int = 0
    doubled: int = 0
    recovery_s: float = 0.0
    p99_ratio: float | None = None


@dataclass(slots=True)
class Report:
    """The rows of a run."""

    rows: list[Row] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A table in aligned columns."""
        cells = [[title for title, _ in COLUMNS]]
        cells += [[_text(name, getattr(row, name)) for _, name in COLUMNS] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return [lines[0], "-" * len(lines[0]), *lines[1:]]

    def write(self, path: Path) -> None:
        """The rows as JSON."""
        path.write_text(json.dumps([asdict(row) for row in self.rows], indent=1))


def _text(name: str, value: float | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if name == "p99_ratio":
        return f"{value:.2f}x"
    return f"{value:.1f} s" if name.endswith("_s") else f"{value:,}"
