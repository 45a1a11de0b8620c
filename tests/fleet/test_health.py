"""A status changes at its threshold, comes back only below the margin, and silence counts in intervals."""

import math

import pytest

from fleet.health import ServerStatus, judge, offline_after_ms

HEALTHY, WARNING, CRITICAL = ServerStatus.HEALTHY, ServerStatus.WARNING, ServerStatus.CRITICAL
NAN = math.nan


@pytest.mark.parametrize(
    ("previous", "cpu", "expected"),
    [
        (HEALTHY, 79.9, HEALTHY),
        (HEALTHY, 80.0, WARNING),
        (HEALTHY, 95.0, CRITICAL),
        (WARNING, 75.0, WARNING),
        (WARNING, 74.9, HEALTHY),
        (WARNING, 94.9, WARNING),
        (CRITICAL, 90.0, CRITICAL),
        (CRITICAL, 89.9, WARNING),
        (CRITICAL, 74.9, HEALTHY),
        (ServerStatus.OFFLINE, 76.0, HEALTHY),
        (ServerStatus.UNSPECIFIED, 80.0, WARNING),
    ],
)
def test_cpu_thresholds_with_hysteresis(previous: ServerStatus, cpu: float, expected: ServerStatus) -> None:
    assert judge(previous, cpu, 10, 10) is expected


def test_the_worst_metric_decides_and_unknown_ones_judge_nothing() -> None:
    assert judge(HEALTHY, 10, 85, 95) is CRITICAL
    assert judge(HEALTHY, 10, 84.9, 85) is WARNING
    assert judge(HEALTHY, NAN, NAN, NAN) is HEALTHY
    assert judge(HEALTHY, NAN, 96, NAN) is CRITICAL


def test_a_value_that_hovers_at_a_threshold_does_not_flicker() -> None:
    status, changes = HEALTHY, 0
    for tick in range(100):
        after = judge(status, 80 + (-1) ** tick, 10, 10)
        changes += after is not status
        status = after
    assert changes == 1


def test_offline_after_three_missed_intervals() -> None:
    assert offline_after_ms(0) == 30_000
    assert offline_after_ms(60_000) == 180_000
