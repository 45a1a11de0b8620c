"""The audit log on a real database, put together as in `services.metadata.__main__`, and a writer that ships there."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from fleet.audit.event import START, Event, Link, draft, placed
from runtime.clock import Clock, SystemClock
from services.metadata.audit.keeper import Keeper, Proof
from services.metadata.audit.sink import fact_of
from services.metadata.audit.store import AuditStore
from services.metadata.target import DatabaseTarget
from tests.harness.postgres import PostgresServer
from tests.metadata.parts import Parts, opened

YEAR_S = 365 * 86_400.0


@dataclass
class Writer:
    """Makes the events of a chain and remembers them."""

    name: str = "gateway-1"
    events: list[Event] = field(default_factory=list)
    end: Link = START

    def make(self, number: int, time_us: int = 1_790_000_000_000_000, step_us: int = 1_000) -> list[Event]:
        made = []
        for index in range(number):
            said = draft(
                time_us=time_us + index * step_us,
                actor="ada",
                role="admin",
                address="10.0.0.7",
                action="/openmanager.gateway.v1.FleetService/UpdateServer",
                target=f"server-{self.end.seq + 1}",
                before={"role": "web"},
                after={"role": "db", "number": self.end.seq + 1},
            )
            event = placed(said, self.name, self.end)
            self.end = event.link
            made.append(event)
        self.events += made
        return made


@dataclass(kw_only=True)
class Audit:
    parts: Parts
    keeper: Keeper
    store: AuditStore
    server: PostgresServer
    database: str

    async def ship(self, events: Iterable[Event]) -> None:
        batch: list[Event] = []
        for event in events:
            batch.append(event)
            if len(batch) == 500:
                await self.keeper.sink.append(batch)
                batch = []
        await self.keeper.sink.append(batch)

    async def filled(self, writer: Writer, number: int, **times: int) -> None:
        """So many events more, all of them in the database, and signed."""
        await self.ship(writer.make(number, **times))
        await self.parts.all_inserted(60.0)
        await self.keeper.sign()
        await self.parts.all_inserted(60.0)

    async def put(self, events: Iterable[Event]) -> None:
        """Into the database as the service does it, but with no journal before it."""
        rows = ",".join(fact_of(event).payload for event in events)
        await self.sql("SELECT audit_insert($1::json)", f"[{rows}]")

    async def tamper(self, *statements: str) -> None:
        """As a superuser, past the triggers."""
        connection = await asyncpg.connect(**(self.server.admin | {"database": self.database}))
        try:
            await connection.execute("SET session_replication_role = replica")
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    async def sql(self, statement: str, *values: Any) -> Any:
        return await self.server.execute(statement, *values, database=self.database)

    async def found(self) -> set[tuple[str, int, int]]:
        return told(await self.keeper.verify())


def told(proof: Proof) -> set[tuple[str, int, int]]:
    return {(finding.kind, finding.first_seq, finding.last_seq) for finding in proof.findings}


@asynccontextmanager
async def auditing(
    target: DatabaseTarget,
    server: PostgresServer,
    folder: Path,
    *,
    clock: Clock | None = None,
    legal_hold: bool = False,
    retention_s: float = YEAR_S,
) -> AsyncIterator[Audit]:
    clock = clock or SystemClock()
    async with opened(target, folder, clock=clock) as parts:
        store = AuditStore(parts.database)
        keeper = Keeper(folder, store, parts.facts, clock=clock, retention_s=retention_s, legal_hold=legal_hold)
        async with keeper:
            database = str(target.options.get("database") or target.address.rpartition("/")[2])
            yield Audit(parts=parts, keeper=keeper, store=store, server=server, database=database)
