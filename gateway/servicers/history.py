"""``HistoryService``: what the servers were, asked of timeseries.

The unary and the streaming method share one core: the query that timeseries checks and answers. What is added here are
the defaults of the range, the limits of a unary answer, and the names that the caller used for a field.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

from fleet import access
from fleet.codec import ms_from_timestamp, timestamp_from_ms
from gateway.readers import Readers
from gateway.servicers.fleet import unknown_server
from gateway.state import FleetState
from gateway.visible import seen, sees
from openmanager.fleet.v1 import history_pb2
from openmanager.gateway.v1 import history_pb2 as public_pb2
from openmanager.timeseries.v1 import timeseries_pb2
from runtime import paging
from runtime.channel import Channel
from runtime.clock import Clock
from runtime.errors import InvalidArgument, OpenManagerError, ResourceExhausted

DEFAULT_RANGE_MS = 3_600_000
MAX_UNARY_SERIES = 1_000
MAX_UNARY_POINTS = 100_000
METRICS_PAGE_SIZE = 1_000
MIN_TIMESTAMP_S, MAX_TIMESTAMP_S = -62_135_596_800, 253_402_300_799
"""What a Timestamp may say; over gRPC it may be anything."""

Request = public_pb2.GetServerHistoryRequest | public_pb2.QueryHistoryRequest


class HistoryServicer:
    """Answers ``openmanager.gateway.v1.HistoryService``."""

    def __init__(self, timeseries: Sequence[Channel], state: FleetState, clock: Clock) -> None:
        """Takes a channel to each timeseries replica."""
        self._readers = Readers(timeseries, clock)
        self._state = state
        self._clock = clock

    async def GetServerHistory(
        self, request: public_pb2.GetServerHistoryRequest, _context: object
    ) -> public_pb2.GetServerHistoryResponse:
        """The answer as a whole, within limits."""
        if not request.server_id:
            raise InvalidArgument("name a server", field="server_id")
        if not sees(self._state, request.server_id):
            raise unknown_server(request.server_id, "server_id")
        query = self._query(request, [request.server_id], list(request.metric))
        names = {"metrics": "metric", "server_ids": "server_id"}
        answer = timeseries_pb2.QueryOnceResponse()
        with self._named(query, names):
            answer = await self._once(query)
        response = public_pb2.GetServerHistoryResponse(incomplete=answer.incomplete)
        for series in answer.series:
            _join(response.series, series)
        if len(response.series) > MAX_UNARY_SERIES:
            raise ResourceExhausted(f"more than {MAX_UNARY_SERIES} series (MAX_UNARY_SERIES): name fewer metrics")
        if sum(len(series.times) for series in response.series) > MAX_UNARY_POINTS:
            raise _too_many_points()
        return response

    async def QueryHistory(
        self, request: public_pb2.QueryHistoryRequest, _context: object
    ) -> AsyncIterator[public_pb2.QueryHistoryResponse]:
        """Passes the stream on."""
        server_ids = list(request.server_ids)
        for server_id in server_ids:
            if not sees(self._state, server_id):
                raise unknown_server(server_id, "server_ids")
        if not server_ids and access.scope() is not None:
            server_ids = [entry.id for entry in seen(self._state.all())]
            if not server_ids:
                return
        query = self._query(request, server_ids, list(request.metrics))
        query.across_servers = request.across_servers
        query.top = request.top
        if request.HasField("percentile"):
            query.percentile = request.percentile
        async for message in self._run(query):
            yield public_pb2.QueryHistoryResponse(series=message.series, incomplete=message.incomplete)

    async def ListMetrics(
        self, request: public_pb2.ListMetricsRequest, _context: object
    ) -> public_pb2.ListMetricsResponse:
        """Pages through what timeseries has."""
        if access.scope() is not None and not request.server_id:
            raise InvalidArgument("name a server: the caller sees some only", field="server_id")
        if not sees(self._state, request.server_id):
            raise unknown_server(request.server_id, "server_id")
        size = paging.page_size(request.page_size, METRICS_PAGE_SIZE)
        asked = timeseries_pb2.ListMetricsRequest(server_id=request.server_id)
        answer: timeseries_pb2.ListMetricsResponse = await self._readers.call(lambda stub: stub.ListMetrics(asked))
        if request.server_id and not answer.metrics and request.server_id not in self._state:
            raise unknown_server(request.server_id, "server_id")
        chosen, token = paging.page_of(
            answer.metrics,
            lambda info: (info.key,),
            listing="metrics",
            filters=(request.server_id,),
            size=size,
            token=request.page_token,
        )
        described = [
            public_pb2.MetricDescription(
                key=info.key,
                name=info.metric.name,
                unit=info.metric.unit,
                kind=info.metric.kind,
                labels=info.metric.labels,
                servers=info.servers,
            )
            for info in chosen
        ]
        return public_pb2.ListMetricsResponse(metrics=described, next_page_token=token, total_size=len(answer.metrics))

    def _query(self, request: Request, server_ids: list[str], metrics: list[str]) -> history_pb2.HistoryQuery:
        for field in ("start_time", "end_time"):
            if not MIN_TIMESTAMP_S <= getattr(request, field).seconds <= MAX_TIMESTAMP_S:
                raise InvalidArgument("the time is outside of the years 1 to 9999", field=field)
        end_ms = ms_from_timestamp(request.end_time) if request.HasField("end_time") else self._clock.now_ms()
        start = request.start_time if request.HasField("start_time") else timestamp_from_ms(end_ms - DEFAULT_RANGE_MS)
        return history_pb2.HistoryQuery(
            server_ids=server_ids,
            metrics=metrics,
            start_time=start,
            end_time=timestamp_from_ms(end_ms),
            step=request.step,
            aggregation=request.aggregation,
        )

    async def _once(self, query: history_pb2.HistoryQuery) -> timeseries_pb2.QueryOnceResponse:
        asked = timeseries_pb2.QueryOnceRequest(query=query)
        try:
            return await self._readers.call(lambda stub: stub.QueryOnce(asked))
        except InvalidArgument as error:
            await self._leave_out_unknown(query, error)
        return await self._once(query) if query.metrics else timeseries_pb2.QueryOnceResponse()

    async def _run(self, query: history_pb2.HistoryQuery) -> AsyncIterator[timeseries_pb2.QueryResponse]:
        with self._named(query, {}):
            try:
                async for message in self._messages(query):
                    yield message
            except InvalidArgument as error:
                await self._leave_out_unknown(query, error)
            else:
                return
            if query.metrics:
                async for message in self._messages(query):
                    yield message

    async def _messages(self, query: history_pb2.HistoryQuery) -> AsyncIterator[timeseries_pb2.QueryResponse]:
        # of several servers one that is in the fleet and has never reported takes nothing from the others
        exist = all(server_id in self._state for server_id in query.server_ids)
        request = timeseries_pb2.QueryRequest(query=query, servers_exist=exist)
        async with aclosing(self._readers.stream(lambda stub: stub.Query(request))) as messages:
            async for message in messages:
                yield message

    async def _leave_out_unknown(self, query: history_pb2.HistoryQuery, error: InvalidArgument) -> None:
        """Leaves metrics out of a query that no server has, for who sees some servers only: what others have and what
        nobody has are the same to him. Raises the error where it is about something else."""
        if access.scope() is None or error.field != "metrics":
            raise error
        listed = await self._readers.call(lambda stub: stub.ListMetrics(timeseries_pb2.ListMetricsRequest()))
        there = {name for info in listed.metrics for name in (info.key, info.metric.name)}
        left = [metric for metric in query.metrics if metric in there]
        if len(left) == len(query.metrics):
            raise error
        del query.metrics[:]
        query.metrics.extend(left)

    @contextmanager
    def _named(self, query: history_pb2.HistoryQuery, names: Mapping[str, str]) -> Iterator[None]:
        """What timeseries refuses, as the caller's own words have it; nothing, where he asks for a server that is in
        the fleet and has never reported."""
        try:
            yield
        except OpenManagerError as error:
            if error.reason == "ANSWER_TOO_LARGE":
                raise _too_many_points() from None
            if error.reason == "SERVER_UNKNOWN":
                if all(server_id in self._state for server_id in query.server_ids):
                    return
                unknown = next(server_id for server_id in query.server_ids if server_id not in self._state)
                raise unknown_server(unknown, names.get("server_ids", "server_ids")) from None
            error.field = names.get(error.field or "", error.field)
            raise


def _too_many_points() -> ResourceExhausted:
    return ResourceExhausted(
        f"more than {MAX_UNARY_POINTS} points (MAX_UNARY_POINTS): shorten the range, widen the step, or stream with "
        "QueryHistory"
    )


def _join(series: RepeatedCompositeFieldContainer[history_pb2.Series], part: history_pb2.Series) -> None:
    """Adds a part to the series it continues, or begins a new one."""
    last = series[-1] if series else None
    if last is not None and (last.server_id, last.metric) == (part.server_id, part.metric):
        last.times.extend(part.times)
        last.values.extend(part.values)
    else:
        series.add().CopyFrom(part)
