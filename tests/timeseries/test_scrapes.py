"""Series that come and go, scraped at times of their own, cost at most twice what they would cost as a matrix."""

import json
import subprocess
import sys

import pytest

from tests.timeseries import scrapes
from tests.timeseries.stores import ROOT

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

AT_MOST = 2.0


def measured(shape: str) -> dict[str, float]:
    """In a process of its own, so that its memory is its own."""
    command = [sys.executable, "-m", scrapes.__name__, shape]
    answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(answer.stdout)
    return found


@pytest.fixture(scope="module")
def matrix() -> dict[str, float]:
    return measured("matrix")


@pytest.mark.parametrize("shape", ["targets", "newcomers", "whole"])
def test_disk_and_memory_are_within_twice_those_of_a_matrix(matrix: dict[str, float], shape: str) -> None:
    found = measured(shape)
    assert found["points"] == matrix["points"]
    for figure in ("block_bytes_per_point", "head_bytes_per_point", "resident_bytes_per_point"):
        assert found[figure] <= AT_MOST * matrix[figure], (figure, found, matrix)
