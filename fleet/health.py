"""How a server is, judged from its three headline metrics and from its silence.

A status that flickers around a threshold is worse than none, so leaving a worse status takes a margin more than
entering it (hysteresis). What must stay true: the same values in the same order give the same status everywhere, and
silence is measured by the receiver's clock, never the sender's.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

DEFAULT_REPORT_INTERVAL_MS = 10_000
MISSED_INTERVALS = 3


class ServerStatus(IntEnum):
    """The numbers are those of ``openmanager.fleet.v1.ServerStatus``; a larger one is worse."""

    UNSPECIFIED = 0
    HEALTHY = 1
    WARNING = 2
    CRITICAL = 3
    OFFLINE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """Percentages from which a metric is bad, and how far it must fall below to be good again."""

    warning: float
    critical: float
    margin: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthRules:
    """The thresholds of the headline metrics, in percent."""

    cpu: Threshold = Threshold(warning=80, critical=95)
    memory: Threshold = Threshold(warning=85, critical=95)
    disk: Threshold = Threshold(warning=85, critical=95)


DEFAULT_RULES = HealthRules()


def judge(
    previous: ServerStatus, cpu: float, memory: float, disk: float, rules: HealthRules = DEFAULT_RULES
) -> ServerStatus:
    """Returns the status of a server that reports.

    Args:
        previous: the status before; decides on which side of a margin the server is.
        cpu: ``cpu_usage`` in percent; NaN when unknown, which judges nothing.
        memory: ``memory_usage``, likewise.
        disk: ``disk_usage``, likewise.
        rules: the thresholds.
    """
    worst = ServerStatus.HEALTHY
    for value, threshold in ((cpu, rules.cpu), (memory, rules.memory), (disk, rules.disk)):
        if math.isnan(value):
            continue
        if value >= _limit(threshold.critical, threshold.margin, inside=previous == ServerStatus.CRITICAL):
            return ServerStatus.CRITICAL
        inside = previous in (ServerStatus.WARNING, ServerStatus.CRITICAL)
        if value >= _limit(threshold.warning, threshold.margin, inside=inside):
            worst = ServerStatus.WARNING
    return worst


def offline_after_ms(report_interval_ms: int) -> int:
    """How long a server may be silent before it counts as offline, in milliseconds.

    Args:
        report_interval_ms: what the sender said; 0 when it did not.
    """
    return MISSED_INTERVALS * (report_interval_ms or DEFAULT_REPORT_INTERVAL_MS)


def _limit(threshold: float, margin: float, *, inside: bool) -> float:
    return threshold - margin if inside else threshold
