"""``FleetService``: the servers and how they are now.

Reads come from ``gateway.state`` alone, as ready bytes. Changes go to the record (``gateway.registry``) first, since
that is what they change, and are then seen in the live state.
"""

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final, Protocol

from fleet import access
from fleet.codec import delimited
from gateway.audit import shown_of
from gateway.changes import Changes, Wanted, made
from gateway.entry import BASIC, FULL, ServerEntry
from gateway.notes import Notes
from gateway.registry import DeletedServer, Registry
from gateway.state import FleetState, content_tag
from gateway.visible import seen, sees
from openmanager.fleet.v1 import status_pb2
from openmanager.gateway.v1 import fleet_pb2
from runtime import audited, paging
from runtime.caller import Caller
from runtime.errors import InvalidArgument, NotFound, OpenManagerError, PermissionDenied
from runtime.prepared import Prepared

MAX_FULL_PAGE_SIZE: Final = 200
"""A full server of 511 metrics is 18 KB; a message holds 16 MiB."""
AGE_KEY: Final = "age"
"""Trailing metadata, and a header over HTTP: how old the live state may be, in seconds. Absent: it is current."""

MAX_FILTER_LABELS: Final = 16
_VIEWS: Final = frozenset({BASIC, FULL})
_UPDATABLE: Final = ("hostname", "environment", "role", "location", "labels", "notes")
_COUNTED: Final = {
    status_pb2.SERVER_STATUS_HEALTHY: "healthy",
    status_pb2.SERVER_STATUS_WARNING: "warning",
    status_pb2.SERVER_STATUS_CRITICAL: "critical",
    status_pb2.SERVER_STATUS_OFFLINE: "offline",
}


_Listed = ServerEntry | DeletedServer


class Context(Protocol):
    """What is needed of a call."""

    def set_trailing_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        """Sends key and value pairs after the answer."""


class FleetServicer:
    """Answers ``openmanager.gateway.v1.FleetService``."""

    def __init__(self, state: FleetState, registry: Registry, changes: Changes, notes: Notes) -> None:
        self._state = state
        self._registry = registry
        self._changes = changes
        self._notes = notes

    def GetServer_at_once(self, request: fleet_pb2.GetServerRequest, who: Caller | None) -> Prepared | None:
        """Ready bytes while the cache is followed: nearly as cheap as an empty handler. Not for who sees some only."""
        if not self._state.following or (isinstance(who, access.Caller) and who.scope is not None):
            return None
        entry = self._state.find(request.id)
        if entry is None:
            return None
        view = request.view or FULL
        if view not in _VIEWS:
            return None
        if not entry.has_notes or view == BASIC:
            return entry.answer(view)
        notes = self._notes.known(entry.id, entry.revision)
        return None if notes is None else entry.answer_with(notes, is_current=True)

    async def GetServer(self, request: fleet_pb2.GetServerRequest, context: Context) -> Prepared:
        """The same, where the cache or the record has to be asked first."""
        view = _view(request.view, FULL)
        await self._tell_age(context)
        entry = self._state.get(request.id)
        if entry is None or not sees(self._state, request.id):
            raise unknown_server(request.id)
        if not entry.has_notes or view == BASIC:
            answer = entry.answer(view)
        else:
            answer = await self._with_notes(entry)
        return answer if access.scope() is None else Prepared(answer.data, etag=content_tag(answer.data))

    async def _with_notes(self, entry: ServerEntry) -> Prepared:
        """Without them, and without an entity tag, where the record cannot be asked."""
        notes = self._notes.known(entry.id, entry.revision)
        if notes is not None:
            return entry.answer_with(notes, is_current=True)
        try:
            revision, notes = await self._notes.read(entry.id)
        except OpenManagerError:
            return Prepared(entry.answer(FULL).data)
        return entry.answer_with(notes, is_current=revision == entry.revision)

    async def ListServers(self, request: fleet_pb2.ListServersRequest, context: Context) -> Prepared:
        """Filters, then pages."""
        await self._tell_age(context)
        if request.show_deleted:
            if access.scope() is not None:
                raise PermissionDenied("deleted servers are shown to who sees all", reason="SCOPE_TOO_NARROW")
            return Prepared(await self._page(request))
        question = ("ListServers", request.SerializeToString(deterministic=True))
        return await self._state.kept(question, lambda: self._page(request), part=access.scope())

    async def _page(self, request: fleet_pb2.ListServersRequest) -> bytes:
        size = paging.page_size(request.page_size)
        view = _view(request.view, BASIC)
        if request.status not in status_pb2.ServerStatus.values():
            raise InvalidArgument(f"there is no status number {request.status}", field="status")
        if view == FULL:
            size = min(size, MAX_FULL_PAGE_SIZE)
        if request.show_deleted:  # the record is asked for one more
            size = min(size, paging.MAX_PAGE_SIZE - 1)
        wanted = Wanted(view, request.environment, request.role, access.scope())
        labels = _labels(request.label)
        filters = [request.status, request.environment, request.role]
        if request.label or request.show_deleted:  # as tokens always were where neither is asked for
            filters += [sorted(request.label), request.show_deleted]
        matching: list[_Listed] = [
            entry
            for entry in self._state.all()
            if (not request.status or entry.status == request.status) and wanted.has(entry)
            if not labels or entry.has_labels(labels)
        ]
        total = len(matching)
        if request.show_deleted and not request.status:
            last = paging.position("servers", filters, request.page_token, (str,)) or [""]
            deleted, more = await self._registry.deleted(
                request.environment, request.role, labels, after_id=str(last[0]), size=size
            )
            matching = sorted((*matching, *deleted), key=lambda listed: listed.id)
            total += more
        chosen, token = paging.page_of(
            matching,
            lambda entry: (entry.id,),
            listing="servers",
            filters=filters,
            size=size,
            token=request.page_token,
        )
        await made(chosen, view)
        message = fleet_pb2.ListServersResponse
        servers = [delimited(message.SERVERS_FIELD_NUMBER, entry.server(view)) for entry in chosen]
        rest = message(next_page_token=token, total_size=total)
        return b"".join([*servers, rest.SerializeToString()])

    async def GetFleetSummary(self, _request: fleet_pb2.GetFleetSummaryRequest, context: Context) -> Prepared:
        """Counts the live state."""
        await self._tell_age(context)
        return await self._state.kept("GetFleetSummary", self._summary, part=access.scope())

    async def _summary(self) -> bytes:
        entries = seen(self._state.all())
        summary = fleet_pb2.FleetSummary(total=len(entries))
        counted = [entry.status for entry in entries if not entry.state.in_maintenance]
        for status, name in _COUNTED.items():
            setattr(summary, name, counted.count(status))
        summary.maintenance = len(entries) - len(counted)
        return fleet_pb2.GetFleetSummaryResponse(summary=summary).SerializeToString()

    async def WatchFleet(
        self, request: fleet_pb2.WatchFleetRequest, _context: object
    ) -> AsyncGenerator[Prepared, None]:
        """First everything, then what changed; a server that no longer matches the filters is gone for this reader."""
        wanted = Wanted(_view(request.view, BASIC), request.environment, request.role, access.scope())
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
        fields = [name for name in fields if name != "etag"]
        for name in fields:
            if name not in _UPDATABLE:
                raise InvalidArgument(
                    f"{name} cannot be updated; {', '.join(_UPDATABLE)} can", field=f"update_mask.{name}"
                )
        if not fields:
            raise InvalidArgument("nothing to update: name at least one field", field="update_mask")
        self._check_stays(request.server, fields)
        self._note_before(request.server.id)
        etag = request.etag or request.server.etag
        return fleet_pb2.UpdateServerResponse(server=await self._registry.update(request.server, fields, etag))

    async def DeleteServer(
        self, request: fleet_pb2.DeleteServerRequest, _context: object
    ) -> fleet_pb2.DeleteServerResponse:
        """Marks the record, then takes the server out of the live state."""
        self._check_sees(request.id, "id")
        self._note_before(request.id)
        await self._registry.delete(request.id, request.etag)
        return fleet_pb2.DeleteServerResponse()

    async def UndeleteServer(
        self, request: fleet_pb2.UndeleteServerRequest, _context: object
    ) -> fleet_pb2.UndeleteServerResponse:
        """Unmarks the record, then admits the server again."""
        self._check_sees(request.id, "id")
        return fleet_pb2.UndeleteServerResponse(server=await self._registry.undelete(request.id, request.etag))

    def _check_sees(self, server_id: str, field: str) -> None:
        if not sees(self._state, server_id):
            raise unknown_server(server_id, field)

    def _check_stays(self, server: fleet_pb2.Server, fields: Sequence[str]) -> None:
        """Raises PermissionDenied where the server would leave the caller's scope."""
        entry = self._state.get(server.id)
        environment, role = ("", "") if entry is None else entry.place
        _check_place(
            fleet_pb2.Server(
                id=server.id,
                environment=server.environment if "environment" in fields else environment,
                role=server.role if "role" in fields else role,
            )
        )

    def _note_before(self, server_id: str) -> None:
        """Tells the audit log what is known of a server that is about to change."""
        known = self._state.get(server_id)
        if known is not None:
            audited.note(before=shown_of(known.message(BASIC)))

    async def _tell_age(self, context: Context) -> None:
        """Asks the cache where it is not followed, and says how old the state may be all the same."""
        if self._state.following:
            return
        await self._state.refresh()
        age_s = self._state.age_s
        if math.isfinite(age_s):
            context.set_trailing_metadata(((AGE_KEY, str(math.ceil(age_s))),))


def _view(
    wanted: fleet_pb2.ServerView.ValueType, default: fleet_pb2.ServerView.ValueType
) -> fleet_pb2.ServerView.ValueType:
    """The view that is asked for. Over gRPC it may be any number, and of each view a server's bytes are kept."""
    view = wanted or default
    if view not in _VIEWS:
        raise InvalidArgument(f"there is no view number {view}", field="view")
    return view


def _labels(wanted: Sequence[str]) -> list[tuple[str, str | None]]:
    if len(wanted) > MAX_FILTER_LABELS:
        raise InvalidArgument(f"more than {MAX_FILTER_LABELS} labels (MAX_FILTER_LABELS)", field="label")
    parts = [text.partition(":") for text in wanted]
    if not all(key for key, _, _ in parts):
        raise InvalidArgument("is not key:value, or key", field="label")
    return [(key, value if colon else None) for key, colon, value in parts]


def _check_place(server: fleet_pb2.Server) -> None:
    scope = access.scope()
    if scope is not None and not scope.has(server.id, server.environment, server.role):
        raise PermissionDenied("the server is outside of the caller's scope", reason="OUT_OF_SCOPE", field="server")


def unknown_server(server_id: str, field: str = "id") -> NotFound:
    """The error for an id that is not in the fleet, or that the caller does not see."""
    return NotFound(f"there is no server {server_id[:255]!r}", reason="SERVER_NOT_FOUND", field=field)
