# ruff: noqa: S608  every statement is put together from constant texts
"""The findings in PostgreSQL, as SQL. What is done when it does not answer is in `store`.

What must stay true: every value is a bound parameter; the SQL runs on PostgreSQL 15 to 18 without extensions.
"""

from collections.abc import Sequence
from typing import Any, Final

import orjson

from services.metadata.anomalies.model import Recorded, Remark
from services.metadata.anomalies.query import AnomalyQuery
from services.metadata.anomalies.telling import anomaly_of
from services.metadata.queries import instant_of, microseconds_of
from services.metadata.store_connection import Database

_GET: Final = "SELECT * FROM anomalies_judged WHERE id = ANY ($1::text[])"
_CHANGED: Final = """SELECT * FROM anomalies_judged WHERE changed_at > $1 AND id <> ALL ($2::text[]) AND id IN (
        SELECT id FROM anomalies WHERE told_at > $1 UNION SELECT anomaly_id FROM anomaly_remarks WHERE said_at > $1)
    ORDER BY changed_at LIMIT $3"""
_COUNT: Final = """SELECT detector, count(*) AS found, count(*) FILTER (WHERE ended_at IS NULL) AS open,
        count(acknowledged_at) AS acknowledged, count(*) FILTER (WHERE is_real) AS said_real,
        count(*) FILTER (WHERE NOT is_real) AS said_false
    FROM anomalies_judged WHERE started_at >= $1 GROUP BY detector ORDER BY detector"""
_LAST: Final = "SELECT greatest((SELECT max(told_at) FROM anomalies), (SELECT max(said_at) FROM anomaly_remarks))"


class PostgresAnomalies:
    """What reads of findings need of a `Database`; every method raises Unavailable while that is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, ids: Sequence[str], *, within_s: float | None = None) -> dict[str, Recorded]:
        """Those that there are, by their ids."""
        async with self._database.connection(within_s=within_s) as connection:
            return {row["id"]: _recorded(row) for row in await connection.fetch(_GET, ids)}

    async def newest(self, query: AnomalyQuery, but: Sequence[str]) -> tuple[list[Recorded], int]:
        """One finding more than the page has, and how many match in all, without those with some ids."""
        values: list[Any] = [but]
        matches = f"id <> ALL ($1::text[]) AND {query.filters.in_postgres(values)}"
        count, counted = f"SELECT count(*) FROM anomalies AS one WHERE {matches}", tuple(values)
        if query.before is not None:
            values += [instant_of(query.before[0]), query.before[1]]
            matches += f" AND (started_at, id) < (${len(values) - 1}, ${len(values)})"
        values.append(query.limit + 1)
        order = "ORDER BY started_at DESC, id DESC"
        listing = f"""SELECT * FROM anomalies_judged WHERE id IN (
            SELECT id FROM anomalies AS one WHERE {matches} {order} LIMIT ${len(values)}) {order}"""
        async with self._database.connection() as connection:
            rows = await connection.fetch(listing, *values)
            total = await connection.fetchval(count, *counted)
        return [_recorded(row) for row in rows], total

    async def changed(self, after_us: int, but: Sequence[str], limit: int) -> list[Recorded]:
        """The first that changed after a time, in that order, without those with some ids."""
        async with self._database.connection() as connection:
            return [_recorded(row) for row in await connection.fetch(_CHANGED, instant_of(after_us), but, limit)]

    async def last_us(self, *, within_s: float) -> int:
        """When something was told or said last; 0: never."""
        async with self._database.connection(within_s=within_s) as connection:
            last = await connection.fetchval(_LAST)
        return 0 if last is None else microseconds_of(last)

    async def count(self, start_us: int) -> list[dict[str, Any]]:
        """For each detector how many findings began at a time or later, and what was said of them."""
        async with self._database.connection() as connection:
            return [dict(row) for row in await connection.fetch(_COUNT, instant_of(start_us))]


def _recorded(row: Any) -> Recorded:
    anomaly = anomaly_of({**row, "contributions": orjson.loads(row["contributions"])})
    return Recorded(
        anomaly=anomaly,
        told_us=microseconds_of(row["told_at"]),
        acknowledged=_remark(row, "acknowledged", None),
        verdict=_remark(row, "verdict", row["is_real"]),
    )


def _remark(row: Any, name: str, is_real: bool | None) -> Remark | None:
    if row[f"{name}_at"] is None:
        return None
    return Remark(
        anomaly_id=row["id"],
        author=row[f"{name}_by"],
        comment=row[f"{name}_comment"],
        time_us=microseconds_of(row[f"{name}_at"]),
        is_real=is_real,
    )
