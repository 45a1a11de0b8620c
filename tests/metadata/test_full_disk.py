"""A disk that is really full: recordings are refused with a reason, nothing acknowledged goes, and room ends it."""

import pytest

from tests.harness.small_disk import small_disk

DISK_BYTES = 24 << 20


@pytest.mark.fault("disk of the journal of facts full")
@pytest.mark.full
def test_a_full_disk_refuses_loses_nothing_and_recovers() -> None:
    with small_disk(DISK_BYTES) as disk:
        disk.run("tests.metadata.full_disk", within_s=100)
