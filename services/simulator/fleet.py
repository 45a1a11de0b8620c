"""Who is in the simulated fleet: names, roles, places and hardware.

What must stay true: the same seed gives the same fleet, and a larger fleet begins with the smaller one, so that raising
``SIMULATOR_SERVERS`` adds servers and renames none.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Final

import numpy as np

from fleet.model import ServerDescriptor

MAX_SERVERS: Final = 20_000
"""1 M points a second at the default interval, the ceiling the product is built for."""

GIB: Final = 1024**3

# Twenty servers are one rack: each further rack is the same mixture, placed anew.
_RACK_ROLES: Final = (
    "web", "db", "api", "cache", "web", "worker", "api", "lb", "web", "db",
    "queue", "api", "worker", "web", "search", "cache", "api", "db", "web", "worker",
)  # fmt: skip
_RACK_ENVIRONMENTS: Final = ("production",) * 12 + ("staging",) * 5 + ("development",) * 3

LOCATIONS: Final[dict[str, float]] = {"frankfurt": 1.0, "virginia": -5.0, "singapore": 8.0, "sao-paulo": -3.0}
"""Where a server stands, and its hours ahead of UTC: the daily wave follows the local clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedServer:
    """One server and the hardware that its values are scaled with.

    Attributes:
        utc_offset_s: local time less UTC, seconds.
        memory_bytes, swap_bytes, disk_root_bytes, disk_data_bytes, disk_logs_bytes: sizes.
    """

    descriptor: ServerDescriptor
    utc_offset_s: float
    memory_bytes: int
    swap_bytes: int
    disk_root_bytes: int
    disk_data_bytes: int
    disk_logs_bytes: int


def build_fleet(count: int, *, seed: int, interval_ms: int) -> tuple[SimulatedServer, ...]:
    """Returns the first ``count`` servers of the fleet that belongs to ``seed``.

    Args:
        count: 1 to ``MAX_SERVERS``.
        seed: any integer from 0.
        interval_ms: what the servers say of how often they report, milliseconds.
    """
    assert 1 <= count <= MAX_SERVERS
    numbers: Counter[str] = Counter()
    servers: list[SimulatedServer] = []
    places = list(LOCATIONS)
    for rack in range(-(-count // len(_RACK_ROLES))):
        random = np.random.default_rng([seed, rack])
        environments = random.permutation(_RACK_ENVIRONMENTS)
        choices = random.integers(0, 1 << 30, size=(len(_RACK_ROLES), 5))
        for role, environment, picks in zip(_RACK_ROLES, environments, choices.tolist(), strict=True):
            numbers[role] += 1
            server_id = f"{role}-{numbers[role]:02d}"
            location = places[picks[0] % len(places)]
            memory = (32, 64, 128)[picks[1] % 3] * GIB
            servers.append(
                SimulatedServer(
                    descriptor=ServerDescriptor(
                        server_id=server_id,
                        hostname=f"{server_id}.{location}.example.net",
                        environment=str(environment),
                        role=role,
                        location=location,
                        report_interval_ms=interval_ms,
                    ),
                    utc_offset_s=LOCATIONS[location] * 3600.0,
                    memory_bytes=memory,
                    swap_bytes=memory // 8,
                    disk_root_bytes=(100, 200, 400)[picks[2] % 3] * GIB,
                    disk_data_bytes=(500, 1000, 2000)[picks[3] % 3] * GIB,
                    disk_logs_bytes=(50, 100)[picks[4] % 2] * GIB,
                )
            )
    return tuple(servers[:count])
