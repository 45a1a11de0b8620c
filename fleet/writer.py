"""The hybrid write path: one batch goes to the history, the live cache and the metadata, in that order of importance.

Both the simulator and every ingest of the gateway write through ``FleetWriter``. What must stay true:

* only timeseries decides the acknowledgement: ``write`` returns after its journal is synced, and raises when it is not;
* cache and metadata failing degrades: counted, told as a metric, retried in the background, never refused;
* what waits for them is latest-wins and bounded, so an hour without cache costs memory for one tick, not for 360;
* a batch may be sent again at any time: the same server, metric and time is the same point.

A metric set that this writer does not hold is METRIC_SET_UNKNOWN, even if timeseries would know it: cache may need it
too, and the rule "send the set again" then holds for every store at once.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
from opentelemetry import context as otel_context

from fleet.codec import descriptor_to_pb, metric_set_to_pb, rows_from_pb, rows_to_pb
from fleet.model import MetricSet, RowError, ServerDescriptor, WriteBatch
from fleet.pending import PendingRows
from fleet.replicas import Describe, Replicas, nobody_knows
from fleet.validation import MAX_ROW_ERRORS, metric_set_unknown
from openmanager.cache.v1 import cache_pb2, cache_pb2_grpc
from openmanager.fleet.v1 import metric_pb2
from openmanager.metadata.v1 import metadata_pb2, metadata_pb2_grpc
from openmanager.timeseries.v1 import timeseries_pb2
from runtime import tasks, telemetry
from runtime.channel import Channel, calling
from runtime.clock import Clock
from runtime.errors import InvalidArgument, OpenManagerError
from runtime.tasks import Backoff, run_forever

MAX_HELD_METRICS = 2_000_000
"""Metrics of all held sets together (120 bytes each, measured); the sets used longest ago are let go first."""

DAY_MS = 86_400_000

MAX_REQUEST_BYTES = 8 << 20
"""Told to the cache in one call, if it is not a single batch: half of the message limit."""

NO_ROOM = frozenset({"MAX_SERVERS", "MAX_LIVE_VALUES"})
"""Bounds of the cache; sent again it would have no more room, and who waits behind would never have his turn."""

MAX_REGISTRATIONS = 5_000
"""Servers told to metadata in one call."""

STOP_TIMEOUT_S = 1.0
"""So long a writer that ends goes on telling cache and metadata of what was acknowledged last."""

_log = logging.getLogger(__name__)
_FOLLOW_BACKOFF = Backoff(initial_s=0.2, max_s=5.0)
_tracer = telemetry.tracer("fleet.writer")
_failures = telemetry.meter(__name__).create_counter(
    "openmanager.writer.failures", unit="{call}", description="Calls on the write path that failed, by peer."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteResult:
    """What timeseries acknowledged; every accepted point is on disk.

    Attributes:
        sequence: place of the batch in the journal.
        accepted_points: points of the rows that were taken.
        rejected_points: points of the rows that were not.
        errors: why, at most 100.
    """

    sequence: int
    accepted_points: int
    rejected_points: int
    errors: tuple[RowError, ...]


@dataclass(slots=True)
class WriterCounters:
    """What happened since the writer was made."""

    acknowledged_points: int = 0
    rejected_points: int = 0
    failures: dict[str, int] = field(default_factory=lambda: {"timeseries": 0, "cache": 0, "metadata": 0})

    def failed(self, store: str) -> None:
        """Counts a failed call."""
        self.failures[store] += 1
        _failures.add(1, {"peer": store})


class FleetWriter:
    """Writes batches for as long as it is entered. Safe for many concurrent calls of ``write``."""

    def __init__(
        self,
        *,
        timeseries: Sequence[Channel],
        cache: Channel,
        metadata: Channel,
        clock: Clock,
        describe: Describe = nobody_knows,
    ) -> None:
        """Takes a channel to each timeseries replica, at least one, and to the two that follow.

        `describe` says what is known elsewhere of a server whose sender has told it before this was made: a replica
        that takes the server over tags its rows with it.
        """
        self._timeseries = Replicas(timeseries, clock, describe)
        self._cache = cache_pb2_grpc.CacheServiceStub(cache.grpc)
        self._registry = metadata_pb2_grpc.ServerRegistryServiceStub(metadata.grpc)
        self._clock = clock
        self._sets: OrderedDict[str, metric_pb2.MetricSet] = OrderedDict()
        self._held_metrics = 0
        self._cached_sets: set[str] = set()  # cache has taken them
        self._told: dict[str, ServerDescriptor] = {}
        self._named: set[str] = set()  # metadata is told that they are there, and no more
        self._rows = PendingRows()
        self._for_cache: dict[str, ServerDescriptor] = {}
        self._again_for_cache: dict[str, ServerDescriptor] = {}  # it may have lost them
        self._for_metadata: dict[str, ServerDescriptor] = {}
        self._rows_waiting = asyncio.Event()
        self._servers_waiting = asyncio.Event()
        self._cache_told = asyncio.Event()  # of all that it is to be told
        self._metadata_told = asyncio.Event()
        self._cache_told.set()
        self._metadata_told.set()
        self._followers: list[asyncio.Task[None]] = []
        self.counters = WriterCounters()

    async def __aenter__(self) -> Self:
        for name, work in (("writer-cache", self._feed_cache), ("writer-metadata", self._feed_metadata)):
            coroutine = run_forever(name, work, _FOLLOW_BACKOFF, clock=self._clock)
            self._followers.append(asyncio.create_task(coroutine, name=name))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._cache_told.wait()
                await self._metadata_told.wait()
        await tasks.cancel(*self._followers)

    async def write(self, batch: WriteBatch) -> WriteResult:
        """Writes a batch and returns once it is durable.

        Raises:
            InvalidArgument: the batch is structurally wrong; nothing of it was kept.
            Unavailable, DeadlineExceeded: timeseries is away; nothing is known of the batch, send it again.
            ResourceExhausted: timeseries cannot take it now (disk full, too much waiting); send it again later.
        """
        self.hold(batch.metric_set)
        return await self.write_message(rows_to_pb(batch.rows), batch.servers)

    def hold(self, metric_set: MetricSet) -> None:
        """Remembers a set, so that rows may name it by its id alone."""
        if metric_set.id in self._sets:
            self._sets.move_to_end(metric_set.id)
        else:
            self.hold_message(metric_set_to_pb(metric_set))

    def hold_message(self, message: metric_pb2.MetricSet) -> None:
        """Remembers a set that is a message already and has its id."""
        if message.id in self._sets:
            self._sets.move_to_end(message.id)
            return
        self._sets[message.id] = message
        self._held_metrics += len(message.metrics)
        while self._held_metrics > MAX_HELD_METRICS and len(self._sets) > 1:
            dropped, oldest = self._sets.popitem(last=False)
            self._held_metrics -= len(oldest.metrics)
            self._timeseries.forget_set(dropped)
            self._cached_sets.discard(dropped)

    def metric_count(self, metric_set_id: str) -> int | None:
        """How many columns a held set has; None when it is not held."""
        message = self._sets.get(metric_set_id)
        return None if message is None else len(message.metrics)

    async def write_message(
        self,
        batch: metric_pb2.MetricBatch,
        servers: Sequence[ServerDescriptor] = (),
        unknown: Iterable[str] = (),
    ) -> WriteResult:
        """Writes a batch that is a message already; its set must be held. Raises as ``write`` does.

        `unknown`: servers in it that nobody described and that may be new. The record gets those that it lacks; what
        it, or anybody, knows of the others stays as it is.

        Raises:
            FailedPrecondition: METRIC_SET_UNKNOWN.
        """
        if batch.metric_set_id in self._sets:
            self._sets.move_to_end(batch.metric_set_id)
        elif batch.rows:
            raise metric_set_unknown(batch.metric_set_id, "metric_set_id")
        news = [server for server in servers if self._told.get(server.server_id) != server]
        with _tracer.start_as_current_span("fleet.write", attributes={"openmanager.rows": len(batch.rows)}):
            response = await self._append(batch, news)
            if response.errors:
                batch = _taken(batch, response.errors, self._clock.now_ms())
                there = {row.server_id for row in batch.rows}
                unknown = [server_id for server_id in unknown if server_id in there]
            self._follow(batch, news)
            self._name(unknown)
        self.counters.acknowledged_points += response.accepted_points
        self.counters.rejected_points += response.rejected_points
        return WriteResult(
            sequence=response.sequence,
            accepted_points=response.accepted_points,
            rejected_points=response.rejected_points,
            errors=tuple(
                RowError(row=e.row, field=e.field, reason=e.reason, message=e.message) for e in response.errors
            ),
        )

    async def tell_servers(self, servers: Sequence[ServerDescriptor]) -> None:
        """Journals what the record says of servers, without a row of theirs.

        Cache and metadata are told by whoever changed the record: a registration behind it, still on its way when the
        next change is made, would undo that.
        """
        news = [server for server in servers if self._told.get(server.server_id) != server]
        if news:
            await self._append(metric_pb2.MetricBatch(), news)
            self._told.update((server.server_id, server) for server in news)

    async def _append(
        self, batch: metric_pb2.MetricBatch, news: Sequence[ServerDescriptor]
    ) -> timeseries_pb2.AppendResponse:
        try:
            return await self._timeseries.append(batch, self._sets.get(batch.metric_set_id), news, self._told)
        except OpenManagerError:
            self.counters.failed("timeseries")
            raise

    def _follow(self, batch: metric_pb2.MetricBatch, news: Iterable[ServerDescriptor]) -> None:
        for server in news:
            self._told[server.server_id] = server
            self._for_cache[server.server_id] = server
            self._for_metadata[server.server_id] = server
            self._servers_waiting.set()
            self._metadata_told.clear()
        if batch.rows:
            self._rows.add(batch, otel_context.get_current(), self._clock.now_ms())
        self._rows_waiting.set()
        self._cache_told.clear()

    def _name(self, unknown: Iterable[str]) -> None:
        for server_id in unknown:
            if server_id not in self._told and server_id not in self._named:
                self._named.add(server_id)
                self._for_metadata.setdefault(server_id, ServerDescriptor(server_id=server_id, hostname=""))
                self._servers_waiting.set()
                self._metadata_told.clear()

    async def _feed_cache(self) -> None:
        while True:
            await self._rows_waiting.wait()
            self._rows_waiting.clear()
            rows, trace = self._rows.take()
            servers, self._for_cache = self._for_cache, {}
            again, self._again_for_cache = self._again_for_cache, {}
            token = otel_context.attach(trace)
            try:
                await self._update_cache(rows, servers, again)
            except InvalidArgument as error:  # sent again it would be refused again; the history has the rows
                _log.error("cache refused %d batches and %d servers: %s", len(rows), len(servers), error)
            except BaseException:
                self._rows.give_back(rows, trace, self._clock.now_ms())
                self._for_cache = servers | self._for_cache
                self._again_for_cache = again | self._again_for_cache
                self._rows_waiting.set()
                raise
            finally:
                otel_context.detach(token)
            if len(self._rows):
                self._rows_waiting.set()
            if not self._rows_waiting.is_set():
                self._cache_told.set()

    async def _update_cache(
        self,
        rows: Sequence[metric_pb2.MetricBatch],
        servers: dict[str, ServerDescriptor],
        again: dict[str, ServerDescriptor],
    ) -> None:
        for request in self._requests(rows, servers, again):
            try:
                async with calling("cache"):
                    await self._cache.UpdateServers(request)
            except OpenManagerError as error:
                self.counters.failed("cache")
                if error.reason == "METRIC_SET_UNKNOWN":  # cache was restarted: it may know no server either
                    self._cached_sets.clear()
                    self._again_for_cache = dict(self._told)
                if error.metadata.get("limit") not in NO_ROOM:
                    raise
                _log.error("cache has no room for some servers: %s", error)  # it has taken the others
            self._cached_sets |= {metric_set.id for metric_set in request.metric_sets} & self._sets.keys()

    def _requests(
        self,
        rows: Sequence[metric_pb2.MetricBatch],
        servers: dict[str, ServerDescriptor],
        again: dict[str, ServerDescriptor],
    ) -> Iterator[cache_pb2.UpdateServersRequest]:
        """What the cache is to be told: one request, or more where they would be too large, in which a set comes with
        the rows that use it. Each is answered before the next is made."""
        request, size = cache_pb2.UpdateServersRequest(), 0
        for name, told in (("servers_again", again), ("servers", servers)):
            for server in told.values():
                message = descriptor_to_pb(server)
                if size + message.ByteSize() > MAX_REQUEST_BYTES:
                    yield request
                    request, size = cache_pb2.UpdateServersRequest(), 0
                getattr(request, name).append(message)
                size += message.ByteSize()
        sent: set[str] = set()  # with this request
        for batch in rows:
            metric_set = self._sets.get(batch.metric_set_id)
            if metric_set is None:
                continue
            is_new = metric_set.id not in self._cached_sets and metric_set.id not in sent
            more = batch.ByteSize() + (metric_set.ByteSize() if is_new else 0)
            if size and size + more > MAX_REQUEST_BYTES:
                yield request
                request, size, sent = cache_pb2.UpdateServersRequest(), 0, set()
                is_new = metric_set.id not in self._cached_sets
            if is_new:
                request.metric_sets.append(metric_set)
                sent.add(metric_set.id)
                if more > MAX_REQUEST_BYTES:
                    yield request
                    request, more, sent = cache_pb2.UpdateServersRequest(), batch.ByteSize(), set()
            request.batches.append(batch)
            size += more
        if size:
            yield request

    async def _feed_metadata(self) -> None:
        while True:
            await self._servers_waiting.wait()
            part = dict(list(self._for_metadata.items())[:MAX_REGISTRATIONS])
            if not part:
                self._servers_waiting.clear()
                self._metadata_told.set()
                continue
            request = metadata_pb2.RegisterServersRequest(
                servers=[descriptor_to_pb(server) for server in part.values()]
            )
            try:
                async with calling("metadata"):
                    await self._registry.RegisterServers(request)
            except InvalidArgument as error:  # sent again they would be refused again; the history has them
                self.counters.failed("metadata")
                _log.error("metadata refused %d servers: %s", len(part), error)
            except OpenManagerError:
                self.counters.failed("metadata")
                raise
            for server_id, server in part.items():
                if self._for_metadata.get(server_id) is server:
                    del self._for_metadata[server_id]


def _taken(batch: metric_pb2.MetricBatch, errors: Sequence[metric_pb2.RowError], now_ms: int) -> metric_pb2.MetricBatch:
    """The batch without the rows that were rejected: what is not kept is not shown as the latest of a server either.

    Where there may be more than an answer lists, all that is not of today goes: today's rows are never too late.
    """
    rows = rows_from_pb(batch, len(batch.values) // len(batch.rows))
    rejected = np.zeros(len(rows.server_ids), np.bool_)
    rejected[[error.row for error in errors]] = True
    if len(errors) >= MAX_ROW_ERRORS:
        rejected |= rows.times_ms < now_ms // DAY_MS * DAY_MS
    return rows_to_pb(rows.select(~rejected))
