"""A disk that is really full: senders are refused with a reason, nothing acknowledged goes, and space ends it."""

from pathlib import Path

import pytest

from tests.harness.small_disk import small_disk

DISK_BYTES = 40 << 20


@pytest.mark.fault("disk of the spool full")
@pytest.mark.parametrize("part", ["engine", "service"])
def test_a_full_disk_refuses_loses_nothing_and_recovers(tmp_path: Path, part: str) -> None:
    with small_disk(DISK_BYTES) as disk:
        disk.run("tests.timeseries.full_disk", part, str(tmp_path), within_s=100)


def test_a_start_on_a_full_disk_says_that_it_is_full() -> None:
    """It said "disk I/O error": the look of a broken disk, where room was all that it wanted."""
    with small_disk(1 << 20) as disk:
        disk.run("tests.timeseries.filled_disk", within_s=60)
