"""What callers get: the record as PostgreSQL has it, with what it does not have yet; without it what is here.

    servers        changed in PostgreSQL only; read from it, from the last known copy while it does not answer
    interactions   recorded in the journal, read from PostgreSQL and it: `interactions_local`

What must stay true: what was acknowledged is read by every later call; what is answered without PostgreSQL says so.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Collection, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Final, TypeVar

from fleet.model import ServerDescriptor
from fleet.status import StoreProbe
from runtime.clock import Clock
from runtime.errors import Unavailable
from services.metadata import checks
from services.metadata.facts import Facts
from services.metadata.interactions_local import LocalInteractions
from services.metadata.queries import ServerQuery
from services.metadata.server_copy import ServerCopy, seen_of
from services.metadata.store import NO_REMARKS, MetadataStore, Page, Remarks, ServerFilter, ServerRecord
from services.metadata.store_connection import Database
from services.metadata.store_postgres import PostgresStore

READ_WITHIN_S: Final = 2.0
"""How long a read of servers waits for PostgreSQL when there is a copy. 20,000 servers are a page of a few ms."""

T = TypeVar("T")


class LocalFirstStore(LocalInteractions, MetadataStore):
    """The record on PostgreSQL, a journal of facts and a copy of the servers."""

    def __init__(
        self, database: Database, postgres: PostgresStore, facts: Facts, copy: ServerCopy, *, clock: Clock
    ) -> None:
        super().__init__(database, facts, clock=clock)
        self._database = database
        self._postgres = postgres
        self._copy = copy
        self._last_probe = StoreProbe(address=database.target.address)

    async def list_servers(
        self, filters: ServerFilter, *, page_size: int = 0, page_token: str = ""
    ) -> Page[ServerRecord]:
        query = ServerQuery.of(filters, page_size, page_token)
        try:
            return query.page(*await self._postgres.list_servers(query, within_s=self._read_within_s))
        except Unavailable:
            stale_since = self._copy.as_of
            if stale_since is None:
                raise
            return query.page(*await self._copy.list(query), stale_since=stale_since)

    async def get_server(self, server_id: str) -> ServerRecord:
        checks.check_server_id(server_id)
        try:
            return await self._postgres.get_server(server_id, within_s=self._read_within_s)
        except Unavailable:
            stale_since = self._copy.as_of
            found = None if stale_since is None else await self._copy.get(server_id)
            if found is None:  # it may have been made since
                raise
            return replace(found, stale_since=stale_since)

    @property
    def _read_within_s(self) -> float | None:
        return None if self._copy.as_of is None else READ_WITHIN_S

    async def create_server(self, descriptor: ServerDescriptor, remarks: Remarks = NO_REMARKS) -> ServerRecord:
        return await self._changing(self._postgres.create_server(descriptor, remarks))

    async def update_server(
        self,
        descriptor: ServerDescriptor,
        fields: Collection[str] = (),
        *,
        remarks: Remarks = NO_REMARKS,
        etag: str = "",
    ) -> ServerRecord:
        return await self._changing(self._postgres.update_server(descriptor, fields, remarks=remarks, etag=etag))

    async def register_servers(self, descriptors: Sequence[ServerDescriptor]) -> int:
        return await self._changing(self._postgres.register_servers(descriptors))

    async def delete_server(self, server_id: str, *, etag: str = "") -> ServerRecord:
        return await self._changing(self._postgres.delete_server(server_id, etag=etag))

    async def undelete_server(self, server_id: str, *, etag: str = "") -> ServerRecord:
        return await self._changing(self._postgres.undelete_server(server_id, etag=etag))

    def watch_servers(self) -> AsyncGenerator[Sequence[ServerRecord], None]:
        return self._copy.watch()

    async def _changing(self, change: Awaitable[T]) -> T:
        told = None
        try:
            changed = await change
            told = seen_of(changed) if isinstance(changed, ServerRecord) else None
        finally:
            self._copy.changed(told)
        return changed

    def _stale_since(self) -> datetime:
        return self._copy.as_of or super()._stale_since()

    async def probe(self) -> StoreProbe:
        """How the database is and what it lacks; one that is down has a lag, too."""
        backlog, probe = await asyncio.gather(self._facts.backlog(), self._probe_database())
        now_us = self._clock.now_ms() * 1_000
        return replace(
            probe,
            degraded="" if probe.down else self._facts.degraded(backlog) or self._database.shared,
            lag_points=backlog.waiting,
            lag_seconds=0.0 if backlog.oldest_us is None else max(0.0, (now_us - backlog.oldest_us) / 1e6),
            spool_bytes=backlog.bytes,
        )

    async def _probe_database(self) -> StoreProbe:
        try:
            self._last_probe = await self._database.probe()
        except Unavailable as error:
            return replace(self._last_probe, down=error.message, latency_ms=0.0)
        return self._last_probe
