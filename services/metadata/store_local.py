"""What callers get: the record as PostgreSQL has it, with what it does not have yet; without it what is here.

    servers        changed in PostgreSQL only; read from it, from the last known copy while it does not answer
    interactions   recorded in the journal; read from PostgreSQL and, where that lacks some, from the journal too; from
                   the journal alone while PostgreSQL does not answer

What must stay true: what was acknowledged is read by every later call; what is answered without PostgreSQL says so.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final, TypeVar
from uuid import UUID

from fleet.model import ServerDescriptor
from fleet.status import StoreProbe
from runtime.clock import Clock
from runtime.errors import NotFound, Unavailable
from services.metadata import checks, interactions
from services.metadata.facts import MAX_NOTED_BETWEEN, Facts
from services.metadata.queries import InteractionQuery, ServerQuery, instant_of, microseconds_of
from services.metadata.server_copy import ServerCopy
from services.metadata.store import (
    NO_REMARKS,
    Interaction,
    InteractionFilter,
    MetadataStore,
    NewInteraction,
    Page,
    Remarks,
    ServerFilter,
    ServerRecord,
)
from services.metadata.store_connection import Database
from services.metadata.store_postgres import PostgresStore

READ_WITHIN_S: Final = 2.0
"""How long a read of servers waits for PostgreSQL when there is a copy. 20,000 servers are a page of a few ms."""
KNOWN_WITHIN_S: Final = 1.0
"""How long recording under an id of the caller's looks for it in PostgreSQL."""
LISTING_TRIES: Final = 5
"""A listing that a backlog overtakes is asked for again; the last one may count some interactions twice."""

T = TypeVar("T")


class LocalFirstStore(MetadataStore):
    """The record on PostgreSQL, a journal of facts and a copy of the servers."""

    def __init__(
        self, database: Database, postgres: PostgresStore, facts: Facts, copy: ServerCopy, *, clock: Clock
    ) -> None:
        self._database = database
        self._postgres = postgres
        self._facts = facts
        self._copy = copy
        self._clock = clock
        self._last_us = 0
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
        try:
            return await change
        finally:
            self._copy.changed()

    async def record_interaction(self, interaction: NewInteraction) -> Interaction:
        fact = interactions.checked_fact(interaction, self._next_us())
        if interaction.id and (known := await self._known(UUID(fact.id))) is not None:
            return known
        return interactions.of_fact(await self._facts.record(fact))

    def _next_us(self) -> int:
        """Now, and later than the last time, so that listings show recordings in their order."""
        self._last_us = max(self._clock.now_ms() * 1_000, self._last_us + 1)
        return self._last_us

    async def _known(self, interaction_id: UUID) -> Interaction | None:
        """What PostgreSQL has under an id; None also when it does not answer."""
        with suppress(Unavailable):
            return await self._postgres.get_interaction(interaction_id, within_s=KNOWN_WITHIN_S)
        return None

    async def get_interaction(self, interaction_id: str) -> Interaction:
        wanted = checks.check_interaction_id(interaction_id)
        local = await self._facts.find(interactions.KIND, str(wanted), unwritten=True)
        try:
            found = await self._postgres.get_interaction(wanted)
        except Unavailable:
            local = local or await self._facts.find(interactions.KIND, str(wanted))
            if local is None:
                raise
            found = None
        if found is None and local is not None:
            return interactions.of_fact(local)
        if found is None:
            raise NotFound(f"there is no interaction {wanted}", field="id")
        return found

    async def list_interactions(
        self, filters: InteractionFilter, *, page_size: int = 0, page_token: str = ""
    ) -> Page[Interaction]:
        query = InteractionQuery.of(filters, page_size, page_token)
        for _ in range(LISTING_TRIES):
            noted = self._facts.noted
            # The journal first: what is inserted between the two questions is then in both answers and not in none.
            local, waiting, first_ids = await self._local(query, unwritten=True)
            try:
                found, total, written = await self._postgres.newest_interactions(query, first_ids)
            except Unavailable:
                return await self._list_local_interactions(query)
            if self._facts.noted - noted <= MAX_NOTED_BETWEEN:
                break
        kept = {interaction.id for interaction in found}
        found += [interaction for interaction in local if interaction.id not in kept]
        found.sort(key=interactions.order, reverse=True)
        return query.page(found, total + waiting - written)

    async def _list_local_interactions(self, query: InteractionQuery) -> Page[Interaction]:
        local, total, _ = await self._local(query, unwritten=False)
        if not local:
            raise Unavailable(
                "older interactions are in the metadata database only, which does not answer",
                reason="OLDER_UNAVAILABLE",
                retry_after_s=1.0,
            )
        return query.page(local, total, stale_since=self._copy.as_of or instant_of(self._clock.now_ms() * 1_000))

    async def _local(self, query: InteractionQuery, *, unwritten: bool) -> tuple[list[Interaction], int, Sequence[str]]:
        before = None if query.before is None else (microseconds_of(query.before[0]), str(query.before[1]))
        wanted = interactions.newest(query, unwritten=unwritten)
        facts, total, first_ids = await self._facts.newest(wanted, before, query.limit + 1)
        return [interactions.of_fact(fact) for fact in facts], total, first_ids

    async def probe(self) -> StoreProbe:
        """How the database is and what it lacks; one that is down has a lag, too."""
        backlog, probe = await asyncio.gather(self._facts.backlog(), self._probe_database())
        now_us = self._clock.now_ms() * 1_000
        return replace(
            probe,
            degraded="" if probe.down else self._facts.degraded(backlog),
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
