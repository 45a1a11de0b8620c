"""A timeseries service that keeps its journal in a list, and rows to put into it."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleet.codec import metric_set_to_pb, rows_to_pb, timestamp_from_ms
from fleet.model import Metric, MetricKind, MetricSet, Rows
from openmanager.timeseries.v1 import timeseries_pb2 as pb
from runtime.errors import Unavailable
from runtime.interception import Interception, service_secret_authenticator
from runtime.server import GrpcServer, bind
from services.analytics.detect import EwmaDetector, EwmaRules
from services.analytics.findings import Anomaly

SECRET = "a-secret-of-the-tests"
T0_MS = 1_700_000_000_000
TICK_MS = 10_000
METRICS = ("load", "cpu_usage", "disk_usage", "memory_usage")
METRIC_SET = MetricSet(tuple(Metric(name=name, unit="%", kind=MetricKind.GAUGE) for name in METRICS))


def rows_of(servers: Sequence[str], times_ms: Sequence[int], values: Any) -> Rows:
    """Rows of METRIC_SET."""
    return Rows(
        metric_set_id=METRIC_SET.id,
        server_ids=tuple(servers),
        times_ms=np.array(times_ms, np.int64),
        values=np.asarray(values, np.float64).reshape(len(servers), len(METRICS)),
    )


def fleet_ticks(ticks: int, servers: int = 3, seed: int = 7) -> list[Rows]:
    """Ticks of a fleet at rest, but for spikes of cpu_usage on the first server and gaps on the second."""
    rng = np.random.default_rng(seed)
    ids = [f"server-{number}" for number in range(servers)]
    made = []
    for tick in range(ticks):
        values = 40.0 + 2.0 * rng.standard_normal((servers, len(METRICS)))
        if 100 <= tick % 150 < 110:
            values[0, METRICS.index("cpu_usage")] = 97.0 + rng.random()
        if tick % 7 == 3 and servers > 1:
            values[1, METRICS.index("memory_usage")] = np.nan
        made.append(rows_of(ids, [T0_MS + tick * TICK_MS] * servers, values))
    return made


class Series:
    """One server's cpu_usage, shown to a detector point by point."""

    def __init__(self, detector: EwmaDetector | None = None, server: str = "web-1", **rules: Any) -> None:
        self.detector = detector or EwmaDetector(EwmaRules(**rules))
        self.server = server
        self.columns = self.detector.columns_of(METRIC_SET)
        self.tick = 0
        self.found: dict[str, Anomaly] = {}

    def show(self, *values: float, at_ms: int | None = None) -> list[Anomaly]:
        """The findings that changed with the last of the values, one every tick."""
        changed: list[Anomaly] = []
        for value in values:
            time_ms = T0_MS + self.tick * TICK_MS if at_ms is None else at_ms
            self.tick += at_ms is None
            row: NDArray[np.float64] = np.full((1, len(METRICS)), np.nan)
            row[0, METRICS.index("cpu_usage")] = value
            changed = self.detector.observe(
                self.columns, [self.server], np.array([time_ms], np.int64), row, T0_MS + self.tick * TICK_MS
            )
            self.found |= {finding.id: finding for finding in changed}
        return changed

    def time_ms(self, tick: int) -> int:
        return T0_MS + tick * TICK_MS


class FakeTimeSeries:
    """TailMetrics as the proto has it; `swept` sequences are gone from the journal."""

    def __init__(self) -> None:
        self.journal: list[pb.TailMetricsResponse] = []
        self.swept = 0
        self.asked: list[int] = []
        self.streams = 0
        self.withhold_set = False
        self.resent = 0
        """How many batches before what was asked for a stream sends again."""
        self._more = asyncio.Event()
        self._broken = asyncio.Event()

    def append(self, rows: Rows | None, *, received_ms: int | None = None) -> int:
        """Journals a batch and returns its sequence."""
        sequence = len(self.journal) + 1
        received_ms = (int(rows.times_ms[-1]) if rows else T0_MS) if received_ms is None else received_ms
        message = pb.TailMetricsResponse(sequence=sequence, receive_time=timestamp_from_ms(received_ms))
        if rows is not None:
            message.batch.CopyFrom(rows_to_pb(rows))
        self.journal.append(message)
        self._more.set()
        self._more = asyncio.Event()
        return sequence

    def break_streams(self) -> None:
        """Ends the running streams as a dying process does."""
        self._broken.set()
        self._broken = asyncio.Event()

    async def TailMetrics(
        self, request: pb.TailMetricsRequest, _context: object
    ) -> AsyncGenerator[pb.TailMetricsResponse, None]:
        self.asked.append(request.from_sequence)
        self.streams += 1
        broken = self._broken
        try:
            place = max((request.from_sequence or len(self.journal) + 1) - self.resent, self.swept + 1)
            first, set_sent = True, False
            while not broken.is_set():
                more = self._more
                while place <= len(self.journal) and not broken.is_set():
                    message = pb.TailMetricsResponse()
                    message.CopyFrom(self.journal[place - 1])
                    if first:
                        message.first_sequence = self.swept + 1
                    if message.batch.rows and not set_sent and not self.withhold_set:
                        message.metric_set.CopyFrom(metric_set_to_pb(METRIC_SET))
                        set_sent = True
                    first = False
                    place += 1
                    yield message
                waits = [asyncio.ensure_future(event.wait()) for event in (more, broken)]
                try:
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for wait in waits:
                        wait.cancel()
            raise Unavailable("the stream was broken")
        finally:
            self.streams -= 1


@contextlib.asynccontextmanager
async def serving(fake: FakeTimeSeries, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """The fake on a real server; yields its address."""
    server = GrpcServer(
        [bind("openmanager.timeseries.v1.TimeSeriesService", fake)],
        Interception(service_secret_authenticator(SECRET)),
    )
    bound = await server.start(address)
    try:
        yield bound
    finally:
        await server.stop(0)
