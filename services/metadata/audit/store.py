"""The audit log in PostgreSQL, as SQL.

What must stay true: every value is a bound parameter; nothing here changes or deletes an event, only `drop_month`
takes a month as a whole, together with the checkpoint of its end.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from fleet.audit.event import Event
from services.metadata.audit.chains import Row
from services.metadata.audit.checkpoint import Checkpoint
from services.metadata.queries import microseconds_of
from services.metadata.store_connection import Database

PAGE_ROWS: Final = 2_000

_TEXTS: Final = "actor, role, authentication, address, action, target, code, reason, trace_id, before, after"
_ROWS: Final = f"""SELECT seq, (extract(epoch FROM time) * 1000000)::bigint, count, prev_hash, id, writer_id, {_TEXTS},
    hash, time FROM audit_events WHERE (writer_id, seq, time) > ($1, $2, $3)
    AND ($4::timestamptz IS NULL OR time >= $4) AND ($5::timestamptz IS NULL OR time < $5)
    ORDER BY writer_id, seq, time LIMIT $6"""  # noqa: S608  constants
_EVENTS: Final = f"""SELECT id, writer_id, seq, time, count, prev_hash, hash, {_TEXTS} FROM audit_events
    WHERE ($1::timestamptz IS NULL OR (time, id) < ($1, $2::uuid))
    AND ($3::timestamptz IS NULL OR time >= $3) AND ($4::timestamptz IS NULL OR time < $4)
    AND ($5 = '' OR actor = $5) AND ($6 = '' OR action = $6) AND ($7 = '' OR target = $7) AND ($8 = '' OR code = $8)
    ORDER BY time DESC, id DESC LIMIT $9"""  # noqa: S608
_HASH: Final = "SELECT hash FROM audit_events WHERE writer_id = $1 AND seq = $2"
_PARTITIONS: Final = """SELECT substr(child.relname, 14) FROM pg_inherits
    JOIN pg_class child ON child.oid = inhrelid WHERE inhparent = 'audit_events'::regclass"""
_CHECKPOINTS: Final = "SELECT number, body, signature FROM audit_checkpoints WHERE number > $1 ORDER BY number LIMIT $2"
_ADD_CHECKPOINT: Final = """INSERT INTO audit_checkpoints (number, body, signature) VALUES ($1, $2, $3)
    ON CONFLICT (number) DO NOTHING"""
_EARLY: Final = datetime.fromisoformat("0001-01-01T00:00:00+00:00")


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFilter:
    """Which events: all conditions hold together; an empty one does not restrict."""

    start: datetime | None = None
    end: datetime | None = None
    actor: str = ""
    action: str = ""
    target: str = ""
    code: str = ""


class AuditStore:
    """The log in a `Database`; every method raises Unavailable while that is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def rows(self, start: datetime | None = None, end: datetime | None = None) -> AsyncGenerator[list[Row], None]:
        """All events in order of (writer, number), a page at a time; only those of `[start, end)`."""
        after: tuple[str, int, datetime] = ("", 0, _EARLY)
        while True:
            async with self._database.connection() as connection:
                found = await connection.fetch(_ROWS, *after, start, end, PAGE_ROWS)
            if found:
                yield [_row(record) for record in found]
            if len(found) < PAGE_ROWS:
                return
            last = found[-1]
            after = (last[5], last[0], last[18])

    async def newest(self, filters: EventFilter, before: tuple[datetime, UUID] | None, limit: int) -> list[Event]:
        """Events in descending order of (time, id), those before a place only."""
        place = before or (None, None)
        async with self._database.connection() as connection:
            found = await connection.fetch(
                _EVENTS,
                *place,
                filters.start,
                filters.end,
                filters.actor,
                filters.action,
                filters.target,
                filters.code,
                limit,
            )
        return [_event(record) for record in found]

    async def hash_of(self, writer_id: str, seq: int) -> bytes | None:
        """Of the event under a number; None: there is none."""
        async with self._database.connection() as connection:
            found: bytes | None = await connection.fetchval(_HASH, writer_id, seq)
        return found

    async def months(self) -> set[str]:
        """The months that have a partition, "YYYY-MM"."""
        async with self._database.connection() as connection:
            return {record[0].replace("_", "-") for record in await connection.fetch(_PARTITIONS)}

    async def checkpoints(self) -> list[Checkpoint]:
        """All of them."""
        found: list[Checkpoint] = []
        while True:
            after = found[-1].number if found else 0
            async with self._database.connection() as connection:
                page = await connection.fetch(_CHECKPOINTS, after, PAGE_ROWS)
            found += [Checkpoint(number=number, body=body, signature=signature) for number, body, signature in page]
            if len(page) < PAGE_ROWS:
                return found

    async def drop_month(self, month: str, checkpoint: Checkpoint) -> None:
        """Drops a month's partition, in one transaction with the checkpoint of its end."""
        name = f"audit_events_{month.replace('-', '_')}"
        async with self._database.connection() as connection, connection.transaction():
            await connection.execute(_ADD_CHECKPOINT, checkpoint.number, checkpoint.body, checkpoint.signature)
            await connection.execute(f"ALTER TABLE audit_events DETACH PARTITION {name}")
            await connection.execute(f"DROP TABLE {name}")


def _row(record: Any) -> Row:
    values = tuple(record)
    seq, time_us, calls, prev_hash, event_id = values[:5]
    return Row(seq, time_us, calls, prev_hash, event_id, values[5:17], values[17])


def event_of_row(row: Row) -> Event:
    """The same as an event."""
    writer, actor, role, authentication, address, action, target, code, reason, trace_id = (
        text or "" for text in row.texts[:10]
    )
    return Event(
        id=str(row.id),
        writer_id=writer,
        seq=row.seq,
        prev_hash=row.prev_hash,
        hash=row.hash,
        time_us=row.time_us,
        count=row.calls,
        actor=actor,
        role=role,
        authentication=authentication,
        address=address,
        action=action,
        target=target,
        code=code,
        reason=reason,
        trace_id=trace_id,
        before=row.texts[10],
        after=row.texts[11],
    )


def row_of_event(event: Event) -> Row:
    """The inverse."""
    texts = (
        *(event.writer_id, event.actor, event.role, event.authentication, event.address, event.action),
        *(event.target, event.code, event.reason, event.trace_id, event.before, event.after),
    )
    return Row(event.seq, event.time_us, event.count, event.prev_hash, UUID(event.id), texts, event.hash)


def _event(record: Any) -> Event:
    row: dict[str, Any] = dict(record)
    row["time_us"] = microseconds_of(row.pop("time"))
    row["id"] = str(row["id"])
    return Event(**row)


def months_before(months: Sequence[str], edge: datetime) -> list[str]:
    """Those that are over at `edge`, oldest first: their last moment is before it."""
    return sorted(month for month in months if month_end(month) <= edge)


def month_start(month: str) -> datetime:
    """The first moment of "YYYY-MM"."""
    return datetime.fromisoformat(f"{month}-01T00:00:00+00:00")


def month_end(month: str) -> datetime:
    """The first moment after it."""
    start = month_start(month)
    return start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)
