"""openmanager.cache.v1.CacheService: decodes, calls the core, encodes. Answers with states are bytes, joined from parts
that the encoder keeps.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

from fleet.validation import server_id_fault
from openmanager.cache.v1 import cache_pb2
from runtime.errors import InvalidArgument
from services.cache.core import Cache
from services.cache.model import ServerState
from services.cache.request import decode_update
from services.cache.wire import sets_of, tag

STATES_PER_SLICE: Final = 250
"""States that are encoded before other calls get their turn; 3-5 ms."""

_GET, _LIST = cache_pb2.GetServerStateResponse, cache_pb2.ListServerStatesResponse
_WithSets = type[cache_pb2.GetServerStateResponse] | type[cache_pb2.ListServerStatesResponse]


class CacheServicer:
    """The service on one Cache."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def UpdateServers(
        self, request: cache_pb2.UpdateServersRequest, _context: object
    ) -> cache_pb2.UpdateServersResponse:
        """Applies rows and descriptors."""
        update, new_sets, refused = await decode_update(request, self._cache.sets, self._cache.clock.now_ms())
        outcome = await self._cache.update(update, new_sets)
        ignored = outcome.ignored_rows + refused
        return cache_pb2.UpdateServersResponse(updated=len(outcome.changed), ignored_rows=ignored)

    async def RemoveServers(
        self, request: cache_pb2.RemoveServersRequest, _context: object
    ) -> cache_pb2.RemoveServersResponse:
        """Forgets servers."""
        for index, server_id in enumerate(request.server_ids):
            if fault := server_id_fault(server_id):
                raise InvalidArgument(fault, field=f"server_ids[{index}]")
        if request.revisions and len(request.revisions) != len(request.server_ids):
            raise InvalidArgument("not one for each id", field="revisions")
        revisions = dict(zip(request.server_ids, request.revisions, strict=False))
        return cache_pb2.RemoveServersResponse(removed=self._cache.remove(list(request.server_ids), revisions))

    async def GetServerState(self, request: cache_pb2.GetServerStateRequest, _context: object) -> bytes:
        """One server with the sets that it needs."""
        if not request.server_id:
            raise InvalidArgument("the server id is empty", field="server_id")
        state = self._cache.get(request.server_id)
        return b"".join((tag(_GET.STATE_FIELD_NUMBER), self._cache.encoder.state(state), self._sets([state], _GET)))

    async def ListServerStates(self, _request: cache_pb2.ListServerStatesRequest, _context: object) -> bytes:
        """All servers with the sets that they need."""
        states, epoch, sequence = self._cache.states()
        parts = [_LIST(version=cache_pb2.Version(epoch=epoch, sequence=sequence)).SerializeToString()]
        for count, state in enumerate(states, start=1):
            parts += (tag(_LIST.STATES_FIELD_NUMBER), self._cache.encoder.state(state))
            if count % STATES_PER_SLICE == 0:
                await asyncio.sleep(0)
        parts.append(self._sets(states, _LIST))
        return b"".join(parts)

    async def GetFleetSummary(
        self, _request: cache_pb2.GetFleetSummaryRequest, _context: object
    ) -> cache_pb2.GetFleetSummaryResponse:
        """Servers by status."""
        summary = self._cache.summary()
        return cache_pb2.GetFleetSummaryResponse(
            total=summary.total,
            healthy=summary.healthy,
            warning=summary.warning,
            critical=summary.critical,
            offline=summary.offline,
        )

    async def WatchServers(
        self, _request: cache_pb2.WatchServersRequest, _context: object
    ) -> AsyncGenerator[bytes, None]:
        """A snapshot, then what changed."""
        async with aclosing(self._cache.watch()) as messages:
            async for message in messages:
                yield message

    def _sets(self, states: Sequence[ServerState], response: _WithSets) -> bytes:
        prefix = tag(response.METRIC_SETS_FIELD_NUMBER)
        return b"".join(prefix + self._cache.encoder.metric_set(metric_set) for metric_set in sets_of(states).values())
