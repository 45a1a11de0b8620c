"""``TimeSeriesService``: a thin skin over the engine."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace

from fleet.codec import metric_to_pb, timestamp_from_ms
from fleet.model import Metric
from fleet.status import StoreProbe
from openmanager.fleet.v1 import metric_pb2
from openmanager.timeseries.v1 import timeseries_pb2
from runtime.clock import Clock
from runtime.errors import InvalidArgument, NotFound, ResourceExhausted
from services.timeseries.combine import Combination, combined
from services.timeseries.engine.engine import Engine
from services.timeseries.engine.query import Query as EngineQuery
from services.timeseries.engine.query import SeriesResult
from services.timeseries.engine.status import EngineStatus
from services.timeseries.followers.follower import Follower
from services.timeseries.remote.reader import Reader
from services.timeseries.remote.replica import ThisReplica
from services.timeseries.wire import (
    combination_of,
    combined_responses,
    decode,
    last_responses,
    query_of,
    query_responses,
    selectors_of,
    tail_response,
)

MAX_ONCE_BYTES = 4 << 20
"""Of an answer in one message: 260,000 points, which a reader's event loop takes apart in 1 ms."""

LOW_DISK_BYTES = 1 << 30
"""Less free than this is said in the status."""


class TimeSeriesServicer:
    """Answers ``openmanager.timeseries.v1.TimeSeriesService``."""

    def __init__(
        self, engine: Engine, clock: Clock, *, reader: Reader | None = None, followers: Sequence[Follower] = ()
    ) -> None:
        """Answers from the engine alone without a `reader`; acknowledges what is on the engine's disk, and where there
        are `followers` only once they have it, too."""
        self._engine = engine
        self._clock = clock
        self._reader = reader
        self._followers = tuple(followers)
        self._this = ThisReplica(engine)

    async def Append(self, request: timeseries_pb2.AppendRequest, _context: object) -> timeseries_pb2.AppendResponse:
        """Answers once the batch is on disk."""
        batch = await decode(request, self._engine.metric_set, self._clock.now_ms(), self._engine)
        sequence = 0
        if batch.rows is not None or batch.metric_sets or batch.servers:
            sequence = await self._engine.append(
                batch.rows, metric_sets=batch.metric_sets, servers=batch.servers, endings=batch.endings
            )
            await asyncio.gather(*(follower.shipped(sequence) for follower in self._followers))  # one's time for all
        errors = [
            metric_pb2.RowError(row=e.row, field=e.field, reason=e.reason, message=e.message) for e in batch.errors
        ]
        return timeseries_pb2.AppendResponse(
            sequence=sequence,
            accepted_points=batch.accepted_points,
            rejected_points=batch.rejected_points,
            errors=errors,
        )

    async def Query(self, request: timeseries_pb2.QueryRequest, _context: object) -> AsyncIterator[bytes]:
        """Streams series as the engine finds them."""
        query = query_of(request.query)
        combination = combination_of(request.query, query)
        if request.servers_exist and query.server_ids and self._is_here(query, local=request.local):
            known = tuple(filter(self._engine.knows_server, query.server_ids))
            if not known:
                return
            query = replace(query, server_ids=known)
        async with aclosing(self._responses(query, combination, local=request.local)) as responses:
            async for response in responses:
                yield response

    async def QueryOnce(self, request: timeseries_pb2.QueryOnceRequest, _context: object) -> bytes:
        """What the stream would have told: its messages have the same fields, and one after the other they are one."""
        query = query_of(request.query)
        combination = combination_of(request.query, query)
        messages: list[bytes] = []
        async with aclosing(self._responses(query, combination, local=False)) as responses:
            async for response in responses:
                messages.append(response)
                if sum(map(len, messages)) > MAX_ONCE_BYTES:
                    raise ResourceExhausted(
                        f"the answer is over MAX_ONCE_BYTES = {MAX_ONCE_BYTES}: stream it with Query, or ask for less",
                        reason="ANSWER_TOO_LARGE",
                    )
        return b"".join(messages)

    async def ReadUnshipped(
        self, request: timeseries_pb2.ReadUnshippedRequest, _context: object
    ) -> AsyncIterator[timeseries_pb2.ReadUnshippedResponse]:
        """Ranges, then points."""
        if not request.follower:
            raise InvalidArgument("name a follower", field="follower")
        held = await self._this.unshipped(query_of(request.query), request.follower)
        yield timeseries_pb2.ReadUnshippedResponse(
            ranges=[
                timeseries_pb2.TimeRange(start_time=timestamp_from_ms(start), end_time=timestamp_from_ms(end))
                for start, end in held.ranges
            ]
        )
        for message in query_responses(held.points):
            part = timeseries_pb2.QueryResponse.FromString(message)
            yield timeseries_pb2.ReadUnshippedResponse(series=part.series)

    async def LastValues(
        self, request: timeseries_pb2.LastValuesRequest, _context: object
    ) -> AsyncIterator[timeseries_pb2.LastValuesResponse]:
        """Streams servers with their newest points."""
        server_ids, metrics = selectors_of(request)
        self._check_names(server_ids, metrics)
        for response in last_responses(await self._engine.last_values(server_ids, metrics)):
            yield response

    async def ListMetrics(
        self, request: timeseries_pb2.ListMetricsRequest, _context: object
    ) -> timeseries_pb2.ListMetricsResponse:
        """Lists by identity."""
        if self._reader is None or request.local:
            infos = await self._engine.list_metrics(request.server_id or None)
        else:
            infos = await self._reader.list_metrics(request.server_id)
        response = timeseries_pb2.ListMetricsResponse()
        for info in infos:
            metric: Metric = info.metric
            response.metrics.add(metric=metric_to_pb(metric), key=info.key, servers=info.servers)
        return response

    async def TailMetrics(
        self, request: timeseries_pb2.TailMetricsRequest, _context: object
    ) -> AsyncIterator[timeseries_pb2.TailMetricsResponse]:
        """Streams journaled batches; the first message says where the tail begins."""
        if request.from_sequence < 0:
            raise InvalidArgument("a sequence is not negative", field="from_sequence")
        sent_sets: set[str] = set()
        first = True
        async for batch in self._engine.tail(request.from_sequence):
            message = tail_response(batch, sent_sets)
            if first:
                kept = self._engine.first_sequence  # by now, maybe, past the batch, which nobody missed all the same
                message.first_sequence = batch.sequence if batch.missed else min(batch.sequence, kept)
                first = False
            yield message

    def _responses(self, query: EngineQuery, combination: Combination, *, local: bool) -> AsyncGenerator[bytes, None]:
        if self._reader is not None and not self._is_here(query, local=local):
            return _joined(self._reader, query, combination)
        if not local:  # another replica has looked already
            self._check_names(query.server_ids, query.metrics)
        if combination.changes:
            return combined_responses(combined(self._engine.query(query), query, combination))
        if local and self._reader is not None and (lacking := self._reader.lacking(query)):
            return _ending(self._engine.packed(query, query_responses), lacking)
        return self._engine.packed(query, query_responses)

    def _is_here(self, query: EngineQuery, *, local: bool) -> bool:
        return local or self._reader is None or self._reader.is_here(query)

    def _check_names(self, server_ids: Iterable[str] | None, metrics: Iterable[str] | None) -> None:
        for server_id in server_ids or ():
            if not self._engine.knows_server(server_id):
                raise NotFound(f"there is no server {server_id[:255]!r}", reason="SERVER_UNKNOWN", field="server_ids")
        unknown = self._engine.unknown_metrics(metrics or ())
        if unknown:
            raise InvalidArgument(f"no server has a metric {unknown[0][:255]!r}", field="metrics")


async def _joined(reader: Reader, query: EngineQuery, combination: Combination) -> AsyncGenerator[bytes, None]:
    """What is not all here, and at the end what could not be asked."""
    answer = await reader.read(query)

    async def results() -> AsyncIterator[SeriesResult]:
        for result in answer.results:
            yield result

    responses = combined_responses(combined(results(), query, combination))
    async with aclosing(_ending(responses, answer.incomplete)) as messages:
        async for message in messages:
            yield message


async def _ending(responses: AsyncGenerator[bytes, None], incomplete: Sequence[str]) -> AsyncGenerator[bytes, None]:
    """An answer, and then what it may lack."""
    async with aclosing(responses):
        async for response in responses:
            yield response
    if incomplete:
        yield timeseries_pb2.QueryResponse(incomplete=incomplete).SerializeToString()


async def probe(engine: Engine) -> StoreProbe:
    """The engine's status as a store."""
    started = time.perf_counter()
    status = await engine.status()
    return StoreProbe(
        server_version="engine 1",
        latency_ms=(time.perf_counter() - started) * 1000,
        spool_bytes=status.journal_bytes,
        disk_free_bytes=status.disk_free_bytes,
        degraded="; ".join(_complaints(status)),
    )


def _complaints(status: EngineStatus) -> Iterator[str]:
    """What an operator should know."""
    if status.refusing:
        yield f"rows are refused: {status.refusing}"
    if status.closing_fails:
        yield f"blocks cannot be stored: {status.last_error.message if status.last_error else 'unknown error'}"
    if status.damaged:
        yield f"{status.damaged} damaged blocks are left out of answers"
    if status.disk_free_bytes < LOW_DISK_BYTES:
        yield f"only {status.disk_free_bytes >> 20} MiB are free on the disk of DATA_DIR"
    if status.disk_bytes_limit is not None and (status.disk_pressed or status.disk_over_limit):
        use = f"{100 * status.disk_bytes / status.disk_bytes_limit:.0f} % of TIMESERIES_DISK_LIMIT are used"
        rest = "today's rows alone need more than that" if status.disk_over_limit else "at 100 % the oldest days go"
        yield f"{use}; {rest}, {status.evicted_partitions} went since the start"
