"""A timeseries service whose series are arrays by the hour."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet.codec import duration_from_ms, metric_to_pb, ms_from_duration, ms_from_timestamp
from fleet.model import Metric, MetricKind
from openmanager.fleet.v1 import history_pb2
from openmanager.timeseries.v1 import timeseries_pb2 as pb
from runtime.channel import Channel
from runtime.clock import ManualClock
from runtime.errors import InvalidArgument, NotFound
from services.analytics.outlook.measurements import Source
from services.analytics.outlook.workers import Workers
from tests.analytics.fakes import SECRET, FakeTimeSeries, serving

Floats = NDArray[np.float64]
HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
NOW_MS: Final = 1_790_000_000_000 // HOUR_MS * HOUR_MS + 20 * 60_000
"""Twenty past an hour."""
PERCENT: Final = {"unit": "%", "kind": MetricKind.GAUGE}


@dataclass(frozen=True, slots=True)
class Kept:
    """A series, its last value in the hour that NOW_MS lies in, `ago` hours before."""

    metric: Metric
    times_ms: NDArray[np.int64]
    values: Floats


class FakeHistory(FakeTimeSeries):
    """`Query` and `ListMetrics` as the proto has them; a long series comes in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[str, str], Kept] = {}
        self.servers: set[str] = set()
        self.queries: list[history_pb2.HistoryQuery] = []
        self.incomplete: list[str] = []
        self.resolution_ms = HOUR_MS
        self.running = 0
        self.gate = asyncio.Event()
        """Queries wait while it is not set."""
        self.gate.set()

    def keep(
        self, server_id: str, name: str, values: Any, *, ago: int = 0, step_ms: int = HOUR_MS, **metric: Any
    ) -> None:
        """Keeps a series that ends `ago` steps before now."""
        made = Metric(name=name, **metric)
        values = np.asarray(values, np.float64)
        last_ms = NOW_MS // step_ms * step_ms - ago * step_ms
        times = last_ms - step_ms * np.arange(len(values) - 1, -1, -1, dtype=np.int64)
        self.kept[server_id, made.key] = Kept(made, times[~np.isnan(values)], values[~np.isnan(values)])
        self.servers.add(server_id)

    async def ListMetrics(self, request: pb.ListMetricsRequest, _context: object) -> pb.ListMetricsResponse:
        found = {
            key: kept.metric for (server_id, key), kept in self.kept.items() if request.server_id in {"", server_id}
        }
        infos = [pb.MetricInfo(metric=metric_to_pb(metric), key=key) for key, metric in sorted(found.items())]
        return pb.ListMetricsResponse(metrics=infos)

    async def Query(self, request: pb.QueryRequest, _context: object) -> AsyncGenerator[pb.QueryResponse, None]:
        query = request.query
        self.queries.append(query)
        self.running += 1
        try:
            await self.gate.wait()
            for server_id in query.server_ids:
                if server_id not in self.servers:
                    raise NotFound("no such server", reason="SERVER_UNKNOWN", field="server_ids")
            for name in query.metrics:
                if not any(name in {key, kept.metric.name} for (_, key), kept in self.kept.items()):
                    raise InvalidArgument(f"no server has a metric {name!r}", field="metrics")
            for (server_id, key), kept in sorted(self.kept.items()):
                if server_id in query.server_ids and {key, kept.metric.name} & set(query.metrics):
                    for part in _parts(query, server_id, kept):
                        part.resolution.CopyFrom(duration_from_ms(self.resolution_ms))
                        yield pb.QueryResponse(series=[part])
            if self.incomplete:
                yield pb.QueryResponse(incomplete=self.incomplete)
        finally:
            self.running -= 1


def _parts(query: history_pb2.HistoryQuery, server_id: str, kept: Kept) -> list[history_pb2.Series]:
    start_ms, end_ms = ms_from_timestamp(query.start_time), ms_from_timestamp(query.end_time)
    assert ms_from_duration(query.step) % 300_000 == 0
    is_counter = kept.metric.kind is MetricKind.COUNTER
    assert (query.aggregation == history_pb2.AGGREGATION_RATE) == is_counter, "the fake's counters are kept as rates"
    inside = (kept.times_ms >= start_ms) & (kept.times_ms < end_ms)
    times, values = kept.times_ms[inside] / 1000, kept.values[inside]
    return [
        history_pb2.Series(server_id=server_id, metric=kept.metric.key, times=times[cut], values=values[cut])
        for cut in (slice(0, 1000), slice(1000, None))
        if len(times[cut])
    ]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a servicer is made of, on a fake timeseries."""

    fake: FakeHistory
    source: Source
    workers: Workers
    clock: ManualClock


@contextlib.asynccontextmanager
async def on_histories(**workers: Any) -> AsyncIterator[Parts]:
    """Parts for a servicer; it is NOW_MS."""
    fake = FakeHistory()
    async with serving(fake) as address, Channel(address, secret=SECRET) as channel:
        with Workers(**workers) as pool:
            yield Parts(fake, Source(channel), pool, ManualClock(now_ms=NOW_MS))


def hours_of(days: float) -> Floats:
    """0, 1, 2, ... of so many days."""
    return np.arange(round(days * 24), dtype=np.float64)


def noise(count: int, seed: int = 1) -> Floats:
    """Normal, of standard deviation 1."""
    return np.random.default_rng(seed).standard_normal(count)


def growing(days: float, a_day: float, now: float, *, noisy: float = 0.1) -> Floats:
    """Hourly values that grow by so much a day and are at `now` at their end."""
    hours = hours_of(days)
    return now + (hours - hours[-1]) / 24 * a_day + noisy * noise(len(hours))
