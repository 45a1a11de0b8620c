"""``FleetService``: the servers and how they are now.

Reads come from ``gateway.state`` alone, as ready bytes. Changes go to the record (``gateway.registry``) first, since
that is what they change, and are then seen in the live state.
"""

import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final, Protocol

from fleet import access
from fleet.codec import delimited
from gateway.changes import Changes, Wanted, made
from gateway.entry import BASIC, FULL
from gateway.registry import Registry
from gateway.state import FleetState, content_tag
from gateway.visible import seen, sees
from openmanager.fleet.v1 import status_pb2
from openmanager.gateway.v1 import fleet_pb2
from runtime import paging
from runtime.errors import InvalidArgument, NotFound, PermissionDenied
from runtime.prepared import Prepared

MAX_FULL_PAGE_SIZE: Final = 200
"""A full server of 511 metrics is 18 KB; a message holds 16 MiB."""
AGE_KEY: Final = "age"
"""Trailing metadata, and a header over HTTP: how old the live state may be, in seconds. Absent: it is current."""

_UPDATABLE: Final = ("hostname", "environment", "role", "location")
_COUNTED: Final = {
    status_pb2.SERVER_STATUS_HEALTHY: "healthy",
    status_pb2.SERVER_STATUS_WARNING: "warning",
    status_pb2.SERVER_STATUS_CRITICAL: "critical",
    status_pb2.SERVER_STATUS_OFFLINE: "offline",
}


class Context(Protocol):
    """What is needed of a call."""

    def set_trailing_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        """Sends key and value pairs after the answer."""


class FleetServicer:
    """Answers ``openmanager.gateway.v1.FleetService``."""

    def __init__(self, state: FleetState, registry: Registry, changes: Changes) -> None:
        self._state = state
        self._registry = registry
        self._changes = changes

    def GetServer_at_once(self, request: fleet_pb2.GetServerRequest) -> Prepared | None:
        """Ready bytes while the cache is followed: nearly as cheap as an empty handler."""
        entry = self._state.get(request.id) if self._state.following and access.scope() is None else None
        return None if entry is None else entry.answer(request.view or FULL)

    async def GetServer(self, request: fleet_pb2.GetServerRequest, context: Context) -> Prepared:
        """The same, where the cache has to be asked first."""
        await self._tell_age(context)
        entry = self._state.get(request.id)
        if entry is None or not sees(self._state, request.id):
            raise unknown_server(request.id)
        answer = entry.answer(request.view or FULL)
        return answer if access.scope() is None else Prepared(answer.data, etag=content_tag(answer.data))

    async def ListServers(self, request: fleet_pb2.ListServersRequest, context: Context) -> Prepared:
        """Filters, then pages."""
        await self._tell_age(context)
        question = ("ListServers", request.SerializeToString(deterministic=True))
        return await self._state.kept(question, lambda: self._page(request), part=access.scope())

    async def _page(self, request: fleet_pb2.ListServersRequest) -> bytes:
        size = paging.page_size(request.page_size)
        view = request.view or BASIC
        if view == FULL:
            size = min(size, MAX_FULL_PAGE_SIZE)
        wanted = Wanted(view, request.environment, request.role, access.scope())
        matching = [
            entry
            for entry in self._state.all()
            if (not request.status or entry.status == request.status) and wanted.has(entry)
        ]
        chosen, token = paging.page_of(
            matching,
            lambda entry: (entry.id,),
            listing="servers",
            filters=(request.status, request.environment, request.role),
            size=size,
            token=request.page_token,
        )
        await made(chosen, view)
        message = fleet_pb2.ListServersResponse
        servers = [delimited(message.SERVERS_FIELD_NUMBER, entry.server(view)) for entry in chosen]
        rest = message(next_page_token=token, total_size=len(matching))
        return b"".join([*servers, rest.SerializeToString()])

    async def GetFleetSummary(self, _request: fleet_pb2.GetFleetSummaryRequest, context: Context) -> Prepared:
        """Counts the live state."""
        await self._tell_age(context)
        return await self._state.kept("GetFleetSummary", self._summary, part=access.scope())

    async def _summary(self) -> bytes:
        entries = seen(self._state.all())
        summary = fleet_pb2.FleetSummary(total=len(entries))
        for status, name in _COUNTED.items():
            setattr(summary, name, sum(entry.status == status for entry in entries))
        return fleet_pb2.GetFleetSummaryResponse(summary=summary).SerializeToString()

    async def WatchFleet(
        self, request: fleet_pb2.WatchFleetRequest, _context: object
    ) -> AsyncGenerator[Prepared, None]:
        """First everything, then what changed; a server that no longer matches the filters is gone for this reader."""
        wanted = Wanted(request.view or BASIC, request.environment, request.role, access.scope())
        async with aclosing(self._changes.watch(wanted, request.after_version)) as messages:
            async for message in messages:
                yield message

    async def CreateServer(
        self, request: fleet_pb2.CreateServerRequest, _context: object
    ) -> fleet_pb2.CreateServerResponse:
        """Records the server, then shows it as offline."""
        _check_place(request.server)
        return fleet_pb2.CreateServerResponse(server=await self._registry.create(request.server))

    async def UpdateServer(
        self, request: fleet_pb2.UpdateServerRequest, _context: object
    ) -> fleet_pb2.UpdateServerResponse:
        """Changes the record, then shows it."""
        self._check_sees(request.server.id, "server.id")
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
        self._check_sees(request.id, "id")
        await self._registry.delete(request.id)
        return fleet_pb2.DeleteServerResponse()

    async def UndeleteServer(
        self, request: fleet_pb2.UndeleteServerRequest, _context: object
    ) -> fleet_pb2.UndeleteServerResponse:
        """Unmarks the record, then admits the server again."""
        self._check_sees(request.id, "id")
        return fleet_pb2.UndeleteServerResponse(server=await self._registry.undelete(request.id))

    def _check_sees(self, server_id: str, field: str) -> None:
        if not sees(self._state, server_id):
            raise unknown_server(server_id, field)

    async def _tell_age(self, context: Context) -> None:
        """Asks the cache where it is not followed, and says how old the state may be all the same."""
        if self._state.following:
            return
        await self._state.refresh()
        age_s = self._state.age_s
        if math.isfinite(age_s):
            context.set_trailing_metadata(((AGE_KEY, str(math.ceil(age_s))),))


def _check_place(server: fleet_pb2.Server) -> None:
    scope = access.scope()
    if scope is not None and not scope.has(server.id, server.environment, server.role):
        raise PermissionDenied("the server is outside of the caller's scope", reason="OUT_OF_SCOPE", field="server")


def unknown_server(server_id: str, field: str = "id") -> NotFound:
    """The error for an id that is not in the fleet, or that the caller does not see."""
    return NotFound(f"there is no server {server_id[:255]!r}", reason="SERVER_NOT_FOUND", field=field)
