"""Many servers' records at once, from a file of somebody's.

What must stay true: nothing is recorded of a file with a row that cannot be, unless the caller wants the others; what a
row does not say stays as it is; the answer has an outcome for each row, in order, and a dry run has the same ones.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import orjson

from fleet.model import ServerDescriptor
from runtime.errors import Aborted, InvalidArgument
from services.metadata import checks
from services.metadata.store import Remarks
from services.metadata.store_connection import Database

FIELDS: Final = ("hostname", "environment", "role", "location", "labels", "notes")
MAX_IMPORTED_SERVERS: Final = 20_000

_KNOWN: Final = """SELECT id, hostname, coalesce(environment, '') AS environment, coalesce(role, '') AS role,
    coalesce(location, '') AS location, labels, notes, deleted_at FROM servers WHERE id = ANY ($1) ORDER BY id"""
_SAID: Final = """(SELECT id, hostname, nullif(environment, '') AS environment, nullif(role, '') AS role,
        nullif(location, '') AS location, labels::jsonb AS labels, notes
    FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[])
        AS said (id, hostname, environment, role, location, labels, notes)) AS said"""
# One that somebody has recorded since it was looked for is not overwritten: it was judged as if there were none.
_ADD: Final = f"""INSERT INTO servers (id, hostname, environment, role, location, labels, notes)
    SELECT id, hostname, environment, role, location, labels, notes FROM {_SAID} ON CONFLICT (id) DO NOTHING"""  # noqa: S608  constants
_CHANGE: Final = f"""UPDATE servers SET hostname = said.hostname, environment = said.environment, role = said.role,
    location = said.location, labels = said.labels, notes = said.notes, updated_at = now()
    FROM {_SAID} WHERE servers.id = said.id"""  # noqa: S608


class Outcome(IntEnum):
    """The numbers are those of ``openmanager.metadata.v1.ImportOutcome``."""

    CREATED = 1
    UPDATED = 2
    UNCHANGED = 3
    FAILED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedServer:
    """A row. `fields`: those of FIELDS that it says."""

    descriptor: ServerDescriptor
    remarks: Remarks
    fields: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a row, or would."""

    outcome: Outcome
    field: str = ""
    message: str = ""


Values = dict[str, Any]


class ServerImports:
    """Imports into a `Database`. `changed` is called after one."""

    def __init__(self, database: Database, *, changed: Callable[[], None]) -> None:
        self._database = database
        self._changed = changed

    async def run(
        self, servers: Sequence[ImportedServer], *, dry_run: bool = False, partial: bool = False
    ) -> tuple[list[Result], bool]:
        """Records servers; returns a result for each, and whether anything was recorded, or would have been.

        Raises:
            InvalidArgument: more than MAX_IMPORTED_SERVERS.
            Unavailable: the database is away.
            Aborted: somebody recorded one of them meanwhile; nothing is recorded.
        """
        if len(servers) > MAX_IMPORTED_SERVERS:
            raise InvalidArgument(f"more than {MAX_IMPORTED_SERVERS} (MAX_IMPORTED_SERVERS)", field="servers")
        results: list[Result | None] = list(_faults(servers))
        wanted = sorted({said.descriptor.server_id for said, fault in zip(servers, results, strict=True) if not fault})
        async with self._database.connection() as connection, connection.transaction():
            rows = await connection.fetch(_KNOWN if dry_run else f"{_KNOWN} FOR UPDATE", wanted)
            known = {row["id"]: row for row in rows}
            puts: list[Values] = []
            for index, said in enumerate(servers):
                if results[index] is None:
                    results[index] = _judged(said, known.get(said.descriptor.server_id), puts)
            done = [result for result in results if result is not None]
            applies = partial or all(result.outcome is not Outcome.FAILED for result in done)
            if applies and puts and not dry_run:
                await _put(connection, puts, known)
        if applies and puts and not dry_run:
            self._changed()
        return done, applies and bool(puts)


async def _put(connection: Any, puts: Sequence[Values], known: Container[str]) -> None:
    puts = sorted(puts, key=lambda values: str(values["id"]))
    new = [values for values in puts if values["id"] not in known]
    changed = [values for values in puts if values["id"] in known]
    for statement, rows in ((_ADD, new), (_CHANGE, changed)):
        columns = ([values[name] for values in rows] for name in ("id", *FIELDS))
        done: str = await connection.execute(statement, *columns)
        if int(done.rpartition(" ")[2]) < len(rows):
            raise Aborted("somebody recorded one of these servers meanwhile; repeat the call")


def _faults(servers: Sequence[ImportedServer]) -> list[Result | None]:
    """What is wrong with each row by itself, or with one that names a server again."""
    faults: list[Result | None] = []
    seen: set[str] = set()
    for said in servers:
        server_id = said.descriptor.server_id
        fault = _fault(said)
        if fault is None and server_id in seen:
            fault = Result(outcome=Outcome.FAILED, field="id", message="another row before it is of the same server")
        seen.add(server_id)
        faults.append(fault)
    return faults


def _fault(said: ImportedServer) -> Result | None:
    try:
        checks.check_descriptor(said.descriptor, "")
        checks.check_labels(said.remarks.labels)
        checks.check_notes(said.remarks.notes)
    except InvalidArgument as error:
        field = (error.field or "").rpartition(".")[2]
        return Result(outcome=Outcome.FAILED, field="id" if field == "server_id" else field, message=error.message)
    return None


def _judged(said: ImportedServer, known: Any, puts: list[Values]) -> Result:
    """What becomes of a row; what is to be written is added to `puts`."""
    descriptor = said.descriptor
    if known is not None and known["deleted_at"] is not None:
        return Result(outcome=Outcome.FAILED, field="id", message="the server is deleted: restore it first")
    before = {
        "hostname": descriptor.server_id,
        "environment": "",
        "role": "",
        "location": "",
        "labels": {},
        "notes": "",
    }
    if known is not None:
        before = {name: known[name] for name in FIELDS} | {"labels": orjson.loads(known["labels"])}
    new: Values = {
        "hostname": descriptor.hostname or descriptor.server_id,
        "environment": descriptor.environment,
        "role": descriptor.role,
        "location": descriptor.location,
        "labels": dict(said.remarks.labels),
        "notes": said.remarks.notes,
    }
    after = before | {name: value for name, value in new.items() if name in said.fields}
    if known is not None and after == before:
        return Result(outcome=Outcome.UNCHANGED)
    puts.append({"id": descriptor.server_id} | after | {"labels": orjson.dumps(after["labels"]).decode()})
    return Result(outcome=Outcome.CREATED if known is None else Outcome.UPDATED)
