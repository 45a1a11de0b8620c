"""Predictions on the simulated fleet: what fills up is foreseen with its date, and hardly anything else is.

One fleet plays everything at once, a scenario on each server, other seeds than those that the constants were found on.
Printed with `-s`: how long before the limit each was foreseen.
"""

import math
from dataclasses import dataclass, field

import pytest

from fleet.anomaly import Anomaly
from services.analytics.fleet_detector import FleetDetector
from services.analytics.prediction.foresight import Kind, Prediction
from services.analytics.prediction.parameters import LIMIT
from services.simulator.catalogue import COLUMN, METRIC_SET
from services.simulator.fleet import build_fleet
from services.simulator.synthetic import SyntheticSource
from tests.analytics.fakes import show

pytestmark = [pytest.mark.full, pytest.mark.timeout(1_800)]

TICK_MS, HOUR_MS = 60_000, 3_600_000
START_MS = 1_760_054_400_000  # Friday 2025-10-10
INJECTED_MS = START_MS + 52 * HOUR_MS
END_MS = INJECTED_MS + 17 * HOUR_MS
PLAYED = (
    ("memory-leak", 1.5),
    ("memory-leak", 4.0),
    ("memory-leak", 8.0),
    ("memory-leak", 16.0),
    ("disk-fill", 1.5),
    ("disk-fill", 4.0),
    ("disk-fill", 8.0),
    ("disk-fill", 16.0),
    ("thrashing", 1.0),
    ("packet-loss", 1.0),
    ("network-saturation", 1.0),
    ("cpu-spike", 1.0),
    ("flapping", 3.0),
    ("outage", 1.0),
)
"""Scenario and hours; the other servers are well."""
SERVERS = len(PLAYED) + 6
METRICS = ("memory_usage", "disk_usage", "swap_usage", "filesystem_var_log_usage")


@dataclass
class Course:
    """What became of a server: when it first was at its limit, findings, and the likeliest prediction."""

    limit_ms: float = math.inf
    found: dict[str, Anomaly] = field(default_factory=dict)
    likeliest: Prediction | None = None
    held: list[bool] = field(default_factory=list)
    """Of each minute with a date, whether the interval held."""


async def play(seed: int) -> list[Course]:
    source = SyntheticSource(build_fleet(SERVERS, seed=seed, interval_ms=TICK_MS), seed=seed, interval_ms=TICK_MS)
    detector, courses = FleetDetector(), {server_id: Course() for server_id in source._ids}
    told: dict[str, list[Prediction]] = {server_id: [] for server_id in source._ids}
    for time_ms in range(START_MS, END_MS, TICK_MS):
        if time_ms == INJECTED_MS:
            for server_id, (scenario, hours) in zip(source._ids, PLAYED, strict=False):
                source.inject(server_id, scenario, hours * 3_600, time_ms)
        for batch in await source.batches(time_ms // TICK_MS, time_ms):
            for place, server_id in enumerate(batch.rows.server_ids):
                if batch.rows.values[place, [COLUMN[name] for name in METRICS]].max() >= LIMIT:
                    courses[server_id].limit_ms = min(courses[server_id].limit_ms, time_ms)
            for one in show(detector, batch.rows, time_ms + 300, METRIC_SET):
                courses[one.server_id].found[one.id] = one
        if detector.foresight is not None:
            for prediction in detector.foresight.of(source._ids, 0.1)[0]:
                told[prediction.server_id].append(prediction)
    for server_id, course in courses.items():
        course.likeliest = max(told[server_id], key=lambda one: one.probability, default=None)
        course.held = [
            one.low_ms <= course.limit_ms <= (one.high_ms or math.inf)
            for one in told[server_id]
            if one.low_ms is not None and one.probability >= 0.5 and one.computed_ms < course.limit_ms < math.inf
        ]
    return list(courses.values())


def foreseen(course: Course) -> list[Anomaly]:
    return [one for one in course.found.values() if one.detector == "prediction"]


@pytest.mark.parametrize("seed", [21])  # 22 and 23 hold, too: a minute each on a quiet machine, four on a busy one
async def test_what_fills_up_is_foreseen_in_time_and_hardly_anything_else(seed: int) -> None:
    courses = await play(seed)
    right = wrong = 0
    for (scenario, hours), course in zip([*PLAYED, *[("none", 0.0)] * 6], courses, strict=True):
        leads = [(course.limit_ms - one.start_ms) / HOUR_MS for one in foreseen(course)]
        likeliest = course.likeliest
        kinds = [] if likeliest is None else [reason.kind.value for reason in likeliest.reasons]
        text = "" if likeliest is None else f"{likeliest.probability:.2f} {sorted(set(kinds))}"
        print(f"{seed} {scenario:19}{hours:5.1f} h  foreseen {[round(lead, 1) for lead in leads]} h before  {text}")
        fails = scenario in {"memory-leak", "disk-fill"}
        right += sum(lead > 0 for lead in leads) if fails else 0
        wrong += sum(lead <= 0 for lead in leads) if fails else len(leads)
        if fails:
            assert max(leads) >= 0.25 * hours, (scenario, hours)
        if scenario == "packet-loss":
            assert likeliest is not None
            assert {reason.kind for reason in likeliest.reasons} == {Kind.ANOMALY_DENSITY, Kind.ERRORS}
        if scenario == "flapping":
            assert likeliest is not None
            assert likeliest.reasons[0].kind is Kind.FLAPPING
    print(f"{seed} precision {right / (right + wrong):.2f} of {right + wrong}")
    assert right / (right + wrong) >= 0.9
    held = [one for course in courses for one in course.held]
    print(f"{seed} the interval held in {sum(held) / len(held):.2f} of {len(held)} minutes")
    assert sum(held) / len(held) >= 0.75
