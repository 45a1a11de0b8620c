"""Servers, sets and rows as the tests of the cache need them."""

from collections.abc import Mapping, Sequence

import numpy as np

from fleet.codec import descriptor_to_pb, metric_set_to_pb, rows_to_pb
from fleet.model import HEADLINE_METRICS, Metric, MetricKind, MetricSet, Rows, ServerDescriptor, ServerDetails
from openmanager.cache.v1 import cache_pb2
from runtime.clock import ManualClock
from services.cache.metric_sets import MetricSets
from services.cache.model import Fleet
from services.cache.state import LiveState, Outcome, Update

T0 = 1_700_000_000_000
"""What a new ManualClock says."""


def set_of(*names: str) -> MetricSet:
    return MetricSet(tuple(Metric(name=name, unit="%", kind=MetricKind.GAUGE) for name in names))


HEADLINE = set_of(*HEADLINE_METRICS)
WIDE = set_of(*HEADLINE_METRICS, *(f"metric_{index}" for index in range(508)))


def ids(count: int) -> tuple[str, ...]:
    return tuple(f"server-{index:05d}" for index in range(count))


def rows_of(metric_set: MetricSet, values: Mapping[str, Sequence[float]], time_ms: int) -> tuple[MetricSet, Rows]:
    """One row for each server at the same time."""
    matrix = np.array(list(values.values()), np.float64).reshape(len(values), len(metric_set))
    times = np.full(len(values), time_ms, np.int64)
    return metric_set, Rows(metric_set_id=metric_set.id, server_ids=tuple(values), times_ms=times, values=matrix)


def tick(count: int, time_ms: int, *, cpu: float = 10.0, seed: int = 0) -> tuple[MetricSet, Rows]:
    """A row of 511 metrics for each of `count` servers."""
    values = np.random.default_rng(seed).random((count, len(WIDE))) * 50
    values[:, 0] = cpu
    times = np.full(count, time_ms, np.int64)
    return WIDE, Rows(metric_set_id=WIDE.id, server_ids=ids(count), times_ms=times, values=values)


def descriptor(server_id: str, **more: object) -> ServerDescriptor:
    fields = {"hostname": f"{server_id}.example", "environment": "production", "role": "web", "location": "eu-1a"}
    return ServerDescriptor(server_id=server_id, **(fields | more))  # type: ignore[arg-type]


def request(
    *batches: tuple[MetricSet, Rows],
    servers: Sequence[ServerDescriptor] = (),
    with_sets: bool = True,
    admit_removed: bool = False,
) -> cache_pb2.UpdateServersRequest:
    sets = {metric_set.id: metric_set for metric_set, _ in batches}
    return cache_pb2.UpdateServersRequest(
        metric_sets=[metric_set_to_pb(metric_set) for metric_set in sets.values()] if with_sets else [],
        servers=[descriptor_to_pb(server) for server in servers],
        batches=[rows_to_pb(rows) for _, rows in batches],
        admit_removed=admit_removed,
    )


class World:
    """A live state and the time it lives in."""

    def __init__(self, epoch: str = "e1") -> None:
        self.clock = ManualClock()
        self.live = LiveState(self.clock, MetricSets(), epoch=epoch)

    def report(self, server_id: str, cpu: float, memory: float = 10, disk: float = 10, at_ms: int = 0) -> Outcome:
        """A row of the headline metrics, measured now or at `at_ms`."""
        at_ms = at_ms or self.clock.now_ms()
        return self.rows(rows_of(HEADLINE, {server_id: (cpu, memory, disk)}, at_ms))

    def rows(self, *batches: tuple[MetricSet, Rows], admit_removed: bool = False) -> Outcome:
        return self.live.update(Update(batches=batches, admit_removed=admit_removed))

    def describe(self, *descriptors: ServerDescriptor, admit_removed: bool = False) -> Outcome:
        return self.live.update(Update(descriptors=descriptors, admit_removed=admit_removed))

    def record(self, server_id: str, details: ServerDetails) -> Outcome:
        """What the record says of a server."""
        return self.live.update(Update(details={server_id: details}))

    def fleet(self) -> Fleet:
        return self.live.fleet()
