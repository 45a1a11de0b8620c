"""Timeseries with its journal in a list, metadata with findings in a dictionary, and a fleet whose rows are put in."""

import asyncio
import contextlib
import functools
import io
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import numpy as np

from fleet.anomaly import Anomaly, anomaly_from_pb
from fleet.codec import metric_set_to_pb, rows_to_pb, timestamp_from_ms
from fleet.model import Metric, MetricKind, MetricSet, Rows
from openmanager.metadata.v1 import anomaly_pb2
from openmanager.timeseries.v1 import timeseries_pb2 as pb
from runtime.errors import FailedPrecondition, InvalidArgument, Unavailable
from runtime.interception import Interception, service_secret_authenticator
from runtime.server import GrpcServer, bind
from services.analytics import checkpoint
from services.analytics.core import Batch, Snapshot
from services.analytics.detect import DetectorState
from services.analytics.fleet_detector import FleetDetector
from services.analytics.follow import parts_of

SECRET = "a-secret-of-the-tests"
T0_MS = 1_700_006_400_000
FAST_MS = 10_000
TICK_MS = 60_000
LEARN_TICKS = 2 * 1_440 + 60
"""A day until series are judged, another until servers are, and the first half-hours of levels."""
GAUGES = (*(f"gauge_{number}" for number in range(7)), "disk_usage")
METRICS = ("load", "cpu_usage", "requests_total", *GAUGES, "bytes_total")
BROKEN_METRICS = ("load", "cpu_usage", "gauge_1", "gauge_5")
METRIC_SET = MetricSet(
    tuple(Metric(name=name, kind=MetricKind.COUNTER if "total" in name else MetricKind.GAUGE) for name in METRICS)
)
SERVERS = ("server-0", "server-1", "server-2")
BROKEN_TICKS = (*range(20, 30), *range(80, 90))
"""After what is learnt: then server-0 is broken."""


def rows_of(servers: Sequence[str], times_ms: Sequence[int], values: Any, metric_set: MetricSet = METRIC_SET) -> Rows:
    """Rows of a set."""
    return Rows(
        metric_set_id=metric_set.id,
        server_ids=tuple(servers),
        times_ms=np.array(times_ms, np.int64),
        values=np.asarray(values, np.float64).reshape(len(servers), len(metric_set)),
    )


def usual(tick: int, servers: int = 3, time_ms: int | None = None) -> Any:
    """What servers at rest measure at a tick, or between two; shape (servers, metrics)."""
    time_ms = T0_MS + tick * TICK_MS if time_ms is None else time_ms
    values = 40.0 + 2.0 * np.random.default_rng(time_ms).standard_normal((servers, len(METRICS)))
    values += 5.0 * np.sin(2 * np.pi * time_ms / 86_400_000)
    values[:, [METRICS.index("requests_total"), METRICS.index("bytes_total")]] += (time_ms - T0_MS) / 100.0
    return values


def fleet_tick(tick: int, *, broken: bool = False, servers: Sequence[str] = SERVERS) -> Rows:
    """What a fleet reports at a tick; broken, the gauges of its first server are far from usual."""
    values = usual(tick, len(servers))
    if broken:
        values[0, [METRICS.index(name) for name in BROKEN_METRICS]] = 97.0
    if tick % 7 == 3 and len(servers) > 1:
        values[1, METRICS.index("gauge_3")] = np.nan
    return rows_of(servers, [T0_MS + tick * TICK_MS] * len(servers), values)


def fleet_ticks(ticks: int) -> list[Rows]:
    """The ticks that follow what `trained` has learnt."""
    return [fleet_tick(LEARN_TICKS + tick, broken=tick in BROKEN_TICKS) for tick in range(ticks)]


def at_ms(tick: int) -> int:
    """The time of a tick after what `trained` has learnt."""
    return T0_MS + (LEARN_TICKS + tick) * TICK_MS


def show(detector: FleetDetector, rows: Rows, now_ms: int | None = None, metric_set: MetricSet = METRIC_SET) -> Any:
    """Shows a detector a batch, each server once; returns the findings that changed."""
    now_ms = int(rows.times_ms.max()) if now_ms is None else now_ms
    changed = detector.advance(now_ms)
    columns = detector.columns_of(metric_set)
    changed += detector.observe(columns, rows.server_ids, rows.times_ms, rows.values, now_ms)
    return changed + detector.settle(now_ms)


@functools.cache
def trained_state() -> DetectorState:
    """What a detector knows after LEARN_TICKS; found once, in a few seconds."""
    detector = FleetDetector()
    for tick in range(LEARN_TICKS):
        assert show(detector, fleet_tick(tick)) == []
    detector.advance(at_ms(0) + 15_000)  # the last minute is closed, too
    return detector.state()


def trained(**arguments: Any) -> FleetDetector:
    """A detector that has learnt what is usual of the fleet."""
    detector = FleetDetector(**arguments)
    detector.restore(trained_state())
    return detector


def trained_snapshot() -> Snapshot:
    """A checkpoint of it."""
    return Snapshot(next_sequence=1, verdicts_until=0, detector=trained_state(), waiting=())


def written(snapshot: Snapshot) -> bytes:
    """The file of a checkpoint."""
    file = io.BytesIO()
    checkpoint.write(snapshot, file)
    return file.getvalue()


def batch_of(rows: Rows, sequence: int, received_ms: int | None = None) -> Batch:
    """A batch as the follower makes it."""
    return Batch(
        sequence=sequence,
        received_ms=int(rows.times_ms.max()) if received_ms is None else received_ms,
        columns=FleetDetector().columns_of(METRIC_SET),
        rows=rows,
        parts=parts_of(rows.server_ids, rows.times_ms),
    )


def same_state(one: DetectorState, other: DetectorState) -> None:
    """Fails where two states differ by more than rounding."""
    assert one.texts == other.texts
    assert one.open_findings == other.open_findings
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_allclose(array, other.arrays[name], rtol=0, atol=1e-9, err_msg=name)


class Shown:
    """A trained detector that is shown the fleet tick by tick, and what it found."""

    def __init__(self, detector: FleetDetector | None = None, tick: int = 0) -> None:
        self.detector = detector or trained()
        self.tick = tick
        self.found: dict[str, Anomaly] = {}

    def show(self, rows: Rows, now_ms: int | None = None) -> None:
        """Shows a batch."""
        self.found |= {finding.id: finding for finding in show(self.detector, rows, now_ms)}

    def go_on(self, ticks: int, *, broken: bool = False) -> None:
        """Shows the next ticks."""
        for _ in range(ticks):
            self.show(fleet_tick(LEARN_TICKS + self.tick, broken=broken))
            self.tick += 1
        # the last minute is closed, too
        self.found |= {finding.id: finding for finding in self.detector.advance(at_ms(self.tick) + 15_000)}

    @property
    def findings(self) -> list[Anomaly]:
        """What was found, in order."""
        return sorted(self.found.values(), key=lambda finding: finding.start_ms)


class FakeMetadata:
    """Keeps findings as metadata does; refuses those of servers that it is told to."""

    def __init__(self) -> None:
        self.kept: dict[str, Anomaly] = {}
        self.told = 0
        self.refuses: set[str] = set()
        self.is_away = False
        self.turned_away = 0
        self.followed_from: list[int] = []
        self.to_tell: asyncio.Queue[anomaly_pb2.FollowAnomaliesResponse | None] = asyncio.Queue()

    async def FollowAnomalies(
        self, request: anomaly_pb2.FollowAnomaliesRequest, _context: object
    ) -> AsyncGenerator[anomaly_pb2.FollowAnomaliesResponse, None]:
        self.followed_from.append(request.after_version)
        while (message := await self.to_tell.get()) is not None:
            yield message
        raise Unavailable("the stream was broken")

    @property
    def findings(self) -> list[Anomaly]:
        """What it was told, newest first."""
        return sorted(self.kept.values(), key=lambda finding: finding.start_ms, reverse=True)

    async def RecordAnomalies(
        self, request: anomaly_pb2.RecordAnomaliesRequest, _context: object
    ) -> anomaly_pb2.RecordAnomaliesResponse:
        if self.is_away:
            self.turned_away += 1
            raise Unavailable("away")
        told = [anomaly_from_pb(message) for message in request.anomalies]
        if any(finding.server_id in self.refuses for finding in told):
            raise InvalidArgument("is not wanted", field="anomalies")
        for finding in told:
            self.told += 1
            self.kept[finding.id] = max(self.kept.get(finding.id, finding), finding, key=lambda one: one.rank)
        return anomaly_pb2.RecordAnomaliesResponse()


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
        self.is_away = False
        self.turned_away = 0
        self.echoes = False
        """Whether what is written here comes in the tail."""
        self.sets: dict[str, Any] = {}
        self.written: list[Any] = []
        self._more = asyncio.Event()
        self._broken = asyncio.Event()

    def append(self, rows: Rows | None, *, received_ms: int | None = None) -> int:
        """Journals a batch and returns its sequence."""
        sequence = len(self.journal) + 1
        received_ms = (int(rows.times_ms.max()) if rows else T0_MS) if received_ms is None else received_ms
        message = pb.TailMetricsResponse(sequence=sequence, receive_time=timestamp_from_ms(received_ms))
        if rows is not None:
            message.batch.CopyFrom(rows_to_pb(rows))
        self.journal.append(message)
        self._more.set()
        self._more = asyncio.Event()
        return sequence

    async def Append(self, request: pb.AppendRequest, _context: object) -> pb.AppendResponse:
        """As a sender's, and seen by whoever follows."""
        if self.is_away:
            self.turned_away += 1
            raise Unavailable("away")
        self.sets.update((one.id, one) for one in request.metric_sets)
        if request.batch.metric_set_id not in self.sets:
            raise FailedPrecondition("unknown", reason="METRIC_SET_UNKNOWN")
        self.written.append(request.batch)
        if self.echoes:
            message = pb.TailMetricsResponse(sequence=len(self.journal) + 1, batch=request.batch)
            message.receive_time.CopyFrom(self.journal[-1].receive_time)
            self.journal.append(message)
            self._more.set()
            self._more = asyncio.Event()
        return pb.AppendResponse(sequence=len(self.journal), accepted_points=len(request.batch.values))

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
            first, sent = True, set[str]()
            while not broken.is_set():
                more = self._more
                while place <= len(self.journal) and not broken.is_set():
                    message = pb.TailMetricsResponse()
                    message.CopyFrom(self.journal[place - 1])
                    if first:
                        message.first_sequence = self.swept + 1
                    set_id = message.batch.metric_set_id
                    if message.batch.rows and set_id not in sent and not self.withhold_set:
                        message.metric_set.CopyFrom(self.sets.get(set_id) or metric_set_to_pb(METRIC_SET))
                        sent.add(set_id)
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
async def serving(fake: FakeTimeSeries | FakeMetadata, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """The fake on a real server; yields its address."""
    is_metadata = isinstance(fake, FakeMetadata)
    service = "metadata.v1.AnomalyStoreService" if is_metadata else "timeseries.v1.TimeSeriesService"
    server = GrpcServer(
        [bind(f"openmanager.{service}", fake)],
        Interception(service_secret_authenticator(SECRET)),
    )
    bound = await server.start(address)
    try:
        yield bound
    finally:
        await server.stop(0)


def fast_tick(number: int, servers: tuple[str, ...] = SERVERS) -> Rows:
    """A tick every ten seconds, after what `trained` has learnt."""
    time_ms = at_ms(0) + number * FAST_MS
    return rows_of(servers, [time_ms] * len(servers), usual(0, time_ms=time_ms)[: len(servers)])


def restarted(detector: FleetDetector, **arguments: Any) -> FleetDetector:
    """A new detector that goes on from a checkpoint of one."""
    again = FleetDetector(**arguments)
    snapshot = Snapshot(next_sequence=1, verdicts_until=0, detector=detector.state(), waiting=())
    again.restore(checkpoint.decode(written(snapshot)).detector)
    return again
