"""What each fault did, as a table at the end of the run: `make faults` is read, not only passed.

A pytest plugin, loaded by tests/conftest.py. A test that breaks something is marked `fault("what is done")` and may
fill in its `fault_row` with what it counted. FAULTS_JSON names a file for the figures.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

COLUMNS = (
    ("fault", "fault"),
    ("result", "result"),
    ("test took", "took_s"),
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
        result: what the test came to.
        took_s: how long it took.
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
    result: str = "not run"
    took_s: float = 0.0
    down_s: float | None = None
    shown_s: float | None = None
    sent: int | None = None
    acknowledged: int | None = None
    found: int | None = None
    missing: int | None = None
    doubled: int | None = None
    recovery_s: float | None = None
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
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in cells
        ]
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


_REPORT = Report()
_ROW = pytest.StashKey[Row]()


@pytest.fixture
def fault_row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """The row of a test that is marked as a fault."""
    yield request.node.stash[_ROW]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives each fault its row."""
    for item in items:
        marker = item.get_closest_marker("fault")
        if marker is not None:
            callspec = getattr(item, "callspec", None)
            which = f" ({callspec.id})" if callspec is not None else ""
            item.stash[_ROW] = Row(fault=f"{marker.args[0]}{which}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Notes what became of it."""
    report: Any = yield
    row = item.stash.get(_ROW, None)
    if row is not None:
        row.took_s += report.duration
        if report.when == "call" or report.outcome != "passed":
            if row.result == "not run":
                _REPORT.rows.append(row)
            row.result = str(report.outcome)
    return report  # type: ignore[no-any-return]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the table."""
    if _REPORT.rows:
        terminalreporter.section("faults")
        for line in _REPORT.lines():
            terminalreporter.line(line)
        if path := os.environ.get("FAULTS_JSON"):
            _REPORT.write(Path(path))
