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
