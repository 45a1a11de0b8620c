"""What a metric has to do with failing, told from its unit, kind and name: nobody says it on the wire.

What must stay true: what is no resource never saturates. A processor, a link or a disk's time in use may be at 100 %
and come back by itself; a disk that is full does not.
"""

import re
from enum import IntEnum
from typing import Final

from fleet.model import Metric, MetricKind
from services.analytics.forecasting.percent import is_percent_name


class Role(IntEnum):
    """The numbers are saved: never change them."""

    NONE = 0
    RESOURCE = 1
    """A gauge in percent of something that fills up."""
    ERRORS = 2
    """A counter of what went wrong."""


_WORD: Final = re.compile(r"[a-z0-9]+")
_FILLS: Final = frozenset(
    {"disk", "disks", "filesystem", "filesystems", "fs", "volume", "partition", "storage", "tablespace"}
    | {"inode", "inodes", "memory", "mem", "ram", "swap"}
)
_OTHERWISE: Final = frozenset(
    {"busy", "pressure", "io", "iops", "time", "idle", "latency", "bandwidth", "cpu", "errors", "fragmentation"}
    | {"free", "available", "avail", "hit", "hits"}
)
"""With such a word it is not a part of the whole that is taken, or one that comes back by itself."""
_ERRORS: Final = re.compile(
    r"error|fail|drop|discard|retrans|reset|timeout|overflow|refus|reject|lost|abort|deadlock|crash|panic|oom|5xx"
)


def role_of(metric: Metric) -> Role:
    """What a metric foretells."""
    name = metric.name.lower()
    if metric.kind is MetricKind.COUNTER:
        return Role.ERRORS if _ERRORS.search(name) else Role.NONE
    words = set(_WORD.findall(name.replace("_", " ")))
    in_percent = metric.unit == "%" or (not metric.unit and is_percent_name(name))
    return Role.RESOURCE if in_percent and words & _FILLS and not words & _OTHERWISE else Role.NONE
