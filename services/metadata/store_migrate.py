"""The schema's history: numbered SQL files, each applied once, whole or not at all.

What must stay true: the files under ``migrations/`` are never altered once released (their checksums are kept in the
database and compared); a file runs in one transaction with its row in ``schema_version``; two services that start at
once migrate once; code that meets a schema newer than itself refuses to touch it.
"""

import hashlib
import logging
import re
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import asyncpg

from runtime.errors import FailedPrecondition

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LOCK_KEY = 0x6F70_656E_6D67_7201
"""Any number that no other user of the database takes: "openmgr" and 1."""
LOCK_TIMEOUT_S = 60
MIGRATION_TIMEOUT_S = 600.0
MIN_SERVER_VERSION = 15
OWN = ("access_changed", "audit_insert", "access_state", "access_users", "audit_checkpoints", "audit_events")
"""Functions and tables that only migrations make, or a dump that is restored: what it makes first is among them."""

_NAME = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One step of the schema."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the SQL text, in hexadecimal."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def load_migrations() -> tuple[Migration, ...]:
    """Reads the SQL files that are part of this package, in order; their numbers are 1, 2, 3, ..."""
    found = []
    for file in (files("services.metadata") / "migrations").iterdir():
        match = _NAME.fullmatch(file.name)
        if match is not None:
            found.append(Migration(version=int(match[1]), name=match[2], sql=file.read_text(encoding="utf-8")))
    found.sort(key=lambda migration: migration.version)
    if [migration.version for migration in found] != list(range(1, len(found) + 1)):
        raise ValueError(f"migrations are not numbered 1, 2, 3, ...: {[migration.version for migration in found]}")
    return tuple(found)


async def migrate(connection: Any, migrations: Sequence[Migration]) -> int:
    """Brings the database of ``connection`` to the newest schema and returns its version.

    Args:
        connection: an asyncpg connection of its own, closed by the caller afterwards.
        migrations: all steps from the first on.

    Raises:
        FailedPrecondition: the server is too old, the schema is newer than ``migrations`` or was made by other files,
            the role has not the rights, or a step failed; the schema is as it was before that step.
        asyncpg and OS exceptions: the connection broke.
    """
    major = connection.get_server_version().major
    if major < MIN_SERVER_VERSION:
        raise FailedPrecondition(f"PostgreSQL {major} is too old: {MIN_SERVER_VERSION} is the oldest that works")
    async with _alone(connection):
        applied = await _applied(connection)
        _check(applied, migrations)
        if not applied:
            await _check_new(connection)
        for migration in migrations[len(applied) :]:
            await _apply(connection, migration)
    return len(migrations)


async def _applied(connection: Any) -> Sequence[Any]:
    """The rows of schema_version, which is made where it is missing."""
    try:
        # Looked up first: the role may be allowed to use the table but not to make one.
        if await connection.fetchval("SELECT to_regclass('schema_version')") is None:
            await _check_new(connection)
            await connection.execute(
                "CREATE TABLE schema_version (version integer PRIMARY KEY, name text NOT NULL, "
                "applied_at timestamptz NOT NULL DEFAULT now(), checksum text NOT NULL)"
            )
        found: Sequence[Any] = await connection.fetch(
            "SELECT version, name, checksum FROM schema_version ORDER BY version"
        )
    except (asyncpg.InsufficientPrivilegeError, asyncpg.InvalidSchemaNameError) as error:
        raise FailedPrecondition(
            f"the role in DATABASE_URL can neither use nor make the tables ({error}): have it own the database, or "
            "grant it CREATE and USAGE on the schema",
            reason="MIGRATION_FAILED",
        ) from error
    return found


async def _check_new(connection: Any) -> None:
    """Keeps hands off a database that is being restored: what is made in it now is what the dump cannot make."""
    found = await connection.fetchval(
        "SELECT name FROM unnest($1::text[]) AS name"
        " WHERE to_regclass(name) IS NOT NULL OR to_regproc(name) IS NOT NULL LIMIT 1",
        OWN,
    )
    if found is not None:
        raise FailedPrecondition(
            f"there is {found}, and no version of the schema: a dump is being restored, or was in part; the database is"
            " left alone until it is whole (docs/operations.md, Backup and restore of the record)",
            reason="SCHEMA_INCOMPLETE",
        )


@asynccontextmanager
async def _alone(connection: Any) -> "AsyncIterator[None]":
    """Holds the migration lock; the database gives it back by itself when the connection ends."""
    await connection.execute("SET statement_timeout = 0")
    await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
    await connection.execute("SELECT pg_advisory_lock($1)", LOCK_KEY, timeout=LOCK_TIMEOUT_S + 5)
    yield
    await connection.execute("SELECT pg_advisory_unlock($1)", LOCK_KEY)


def _check(applied: Sequence[Any], migrations: Sequence[Migration]) -> None:
    if len(applied) > len(migrations):
        raise FailedPrecondition(
            f"the database's schema is version {applied[-1]['version']}, this program knows {len(migrations)}: "
            "start a newer version of the program, or restore the database from before the upgrade",
            reason="SCHEMA_TOO_NEW",
        )
    for row, migration in zip(applied, migrations, strict=False):
        if (row["version"], row["checksum"]) != (migration.version, migration.checksum):
            raise FailedPrecondition(
                f"migration {row['version']} ({row['name']}) was applied with another content than this program's",
                reason="SCHEMA_MISMATCH",
            )


async def _apply(connection: Any, migration: Migration) -> None:
    log.info("applying migration %d (%s)", migration.version, migration.name)
    try:
        async with connection.transaction():
            await connection.execute(migration.sql, timeout=MIGRATION_TIMEOUT_S)
            await connection.execute(
                "INSERT INTO schema_version (version, name, checksum) VALUES ($1, $2, $3)",
                migration.version,
                migration.name,
                migration.checksum,
            )
    except (asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError):
        raise
    except asyncpg.PostgresError as error:
        raise FailedPrecondition(
            f"migration {migration.version} ({migration.name}) failed and was rolled back: {error}",
            reason="MIGRATION_FAILED",
        ) from error
