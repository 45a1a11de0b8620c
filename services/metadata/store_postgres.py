# ruff: noqa: S608  every statement is put together at import, from constants of this file
"""The record of servers in PostgreSQL, as SQL. What is done when it does not answer is in `store_local`.

What must stay true: every value is a bound parameter, every statement a constant text; the SQL runs on PostgreSQL 15 to
18 without extensions; a missing text is NULL in the table and empty outside.
"""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import orjson

from fleet.model import ServerDescriptor, ServerDetails
from runtime.errors import Aborted, AlreadyExists, InvalidArgument, NotFound
from services.metadata import checks
from services.metadata.queries import ServerQuery
from services.metadata.store import NO_REMARKS, UPDATABLE_FIELDS, Remarks, ServerRecord
from services.metadata.store_connection import Database

_WINDOWS = """SELECT json_agg(json_build_array(
        floor(extract(epoch FROM starts_at) * 1000)::bigint, floor(extract(epoch FROM ends_at) * 1000)::bigint)
        ORDER BY starts_at, ends_at) FROM maintenance_windows WHERE server_id = servers.id AND ends_at > now()"""
WINDOWS_OF_ONE = _WINDOWS.replace("servers.id", "$1")
"""The windows of $1 that have not ended, as JSON: [[start, end], ...] in ms since the epoch; NULL: none."""
_SERVER_COLUMNS = f"""id, hostname, environment, role, location, report_interval_ms, created_at, updated_at, deleted_at,
    revision, labels, notes, ({_WINDOWS}) AS windows"""
_SERVER_MATCHES = """($1 = '' OR environment = $1) AND ($2 = '' OR role = $2)
    AND ($3::text[] IS NULL OR id = ANY ($3)) AND ($4 OR deleted_at IS NULL) AND NOT ($5 AND deleted_at IS NULL)
    AND ($6::jsonb IS NULL OR labels @> $6) AND ($7::text[] IS NULL OR labels ?& $7)"""
_LIST_SERVERS = f"""SELECT {_SERVER_COLUMNS} FROM servers WHERE {_SERVER_MATCHES}
    AND id COLLATE "C" > $8 ORDER BY id COLLATE "C" LIMIT $9"""
_COUNT_SERVERS = f"SELECT count(*) FROM servers WHERE {_SERVER_MATCHES}"
_NOW_AND_TOTAL = "SELECT now(), (SELECT count(*) FROM servers)"
_CHANGED_SERVERS = f"SELECT {_SERVER_COLUMNS} FROM servers WHERE updated_at >= $1"
_MOVE_ON = f"""UPDATE servers SET revision = seen_revision + 1, updated_at = now()
    FROM unnest($1::text[], $2::bigint[], $3::timestamptz[]) AS seen (seen_id, seen_revision, seen_at)
    WHERE id = seen_id AND (revision < seen_revision OR (revision = seen_revision AND updated_at <> seen_at))
    RETURNING {_SERVER_COLUMNS}"""
_GET_SERVER = f"SELECT {_SERVER_COLUMNS} FROM servers WHERE id = $1 AND deleted_at IS NULL"
_CREATE_SERVER = f"""INSERT INTO servers (id, hostname, environment, role, location, report_interval_ms, labels, notes)
    VALUES ($1, $2, NULLIF($3, ''), NULLIF($4, ''), NULLIF($5, ''), NULLIF($6::integer, 0), $7::jsonb, $8)
    ON CONFLICT (id) DO NOTHING RETURNING {_SERVER_COLUMNS}"""
_UPDATE_SERVER = f"""UPDATE servers SET
    hostname = CASE WHEN 'hostname' = ANY ($9::text[]) THEN $2 ELSE hostname END,
    environment = CASE WHEN 'environment' = ANY ($9) THEN NULLIF($3, '') ELSE environment END,
    role = CASE WHEN 'role' = ANY ($9) THEN NULLIF($4, '') ELSE role END,
    location = CASE WHEN 'location' = ANY ($9) THEN NULLIF($5, '') ELSE location END,
    report_interval_ms = CASE WHEN 'report_interval' = ANY ($9) THEN NULLIF($6::integer, 0)
        ELSE report_interval_ms END,
    labels = CASE WHEN 'labels' = ANY ($9) THEN $7::jsonb ELSE labels END,
    notes = CASE WHEN 'notes' = ANY ($9) THEN $8 ELSE notes END,
    updated_at = now()
    WHERE id = $1 AND deleted_at IS NULL AND ($10::bigint IS NULL OR revision = $10) RETURNING {_SERVER_COLUMNS}"""
# The join leaves out what would not differ before anything is locked: ON CONFLICT DO UPDATE locks (and so writes) every
# row it meets, even one that its WHERE then leaves alone. What is not said stays as the row has it when it is locked:
# somebody may have changed it since the statement began.
_REGISTER_SERVERS = """INSERT INTO servers AS kept (id, hostname, environment, role, location, report_interval_ms)
    SELECT said.id, CASE WHEN said.hostname = '' AND old.id IS NULL THEN said.id ELSE said.hostname END,
        nullif(said.environment, ''), nullif(said.role, ''), nullif(said.location, ''),
        nullif(said.report_interval_ms, 0)
    FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::integer[])
        AS said (id, hostname, environment, role, location, report_interval_ms)
    LEFT JOIN servers AS old ON old.id = said.id
    WHERE old.id IS NULL
        OR (said.hostname <> '' AND said.hostname <> old.hostname)
        OR (said.environment <> '' AND said.environment IS DISTINCT FROM old.environment)
        OR (said.role <> '' AND said.role IS DISTINCT FROM old.role)
        OR (said.location <> '' AND said.location IS DISTINCT FROM old.location)
        OR (said.report_interval_ms <> 0 AND said.report_interval_ms IS DISTINCT FROM old.report_interval_ms)
    ON CONFLICT (id) DO UPDATE SET hostname = coalesce(nullif(EXCLUDED.hostname, ''), kept.hostname),
        environment = coalesce(EXCLUDED.environment, kept.environment), role = coalesce(EXCLUDED.role, kept.role),
        location = coalesce(EXCLUDED.location, kept.location),
        report_interval_ms = coalesce(EXCLUDED.report_interval_ms, kept.report_interval_ms), updated_at = now()
        WHERE (kept.hostname, kept.environment, kept.role, kept.location, kept.report_interval_ms) IS DISTINCT FROM
        (coalesce(nullif(EXCLUDED.hostname, ''), kept.hostname), coalesce(EXCLUDED.environment, kept.environment),
        coalesce(EXCLUDED.role, kept.role), coalesce(EXCLUDED.location, kept.location),
        coalesce(EXCLUDED.report_interval_ms, kept.report_interval_ms))"""
_DELETE_SERVER = f"""UPDATE servers SET deleted_at = now(), updated_at = now()
    WHERE id = $1 AND deleted_at IS NULL AND ($2::bigint IS NULL OR revision = $2) RETURNING {_SERVER_COLUMNS}"""
_UNDELETE_SERVER = f"""UPDATE servers SET deleted_at = NULL, updated_at = now()
    WHERE id = $1 AND deleted_at IS NOT NULL AND ($2::bigint IS NULL OR revision = $2) RETURNING {_SERVER_COLUMNS}"""
_IS_DELETED = "SELECT deleted_at IS NOT NULL FROM servers WHERE id = $1"


class PostgresStore:
    """The record in a `Database`: `MetadataStore`'s changes and what its reads need.

    Every method raises Unavailable while the database is away; `within_s` bounds the wait for it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list_servers(
        self, query: ServerQuery, *, within_s: float | None = None
    ) -> tuple[list[ServerRecord], int]:
        """One server more than the page has, and how many match in all."""
        bound = (
            *(query.environment, query.role, query.ids, query.show_deleted or query.only_deleted, query.only_deleted),
            *_label_bounds(query),
        )
        async with self._database.connection(within_s=within_s) as connection:
            rows = await connection.fetch(_LIST_SERVERS, *bound, query.after, query.limit + 1)
            total = await connection.fetchval(_COUNT_SERVERS, *bound)
        return [_server(row) for row in rows], total

    async def changed_servers(self, since: datetime | None) -> tuple[list[ServerRecord], int, datetime]:
        """The servers that changed since a time of the database (None: none), how many there are, its time now."""
        async with self._database.connection() as connection:
            now, total = await connection.fetchrow(_NOW_AND_TOTAL)
            rows = await connection.fetch(_CHANGED_SERVERS, since)
        return [_server(row) for row in rows], total, now

    async def move_on(self, seen: Sequence[tuple[str, int, datetime]]) -> list[ServerRecord]:
        """Has records that are not as they were seen (id, revision, update time) go on behind that revision.

        Returns those that did; one that is as it was seen, or later, stays.
        """
        async with self._database.connection() as connection:
            rows = await connection.fetch(_MOVE_ON, *(list(column) for column in zip(*seen, strict=True)))
        return [_server(row) for row in rows]

    async def get_server(self, server_id: str, *, within_s: float | None = None) -> ServerRecord:
        async with self._database.connection(within_s=within_s) as connection:
            row = await connection.fetchrow(_GET_SERVER, checks.check_server_id(server_id))
        return _found(row, server_id)

    async def create_server(self, descriptor: ServerDescriptor, remarks: Remarks = NO_REMARKS) -> ServerRecord:
        checks.check_descriptor(descriptor, "descriptor")
        said = _checked(remarks)
        async with self._database.connection() as connection:
            row = await connection.fetchrow(_CREATE_SERVER, *_values(descriptor), *said)
        if row is None:
            raise AlreadyExists(f"there is a server {descriptor.server_id!r}, maybe a deleted one", field="server_id")
        return _server(row)

    async def update_server(
        self,
        descriptor: ServerDescriptor,
        fields: Collection[str] = (),
        *,
        remarks: Remarks = NO_REMARKS,
        etag: str = "",
    ) -> ServerRecord:
        unknown = sorted(set(fields) - set(UPDATABLE_FIELDS))
        if unknown:
            raise InvalidArgument(
                f"{unknown[0][:64]!r} is not one of {', '.join(UPDATABLE_FIELDS)}", field="update_mask"
            )
        checks.check_descriptor(descriptor, "descriptor")
        chosen = list(fields or UPDATABLE_FIELDS)
        values = (*_values(descriptor), *_checked(remarks), chosen)
        return await self._one_server(_UPDATE_SERVER, *values, checks.revision_of(etag))

    async def register_servers(self, descriptors: Sequence[ServerDescriptor]) -> int:
        if len(descriptors) > checks.MAX_REGISTERED_SERVERS:
            raise InvalidArgument(
                f"at most {checks.MAX_REGISTERED_SERVERS} at once (MAX_REGISTERED_SERVERS)", field="servers"
            )
        for index, descriptor in enumerate(descriptors):
            checks.check_descriptor(descriptor, f"servers[{index}]")
        # Sorted, so that two calls lock rows in the same order and cannot wait for each other in a circle.
        unique = sorted({d.server_id: d for d in descriptors}.values(), key=lambda d: d.server_id)
        if not unique:
            return 0
        columns = (
            [d.server_id for d in unique],
            [d.hostname for d in unique],
            [d.environment for d in unique],
            [d.role for d in unique],
            [d.location for d in unique],
            [d.report_interval_ms for d in unique],
        )
        async with self._database.connection() as connection:
            done: str = await connection.execute(_REGISTER_SERVERS, *columns)
        return int(done.rpartition(" ")[2])  # "INSERT 0 <rows inserted or updated>"

    async def delete_server(self, server_id: str, *, etag: str = "") -> ServerRecord:
        return await self._one_server(_DELETE_SERVER, checks.check_server_id(server_id), checks.revision_of(etag))

    async def undelete_server(self, server_id: str, *, etag: str = "") -> ServerRecord:
        checks.check_server_id(server_id)
        revision = checks.revision_of(etag)
        async with self._database.connection() as connection:
            row = await connection.fetchrow(_UNDELETE_SERVER, server_id, revision)
            is_deleted = None if row else await connection.fetchval(_IS_DELETED, server_id)
        if is_deleted and revision is not None:
            raise etag_mismatch(server_id)
        if is_deleted is not None:  # now it may be, but was not when it was to be restored
            raise AlreadyExists(f"the server {server_id!r} is not deleted", field="server_id")
        return _found(row, server_id)

    async def _one_server(self, statement: str, server_id: str, *values: Any) -> ServerRecord:
        async with self._database.connection() as connection:
            row = await connection.fetchrow(statement, server_id, *values)
            # Without a revision (the last of the values) it was deleted then, whatever it is by now.
            if row is None and values[-1] is not None and await connection.fetchval(_IS_DELETED, server_id) is False:
                raise etag_mismatch(server_id)
        return _found(row, server_id)


def etag_mismatch(server_id: str) -> Aborted:
    """The error for a change that was made for another revision."""
    return Aborted(
        f"the record of the server {server_id!r} has changed: read it again, and send the etag that it has then",
        reason="ETAG_MISMATCH",
        field="etag",
    )


def details_of(revision: int, labels: str, has_notes: bool, windows: str | None) -> ServerDetails:
    """Makes details of columns; `labels` and `windows` are JSON."""
    return ServerDetails(
        revision=revision,
        labels=tuple(sorted((str(key), str(value)) for key, value in orjson.loads(labels).items())),
        has_notes=has_notes,
        maintenance=tuple((start, end) for start, end in orjson.loads(windows or b"[]")),
    )


def _label_bounds(query: ServerQuery) -> tuple[str | None, list[str] | None]:
    """The labels wanted with their values, as JSON, and the keys wanted whatever the value is.

    None: any, which costs the database nothing; a comparison of each of 20,000 rows takes 1 to 2 ms.
    """
    values = {key: value for key, value in query.labels if value}
    keys = [key for key, value in query.labels if not value]
    return orjson.dumps(values).decode() if values else None, keys or None


def _checked(remarks: Remarks) -> tuple[str, str]:
    """Labels as JSON, and the notes."""
    return orjson.dumps(dict(checks.check_labels(remarks.labels))).decode(), checks.check_notes(remarks.notes)


def _values(descriptor: ServerDescriptor) -> tuple[str, str, str, str, str, int]:
    return (
        descriptor.server_id,
        descriptor.hostname or descriptor.server_id,
        descriptor.environment,
        descriptor.role,
        descriptor.location,
        descriptor.report_interval_ms,
    )


def _found(row: Any, server_id: str) -> ServerRecord:
    if row is None:
        raise NotFound(f"there is no server {server_id!r}", reason="SERVER_NOT_FOUND", field="server_id")
    return _server(row)


def _server(row: Any) -> ServerRecord:
    descriptor = ServerDescriptor(
        server_id=row["id"],
        hostname=row["hostname"],
        environment=row["environment"] or "",
        role=row["role"] or "",
        location=row["location"] or "",
        report_interval_ms=row["report_interval_ms"] or 0,
    )
    return ServerRecord(
        descriptor=descriptor,
        create_time=row["created_at"],
        update_time=row["updated_at"],
        delete_time=row["deleted_at"],
        details=details_of(row["revision"], row["labels"], bool(row["notes"]), row["windows"]),
        notes=row["notes"],
    )
