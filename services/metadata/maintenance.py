# ruff: noqa: S608  every statement is put together at import, from constants of this file
"""Maintenance windows: when a server is worked on, and so not counted unhealthy.

What must stay true: a window belongs to a server that is not deleted while it is changed; each change of one moves the
revision of its server's record, by which the live state hears of it; at most MAX_OPEN_WINDOWS of a server have not
ended and MAX_ENDED_WINDOWS have. Everything raises ``Unavailable`` while the database is away.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from fleet.model import ServerDetails
from runtime import paging
from runtime.clock import Clock
from runtime.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted
from services.metadata import checks
from services.metadata.queries import instant_of, microseconds_of, place_in
from services.metadata.server_copy import Seen
from services.metadata.store import Page
from services.metadata.store_connection import Database
from services.metadata.store_postgres import WINDOWS_OF_ONE, details_of

UPDATABLE_FIELDS: Final = ("start_time", "end_time", "reason")
MAX_OPEN_WINDOWS: Final = 32
"""Of one server: those that have not ended."""
MAX_ENDED_WINDOWS: Final = 1_000
"""Of one server that are kept; the one that ended longest ago goes first."""
MAX_WINDOW: Final = timedelta(days=366)
MAX_REASON_CHARACTERS: Final = 1_000
MAX_CALLER_CHARACTERS: Final = 255

_COLUMNS: Final = "id, server_id, starts_at, ends_at, reason, created_by, created_at, updated_at"
_TOUCH: Final = """UPDATE servers SET updated_at = now() WHERE id = $1 AND deleted_at IS NULL
    RETURNING revision, updated_at, labels, notes <> '' AS has_notes"""
_FORGET: Final = """DELETE FROM maintenance_windows WHERE server_id = $1 AND ends_at <= now() AND id IN
    (SELECT id FROM maintenance_windows WHERE server_id = $1 AND ends_at <= now() ORDER BY ends_at DESC OFFSET $2)"""
_COUNT_OPEN: Final = "SELECT count(*) FROM maintenance_windows WHERE server_id = $1 AND ends_at > now() AND id <> $2"
_ADD: Final = f"""INSERT INTO maintenance_windows (server_id, starts_at, ends_at, reason, created_by, id)
    VALUES ($1, $2, $3, $4, $5, coalesce($6, gen_random_uuid())) ON CONFLICT (id) DO NOTHING RETURNING {_COLUMNS}"""
_GET: Final = f"SELECT {_COLUMNS} FROM maintenance_windows WHERE server_id = $1 AND id = $2"
_CHANGE: Final = f"""UPDATE maintenance_windows SET starts_at = $3, ends_at = $4, reason = $5, updated_at = now()
    WHERE server_id = $1 AND id = $2 RETURNING {_COLUMNS}"""
_REMOVE: Final = "DELETE FROM maintenance_windows WHERE server_id = $1 AND id = $2 RETURNING id"
_MATCHES: Final = "server_id = $1 AND ($2 OR ends_at > now())"
_LIST: Final = f"""SELECT {_COLUMNS} FROM maintenance_windows WHERE {_MATCHES}
    AND ($3::timestamptz IS NULL OR (starts_at, id) < ($3, $4::uuid)) ORDER BY starts_at DESC, id DESC LIMIT $5"""
_COUNT: Final = f"SELECT count(*) FROM maintenance_windows WHERE {_MATCHES}"
_NO_WINDOW: Final = UUID(int=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWindow:
    """A window to record. ``start_time`` None: now; ``id`` empty: the store chooses a UUID."""

    server_id: str
    start_time: datetime | None
    end_time: datetime | None
    reason: str = ""
    created_by: str = ""
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A window as recorded, [start, end)."""

    id: str
    server_id: str
    start_time: datetime
    end_time: datetime
    reason: str
    created_by: str
    create_time: datetime
    update_time: datetime


class MaintenanceStore:
    """Windows in a `Database`. `changed` is told of each change what its server's record is then."""

    def __init__(self, database: Database, *, clock: Clock, changed: Callable[[Seen], None]) -> None:
        self._database = database
        self._clock = clock
        self._changed = changed

    async def add(self, new: NewWindow) -> tuple[Window, ServerDetails]:
        """Records a window; also returns what its server's details are with it.

        Raises:
            AlreadyExists: the id is taken.
            InvalidArgument: naming the field of the window.
            NotFound: no such server.
            ResourceExhausted: MAX_OPEN_WINDOWS.
        """
        checks.check_server_id(new.server_id)
        own_id = checks.check_interaction_id(new.id) if new.id else None
        start, end = _checked_span(new.start_time or self._now(), new.end_time)
        _checked_reason(new.reason)
        checks.check_text(new.created_by, "created_by", max_characters=MAX_CALLER_CHARACTERS)
        if end <= self._now():
            raise InvalidArgument("has passed already", field="end_time")
        async with self._database.connection() as connection, connection.transaction():
            server = await _touched(connection, new.server_id)
            await _check_room(connection, new.server_id, _NO_WINDOW)
            await connection.execute(_FORGET, new.server_id, MAX_ENDED_WINDOWS)
            row = await connection.fetchrow(_ADD, new.server_id, start, end, new.reason, new.created_by, own_id)
            if row is None:
                raise AlreadyExists(f"there is a maintenance window {own_id}", field="id")
            details = await _details(connection, new.server_id, server)
        self._changed(Seen(new.server_id, server["revision"], server["updated_at"]))
        return _window(row), details

    async def get(self, server_id: str, window_id: str) -> Window:
        """Returns a window of a server.

        Raises:
            NotFound: there is none.
        """
        checks.check_server_id(server_id)
        wanted = checks.check_interaction_id(window_id)
        async with self._database.connection() as connection:
            return _found(await connection.fetchrow(_GET, server_id, wanted), wanted)

    async def list(self, server_id: str, *, show_ended: bool, page_size: int, page_token: str) -> Page[Window]:
        """Lists the windows of a server, those that begin last first; those that have ended only if asked for.

        Raises:
            InvalidArgument: a negative ``page_size``, a ``page_token`` of another listing.
        """
        checks.check_server_id(server_id)
        limit = paging.page_size(page_size)
        filters = [server_id, show_ended]
        last = paging.position("maintenance", filters, page_token, (int, str))
        before = place_in(last) or (None, None)
        async with self._database.connection() as connection:
            rows = await connection.fetch(_LIST, *filters, *before, limit + 1)
            total = await connection.fetchval(_COUNT, *filters)
        found = [_window(row) for row in rows]
        token = ""
        if len(found) > limit:
            at = found[limit - 1]
            token = paging.page_token("maintenance", filters, [microseconds_of(at.start_time), at.id])
        return Page(items=tuple(found[:limit]), next_page_token=token, total_size=total)

    async def change(
        self, window_id: str, new: NewWindow, fields: Collection[str] = ()
    ) -> tuple[Window, ServerDetails]:
        """Sets the named ones of UPDATABLE_FIELDS, all of them when none is named; who recorded it stays.

        Raises:
            InvalidArgument: naming the field, or ``update_mask``.
            NotFound: no such window or server.
            ResourceExhausted: MAX_OPEN_WINDOWS, when one that had ended is opened again.
        """
        unknown = sorted(set(fields) - set(UPDATABLE_FIELDS))
        if unknown:
            raise InvalidArgument(
                f"{unknown[0][:64]!r} is not one of {', '.join(UPDATABLE_FIELDS)}", field="update_mask"
            )
        checks.check_server_id(new.server_id)
        wanted = checks.check_interaction_id(window_id)
        _checked_reason(new.reason)
        chosen = set(fields or UPDATABLE_FIELDS)
        async with self._database.connection() as connection, connection.transaction():
            server = await _touched(connection, new.server_id)
            before = _found(await connection.fetchrow(_GET, new.server_id, wanted), wanted)
            start, end = _checked_span(
                (new.start_time or self._now()) if "start_time" in chosen else before.start_time,
                new.end_time if "end_time" in chosen else before.end_time,
            )
            if end > self._now() >= before.end_time:
                await _check_room(connection, new.server_id, wanted)
            reason = new.reason if "reason" in chosen else before.reason
            row = await connection.fetchrow(_CHANGE, new.server_id, wanted, start, end, reason)
            details = await _details(connection, new.server_id, server)
        self._changed(Seen(new.server_id, server["revision"], server["updated_at"]))
        return _window(row), details

    async def remove(self, server_id: str, window_id: str) -> ServerDetails:
        """Removes a window; returns what its server's details are without it.

        Raises:
            NotFound: no such window or server.
        """
        checks.check_server_id(server_id)
        wanted = checks.check_interaction_id(window_id)
        async with self._database.connection() as connection, connection.transaction():
            server = await _touched(connection, server_id)
            if await connection.fetchval(_REMOVE, server_id, wanted) is None:
                raise _no_window(wanted)
            details = await _details(connection, server_id, server)
        self._changed(Seen(server_id, server["revision"], server["updated_at"]))
        return details

    def _now(self) -> datetime:
        return instant_of(self._clock.now_ms() * 1_000)


async def _touched(connection: Any, server_id: str) -> Any:
    """The server's row, locked until the transaction ends, its revision moved."""
    row = await connection.fetchrow(_TOUCH, server_id)
    if row is None:
        raise NotFound(f"there is no server {server_id!r}", reason="SERVER_NOT_FOUND", field="server_id")
    return row


async def _check_room(connection: Any, server_id: str, but: UUID) -> None:
    if await connection.fetchval(_COUNT_OPEN, server_id, but) >= MAX_OPEN_WINDOWS:
        raise ResourceExhausted(
            f"the server has {MAX_OPEN_WINDOWS} windows that have not ended (MAX_OPEN_WINDOWS)",
            metadata={"limit": "MAX_OPEN_WINDOWS"},
        )


async def _details(connection: Any, server_id: str, server: Any) -> ServerDetails:
    windows = await connection.fetchval(WINDOWS_OF_ONE, server_id)
    return details_of(server["revision"], server["labels"], server["has_notes"], windows)


def _checked_span(start: datetime, end: datetime | None) -> tuple[datetime, datetime]:
    if end is None:
        raise InvalidArgument("says when the window ends", field="end_time")
    if end <= start:
        raise InvalidArgument("is not after start_time", field="end_time")
    if end - start > MAX_WINDOW:
        raise InvalidArgument(f"is more than {MAX_WINDOW.days} days after start_time", field="end_time")
    return start, end


def _checked_reason(reason: str) -> None:
    checks.check_text(reason, "reason", max_characters=MAX_REASON_CHARACTERS)


def _found(row: Any, window_id: UUID) -> Window:
    if row is None:
        raise _no_window(window_id)
    return _window(row)


def _no_window(window_id: UUID) -> NotFound:
    return NotFound(f"the server has no maintenance window {window_id}", field="id")


def _window(row: Any) -> Window:
    return Window(
        id=str(row["id"]),
        server_id=row["server_id"],
        start_time=row["starts_at"],
        end_time=row["ends_at"],
        reason=row["reason"],
        created_by=row["created_by"],
        create_time=row["created_at"],
        update_time=row["updated_at"],
    )
