"""A replica of this service as a reader sees it: what it holds itself, and what of that the shared store may lack.

One of them is this process, the others are asked over gRPC. What must stay true: a replica that is away costs one
caller its time-out and not each of them; an answer is bounded by the same limits as the engine's.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from fleet.codec import metric_from_pb, ms_from_timestamp, timestamp_from_ms
from fleet.model import Metric, MetricKind
from openmanager.fleet.v1 import history_pb2
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc
from runtime.channel import Channel, calling
from runtime.circuit import Circuit
from runtime.clock import Clock
from runtime.errors import ResourceExhausted
from services.timeseries.engine import Engine
from services.timeseries.engine.aggregate import lookback_ms
from services.timeseries.engine.catalog import MetricInfo
from services.timeseries.engine.query import Query, SeriesResult
from services.timeseries.engine.unshipped import Ranges
from services.timeseries.remote.history import patience_s

CALL_TIMEOUT_S: Final = 20.0
METRICS_KEPT_S: Final = 30.0


class Held(NamedTuple):
    """Points of some instants (`ranges`), and maybe a few more."""

    ranges: Ranges
    points: list[SeriesResult]


class Answered(NamedTuple):
    """What a replica holds itself, and, in words, of which parts of the range that may not be everything."""

    results: list[SeriesResult]
    lacking: list[str]


class Replica(Protocol):
    """Something that holds the rows of some servers. Raises Unavailable when it is away."""

    @property
    def name(self) -> str:
        """For people."""

    async def query(self, query: Query) -> list[SeriesResult]:
        """The engine's answer, from what the replica holds itself."""

    async def answered(self, query: Query) -> Answered:
        """The same, and what it may lack; of this process its reader knows that."""

    async def unshipped(self, query: Query, follower: str) -> Held:
        """The points of the range, and of what an aggregation needs before it, that a follower may not have shipped."""

    async def metrics(self) -> Mapping[str, Metric]:
        """The metrics that it has, by key."""

    async def list_metrics(self, server_id: str) -> list[MetricInfo]:
        """The same with how many servers have each; of one server, if it is not empty."""


class ThisReplica:
    """The engine of this process."""

    name = "this replica"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def query(self, query: Query) -> list[SeriesResult]:
        return [result async for result in self._engine.query(query)]

    async def answered(self, query: Query) -> Answered:
        return Answered(await self.query(query), [])

    async def unshipped(self, query: Query, follower: str) -> Held:
        ranges = await self._engine.cursors.unshipped(follower)
        start_ms = query.start_ms - lookback_ms(query.aggregation, query.step_ms)
        points: list[SeriesResult] = []
        for start, end in ranges:
            part = replace(query, start_ms=max(start, start_ms), end_ms=min(end, query.end_ms), step_ms=0)
            if part.start_ms < part.end_ms:
                points += await self.query(part)
        return Held(ranges, points)

    async def metrics(self) -> Mapping[str, Metric]:
        return {info.key: info.metric for info in await self._engine.list_metrics()}

    async def list_metrics(self, server_id: str) -> list[MetricInfo]:
        return await self._engine.list_metrics(server_id or None)


class Peer:
    """Another process."""

    def __init__(self, channel: Channel, clock: Clock, max_points: int) -> None:
        self.name = f"timeseries replica {channel.target}"
        self._stub: Any = timeseries_pb2_grpc.TimeSeriesServiceStub(channel.grpc)
        self._clock = clock
        self._max_points = max_points
        self._circuit = Circuit(self.name, clock)
        self._metrics: dict[str, Metric] = {}
        self._metrics_until_s = float("-inf")

    async def query(self, query: Query) -> list[SeriesResult]:
        return (await self.answered(query)).results

    async def answered(self, query: Query) -> Answered:
        request = timeseries_pb2.QueryRequest(query=_message(query), local=True)
        found, lacking = _Collected(await self.metrics(), self._max_points), list[str]()
        with self._circuit.attempt():
            async for answer in self._asked(self._stub.Query, request):
                found.add(answer.series)
                lacking += answer.incomplete
        return Answered(found.results(), lacking)

    async def unshipped(self, query: Query, follower: str) -> Held:
        request = timeseries_pb2.ReadUnshippedRequest(query=_message(query), follower=follower)
        found = _Collected(await self.metrics(), self._max_points)
        ranges: Ranges = []
        with self._circuit.attempt():
            async for answer in self._asked(self._stub.ReadUnshipped, request):
                ranges += [
                    (ms_from_timestamp(one.start_time), ms_from_timestamp(one.end_time)) for one in answer.ranges
                ]
                found.add(answer.series)
        return Held(ranges, found.results())

    async def metrics(self) -> Mapping[str, Metric]:
        """As known for up to METRICS_KEPT_S."""
        if self._clock.monotonic() >= self._metrics_until_s:
            self._metrics = {info.key: info.metric for info in await self.list_metrics("")}
            self._metrics_until_s = self._clock.monotonic() + METRICS_KEPT_S
        return self._metrics

    async def list_metrics(self, server_id: str) -> list[MetricInfo]:
        request = timeseries_pb2.ListMetricsRequest(server_id=server_id, local=True)
        with self._circuit.attempt():
            async with calling(self.name):
                answer = await self._stub.ListMetrics(request, timeout=_timeout_s())
        return [
            MetricInfo(key=info.key, metric=metric_from_pb(info.metric), servers=info.servers)
            for info in answer.metrics
        ]

    async def _asked(self, method: Any, request: Any) -> AsyncIterator[Any]:
        async with calling(self.name):
            async for answer in method(request, timeout=_timeout_s()):
                yield answer


def _timeout_s() -> float:
    left_s = patience_s()
    return CALL_TIMEOUT_S if left_s is None else min(CALL_TIMEOUT_S, left_s)


def _message(query: Query) -> history_pb2.HistoryQuery:
    message = history_pb2.HistoryQuery(
        server_ids=query.server_ids or (),
        metrics=query.metrics or (),
        start_time=timestamp_from_ms(query.start_ms),
        end_time=timestamp_from_ms(query.end_ms),
        aggregation=history_pb2.Aggregation.ValueType(query.aggregation),
    )
    message.step.FromMilliseconds(query.step_ms)
    return message


class _Collected:
    """Series out of messages, in which a long one may continue."""

    def __init__(self, metrics: Mapping[str, Metric], max_points: int) -> None:
        self._metrics = metrics
        self._left = max_points
        self._parts: dict[tuple[str, str], list[history_pb2.Series]] = {}

    def add(self, series: Any) -> None:
        for part in series:
            self._left -= len(part.times)
            self._parts.setdefault((part.server_id, part.metric), []).append(part)
        if self._left < 0:
            raise ResourceExhausted("a replica's answer has more than max_points points", reason="MAX_POINTS")

    def results(self) -> list[SeriesResult]:
        return [self._result(parts) for parts in self._parts.values()]

    def _result(self, parts: list[history_pb2.Series]) -> SeriesResult:
        first = parts[0]
        metric = self._metrics.get(first.metric)
        times_s = np.concatenate([np.array(part.times) for part in parts])
        return SeriesResult(
            server_id=first.server_id,
            metric_key=first.metric,
            unit=first.unit,
            kind=MetricKind.UNSPECIFIED if metric is None else metric.kind,
            times_ms=np.rint(times_s * 1_000).astype(np.int64),
            values=np.concatenate([np.array(part.values) for part in parts]),
            resolution_ms=first.resolution.ToMilliseconds(),
        )
