"""`OpenManager`: a method for everything that the public API reads, and one that writes.

What must stay true: every unary call has a deadline; what fails raises OpenManagerError and nothing else; streams end
their call when their reader leaves, also in the middle.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

from client import watching
from client.backoff import Backoff
from client.channel import DEFAULT_ADDRESS, open_channel
from client.errors import OpenManagerError, from_rpc_error
from client.history import History, Joiner, from_message, timestamp
from client.writing import Batches, Totals, Writing
from openmanager.fleet.v1 import history_pb2 as series_pb2
from openmanager.fleet.v1 import status_pb2
from openmanager.gateway.v1 import (
    fleet_pb2,
    fleet_pb2_grpc,
    history_pb2,
    history_pb2_grpc,
    ingest_pb2,
    ingest_pb2_grpc,
    storage_pb2,
    storage_pb2_grpc,
    transfer_pb2,
    transfer_pb2_grpc,
)

DEFAULT_TIMEOUT_S: Final = 10.0
PAGE_SIZE: Final = 1_000
RETRY_FOR_S: Final = 60.0


class OpenManager:
    """A gateway. `async with OpenManager.connect(address) as manager: ...`; methods may run at once."""

    def __init__(self, channel: grpc.aio.Channel, address: str, token: str | None, timeout_s: float) -> None:
        """Takes a channel, which it closes; `connect` makes one."""
        self.address = address
        self._channel = channel
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._backoff = Backoff()
        self._fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)
        self._history: Any = history_pb2_grpc.HistoryServiceStub(channel)
        self._ingest: Any = ingest_pb2_grpc.IngestServiceStub(channel)
        self._storage: Any = storage_pb2_grpc.StorageServiceStub(channel)
        self._transfer: Any = transfer_pb2_grpc.ServerTransferServiceStub(channel)

    @classmethod
    def connect(
        cls,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        ca_file: str | Path | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Self:
        """A gateway by its address; nothing is sent before the first call.

        Args:
            address: `client.channel` says what is understood; beyond this machine it is with TLS.
            token: the bearer token, where the gateway wants one.
            ca_file: PEM of the authority that signed the gateway's certificate; default: the public ones.
            timeout_s: how long a call may take; streams may take longer.

        Raises:
            BadAddress: address or file make no sense.
        """
        return cls(open_channel(address, ca_file), address, token, timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection and every call."""
        await self._channel.close(None)

    async def servers(
        self, *, status: str = "", environment: str = "", role: str = "", full: bool = False
    ) -> AsyncGenerator[fleet_pb2.Server, None]:
        """Servers in order of id.

        Args:
            status: only `healthy`, `warning`, `critical` or `offline` ones.
            environment, role: only those.
            full: with all their metrics, not only the headline ones.
        """
        request = fleet_pb2.ListServersRequest(
            page_size=PAGE_SIZE, environment=environment, role=role, view=_view(full)
        )
        if status:
            request.status = status_pb2.ServerStatus.Value(f"SERVER_STATUS_{status.upper()}")
        while True:
            answer = await self._call(self._fleet.ListServers, request)
            for server in answer.servers:
                yield server
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token

    async def server(self, server_id: str) -> fleet_pb2.Server:
        """One server with all its metrics."""
        answer = await self._call(self._fleet.GetServer, fleet_pb2.GetServerRequest(id=server_id))
        return cast("fleet_pb2.Server", answer.server)

    async def export_servers(
        self, file_format: str = "csv", *, environment: str = "", role: str = ""
    ) -> AsyncGenerator[str, None]:
        """The record of the servers as a file, a part after another; `file_format` is `csv` or `json_lines`."""
        request = transfer_pb2.ExportServersRequest(
            format=_file_format(file_format), environment=environment, role=role
        )
        stream = self._transfer.ExportServers(request, metadata=self._metadata)
        try:
            with self._calling():
                async for message in stream:
                    yield message.text
        finally:
            stream.cancel()

    async def import_servers(
        self, text: str, file_format: str = "csv", *, dry_run: bool = False, partial: bool = False
    ) -> transfer_pb2.ImportServersResponse:
        """Adds the servers of a file, or changes those that are there; says of each row what became of it.

        Args:
            text: the file.
            file_format: `csv` or `json_lines`.
            dry_run: only say it.
            partial: record the other rows though some cannot be.
        """
        request = transfer_pb2.ImportServersRequest(
            format=_file_format(file_format), text=text, dry_run=dry_run, partial=partial
        )
        return cast("transfer_pb2.ImportServersResponse", await self._call(self._transfer.ImportServers, request))

    async def summary(self) -> fleet_pb2.FleetSummary:
        """How many servers have which status."""
        answer = await self._call(self._fleet.GetFleetSummary, fleet_pb2.GetFleetSummaryRequest())
        return cast("fleet_pb2.FleetSummary", answer.summary)

    def watch(
        self,
        *,
        environment: str = "",
        role: str = "",
        full: bool = False,
        on_lost: watching.OnLost | None = None,
    ) -> AsyncGenerator[fleet_pb2.WatchFleetResponse, None]:
        """The fleet as it changes, at most one change a tick. It begins with a message with `snapshot`, and so it may
        after a lost connection: everything held before is void then.

        Args:
            environment, role: only those.
            full: with all their metrics.
            on_lost: told of a lost connection and in how many seconds it is tried again; the first one is raised.
        """

        def call(after_version: str) -> watching.Call:
            request = fleet_pb2.WatchFleetRequest(
                environment=environment, role=role, view=_view(full), after_version=after_version
            )
            return cast("watching.Call", self._fleet.WatchFleet(request, metadata=self._metadata))

        return watching.watch(call, self.address, self._backoff, on_lost)

    async def history(self, server_ids: str | Sequence[str], metrics: Sequence[str], **options: Any) -> History:
        """What `stream_history` tells, as one answer of whole series."""
        joiner, whole = Joiner(), History()
        async with contextlib.aclosing(self.stream_history(server_ids, metrics, **options)) as parts:
            async for part in parts:
                whole.series.extend(joiner.add(part.series))
                whole.incomplete.extend(part.incomplete)
        whole.series.extend(joiner.end())
        return whole

    async def stream_history(
        self,
        server_ids: str | Sequence[str],
        metrics: Sequence[str],
        *,
        start: datetime | float | None = None,
        end: datetime | float | None = None,
        step_s: float = 0.0,
        aggregation: str = "AVG",
        across_servers: str = "",
        percentile: float | None = None,
        top: int = 0,
    ) -> AsyncGenerator[History, None]:
        """Series, or the next parts of the last one, as they come: memory stays small however long they are.

        Args:
            server_ids: one or several; none: all that have the metrics.
            metrics: exact identities, or bare names, which match every set of labels.
            start, end: `[start, end)`: datetimes with their zone, or seconds since the epoch; default: the last hour.
            step_s: width of a window; 0: the points as they were written.
            aggregation: how a window becomes a value: AVG, MIN, MAX, SUM, COUNT, FIRST, LAST or RATE.
            across_servers: puts the servers together: AVG, MIN, MAX, SUM or PERCENTILE; needs a step.
            percentile: 0 to 100, for PERCENTILE.
            top: only so many servers of each metric, those with the largest mean.
        """
        request = history_pb2.QueryHistoryRequest(
            server_ids=[server_ids] if isinstance(server_ids, str) else server_ids,
            metrics=metrics,
            start_time=None if start is None else timestamp(start),
            end_time=None if end is None else timestamp(end),
            aggregation=series_pb2.Aggregation.Value(f"AGGREGATION_{aggregation.upper()}"),
            percentile=percentile,
            top=top,
        )
        if step_s:
            step = Duration()
            step.FromNanoseconds(round(step_s * 1e9))
            request.step.CopyFrom(step)
        if across_servers:
            request.across_servers = series_pb2.ServerAggregation.Value(f"SERVER_AGGREGATION_{across_servers.upper()}")
        stream = self._history.QueryHistory(request, metadata=self._metadata)
        try:
            with self._calling():
                async for message in stream:
                    yield from_message(message)
        finally:
            stream.cancel()

    async def metrics(self, server_id: str = "") -> AsyncGenerator[history_pb2.MetricDescription, None]:
        """The metrics that exist, of one server or of all, in order of identity."""
        request = history_pb2.ListMetricsRequest(page_size=PAGE_SIZE, server_id=server_id)
        while True:
            answer = await self._call(self._history.ListMetrics, request)
            for metric in answer.metrics:
                yield metric
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token

    def writing(
        self, batches: Batches, *, retry_for_s: float = RETRY_FOR_S, on_lost: watching.OnLost | None = None
    ) -> AsyncGenerator[ingest_pb2.WriteMetricsResponse, None]:
        """Writes batches, several on their way at once; an answer for each, in order, when its points are on disk.

        Args:
            batches: what `batch` makes. One without metrics has those of the one before it.
            retry_for_s: how long to send again without an acknowledgement before the error is raised.
            on_lost: told of each failure and in how many seconds the unanswered batches are sent again.
        """
        writing = Writing(
            lambda: self._ingest.WriteMetrics(metadata=self._metadata),
            self.address,
            batches,
            backoff=self._backoff,
            retry_for_s=retry_for_s,
            on_lost=on_lost,
        )
        return writing.run()

    async def write(self, *batches: ingest_pb2.WriteMetricsRequest, retry_for_s: float = RETRY_FOR_S) -> Totals:
        """Writes batches and returns when all of them are on disk."""
        totals = Totals()
        async with contextlib.aclosing(self.writing(batches, retry_for_s=retry_for_s)) as answers:
            async for answer in answers:
                totals.add(answer)
        return totals

    async def status(self) -> list[status_pb2.StoreStatus]:
        """How every store is."""
        answer = await self._call(self._storage.GetStorageStatus, storage_pb2.GetStorageStatusRequest())
        return list(answer.stores)

    async def call(self, method: str, request: bytes = b"") -> bytes:
        """Calls a unary method of which this client has no proto, for example `/package.Service/Method`."""
        answer = await self._call(self._channel.unary_unary(method), request)
        return cast("bytes", answer)

    async def stream(self, method: str, request: bytes = b"") -> AsyncGenerator[bytes, None]:
        """The same of a method that answers with a stream; it may take as long as it likes."""
        answers: Any = cast("Any", self._channel.unary_stream(method))(request, metadata=self._metadata)
        try:
            with self._calling():
                async for answer in answers:
                    yield cast("bytes", answer)
        finally:
            answers.cancel()

    async def _call(self, method: Any, request: Any) -> Any:
        """Calls a method that may be repeated; waits, within the time of the call, where the gateway asks for it."""
        ends = time.monotonic() + self._timeout_s
        while True:
            try:
                with self._calling():
                    left_s = ends - time.monotonic()
                    return await method(request, timeout=left_s, metadata=self._metadata)
            except OpenManagerError as error:
                pause_s = error.retry_after_s
                throttled = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
                if not throttled or pause_s is None or time.monotonic() + pause_s >= ends:
                    raise
            await asyncio.sleep(pause_s)

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.address) from error


def _file_format(name: str) -> transfer_pb2.ServerFileFormat.ValueType:
    return transfer_pb2.ServerFileFormat.Value(f"SERVER_FILE_FORMAT_{name.upper()}")


def _view(full: bool) -> fleet_pb2.ServerView.ValueType:
    return fleet_pb2.SERVER_VIEW_FULL if full else fleet_pb2.SERVER_VIEW_BASIC
