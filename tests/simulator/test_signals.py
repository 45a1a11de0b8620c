"""Values are a function of seed and tick, plausible, and honest about counters."""

import math
import time
from collections.abc import Callable

import numpy as np
import pytest

from fleet.health import DEFAULT_RULES
from fleet.model import MetricKind
from services.simulator.catalogue import CATALOGUE, COLUMN
from services.simulator.noise import Floats
from tests.simulator.support import INTERVAL_MS, NOON, generator

COUNTERS = np.array([spec.metric.kind is MetricKind.COUNTER for spec in CATALOGUE])
HOUR_MS = 3_600_000
FRIDAY = NOON * INTERVAL_MS // HOUR_MS - 12


@pytest.fixture(scope="module")
def sixty_days() -> Floats:
    """Every hour of sixty days from a Friday's midnight, shape (ticks, servers, metrics)."""
    source = generator(10, interval_ms=HOUR_MS)
    return np.stack([source.values(FRIDAY + tick) for tick in range(60 * 24)])


def test_the_same_seed_and_tick_give_the_same_values_in_any_order() -> None:
    ticks = [NOON, NOON + 1, NOON + 119, NOON + 120, NOON + 50_000]
    one, other = generator(), generator()
    forward = [one.values(tick) for tick in ticks]
    backward = [other.values(tick) for tick in reversed(ticks)][::-1]
    for left, right in zip(forward, backward, strict=True):
        assert left.tobytes() == right.tobytes()
    assert not np.array_equal(forward[0], forward[1])
    assert not np.array_equal(forward[0], generator(seed=8).values(NOON))


def test_a_larger_fleet_leaves_the_first_servers_as_they_were() -> None:
    assert np.array_equal(generator(600).values(NOON)[:20], generator(20).values(NOON))


def test_counters_step_back_only_at_a_reboot(sixty_days: Floats) -> None:
    steps = np.diff(sixty_days, axis=0)
    rebooted = steps[:, :, COLUMN["boot_time_seconds"]] != 0
    assert 10 <= rebooted.sum() <= 40  # ten servers, a reboot every three to six weeks
    assert (steps[~rebooted][:, COUNTERS] >= 0).all()
    fell = (steps[rebooted][:, COUNTERS] < 0).mean()
    assert fell > 0.95  # but for counters that had not moved yet
    uptime = sixty_days[:, :, COLUMN["uptime_seconds"]]
    assert (uptime >= 0).all()
    assert (np.diff(uptime, axis=0)[~rebooted] > 0).all()


def test_counters_grow_at_every_tick_of_ten_seconds() -> None:
    source = generator()
    values = np.stack([source.values(NOON + tick) for tick in range(400)])
    steps = np.diff(values[:, :, COUNTERS], axis=0)
    same_boot = np.diff(values[:, :, COLUMN["boot_time_seconds"]], axis=0) == 0
    assert (steps[same_boot] >= 0).all()
    bytes_in = np.diff(values[:, :, COLUMN["network_eth0_receive_bytes"]], axis=0)[same_boot]
    assert (bytes_in > 0).all()


def test_values_stay_within_their_bounds_and_are_rounded_as_agents_round(sixty_days: Floats) -> None:
    assert np.isfinite(sixty_days).all()
    assert (sixty_days >= 0).all()
    for column, spec in enumerate(CATALOGUE):
        values = sixty_days[:, :, column]
        if spec.metric.unit == "%":
            assert values.max() <= 100.0, spec.metric.name
        if spec.metric.unit == "By" or (spec.metric.unit == "1" and spec.decimals == 0):
            assert np.array_equal(values, np.rint(values)), spec.metric.name
        places = 10.0**spec.decimals
        assert np.array_equal(values, np.rint(values * places) / places), spec.metric.name


def test_the_healthy_fleet_stays_under_the_warning_thresholds(sixty_days: Floats) -> None:
    thresholds = {
        "cpu_usage": DEFAULT_RULES.cpu,
        "memory_usage": DEFAULT_RULES.memory,
        "disk_usage": DEFAULT_RULES.disk,
    }
    for name, threshold in thresholds.items():
        assert (sixty_days[:, :, COLUMN[name]] >= threshold.warning).mean() < 0.001, name


def test_the_day_the_week_and_the_disks_show(sixty_days: Floats) -> None:
    cpu = sixty_days[:, :, COLUMN["cpu_usage"]].reshape(60, 24, 10).mean(axis=1)  # a mean for each day
    weekday = (np.arange(60) + 4) % 7  # the fixture begins on a Friday
    users = [row for row in range(10) if row not in {1, 5, 7}]  # not the database's, the worker's and the balancer's
    assert cpu[weekday < 5][:, users].mean() > 1.15 * cpu[weekday >= 5][:, users].mean()
    within_a_day = sixty_days[:24, 0, COLUMN["cpu_usage"]]
    assert within_a_day.max() > 1.5 * within_a_day.min()
    disk = sixty_days[:, :, COLUMN["disk_usage"]]
    drops = (np.diff(disk, axis=0) < -5.0).sum(axis=0)
    assert (drops >= 1).all()  # everybody was cleaned up
    assert (np.diff(disk, axis=0) >= 0).mean() > 0.8  # and filled otherwise


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cpu_usage", "load_1m"),
        ("cpu_usage", "http_latency_p99_seconds"),
        ("cpu_usage", "http_requests_per_second"),
        ("cpu_usage", "temperature_cpu_package_celsius"),
    ],
)
def test_what_belongs_together_moves_together(sixty_days: Floats, one: str, other: str) -> None:
    for server in range(10):
        left, right = sixty_days[:, server, COLUMN[one]], sixty_days[:, server, COLUMN[other]]
        assert np.corrcoef(left, right)[0, 1] > 0.5


def test_parts_add_up(sixty_days: Floats) -> None:
    def of(name: str) -> Floats:
        return np.asarray(sixty_days[:, :, COLUMN[f"memory_{name}_bytes"]])

    assert np.abs(of("used") + of("available") - of("total")).max() <= 2
    assert np.abs(of("used") + of("cached") + of("buffers") + of("free") - of("total")).max() <= 4
    share = 100.0 * of("used") / of("total")
    assert np.abs(share - sixty_days[:, :, COLUMN["memory_usage"]]).max() < 0.01


def test_a_counter_agrees_with_its_gauge() -> None:
    source = generator()
    values = np.stack([source.values(NOON + tick) for tick in range(360)])
    busy = [name for name in COLUMN if name.startswith("cpu_") and name.endswith("_seconds") and "iowait" not in name]
    seconds = sum(values[-1, :, COLUMN[name]] - values[0, :, COLUMN[name]] for name in busy)
    usage = 100.0 * np.asarray(seconds) / (16 * 3590.0)
    assert np.abs(usage - values[:, :, COLUMN["cpu_usage"]].mean(axis=0)).max() < 5.0


def test_a_tick_of_the_default_fleet_costs_little_more_than_a_loop_over_its_values() -> None:
    """A millisecond each; five would be those of one who makes the values one by one."""
    source = generator()
    values = source.values(NOON).ravel().tolist()

    def median_s(work: Callable[[int], object]) -> float:
        took = []
        for tick in range(50):
            started = time.process_time()
            work(NOON + tick)
            took.append(time.process_time() - started)
        return float(np.median(took))

    assert median_s(source.values) < 5 * median_s(lambda _: [math.sin(value) for value in values])
