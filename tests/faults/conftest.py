"""The table at the end of a run of faults, and where it is written to."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.report import Report

_REPORT = Report()


@pytest.fixture
def report() -> Iterator[Report]:
    """Where a test adds its row."""
    yield _REPORT


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the table; FAULTS_JSON names a file for the figures."""
    if _REPORT.rows:
        terminalreporter.section("faults")
        for line in _REPORT.lines():
            terminalreporter.line(line)
        if path := os.environ.get("FAULTS_JSON"):
            _REPORT.write(Path(path))
