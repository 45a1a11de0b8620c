"""The words in which the catalogue is written: what a metric is called, and what it follows.

A gauge is ``scale * (rest + (full - rest) * driver)`` plus its own slow wander and noise; a counter grows by
``scale * per_second * driver`` a second. ``scale`` makes servers differ: by hardware, by role, or at random.
"""

from dataclasses import dataclass
from enum import Enum

from fleet.model import Metric, MetricKind
from services.simulator.drivers import RATES, Driver

UNBOUNDED = float("inf")
EXACT = 0.0
"""A ``jitter`` for metrics that are tied to others: used + free must stay the total."""


class Scale(Enum):
    """What a server's values of a metric are multiplied with, constant for the server's life."""

    NONE = "none"
    SPREAD = "spread"  # a random factor of each metric on each server, about +-20 %
    MEMORY = "memory"  # bytes of memory
    SWAP = "swap"  # bytes of swap
    DISK_ROOT = "disk_root"  # bytes of the file system
    DISK_DATA = "disk_data"
    DISK_LOGS = "disk_logs"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """One metric of the catalogue and how it moves.

    Attributes:
        rest, full: the value where the driver is 0 and 1; a counter has only ``full``, its growth a second.
        jitter: noise and wander of the metric's own, as a fraction of ``full - rest``.
        low, high: bounds of the value.
        decimals: places after the point that an agent would report.
        roles: where the metric's software is in full use; elsewhere it idles. Empty means everywhere.
    """

    metric: Metric
    driver: Driver
    rest: float
    full: float
    jitter: float
    low: float
    high: float
    decimals: int
    scale: Scale
    roles: frozenset[str]


def gauge(
    name: str,
    unit: str,
    driver: Driver,
    rest: float,
    full: float,
    *,
    jitter: float = 0.02,
    high: float = UNBOUNDED,
    decimals: int = 0,
    scale: Scale = Scale.SPREAD,
    roles: frozenset[str] = frozenset(),
) -> MetricSpec:
    """Returns a gauge that is ``rest`` where ``driver`` is 0 and ``full`` where it is 1, never below 0."""
    return MetricSpec(
        metric=Metric(name=name, unit=unit, kind=MetricKind.GAUGE),
        driver=driver,
        rest=rest,
        full=full,
        jitter=jitter,
        low=0.0,
        high=high,
        decimals=decimals,
        scale=scale,
        roles=roles,
    )


def percent(
    name: str,
    driver: Driver,
    rest: float,
    full: float,
    *,
    jitter: float = 0.015,
    roles: frozenset[str] = frozenset(),
) -> MetricSpec:
    """Returns a percentage between 0 and 100 with two decimals; every server has the same range."""
    return gauge(name, "%", driver, rest, full, jitter=jitter, high=100.0, decimals=2, scale=Scale.NONE, roles=roles)


def constant(name: str, unit: str, value: float, *, scale: Scale = Scale.NONE, decimals: int = 0) -> MetricSpec:
    """Returns a gauge that never moves: a size, a limit, a switch."""
    return gauge(name, unit, Driver.ONE, 0.0, value, jitter=EXACT, scale=scale, decimals=decimals)


def counter(
    name: str,
    unit: str,
    driver: Driver,
    per_second: float,
    *,
    decimals: int = 0,
    scale: Scale = Scale.SPREAD,
    roles: frozenset[str] = frozenset(),
) -> MetricSpec:
    """Returns a counter that grows by ``per_second`` where ``driver`` is 1 and starts again at a reboot."""
    assert driver < RATES, f"{name}: {driver.name} has no integral"
    return MetricSpec(
        metric=Metric(name=name, unit=unit, kind=MetricKind.COUNTER),
        driver=driver,
        rest=0.0,
        full=per_second,
        jitter=EXACT,
        low=0.0,
        high=UNBOUNDED,
        decimals=decimals,
        scale=scale,
        roles=roles,
    )
