"""The one connection over which the database is asked how it is, beside the pool.

A pool of which every connection is busy, or half-open, says nothing about the database; so this one is its own. What
must stay true: an answer comes from a server that takes writes, and says which database it is.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg
from opentelemetry import trace

from services.metadata.driver_errors import CANNOT_SAY, GIVEN_UP, UNAVAILABLE

# The timeline grows by one with every promotion; the name of the file being written says it at once, where
# pg_control_checkpoint() says the old one until the first checkpoint after the promotion. A table that was made anew,
# as a dump that is restored in its place does, has the highest number of all.
_TABLES: Final = ", ".join(
    f"to_regclass('{name}')"
    for name in ("ai_interactions", "ai_feedback", "audit_events", "audit_checkpoints", "anomalies", "anomaly_remarks")
)
_ASK: Final = f"""SELECT current_setting('server_version') AS version,
    pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on' AS read_only,
    CASE WHEN pg_is_in_recovery() THEN NULL ELSE
        (SELECT system_identifier FROM pg_control_system()) || '-' ||
        substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) || '-' ||
        (SELECT oid FROM pg_database WHERE datname = current_database()) || '-' ||
        coalesce((SELECT max(oid) FROM pg_class WHERE oid IN ({_TABLES})), 0) END AS identity,
    CASE WHEN pg_is_in_recovery() THEN NULL ELSE
        pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0')::bigint END AS log,
    CASE WHEN pg_is_in_recovery() THEN NULL ELSE
        pg_snapshot_xmin(pg_current_snapshot())::text::bigint END AS transactions"""  # noqa: S608  constants
_ASK_LESS: Final = """SELECT current_setting('server_version') AS version,
    current_setting('transaction_read_only') = 'on' AS read_only, NULL AS identity, NULL AS log, NULL AS transactions"""
_READ_MARKS: Final = """SELECT coalesce(max(mark) FILTER (WHERE journal = $1), 0),
    coalesce(sum(mark) FILTER (WHERE journal IS DISTINCT FROM $1), 0)::bigint FROM fact_marks"""
MARK_WITHIN_S: Final = 0.3
"""For reading the mark: a lock on its table says nothing of the database, which all else is asked of catalogues."""
MARK: Final = """INSERT INTO fact_marks AS old (journal, mark) VALUES ($1, 1)
    ON CONFLICT (journal) DO UPDATE SET mark = old.mark + 1"""
"""After the facts of a batch: a database that has the mark has them, too."""


class Position(NamedTuple):
    """How far a server is: bytes of write-ahead log that it has synced, transactions that have ended, and with how many
    batches of our facts it was marked.

    On one server none goes back, but for transactions that a crash of it undid: facts are sent again for nothing then.
    The marks say exactly what of ours a copy lacks, whoever worked with it, but nothing of one from before there were
    any. Log alone is not enough, for a copy writes some by only being read (pages are tidied up; more than five facts
    take, seen).
    """

    log: int = 0
    transactions: int = 0
    mark: int = 0

    def is_before(self, other: "Position") -> bool:
        """Whether one server that was at the other cannot be here."""
        return any(mine < theirs for mine, theirs in zip(self, other, strict=True))

    def least(self, other: "Position") -> "Position":
        return Position(*map(min, self, other))

    def most(self, other: "Position") -> "Position":
        return Position(*map(max, self, other))


UNREAD: Final = -1
"""A mark that could not be read just now."""
UNSAID: Final = Position()
"""Where a server is that does not say it."""


class Answer(NamedTuple):
    """What a server says of itself; `identity` (system identifier, timeline, database, tables) is None where it cannot,
    as is `position`. `others`: how often journals that are not ours have marked it; None: that was not read."""

    version: str
    identity: str | None
    position: Position | None
    others: int | None = None


class Lineage:
    """Tells an older copy of a database (a snapshot, a folder that was put back) from the database itself.

    It says the same of itself, but is not as far as the database was: from then on its identity has something new
    behind it, so that all who know identities take it for another one. Always another text: the same copy may be put
    back again, and has then lost what came since the first time.
    """

    def __init__(self) -> None:
        self._base, self._copy = "", ""
        self.position = UNSAID
        """How far the database that answered last is known to have been."""
        self.journal: UUID | None = None
        """Whose marks count."""
        self._others: int | None = None
        self.others_came = 0
        """How often it was seen that others have marked the database meanwhile."""

    def remember(self, identity: str | None, position: Position, journal: UUID | None = None) -> None:
        """What an earlier life of the service knew."""
        self.journal = journal
        base, at, copy = (identity or "").partition("@")
        self._base, self._copy, self.position = base, at + copy, position

    def before(self) -> tuple[str, Position]:
        """What is known when a question is put, which its answer is held against: others may overtake it."""
        return self._base, self.position

    def named(self, answer: Answer, before: tuple[str, Position]) -> Answer:
        """The answer with the identity that all may compare."""
        if answer.identity is None or answer.position is None:
            return answer
        if answer.others is not None:
            if answer.identity == self._base and self._others is not None and self._others < answer.others:
                self.others_came += 1
            self._others = answer.others
        position = answer.position
        if position.mark == UNREAD:
            position = position._replace(mark=self.position.mark if answer.identity == self._base else 0)
        if answer.identity != self._base:
            self._base, self._copy, self.position = answer.identity, "", position
        elif self._base == before[0] and position.is_before(self.position.least(before[1])):
            self._copy, self.position = f"@{position.log:X}-{secrets.token_hex(4)}", position
        else:
            self.position = self.position.most(position)
        return answer._replace(identity=self._base + self._copy)


async def question(connection: Any, journal: UUID | None) -> Answer:
    """Asks a server what it is; raises as the driver does, and ReadOnlySQLTransactionError if it takes no writes."""
    with untraced():
        try:
            row = await connection.fetchrow(_ASK)
        except CANNOT_SAY:
            row = await connection.fetchrow(_ASK_LESS)
        mark, others = (UNREAD, None) if row["log"] is None else await _marks(connection, journal)
    if row["read_only"]:
        raise asyncpg.ReadOnlySQLTransactionError("it takes no writes: a standby, or set to read-only")
    position = None if row["log"] is None else Position(row["log"], row["transactions"], mark)
    return Answer(row["version"], row["identity"], position, others)


async def _marks(connection: Any, journal: UUID | None) -> tuple[int, int | None]:
    """Ours, and those of all others together."""
    try:
        mark, others = await connection.fetchrow(_READ_MARKS, journal, timeout=MARK_WITHIN_S)
    except asyncpg.UndefinedTableError:  # from before there were marks, or without tables yet
        return 0, None
    except (TimeoutError, *GIVEN_UP, *CANNOT_SAY):
        return UNREAD, None
    return mark, others


class Line:
    """Kept open between questions, connected anew when it broke."""

    def __init__(self, connect: Callable[[float], Awaitable[Any]], within_s: float) -> None:
        """`connect` makes a connection within the seconds given; `within_s` bounds a question with it."""
        self._connect = connect
        self._within_s = within_s
        self._connection: Any = None
        self._asking = asyncio.Lock()

    async def ask(self, journal: UUID | None) -> Answer:
        """Raises as `question` does, and TimeoutError."""
        async with self._asking:
            line, self._connection = self._connection, None
            try:
                async with asyncio.timeout(self._within_s):
                    if line is not None:
                        try:
                            answer = await question(line, journal)
                        except UNAVAILABLE:  # it broke since the last time, which says little of the database
                            line.terminate()
                            line = None
                    if line is None:
                        line = await self._connect(self._within_s)
                        answer = await question(line, journal)
            except BaseException:
                if line is not None:
                    line.terminate()
                raise
            self._connection = line
            return answer

    def drop(self) -> None:
        """Ends the connection, if there is one."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


def untraced() -> AbstractContextManager[trace.Span]:
    """Makes spans of nothing inside: a parent that is not sampled. A probe every 2 s would bury the traces of calls."""
    unsampled = trace.SpanContext(trace_id=1, span_id=1, is_remote=False, trace_flags=trace.TraceFlags(0))
    return trace.use_span(trace.NonRecordingSpan(unsampled))
