"""The store of the product, put together as `services.metadata.__main__` does, with its parts at hand."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.clock import Clock, SystemClock
from services.metadata.facts import Facts
from services.metadata.queries import ServerQuery
from services.metadata.server_copy import ServerCopy
from services.metadata.store import ServerFilter
from services.metadata.store_connection import Bounds, Database
from services.metadata.store_local import LocalFirstStore
from services.metadata.store_postgres import PostgresStore
from services.metadata.target import DatabaseTarget
from tests.harness import eventually

LIMIT_BYTES = 1 << 30
PATIENT = Bounds(acquire_s=20.0, command_s=30.0, probe_s=20.0)
"""Of a database that does not hang: one that is away refuses at once, and a machine that stalls is no outage."""
EVERYTHING = ServerQuery.of(ServerFilter(), 0, "")


@dataclass(frozen=True, kw_only=True)
class Parts:
    database: Database
    facts: Facts
    copy: ServerCopy
    store: LocalFirstStore

    async def all_inserted(self, within_s: float = 30.0) -> None:
        """Waits until the database has every fact."""

        async def nothing_waits() -> bool:
            return (await self.facts.backlog()).waiting == 0

        await eventually(nothing_waits, within_s)


async def waits_for_a_lock(connection: Any) -> bool:
    """Whether somebody waits for what another one holds."""
    return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"))


def assemble(
    target: DatabaseTarget,
    folder: Path,
    *,
    bounds: Bounds = PATIENT,
    clock: Clock | None = None,
    limit_bytes: int = LIMIT_BYTES,
) -> Parts:
    clock = clock or SystemClock()
    database = Database(target, clock=clock, bounds=bounds)
    postgres = PostgresStore(database)
    facts = Facts(folder, database, clock=clock, limit_bytes=limit_bytes)
    copy = ServerCopy(folder, postgres, database, clock=clock)
    store = LocalFirstStore(database, postgres, facts, copy, clock=clock)
    return Parts(database=database, facts=facts, copy=copy, store=store)


@asynccontextmanager
async def opened(
    target: DatabaseTarget,
    folder: Path,
    *,
    bounds: Bounds = PATIENT,
    clock: Clock | None = None,
    limit_bytes: int = LIMIT_BYTES,
) -> AsyncIterator[Parts]:
    made = assemble(target, folder, bounds=bounds, clock=clock, limit_bytes=limit_bytes)
    async with made.database, made.facts, made.copy:
        yield made
