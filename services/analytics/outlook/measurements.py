"""Metrics by the hour, asked of timeseries.

What must stay true: only `Query` and `ListMetrics` are asked, so whatever answers them (this replica, another, an
external store) is read alike; hours are the widest step that the mathematics takes, so that a year is read from the
coarsest tier; a counter is read as its rate; a reader who is cancelled ends the query.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from fleet.codec import duration_from_ms, ms_from_duration, timestamp_from_ms
from openmanager.fleet.v1 import history_pb2, metric_pb2
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc
from runtime import deadline
from runtime.channel import Channel, calling
from runtime.errors import InvalidArgument, OpenManagerError
from services.analytics.forecasting.grid import HOUR_MS, measurable
from services.analytics.forecasting.robust import Floats, Integers

NAMES_SHOWN: Final = 3
"""Of metrics with one name so many are named to who has to choose."""
_FIELDS: Final = {"server_ids": "server_id", "metrics": "metric"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A metric: its identity, its unit as its sender gave it, and whether it is a counter."""

    key: str
    unit: str
    is_counter: bool

    @property
    def shown_unit(self) -> str:
        """The unit of its values here."""
        return f"{self.unit}/s" if self.is_counter and self.unit else self.unit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measurements:
    """What was measured of one metric of one server.

    Attributes:
        times_ms, values: as many, ascending; of windows of the step, by their starts.
        resolution_ms: width of the coarsest roll-ups in it; 0: of points alone.
        incomplete: what could not be asked.
    """

    server_id: str
    metric: Chosen
    times_ms: Integers
    values: Floats
    resolution_ms: int = 0
    incomplete: tuple[str, ...] = ()

    @property
    def data_end_ms(self) -> int | None:
        """The end of the last hour in which anything was measured."""
        there = self.times_ms[np.isfinite(self.values)]
        return int(there[-1]) // HOUR_MS * HOUR_MS + HOUR_MS if len(there) else None


@dataclass(slots=True)
class _Parts:
    times: list[Floats] = field(default_factory=list)
    values: list[Floats] = field(default_factory=list)
    resolution_ms: int = 0


class Source:
    """Asks timeseries."""

    def __init__(self, timeseries: Channel) -> None:
        self._stub = timeseries_pb2_grpc.TimeSeriesServiceStub(timeseries.grpc)

    async def metrics(self, server_id: str, name: str) -> list[Chosen]:
        """The metrics of a server (empty: of any) that an identity or a bare name means."""
        async with calling("timeseries"):
            answer: timeseries_pb2.ListMetricsResponse = await self._stub.ListMetrics(
                timeseries_pb2.ListMetricsRequest(server_id=server_id)
            )
        exact = [_chosen(info) for info in answer.metrics if info.key == name]
        return exact or [_chosen(info) for info in answer.metrics if info.metric.name == name]

    async def metric(self, server_id: str, name: str) -> Chosen:
        """The one metric of a server; one that the server never had, as it was named.

        Raises:
            InvalidArgument: the name is of several.
        """
        found = await self.metrics(server_id, name)
        if len(found) > 1:
            some = ", ".join(one.key for one in found[:NAMES_SHOWN])
            more = ", ..." if len(found) > NAMES_SHOWN else ""
            raise InvalidArgument(
                f"{len(found)} metrics have this name: say which of {some}{more}",
                field="metric",
                reason="METRIC_AMBIGUOUS",
            )
        return found[0] if found else Chosen(key=name, unit="", is_counter=False)

    async def read(
        self, server_id: str, metric: Chosen, start_ms: int, end_ms: int, step_ms: int = HOUR_MS
    ) -> Measurements:
        """One metric in `[start_ms, end_ms)`, no matter whether there is anything.

        Raises:
            NotFound: SERVER_UNKNOWN, timeseries has never heard of the server.
            InvalidArgument: no server has the metric.
        """
        found = await self.read_many([server_id], [metric], start_ms, end_ms, step_ms)
        return found[0]

    async def read_many(
        self, server_ids: Sequence[str], metrics: Sequence[Chosen], start_ms: int, end_ms: int, step_ms: int = HOUR_MS
    ) -> list[Measurements]:
        """Each of the metrics, gauges or counters all of them, of each server that has it in that time, in order of
        server and metric. One server and one metric: always one."""
        by_key = {metric.key: metric for metric in metrics}
        is_counter = metrics[0].is_counter
        query = history_pb2.HistoryQuery(
            server_ids=server_ids,
            metrics=list(by_key),
            start_time=timestamp_from_ms(start_ms),
            end_time=timestamp_from_ms(end_ms),
            step=duration_from_ms(step_ms),
            aggregation=history_pb2.AGGREGATION_RATE if is_counter else history_pb2.AGGREGATION_AVG,
        )
        found: dict[tuple[str, str], _Parts] = {}
        incomplete: list[str] = []
        try:
            async with aclosing(self._query(query)) as messages:
                async for message in messages:
                    incomplete += message.incomplete
                    for series in message.series:
                        if series.metric not in by_key:  # an identity without labels is also a name of others
                            continue
                        parts = found.setdefault((series.server_id, series.metric), _Parts())
                        parts.times.append(np.array(series.times))
                        parts.values.append(np.array(series.values))
                        parts.resolution_ms = max(parts.resolution_ms, ms_from_duration(series.resolution))
        except OpenManagerError as error:
            error.field = _FIELDS.get(error.field or "", error.field)
            raise
        if not found and len(server_ids) == len(by_key) == 1:
            found[server_ids[0], metrics[0].key] = _Parts()
        return [
            Measurements(
                server_id=server_id,
                metric=by_key[key],
                times_ms=np.rint(np.concatenate([np.zeros(0), *parts.times]) * 1000).astype(np.int64),
                values=measurable(np.concatenate([np.zeros(0), *parts.values])),
                resolution_ms=parts.resolution_ms,
                incomplete=tuple(incomplete),
            )
            for (server_id, key), parts in found.items()
        ]

    async def _query(self, query: history_pb2.HistoryQuery) -> AsyncGenerator[timeseries_pb2.QueryResponse, None]:
        async with calling("timeseries"):
            call = self._stub.Query(timeseries_pb2.QueryRequest(query=query), timeout=deadline.remaining_s())
            try:
                async for message in call:
                    yield message
            finally:
                call.cancel()


def _chosen(info: timeseries_pb2.MetricInfo) -> Chosen:
    return Chosen(key=info.key, unit=info.metric.unit, is_counter=info.metric.kind == metric_pb2.METRIC_KIND_COUNTER)
