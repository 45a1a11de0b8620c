"""The values of the cache: what is known of a server now, and of the fleet.

What must stay true: a value never changes once it is made, so that whoever holds one (a watcher, the follower's
thread) may read it at any time; values that are not finite are no values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleet.health import ServerStatus
from fleet.model import HEADLINE_METRICS, NO_DETAILS, MetricSet, ServerDescriptor, ServerDetails

Headline = tuple[float, float, float]
"""cpu_usage, memory_usage, disk_usage in percent; NaN where there is none."""

NO_HEADLINE: Headline = (math.nan, math.nan, math.nan)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """The newest values of one metric set for one server.

    Attributes:
        metric_set: what names the values.
        time_ms: when they were measured, by the sender's clock.
        received_ms: when they arrived, by ours.
        received_s: the same on our monotonic clock, which alone measures how old the sample is.
        values: float64, shape (len(metric_set),), owned by this sample; NaN means no value.
        headline: the headline metrics among them.
        restored: read back from a store, which keeps the metrics' identities but not their units and kinds.
        origin: the id of the set that a restored sample came in, where the store kept it.
    """

    metric_set: MetricSet
    time_ms: int
    received_ms: int
    received_s: float
    values: NDArray[np.float64]
    headline: Headline
    restored: bool = False
    origin: str = ""

    @property
    def set_id(self) -> str:
        """The set that its sender calls it by."""
        return self.origin or self.metric_set.id

    @property
    def order(self) -> tuple[int, int]:
        """The newer of two samples has the greater one."""
        return order_of(self.time_ms, self.received_ms)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServerState:
    """Everything known of one server now.

    Attributes:
        observed_ms: time of the newest values by the sender's clock; None when nothing was ever reported.
        received_ms: when those arrived, by our clock.
        heard_s: when the server was last heard of, on our monotonic clock; what silence is measured from.
        samples: at most one for each metric set, the newest last.
        sequence: orders this state among all states of this life of the process.
        stamp: when it became as it is, in ms by the clock of the replica that says so, but later than every state of
            this server that went into it; 0 when it was read from a store that did not say.
        writer: that replica.
        life: when the server was admitted, in ms; 0 when it was never removed. What belongs to an older life is void.
        described: the stamp of its descriptor.
        details: what is recorded beside the descriptor, of the latest revision that was told.
        in_maintenance: whether a window of the details is open, by our clock.
    """

    descriptor: ServerDescriptor
    status: ServerStatus
    observed_ms: int | None
    received_ms: int | None
    heard_s: float
    samples: tuple[Sample, ...]
    sequence: int
    stamp: int = 0
    writer: str = ""
    life: int = 0
    described: int = 0
    details: ServerDetails = NO_DETAILS
    in_maintenance: bool = False

    @property
    def server_id(self) -> str:
        return self.descriptor.server_id

    @property
    def version(self) -> str:
        """Names this content of the state among all replicas; empty for what no replica vouches for."""
        return version_of(self.stamp, self.writer)

    @property
    def cells(self) -> int:
        """How many values its samples hold, absent ones counted."""
        return sum(len(sample.values) for sample in self.samples)

    def metrics(self) -> dict[str, float]:
        """Every metric by its identity as text; where sets overlap, the newest value that there is."""
        merged: dict[str, float] = {}
        for sample in self.samples:
            pairs = zip(sample.metric_set.keys, sample.values.tolist(), strict=True)
            if np.isfinite(sample.values).all():
                merged.update(pairs)
            else:
                merged.update((key, value) for key, value in pairs if math.isfinite(value))
        return merged

    def headline(self) -> Headline:
        """The newest headline values that there are."""
        return newest_headline(self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """That a server was removed, and stays so until it is admitted again: until a state of a later life.

    `revision` is that of its record as it was deleted, so that a later one tells that it was restored; 0: not known.
    """

    server_id: str
    stamp: int
    writer: str
    life: int
    revision: int = 0

    @property
    def version(self) -> str:
        """As that of a state."""
        return version_of(self.stamp, self.writer)


Stored = ServerState | Removal
"""What there is to know of one server."""

STAMP_DIGITS = 12


def version_of(stamp: int, writer: str) -> str:
    """A stamp and who gave it, as a text that orders like the stamp."""
    return f"{stamp:0{STAMP_DIGITS}x}.{writer}" if stamp else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSummary:
    """Servers by status. `total` also counts those that nothing is known of yet."""

    total: int = 0
    healthy: int = 0
    warning: int = 0
    critical: int = 0
    offline: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fleet:
    """All servers at one moment.

    Attributes:
        states: in order of id.
        version: names this content, by the latest stamp of anything that went into it.
        bases: versions that others wrote of the fleet and that went into it.
    """

    states: Sequence[ServerState]
    summary: FleetSummary
    version: str = ""
    bases: tuple[str, ...] = ()


AHEAD_MS: Final = 10_000
"""A row's time counts up to so long after it came: a sender's clock that was ahead by more, and is set right, would
otherwise hide what it reports for as long as it was ahead. Clocks of replicas may differ by that."""


def order_of(time_ms: int, received_ms: int) -> tuple[int, int]:
    """Orders the rows of a set."""
    return min(time_ms, received_ms + AHEAD_MS), time_ms


def newest_headline(samples: Sequence[Sample]) -> Headline:
    """The headline of samples given oldest first."""
    if len(samples) == 1:
        return samples[0].headline
    merged = NO_HEADLINE
    for sample in samples:
        cpu, memory, disk = (old if math.isnan(new) else new for old, new in zip(merged, sample.headline, strict=True))
        merged = (cpu, memory, disk)
    return merged


def headline_columns(metric_set: MetricSet) -> tuple[int, int, int]:
    """Where a set has the headline metrics; -1 for one that it does not have."""
    places = {key: column for column, key in enumerate(metric_set.keys) if key in HEADLINE_METRICS}
    cpu, memory, disk = (places.get(name, -1) for name in HEADLINE_METRICS)
    return cpu, memory, disk


def headline_of(values: NDArray[np.float64], columns: tuple[int, int, int]) -> Headline:
    """Reads the headline out of a row; what is not finite is no value."""
    cpu, memory, disk = (float(values[column]) if column >= 0 else math.nan for column in columns)
    if not math.isfinite(cpu + memory + disk):
        cpu, memory, disk = (value if math.isfinite(value) else math.nan for value in (cpu, memory, disk))
    return cpu, memory, disk
