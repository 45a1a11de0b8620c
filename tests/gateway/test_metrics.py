"""What `GET /metrics` says of stores."""

import pytest

from gateway.metrics import disk_free_bytes
from openmanager.fleet.v1 import status_pb2


@pytest.mark.parametrize(
    ("name", "role", "free", "told"),
    [
        ("engine", "primary", 5, 5),
        ("engine", "primary", 0, 0),
        ("postgresql", "embedded", 0, 0),
        ("postgresql", "primary", 0, None),
        ("redis", "follower", 0, None),
    ],
)
def test_a_disk_that_cannot_be_seen_is_not_told_as_a_full_one(
    name: str, role: str, free: int, told: int | None
) -> None:
    assert disk_free_bytes(status_pb2.StoreStatus(name=name, role=role, disk_free_bytes=free)) == told
