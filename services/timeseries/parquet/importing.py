"""Import: sends the points of Parquet files to the service as its senders do, or to an engine where none runs.

What must stay true: a point counts as taken when it is acknowledged, that is on disk; batches are sent one after the
other in the order of the files, so that of points of one series and time the last is the newest; files whose columns
do not fit are refused before anything is sent; sending everything again changes nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from fleet import validation
from fleet.codec import descriptor_to_pb, metric_set_to_pb, rows_to_pb
from fleet.model import MetricSet, Rows, ServerDescriptor
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc
from runtime import folder, tls
from runtime.channel import Channel, calling
from runtime.clock import Clock
from runtime.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from runtime.settings import split_address
from services.timeseries.engine.engine import Engine
from services.timeseries.parquet.faults import Book
from services.timeseries.parquet.layout import Progress, files_to_import
from services.timeseries.parquet.matrices import BUFFER_ROWS, Buffer, Matrix, Sets
from services.timeseries.parquet.reading import Reader, read_servers
from services.timeseries.servicer import TimeSeriesServicer
from services.timeseries.settings import TimeSeriesSettings

REQUEST_VALUES: Final = 250_000
"""Cells of one request, 2 MB; the last rows of a matrix may make it twice that."""
REQUEST_ROWS: Final = 10_000
REQUEST_SERVERS: Final = 1_000
MAX_SERIES: Final = 1_000_000
"""Series remembered at once, some 500 MB; then all are forgotten."""
CALL_DEADLINE_S: Final = 60.0
RETRY_INTERVAL_S: Final = 1.0
RETRY_BOUND_S: Final = 60.0
"""How long a batch is tried again while the service is away, as when it is restarted, or has no room."""


class Target(Protocol):
    """Where points go: the stub of a service that runs, or an engine in this process."""

    async def Append(self, request: timeseries_pb2.AppendRequest, /) -> timeseries_pb2.AppendResponse: ...

    async def ListMetrics(
        self, request: timeseries_pb2.ListMetricsRequest, /
    ) -> timeseries_pb2.ListMetricsResponse: ...


class _InProcess:
    """The servicer without a wire."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._servicer = TimeSeriesServicer(engine, clock)

    async def Append(self, request: timeseries_pb2.AppendRequest, /) -> timeseries_pb2.AppendResponse:
        return await self._servicer.Append(request, None)

    async def ListMetrics(self, request: timeseries_pb2.ListMetricsRequest, /) -> timeseries_pb2.ListMetricsResponse:
        return await self._servicer.ListMetrics(request, None)


@asynccontextmanager
async def target_of(settings: TimeSeriesSettings, clock: Clock) -> AsyncIterator[tuple[Target, str]]:
    """TIMESERIES_TARGET where it is set; else the store in DATA_DIR if no service has it; else that service.

    With it comes what to call it.
    """
    async with AsyncExitStack() as stack:
        address = settings.target
        if address is None:
            try:
                store = stack.enter_context(folder.locked(settings.data_dir, "timeseries"))
            except folder.CannotStartError:
                address = _dialled(settings.address)
            else:
                engine = await stack.enter_async_context(Engine.open(store, clock=clock, settings=settings.engine()))
                yield _InProcess(engine, clock), f"{store}, which no service has open"
                return
        channel = Channel(
            address,
            secret=folder.service_secret(settings),
            credentials=tls.channel_credentials(settings),
            default_deadline_s=CALL_DEADLINE_S,
        )
        await stack.enter_async_context(channel)
        stub: Any = timeseries_pb2_grpc.TimeSeriesServiceStub(channel.grpc)
        yield stub, f"the service at {address}"


def _dialled(address: str) -> str:
    """Where a service that listens on an address is reached from its own machine."""
    host, port = split_address(address)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Request:
    """A batch that grows until it is sent; `places` has for each row the place of one of its points."""

    def __init__(self, metric_set: MetricSet, file: Path) -> None:
        self.metric_set = metric_set
        self.file = file
        self.places: list[int] = []
        self._parts: list[Matrix] = []

    def add(self, part: Matrix) -> None:
        """Takes some rows."""
        self._parts.append(part)
        self.places += part.places.tolist()

    def message(self, *, tell_set: bool) -> timeseries_pb2.AppendRequest:
        """What is sent: a copy of everything."""
        rows = Rows(
            metric_set_id=self.metric_set.id,
            server_ids=tuple(part.server_id for part in self._parts for _ in part.places),
            times_ms=np.concatenate([part.times_ms for part in self._parts]),
            values=np.concatenate([part.values for part in self._parts]),
        )
        sets = [metric_set_to_pb(self.metric_set)] if tell_set else []
        return timeseries_pb2.AppendRequest(metric_sets=sets, batch=rows_to_pb(rows))


_Batch = tuple[Request, timeseries_pb2.AppendRequest]


class Importer:
    """One import; making it checks the files' columns. `run` it once; `book` says then what became of the rows."""

    def __init__(self, path: Path, clock: Clock, progress: Progress) -> None:
        files, servers = files_to_import(path)
        self._reader = Reader(files, clock)
        self._descriptors = read_servers(servers) if servers else []
        self._clock = clock
        self._progress = progress
        self._buffer = Buffer(BUFFER_ROWS)
        self._sets = Sets()
        self._told_sets: set[str] = set()

    @property
    def book(self) -> Book:
        """What became of the rows so far."""
        return self._reader.book

    async def run(self, target: Target) -> None:
        """Sends everything.

        Raises:
            OpenManagerError: the target takes no batches any more; what was acknowledged before stays.
        """
        await self._tell_servers(target)
        batches = self._batches()
        ready = asyncio.create_task(asyncio.to_thread(next, batches, None), name="read")
        try:
            while (batch := await ready) is not None:
                ready = asyncio.create_task(asyncio.to_thread(next, batches, None), name="read")
                await self._send(target, *batch)
        finally:
            await asyncio.gather(ready, return_exceptions=True)

    async def _tell_servers(self, target: Target) -> None:
        """Describes the servers that the target has no rows of; what it knows of others is newer."""
        unknown: list[ServerDescriptor] = []
        for descriptor in self._descriptors:
            try:
                validation.check_descriptors([descriptor])
            except InvalidArgument as error:
                self.book.damaged.append(f"servers.parquet: {descriptor.server_id!r}: {error.message}")
                continue
            async with calling("timeseries"):
                request = timeseries_pb2.ListMetricsRequest(server_id=descriptor.server_id)
                if not (await target.ListMetrics(request)).metrics:
                    unknown.append(descriptor)
        for start in range(0, len(unknown), REQUEST_SERVERS):
            some = [descriptor_to_pb(one) for one in unknown[start : start + REQUEST_SERVERS]]
            await self._append(target, timeseries_pb2.AppendRequest(servers=some))

    async def _send(self, target: Target, request: Request, message: timeseries_pb2.AppendRequest) -> None:
        response = await self._append(target, message)
        book = self.book
        book.taken += response.accepted_points
        if response.rejected_points:
            reasons = sorted({error.reason for error in response.errors})
            column = "server_id" if reasons == ["BAD_SERVER_ID"] else "time"
            places = (request.places[error.row] for error in response.errors)
            book.blame(column, f"the service says {', '.join(reasons)}", response.rejected_points, places)
        done = book.taken + book.not_taken + book.without_value
        self._progress(str(request.file), book.taken, min(1.0, done / max(1, self._reader.total)))

    async def _append(self, target: Target, message: timeseries_pb2.AppendRequest) -> timeseries_pb2.AppendResponse:
        """Sends a batch; once one was taken, again and again while that may help."""
        ends = self._clock.monotonic() + RETRY_BOUND_S
        while True:
            try:
                async with calling("timeseries"):
                    return await target.Append(message)
            except (Unavailable, DeadlineExceeded, ResourceExhausted):
                if not self.book.taken or self._clock.monotonic() >= ends:
                    raise
            await self._clock.sleep(RETRY_INTERVAL_S)

    def _batches(self) -> Iterator[_Batch]:
        """Everything, in batches."""
        reader, buffer, path = self._reader, self._buffer, Path()
        for path, points in reader.points():
            if not buffer.has_room(len(points.series)):
                yield from self._emptied(buffer.unfinished(reader.table.series) or buffer.size, path)
                if not buffer.has_room(len(points.series)):
                    yield from self._emptied(buffer.size, path)
            buffer.add(points)
            if len(reader.table.series) > MAX_SERIES:
                yield from self._emptied(buffer.size, path)
                reader.forget()
        yield from self._emptied(buffer.size, path)

    def _emptied(self, end: int, file: Path) -> Iterator[_Batch]:
        """Takes the points before `end` out of the buffer. The messages are copies, so it may change then."""
        growing: dict[str, Request] = {}
        for matrix in self._buffer.matrices(end, self._reader.table.series, self._sets):
            metric_set = matrix.metric_set
            limit = max(1, min(REQUEST_ROWS, REQUEST_VALUES // len(metric_set)))
            for start in range(0, len(matrix.times_ms), limit):
                request = growing.setdefault(metric_set.id, Request(metric_set, file))
                request.add(matrix.part(start, start + limit))
                if len(request.places) >= limit:
                    yield self._finished(growing.pop(metric_set.id))
        for request in growing.values():
            yield self._finished(request)
        self._buffer.keep_from(end)

    def _finished(self, request: Request) -> _Batch:
        set_id = request.metric_set.id
        message = request.message(tell_set=set_id not in self._told_sets)
        self._told_sets.add(set_id)
        return request, message
