"""The learning set: interactions as they were at one moment, streamed from PostgreSQL with bounded memory.

What must stay true: an export reads one snapshot; however many there are and however slowly they are read, no more than
BATCH_ROWS of them are here (3 MiB each at most); the other callers keep their connections.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, Final

import asyncpg

from runtime.errors import Aborted, ResourceExhausted
from services.metadata.interaction_query import in_postgres
from services.metadata.personal import redacted
from services.metadata.store import Example, InteractionFilter
from services.metadata.store_connection import Database

BATCH_ROWS: Final = 16
MAX_EXPORTS: Final = 2
"""Of one connection each; there are 10."""
BATCH_WITHIN_S: Final = 60.0
"""For finding the next rows: a filter may leave out millions between two."""
READER_WITHIN_S: Final = 60
"""A reader that takes nothing for so long is left: its snapshot keeps PostgreSQL from cleaning up."""


class Exports:
    """The exports that run."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._running = 0

    async def examples(self, filters: InteractionFilter, *, redact: bool) -> AsyncGenerator[Example, None]:
        """As `MetadataStore.export_interactions`, of what PostgreSQL has."""
        if self._running >= MAX_EXPORTS:
            raise ResourceExhausted(f"{MAX_EXPORTS} exports run already", reason="TOO_MANY_EXPORTS", retry_after_s=5.0)
        self._running += 1
        try:
            async with aclosing(self._batches(filters)) as batches:
                async for rows in batches:
                    for example in await asyncio.to_thread(_examples, rows, redact):
                        yield example
        finally:
            self._running -= 1

    async def _batches(self, filters: InteractionFilter) -> AsyncGenerator[list[Any], None]:
        values: list[Any] = []
        statement = f"""SELECT query, coalesce(correction, response) AS answer FROM ai_interactions
            WHERE query <> '' AND coalesce(correction, response) <> '' AND {in_postgres(filters, values)}
            ORDER BY created_at, id"""  # noqa: S608  of constant pieces
        async with self._database.connection() as connection, _snapshot(connection):
            await connection.execute(
                f"SET LOCAL statement_timeout = '{BATCH_WITHIN_S:.0f}s';"
                f" SET LOCAL idle_in_transaction_session_timeout = '{READER_WITHIN_S + 1}s'"
            )
            cursor = await connection.cursor(statement, *values)
            while rows := await cursor.fetch(BATCH_ROWS, timeout=BATCH_WITHIN_S):
                given_s = time.monotonic()
                yield rows
                if time.monotonic() - given_s >= READER_WITHIN_S:
                    raise Aborted(
                        f"nothing of the export was taken for {READER_WITHIN_S} s, so it was ended: begin it again",
                        reason="EXPORT_TOO_SLOW",
                    )


@asynccontextmanager
async def _snapshot(connection: Any) -> AsyncIterator[None]:
    """A transaction, whose one cursor is one snapshot."""
    transaction = connection.transaction(readonly=True)
    await transaction.start()
    try:
        yield
    except Aborted:
        with suppress(asyncpg.InterfaceError):  # PostgreSQL has ended it, a second later, and the pool has it back
            connection.terminate()
        raise
    except BaseException:
        await transaction.rollback()
        raise
    await transaction.rollback()


def _examples(rows: list[Any], redact: bool) -> list[Example]:
    clean = redacted if redact else str
    return [Example(query=clean(row["query"]), answer=clean(row["answer"])) for row in rows]
