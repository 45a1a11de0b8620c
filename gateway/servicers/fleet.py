"""``FleetService``: the servers and how they are now.

Reads come from ``gateway.state`` alone. Changes go to the record (``gateway.registry``) first, since that is what they
change, and are then seen in the live state.
"""

from collections.abc import AsyncIterator, Iterable

from gateway.registry import Registry
from gateway.state import FleetState, ServerEntry
from openmanager.fleet.v1 import status_pb2
from openmanager.gateway.v1 import fleet_pb2
from runtime import paging
from runtime.errors import InvalidArgument, NotFound

MAX_FULL_PAGE_SIZE = 200
"""A full server of 511 metrics is 18 KB; a message holds 16 MiB."""

_UPDATABLE = ("hostname", "environment", "role", "location")
_COUNTED = {
    status_pb2.SERVER_STATUS_HEALTHY: "healthy",
    status_pb2.SERVER_STATUS_WARNING: "warning",
    status_pb2.SERVER_STATUS_CRITICAL: "critical",
    status_pb2.SERVER_STATUS_OFFLINE: "offline",
}


class FleetServicer:
    """Answers ``openmanager.gateway.v1.FleetService``."""

    def __init__(self, state: FleetState, registry: Registry) -> None:
        self._state = state
        self._registry = registry

    async def GetServer(
        self, request: fleet_pb2.GetServerRequest, _context: object
    ) -> fleet_pb2.GetServerResponse | bytes:
        """Returns ready bytes for the full view: as cheap as an empty handler."""
        entry = self._state.get(request.id)
        if entry is None:
            raise unknown_server(request.id)
        if request.view == fleet_pb2.SERVER_VIEW_BASIC:
            return fleet_pb2.GetServerResponse(server=entry.basic)
        return entry.full_response

    async def ListServers(
        self, request: fleet_pb2.ListServersRequest, _context: object
    ) -> fleet_pb2.ListServersResponse:
        """Filters, then pages."""
        size = paging.page_size(request.page_size)
        view = request.view or fleet_pb2.SERVER_VIEW_BASIC
        if view == fleet_pb2.SERVER_VIEW_FULL:
            size = min(size, MAX_FULL_PAGE_SIZE)
        filters = (request.status, request.environment, request.role)
        matching = [
            entry
            for entry in self._state.all()
            if (not request.status or entry.status == request.status) and _placed(entry, *filters[1:])
        ]
        chosen, token = paging.page_of(
            matching, lambda entry: (entry.id,), listing="servers", filters=filters, size=size, token=request.page_token
        )
        return fleet_pb2.ListServersResponse(
            servers=[entry.view(view) for entry in chosen], next_page_token=token, total_size=len(matching)
        )

    async def GetFleetSummary(
        self, _request: fleet_pb2.GetFleetSummaryRequest, _context: object
    ) -> fleet_pb2.GetFleetSummaryResponse:
        """Counts the live state."""
        entries = self._state.all()
        summary = fleet_pb2.FleetSummary(total=len(entries))
        for status, name in _COUNTED.items():
            setattr(summary, name, sum(entry.status == status for entry in entries))
        return fleet_pb2.GetFleetSummaryResponse(summary=summary)

    async def WatchFleet(
        self, request: fleet_pb2.WatchFleetRequest, _context: object
    ) -> AsyncIterator[fleet_pb2.WatchFleetResponse]:
        """First everything, then what changed; a server that no longer matches the filters is gone for this reader."""
        view = request.view or fleet_pb2.SERVER_VIEW_BASIC
        shown: set[str] = set()
        with self._state.watching() as watcher:
            while True:
                everything, changed, removed = await watcher.next()
                entries = self._state.all() if everything else self._entries(changed)
                matching = [entry for entry in entries if _placed(entry, request.environment, request.role)]
                gone = (removed | (changed - {entry.id for entry in matching})) & shown
                shown = (shown - gone) | {entry.id for entry in matching}
                if not (everything or matching or gone):
                    continue
                yield fleet_pb2.WatchFleetResponse(
                    version=self._state.version,
                    snapshot=everything,
                    servers=[entry.view(view) for entry in matching],
                    removed=[fleet_pb2.RemovedServer(id=server_id) for server_id in sorted(gone)],
                )

    async def CreateServer(
        self, request: fleet_pb2.CreateServerRequest, _context: object
    ) -> fleet_pb2.CreateServerResponse:
        """Records the server, then shows it as offline."""
        return fleet_pb2.CreateServerResponse(server=await self._registry.create(request.server))

    async def UpdateServer(
        self, request: fleet_pb2.UpdateServerRequest, _context: object
    ) -> fleet_pb2.UpdateServerResponse:
        """Changes the record, then shows it."""
        fields = list(request.update_mask.paths) or [name for name in _UPDATABLE if getattr(request.server, name)]
        for name in fields:
            if name not in _UPDATABLE:
                raise InvalidArgument(
                    f"{name} cannot be updated; {', '.join(_UPDATABLE)} can", field=f"update_mask.{name}"
                )
        if not fields:
            raise InvalidArgument("nothing to update: name at least one field", field="update_mask")
        return fleet_pb2.UpdateServerResponse(server=await self._registry.update(request.server, fields))

    async def DeleteServer(
        self, request: fleet_pb2.DeleteServerRequest, _context: object
    ) -> fleet_pb2.DeleteServerResponse:
        """Marks the record, then takes the server out of the live state."""
        await self._registry.delete(request.id)
        return fleet_pb2.DeleteServerResponse()

    async def UndeleteServer(
        self, request: fleet_pb2.UndeleteServerRequest, _context: object
    ) -> fleet_pb2.UndeleteServerResponse:
        """Unmarks the record, then admits the server again."""
        return fleet_pb2.UndeleteServerResponse(server=await self._registry.undelete(request.id))

    def _entries(self, ids: Iterable[str]) -> list[ServerEntry]:
        return [entry for server_id in sorted(ids) if (entry := self._state.get(server_id)) is not None]


def unknown_server(server_id: str) -> NotFound:
    """The error for an id that is not in the fleet."""
    return NotFound(f"there is no server {server_id[:255]!r}", reason="SERVER_NOT_FOUND", field="id")


def _placed(entry: ServerEntry, environment: str, role: str) -> bool:
    descriptor = entry.state.descriptor
    return (not environment or descriptor.environment == environment) and (not role or descriptor.role == role)
