# ruff: noqa: S608  every statement is put together from constant texts
"""The interactions in PostgreSQL, as SQL. What is done when it does not answer is in `interactions_local`.

What must stay true: every value is a bound parameter; the SQL runs on PostgreSQL 15 to 18 without extensions; a missing
text is NULL in the table and empty outside.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import orjson

from services.metadata.interaction_query import InteractionQuery, in_postgres
from services.metadata.interactions import Erasures
from services.metadata.store import Interaction
from services.metadata.store_connection import Database

COLUMNS: Final = """id, session_id, query, response, confidence, user_rating, created_at, model, prompt_hash,
    prompt_tokens, response_tokens, latency_ms, server_ids, anomaly_ids, tags, correction,
    rating_comment, rated_at, corrected_at"""
NOTHING_ERASED: Final = Erasures()
FORGET_ROWS: Final = 1_000
PHRASE_ROWS: Final = 7_000
"""Of so many interactions with the words of a phrase it is quicker to look at each than to go back in time until
enough have the phrase. PostgreSQL takes it for as frequent as its words together, and goes back too far: among
1,000,000, 45 to 85 ms instead of 10 where 1,400 to 3,500 have the words."""
_SESSION: Final = """SELECT count(*) FILTER (WHERE id <> ALL ($2::uuid[])) AS count, max(created_at) AS last
    FROM ai_interactions WHERE session_id = $1"""
_FORGET: Final = """WITH old AS (SELECT id FROM ai_interactions WHERE created_at < $1 ORDER BY created_at, id LIMIT $2),
    unsaid AS (DELETE FROM ai_feedback WHERE interaction_id IN (SELECT id FROM old)),
    gone AS (DELETE FROM ai_interactions WHERE id IN (SELECT id FROM old) RETURNING id)
    SELECT count(*) FROM gone"""
_FORGET_LONELY: Final = """DELETE FROM ai_feedback AS said WHERE said.created_at < $1 AND NOT EXISTS (
    SELECT FROM ai_interactions AS one WHERE one.id = said.interaction_id)"""
_ESTIMATE: Final = """EXPLAIN (FORMAT JSON) SELECT FROM ai_interactions
    WHERE words @@ websearch_to_tsquery('simple', $1)"""
_GET: Final = f"SELECT {COLUMNS} FROM ai_interactions WHERE id = $1"
_GET_ALL: Final = f"SELECT {COLUMNS} FROM ai_interactions WHERE id = ANY ($1)"


class PostgresInteractions:
    """What reads of interactions need of a `Database`.

    Every method raises Unavailable while the database is away; `within_s` bounds the wait for it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, interaction_id: UUID, *, within_s: float | None = None) -> Interaction | None:
        """None: there is none under this id."""
        async with self._database.connection(within_s=within_s) as connection:
            row = await connection.fetchrow(_GET, interaction_id)
        return None if row is None else of_row(row)

    async def get_all(self, ids: Sequence[UUID], *, within_s: float) -> dict[str, Interaction]:
        """Those that there are."""
        async with self._database.connection(within_s=within_s) as connection:
            rows = await connection.fetch(_GET_ALL, ids)
        return {str(row["id"]): of_row(row) for row in rows}

    async def newest(
        self, query: InteractionQuery, asked_ids: Sequence[str] = (), erased: Erasures = NOTHING_ERASED
    ) -> tuple[list[Interaction], int, int]:
        """One interaction more than the page has, how many match in all, and how many of `asked_ids` are there; but
        what is erased."""
        values: list[Any] = []
        matches, kept = in_postgres(query.filters, values), _but(erased, values)
        # One statement, so that what is inserted meanwhile is in both numbers or in none.
        count = f"""SELECT (SELECT count(*) FROM ai_interactions WHERE {matches}{kept}),
            (SELECT count(*) FROM ai_interactions WHERE id = ANY (${len(values) + 1}::uuid[]){kept})"""
        listing, bound = listing_sql(query, COLUMNS, erased)
        async with self._database.connection() as connection:
            rows = await connection.fetch(listing, *bound)
            total, asked = await connection.fetchrow(count, *values, asked_ids)
        return [of_row(row) for row in rows], total, asked

    async def search(self, query: InteractionQuery) -> list[Interaction]:
        """One interaction more than the page has."""
        statement, values = listing_sql(query, COLUMNS)
        async with self._database.connection() as connection, connection.transaction(readonly=True):
            # How rare the words are decides between the index of words and that of times: no plan fits all.
            await connection.execute("SET LOCAL plan_cache_mode = force_custom_plan")
            if '"' in query.words:
                (plan,) = orjson.loads(await connection.fetchval(_ESTIMATE, query.words))
                if plan["Plan"]["Plan Rows"] < PHRASE_ROWS:
                    await connection.execute("SET LOCAL enable_indexscan = off")
            rows = await connection.fetch(statement, *values)
        return [of_row(row) for row in rows]

    async def size_of_session(
        self, session_id: str, but: Sequence[str], *, within_s: float
    ) -> tuple[int, datetime | None]:
        """How many interactions it has but some, which may be just coming, and the time of the last of all."""
        async with self._database.connection(within_s=within_s) as connection:
            row = await connection.fetchrow(_SESSION, session_id, but)
        return row["count"], row["last"]

    async def forget(self, before: datetime) -> int:
        """Deletes what was recorded before a time, with all that was said of it; returns how many interactions."""
        total, gone = 0, FORGET_ROWS
        while gone:
            async with self._database.connection() as connection:
                gone = await connection.fetchval(_FORGET, before, FORGET_ROWS)
            total += gone
        async with self._database.connection() as connection:  # of interactions that it never had, or not any more
            await connection.execute(_FORGET_LONELY, before)
        return total


def _but(erased: Erasures, values: list[Any]) -> str:
    """To be added to a condition: without what is erased."""
    if not erased.sessions:
        return ""
    values += erased
    return f""" AND NOT EXISTS (SELECT FROM unnest(${len(values) - 1}::text[], ${len(values)}::timestamptz[])
        AS erased (session, until) WHERE session_id = erased.session AND created_at <= erased.until)"""


def listing_sql(query: InteractionQuery, columns: str, erased: Erasures = NOTHING_ERASED) -> tuple[str, list[Any]]:
    """The statement of a page, with one row more, and its parameters."""
    values: list[Any] = []
    matches = in_postgres(query.filters, values) + _but(erased, values)
    if query.words:
        values.append(query.words)
        matches += f" AND words @@ websearch_to_tsquery('simple', ${len(values)})"
    if query.before is not None:
        values += query.before
        matches += f" AND (created_at, id) < (${len(values) - 1}, ${len(values)})"
    values.append(query.limit + 1)
    order = f"ORDER BY created_at DESC, id DESC LIMIT ${len(values)}"
    return f"SELECT {columns} FROM ai_interactions WHERE {matches} {order}", values


def of_row(row: Any) -> Interaction:
    """The interaction in a row with COLUMNS."""
    return Interaction(
        id=str(row["id"]),
        session_id=row["session_id"] or "",
        query=row["query"] or "",
        response=row["response"] or "",
        confidence=row["confidence"],
        user_rating=row["user_rating"],
        create_time=row["created_at"],
        model=row["model"] or "",
        prompt_hash=row["prompt_hash"] or "",
        prompt_tokens=row["prompt_tokens"],
        response_tokens=row["response_tokens"],
        latency_ms=row["latency_ms"],
        server_ids=tuple(row["server_ids"] or ()),
        anomaly_ids=tuple(row["anomaly_ids"] or ()),
        tags=tuple(row["tags"] or ()),
        correction=row["correction"] or "",
        rating_comment=row["rating_comment"] or "",
        rate_time=row["rated_at"],
        correct_time=row["corrected_at"],
    )
