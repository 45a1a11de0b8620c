"""The simulator's fleet shown to the detector that the service runs, on a virtual clock: nobody waits.

The rows of the bench that need a fleet (a quiet week, scenarios, a restart) and the tests of scenarios play it.

What must stay true: the detector is fed as the service feeds it, a batch at a time: `advance`, `observe`, `settle`,
with the time at which the batch would have been journaled; a finding is known when it is told, not when what it tells
of began, which for a minute's finding is up to 75 s earlier; the same seed gives the same rows and the same findings.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from fleet.anomaly import Anomaly
from fleet.model import Rows
from services.analytics.detect import SetColumns
from services.analytics.fleet_detector import FleetDetector
from services.analytics.scores import Scored
from services.simulator.catalogue import METRIC_SET
from services.simulator.fleet import build_fleet
from services.simulator.synthetic import SyntheticSource

MONDAY_MS: Final = 1_760_313_600_000
"""2025-10-13, 00:00 UTC."""
DAY_MS: Final = 86_400_000
HOUR_MS: Final = 3_600_000
MINUTE_MS: Final = 60_000
TICK_MS: Final = 10_000
"""As the simulator ticks when nothing is set."""
ON_THE_WAY_MS: Final = 300
"""From a row's time until it is journaled."""
LEARN_MS: Final = 2 * DAY_MS + 2 * HOUR_MS
"""A day until series are judged, another until servers are, and the first half-hours of their levels."""

_COLUMNS: Final = SetColumns.of(METRIC_SET)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A finding as it was told last, and when it was told first, milliseconds since the epoch by the tail's time."""

    finding: Anomaly
    told_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What came of showing a detector a batch.

    Attributes:
        findings: those that changed.
        scored: the servers' scores, where a minute was judged.
        cost_ms: processor time.
    """

    findings: list[Anomaly]
    scored: list[Scored]
    cost_ms: float


class SimulatedFleet:
    """Servers, and a detector that is shown what they report."""

    def __init__(
        self, servers: int, *, seed: int, tick_ms: int = TICK_MS, detector: FleetDetector | None = None
    ) -> None:
        """`detector`: one that goes on; a new one when there is none."""
        made = build_fleet(servers, seed=seed, interval_ms=tick_ms)
        self.detector = detector or FleetDetector()
        self.source = SyntheticSource(made, seed=seed, interval_ms=tick_ms)
        self.server_ids = tuple(server.descriptor.server_id for server in made)
        self.told: dict[str, Told] = {}
        """All findings so far, by id."""
        self._tick_ms = tick_ms

    async def play(
        self, start_ms: int, end_ms: int, see: Callable[[Rows, Shown], None] | None = None
    ) -> tuple[list[Told], list[Shown]]:
        """Plays the ticks of `[start_ms, end_ms)`.

        Args:
            see: is shown the rows, too, and what came of them.

        Returns:
            The findings that changed, as they are at the end, and what came of each batch.
        """
        changed, came = set[str](), list[Shown]()
        first = -(-start_ms // self._tick_ms)
        for tick in range(first, -(-end_ms // self._tick_ms)):
            time_ms = tick * self._tick_ms
            for batch in await self.source.batches(tick, time_ms):
                now_ms = time_ms + ON_THE_WAY_MS
                shown = show(self.detector, batch.rows, now_ms)
                came.append(shown)
                for one in shown.findings:
                    self._tell(one, now_ms)
                    changed.add(one.id)
                if see is not None:
                    see(batch.rows, shown)
        return [self.told[one] for one in self.told if one in changed], came

    def _tell(self, finding: Anomaly, now_ms: int) -> None:
        before = self.told.get(finding.id)
        self.told[finding.id] = Told(finding=finding, told_ms=before.told_ms if before else now_ms)


def show(detector: FleetDetector, rows: Rows, now_ms: int) -> Shown:
    """Shows a detector a batch, each server once."""
    began = time.process_time()
    found = detector.advance(now_ms)
    found += detector.observe(_COLUMNS, rows.server_ids, rows.times_ms, rows.values, now_ms)
    found += detector.settle(now_ms)
    scored = detector.take_scores()
    return Shown(findings=found, scored=scored, cost_ms=1e3 * (time.process_time() - began))


def first_hour_ms(seed: int) -> int:
    """When the fleet of a seed begins: on all days of the week in turn, at a drawn hour.

    What is not known yet of weekends or of working days is a reason for false findings, and an incident at night is
    another than one at noon."""
    return MONDAY_MS + seed % 7 * DAY_MS + int(np.random.default_rng(seed).integers(24)) * HOUR_MS
