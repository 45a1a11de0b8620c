"""Latencies and the days until a disk is full."""

import random

import pytest

from fleet.store_figures import LATENCIES_KEPT, LATENCY_SPAN_S, MIN_SPAN_S, SAMPLES_KEPT, FreeSpace, Latencies

GIB = 1 << 30
DAY_S = 86_400.0


def test_percentiles_are_of_the_last_five_minutes_and_by_nearest_rank() -> None:
    latencies = Latencies()
    assert latencies.percentile(0.0, 50) == 0.0
    for at_s, value in enumerate((5.0, 1.0, 3.0)):
        latencies.add(float(at_s), value)
    assert [latencies.percentile(2.0, p) for p in (0, 50, 99, 100)] == [1.0, 3.0, 5.0, 5.0]
    assert latencies.percentile(LATENCY_SPAN_S + 0.5, 100) == 3.0, "the first is older"
    for half in range(LATENCIES_KEPT):  # a store that is degraded is asked twice a second
        latencies.add(1_000 + half / 2, 9.0 if half == 1 else 2.0)
    assert latencies.percentile(1_000 + LATENCY_SPAN_S, 100) == 9.0
    assert latencies.percentile(1_000 + 3 * LATENCY_SPAN_S, 100) == 0.0, "nothing was answered for so long"


def filled(per_day: float, *, free: float = 100 * GIB, samples: int = 60, noise: float = 0.0) -> FreeSpace:
    rng = random.Random(3)
    space = FreeSpace()
    for minute in range(samples):
        space.add(minute * 60.0, int(free - per_day * minute * 60.0 / DAY_S + rng.uniform(-noise, noise)))
    return space


def test_a_disk_that_loses_ten_gib_a_day_is_full_in_ten_days() -> None:
    assert filled(10 * GIB).days_left == pytest.approx(10, rel=0.01)


def test_files_that_come_and_go_change_little() -> None:
    assert filled(10 * GIB, samples=SAMPLES_KEPT, noise=2 * GIB).days_left == pytest.approx(9, rel=0.1)


@pytest.mark.parametrize("per_day", [0.0, -GIB, 100 * GIB / 5_000])
def test_a_disk_that_does_not_fill_has_no_last_day(per_day: float) -> None:
    assert filled(per_day).days_left is None


def test_nothing_is_said_before_it_was_seen_for_long_enough() -> None:
    minutes = int(MIN_SPAN_S / 60)
    assert filled(10 * GIB, samples=minutes).days_left is None
    assert filled(10 * GIB, samples=minutes + 1).days_left is not None


def test_samples_are_a_minute_apart_however_often_it_is_looked_at() -> None:
    space = FreeSpace()
    for tenth in range(int(MIN_SPAN_S * 10)):
        space.add(tenth / 10, 100 * GIB - tenth)
    assert space.days_left is None  # 599.9 s
