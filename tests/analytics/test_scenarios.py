"""The detector on the simulated fleet: silent while nothing is wrong, and right about what is, when something is.

Days of ticks are made here and shown to the detector one a minute; nobody waits.

Measured besides, once: 20 quiet servers of 511 for a week, seed 7: 1 finding with a tick a minute, 4 with one every ten
seconds (raw scores 4.0 to 4.4, three of them on the first Monday, when one Friday is all that is known of weekdays).
"""

import functools
from dataclasses import dataclass

import pytest

from fleet.anomaly import Anomaly
from services.analytics.detect import DetectorState
from services.analytics.fleet_detector import FleetDetector
from services.simulator.catalogue import METRIC_SET
from services.simulator.fleet import build_fleet
from services.simulator.synthetic import SyntheticSource
from tests.analytics.fakes import show

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

SERVERS, SEED, TICK_MS = 6, 7, 60_000
START_MS = 1_760_054_400_000  # Friday 2025-10-10
DAYS = 3
END_MS = START_MS + DAYS * 86_400_000
INJECTED_MS = END_MS + 2 * 3_600_000
MINUTE_MS = 60_000


@dataclass
class Fleet:
    """A simulated fleet, and the detector that it is shown to."""

    detector: FleetDetector
    source: SyntheticSource

    async def play(self, start_ms: int, end_ms: int) -> dict[str, Anomaly]:
        """What is found, by id, as it was told last."""
        found: dict[str, Anomaly] = {}
        for time_ms in range(start_ms, end_ms, TICK_MS):
            for batch in await self.source.batches(time_ms // TICK_MS, time_ms):
                for one in show(self.detector, batch.rows, time_ms + 300, METRIC_SET):
                    found[one.id] = one
        return found


def new_fleet() -> Fleet:
    servers = build_fleet(SERVERS, seed=SEED, interval_ms=TICK_MS)
    return Fleet(FleetDetector(), SyntheticSource(servers, seed=SEED, interval_ms=TICK_MS))


@functools.cache
def _learnt() -> dict[str, DetectorState]:
    return {}


async def learnt() -> Fleet:
    """A fleet of which three quiet days are known, in which nothing was found."""
    if not _learnt():
        fleet = new_fleet()
        assert await fleet.play(START_MS, END_MS) == {}
        _learnt()["state"] = fleet.detector.state()
    fleet = new_fleet()
    fleet.detector.restore(_learnt()["state"])
    return fleet


async def test_a_quiet_fleet_makes_no_finding() -> None:
    fleet = await learnt()
    assert await fleet.play(END_MS, END_MS + 8 * 3_600_000) == {}
    assert fleet.detector.learned == 1.0


async def played(scenario: str, hours: float, after_h: float = 0.4) -> list[Anomaly]:
    """What is found of a scenario on one server until `after_h` hours after its end, first to last."""
    fleet = await learnt()
    assert await fleet.play(END_MS, INJECTED_MS) == {}
    server_id = fleet.source._ids[2]
    fleet.source.inject(server_id, scenario, hours * 3_600, INJECTED_MS)
    found = await fleet.play(INJECTED_MS, INJECTED_MS + round((hours + after_h) * 3_600_000))
    assert {one.server_id for one in found.values()} <= {server_id}, "of that server and no other"
    return sorted(found.values(), key=lambda one: one.start_ms)


@pytest.mark.parametrize(
    ("scenario", "hours", "within_minutes", "words", "least"),
    [
        ("cpu-spike", 0.5, 1, ("latency", "duration", "load", "cpu", "pool_wait"), 8),
        ("memory-leak", 4, 210, ("memory", "swap", "page", "iowait"), 7),  # of 240: half an hour before it is full
        ("thrashing", 0.5, 2, ("memory", "swap", "page", "iowait"), 7),
        ("packet-loss", 0.5, 1, ("tcp", "udp", "ip_", "network", "dns"), 9),
        ("network-saturation", 0.5, 1, ("tcp", "udp", "ip_", "network", "dns"), 9),
        # by the load that comes with it, at a raw score of 4.3; with a tick every ten seconds it comes to 3.2 and is
        # not found: that a disk fills is for the forecast to say
        ("disk-fill", 6, 1, ("disk", "postgres", "page"), 8),
    ],
)
async def test_a_scenario_is_one_finding_that_names_metrics_of_its_kind(
    scenario: str, hours: float, within_minutes: int, words: tuple[str, ...], least: int
) -> None:
    found = await played(scenario, hours)
    (first,) = found
    assert first.detector == "departure"
    assert first.start_ms - INJECTED_MS <= within_minutes * MINUTE_MS
    named = [part.metric for part in first.contributions]
    assert len(named) == 10
    assert sum(any(word in metric for word in words) for metric in named) >= least, named


@pytest.mark.parametrize("scenario", ["outage", "flapping"])
async def test_who_falls_silent_is_one_finding(scenario: str) -> None:
    first, *others = await played(scenario, 1)
    assert (first.detector, first.metric) == ("silence", "")
    assert first.start_ms - INJECTED_MS < MINUTE_MS
    assert first.end_ms is not None
    assert others == []


@pytest.mark.xfail(
    strict=True,
    reason="an hour's profile takes in what the incident did to it, without bound, so that an hour after its beginning "
    "what is normal again is unusual: tcp_resets_sent .8 where 12 to 13 is expected, at a raw score of 4 to 5",
)
async def test_an_incident_of_half_an_hour_has_no_echo() -> None:
    assert len(await played("packet-loss", 0.5, after_h=1.0)) == 1
