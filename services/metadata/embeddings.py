"""Similar interactions: those whose embeddings are nearest, by pgvector and its HNSW index.

All embeddings have as many numbers as the first that was recorded: only the callers know their model, so no setting
could say it before, and vectors of two models cannot be compared anyhow. It holds for as long as one is kept.

The extension may be missing where PostgreSQL is yours: embeddings are kept all the same, as plain numbers, and can be
compared once it is there. What must stay true: recording never waits for the index; without the index, or while it is
being made, answers are right and only slower.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from runtime import tasks
from runtime.errors import FailedPrecondition, InvalidArgument, OpenManagerError, Unavailable
from services.metadata.driver_errors import CANNOT_SAY
from services.metadata.interactions_postgres import COLUMNS, of_row
from services.metadata.store import Interaction
from services.metadata.store_connection import Database

INDEX: Final = "ai_embeddings_nearest"
INDEX_WITHIN_S: Final = 6 * 3600.0
"""A million embeddings take an hour or more; few take no time."""
MIN_EF_SEARCH: Final = 100
"""How many neighbours the index looks at: more find more of the nearest and take longer. Its default is 40, which would
also be the most that is found."""
_SIZE: Final = "SELECT cardinality(embedding) FROM ai_embeddings LIMIT 1"
_EXTENSION: Final = """SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'vector') AS here,
    EXISTS (SELECT FROM pg_available_extensions WHERE name = 'vector') AS installed"""
_INDEX_STATE: Final = """SELECT indisvalid AND pg_get_indexdef(indexrelid) LIKE $2 FROM pg_index
    WHERE indexrelid = to_regclass($1)"""
_QUOTED_COLUMNS: Final = ", ".join(f"kept.{name.strip()}" for name in COLUMNS.split(","))

log = logging.getLogger(__name__)


class Embeddings:
    """The embeddings in a `Database`."""

    def __init__(self, database: Database, waits: Callable[[], Awaitable[bool]]) -> None:
        """`waits`: whether some may be on their way there."""
        self._database = database
        self._waits = waits
        self._size: int | None = None
        self._indexing: asyncio.Task[None] | None = None
        self._indexed: set[tuple[str | None, int]] = set()  # in which databases, of which size

    async def check_size(self, embedding: Sequence[float], *, within_s: float | None = None) -> None:
        """Raises InvalidArgument for another size than that of the first; Unavailable: none is known, nor asked."""
        if self._size is None:
            self._size = await self._kept(within_s) or self._size
        elif self._size != len(embedding):
            with suppress(Unavailable):  # what is known holds
                if await self._kept(within_s) is None and not await self._waits():
                    self._size = None  # those that had it are all erased
        if self._size not in {None, len(embedding)}:
            raise InvalidArgument(
                f"has {len(embedding)} numbers; the first that was recorded has {self._size}, and so must all",
                field="embedding",
            )

    async def _kept(self, within_s: float | None) -> int | None:
        """The size of those that are kept; None: there is none."""
        async with self._database.connection(within_s=within_s) as connection:
            size: int | None = await connection.fetchval(_SIZE)
        return size

    async def check_new(self, embedding: Sequence[float], *, within_s: float) -> None:
        """The same for one that is to be recorded: it may be the first, also as far as one knows without PostgreSQL."""
        with suppress(Unavailable):
            await self.check_size(embedding, within_s=within_s)
        self._size = self._size or len(embedding)

    async def nearest(self, embedding: Sequence[float], limit: int) -> list[tuple[Interaction, float]]:
        """Interactions and distances; FailedPrecondition without the extension."""
        size = len(embedding)
        # The index knows the expression, in which the number of numbers is a part of the type.
        distance = f"said.embedding::vector({size}) <=> $1::real[]::vector({size})"
        statement = f"""SELECT {_QUOTED_COLUMNS}, near.distance FROM (
                SELECT said.interaction_id, {distance} AS distance FROM ai_embeddings AS said
                WHERE cardinality(said.embedding) = {size} ORDER BY {distance} LIMIT $2) AS near
            JOIN ai_interactions AS kept ON kept.id = near.interaction_id ORDER BY near.distance, kept.id"""  # noqa: S608
        async with self._database.connection() as connection:
            await _need_extension(connection)
            async with connection.transaction(readonly=True):
                await connection.execute(f"SET LOCAL hnsw.ef_search = {max(MIN_EF_SEARCH, limit)}")
                rows = await connection.fetch(statement, list(embedding), limit)
        if self._size == size:  # else there are none yet, and the first may have another
            self._make_index(size)
        return [(of_row(row), row["distance"]) for row in rows]

    def _make_index(self, size: int) -> None:
        """Begins to make the index, if it is not known to be there."""
        if (self._database.identity, size) not in self._indexed and (self._indexing is None or self._indexing.done()):
            self._indexing = tasks.start("embeddings-index", self._index(size))

    async def _index(self, size: int) -> None:
        statement = f"""CREATE INDEX CONCURRENTLY {INDEX} ON ai_embeddings
            USING hnsw ((embedding::vector({size})) vector_cosine_ops) WHERE cardinality(embedding) = {size}"""
        try:
            async with self._database.connection() as connection:
                identity = self._database.identity
                state = await connection.fetchval(_INDEX_STATE, INDEX, f"%= {size})%")
                if state is None or not state:
                    await connection.execute("SET statement_timeout = 0")
                    if state is not None:  # what was left of one that was not finished, or of another size
                        await connection.execute(f"DROP INDEX CONCURRENTLY {INDEX}", timeout=INDEX_WITHIN_S)
                    await connection.execute(statement, timeout=INDEX_WITHIN_S)
                    log.info("made the index of embeddings with %d numbers", size)
            self._indexed.add((identity, size))
        except OpenManagerError as error:
            log.warning("the index of embeddings is not made, which the next search tries again: %s", error.message)


async def _need_extension(connection: Any) -> None:
    row = await connection.fetchrow(_EXTENSION)
    if row["here"]:
        return
    if row["installed"]:
        try:
            await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        except CANNOT_SAY:
            raise _missing("ask a superuser of the database for CREATE EXTENSION vector") from None
        return
    raise _missing("install it on the database's machine (package postgresql-<version>-pgvector), then repeat the call")


def _missing(what_to_do: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"similar interactions need PostgreSQL's extension pgvector: {what_to_do}", reason="PGVECTOR_MISSING"
    )
