"""``IngestService``: where agents write.

The batch is handed on as it came: ``WriteMetricsRequest`` begins with the fields of ``MetricBatch`` under the same
numbers, so no value is touched on the way through (a test holds the two messages to that).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence

from fleet import access
from fleet.codec import descriptor_from_pb, metric_from_pb
from fleet.model import MetricSet, ServerDescriptor
from fleet.validation import check_batch, check_descriptors, check_metric_set, metric_set_unknown, server_id_fault
from fleet.writer import FleetWriter
from gateway.state import FleetState
from gateway.visible import sees
from openmanager.fleet.v1 import metric_pb2
from openmanager.gateway.v1 import ingest_pb2
from runtime.errors import InvalidArgument, PermissionDenied

THREAD_METRICS = 2_000
"""Sets over this are checked in a thread: decoding and hashing take 2.2 ms for 511 metrics."""


Recorded = Callable[[Sequence[str]], Awaitable[Mapping[str, tuple[str, str]]]]
"""Given ids, environment and role of each that is recorded, deleted or not."""


def _checked_set(request: ingest_pb2.WriteMetricsRequest) -> metric_pb2.MetricSet:
    metric_set = MetricSet(tuple(metric_from_pb(metric) for metric in request.metrics))
    check_metric_set(metric_set, "metrics", request.metric_set_id)
    return metric_pb2.MetricSet(id=metric_set.id, metrics=request.metrics)


class IngestServicer:
    """Answers ``openmanager.gateway.v1.IngestService``."""

    def __init__(self, writer: FleetWriter, state: FleetState, recorded: Recorded) -> None:
        """`recorded`: asks the record for the places of servers."""
        self._writer = writer
        self._state = state
        self._recorded = recorded

    async def WriteMetrics(
        self, requests: AsyncIterator[ingest_pb2.WriteMetricsRequest], _context: object
    ) -> AsyncIterator[ingest_pb2.WriteMetricsResponse]:
        """Answers each request once its points are on disk."""
        set_id, described = "", set[str]()
        async for request in requests:
            set_id = await self._set_of(request, set_id)
            yield await self._write(request, set_id, described)

    async def _set_of(self, request: ingest_pb2.WriteMetricsRequest, previous: str) -> str:
        if not request.metrics:
            return request.metric_set_id or previous
        large = len(request.metrics) > THREAD_METRICS
        message = await asyncio.to_thread(_checked_set, request) if large else _checked_set(request)
        self._writer.hold_message(message)
        return message.id

    async def _write(
        self, request: ingest_pb2.WriteMetricsRequest, set_id: str, described: set[str]
    ) -> ingest_pb2.WriteMetricsResponse:
        servers = [descriptor_from_pb(message) for message in request.servers]
        check_descriptors(servers)
        await self._check_scope(request, servers, described)
        unknown = self._unknown(request)
        request.ClearField("metrics")
        request.ClearField("servers")
        request.metric_set_id = set_id
        batch = metric_pb2.MetricBatch.FromString(request.SerializeToString())
        count = self._writer.metric_count(set_id)
        if count is not None:
            check_batch(batch, count)
        elif batch.rows or batch.values:
            if not set_id:
                raise InvalidArgument("name the columns: send metrics with the first batch", field="metrics")
            raise metric_set_unknown(set_id, "metric_set_id")
        result = await self._writer.write_message(batch, servers, unknown)
        errors = [
            metric_pb2.RowError(row=e.row, field=e.field, reason=e.reason, message=e.message) for e in result.errors
        ]
        return ingest_pb2.WriteMetricsResponse(
            accepted_points=result.accepted_points,
            rejected_points=result.rejected_points,
            errors=errors,
            metric_set_id=set_id,
        )

    async def _check_scope(
        self, request: ingest_pb2.WriteMetricsRequest, servers: Sequence[ServerDescriptor], described: set[str]
    ) -> None:
        """Raises PermissionDenied for a server that the caller does not see, or would move out of his scope.

        `described`: the servers that this stream has described and the live state has not shown since.
        """
        scope = access.scope()
        if scope is None:
            return
        for index, server in enumerate(servers):
            entry = self._state.get(server.server_id)
            environment, role = ("", "") if entry is None else entry.place
            place = (server.environment or environment, server.role or role)
            if not scope.has(server.server_id, *place) or (entry and not sees(self._state, server.server_id)):
                raise _out_of_scope(server.server_id, f"servers[{index}]")
        said = {server.server_id for server in servers}
        rows = [row.server_id for row in request.rows]
        described.difference_update([server_id for server_id in described if server_id in self._state])
        recorded = await self._places_of(scope, said.union(set(rows) - described))
        for index, server in enumerate(servers):
            if server.server_id in recorded and not scope.has(server.server_id, *recorded[server.server_id]):
                raise _out_of_scope(server.server_id, f"servers[{index}]")
        described.update(server_id for server_id in said if server_id not in self._state)
        for index, server_id in enumerate(rows):  # of who is new to the fleet he is told the same as of who is hidden
            if server_id in said or sees(self._state, server_id):
                continue
            known = server_id not in self._state and server_id in recorded
            if server_id not in described and not (known and scope.has(server_id, *recorded[server_id])):
                raise _out_of_scope(server_id, f"rows[{index}].server_id")

    async def _places_of(self, scope: access.Scope, server_ids: Iterable[str]) -> Mapping[str, tuple[str, str]]:
        """Those of the record, where they count and the live state does not have them: it lacks deleted servers, and
        for a moment all where the cache begins anew."""
        if not scope.environments and not scope.server_roles:
            return {}
        lacks = [one for one in server_ids if one not in self._state and not server_id_fault(one)]
        return await self._recorded(lacks) if lacks else {}

    def _unknown(self, request: ingest_pb2.WriteMetricsRequest) -> Sequence[str]:
        """Servers with rows that are neither described nor in the fleet: new ones, or deleted ones, or all of them
        where the cache has begun anew, so nothing is made up of them."""
        if not self._state.known:
            return ()
        said = {server.server_id for server in request.servers}
        found = {row.server_id for row in request.rows if row.server_id not in self._state} - said
        return [server_id for server_id in found if not server_id_fault(server_id)]


def _out_of_scope(server_id: str, field: str) -> PermissionDenied:
    text = f"{server_id[:255]!r} is outside of the caller's scope"
    return PermissionDenied(text, reason="OUT_OF_SCOPE", field=field)
