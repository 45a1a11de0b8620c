"""facts.db: append-only facts on our own disk, from before they are acknowledged until a day after PostgreSQL has them.

    waiting ──inserted──> inserted ──24 h──> gone
       │ ^                   │
       │ └───── replay ──────┘  another timeline, system or database answers than the one they were inserted into
    refused ──> dead_letters: PostgreSQL answered that it will not keep this one; a person retries or drops it

What must stay true:

* a fact has its id and its time before it is stored here, so that inserting it again is a no-op; `append` returns after
  the sync;
* nothing but sweeping, making room and `drop` deletes, the first two only what was inserted;
* sequences are never used again, so that a late note cannot meet another fact.

Synchronous, one thread for each connection. The command line opens the same file beside the service.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple
from uuid import UUID, uuid4

import apsw

from runtime.errors import DataLoss, FailedPrecondition, OpenManagerError, ResourceExhausted
from runtime.local_file import DAMAGED, connect
from runtime.sqlite import Transaction, fetch, give_back
from services.metadata.journal_query import UNWRITTEN, Newest, asked
from services.metadata.line import UNSAID, Position

FILE_NAME: Final = "facts.db"
FORMAT_VERSION: Final = 1
KEPT_MS: Final = 24 * 3_600_000
"""A standby that took over may lack what its primary acknowledged; one that lags by more than a day is no standby."""
ROW_OVERHEAD_BYTES: Final = 400
"""A fact's share of the indexes and of half-empty pages."""
ROOM_FACTS: Final = 1_000
SHRINK_PAGES: Final = 4_096
BUNDLE: Final = 2_000
"""Facts that are swept, or put back, in one transaction: recordings wait for it, 0.05 to 0.2 s. A journal at its limit
has a million."""

WAITING, INSERTED, REFUSED = 0, 1, 2
_POSITION: Final = ("position", "transactions", "mark")

_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE facts (sequence INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, id TEXT NOT NULL,
    subject TEXT NOT NULL, created_us INTEGER NOT NULL, payload TEXT NOT NULL, state INTEGER NOT NULL DEFAULT 0,
    inserted_ms INTEGER, UNIQUE (kind, id)) STRICT;
CREATE INDEX facts_waiting ON facts (sequence, created_us) WHERE state = 0;
CREATE INDEX facts_inserted ON facts (inserted_ms) WHERE state = 1;
CREATE INDEX facts_unwritten ON facts (kind, created_us, id) WHERE state <> 1;
CREATE INDEX facts_newest ON facts (kind, created_us, id, subject);
CREATE TABLE dead_letters (sequence INTEGER PRIMARY KEY, reason TEXT NOT NULL, first_ms INTEGER NOT NULL,
    last_ms INTEGER NOT NULL, attempts INTEGER NOT NULL) STRICT;
"""
_FACT: Final = "kind, id, subject, created_us, payload"
INSERT: Final = f"INSERT INTO facts ({_FACT}) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"  # noqa: S608


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """Something that happened and is never changed.

    Attributes:
        kind: which of `kinds.KINDS` knows how it is inserted.
        id: unique in its kind, given before it is stored.
        subject: what listings of its kind filter by; empty: nothing.
        created_us: when it happened, UTC, microseconds since the Unix epoch.
        payload: JSON object with the columns of its row.
    """

    kind: str
    id: str
    subject: str
    created_us: int
    payload: str

    @property
    def bytes(self) -> int:
        """About what it takes on disk."""
        return len(self.payload.encode()) + ROW_OVERHEAD_BYTES


class Waiting(NamedTuple):
    """A fact that PostgreSQL does not have yet."""

    sequence: int
    fact: Fact


class Backlog(NamedTuple):
    """What PostgreSQL lacks: facts, the time of the first of them, dead letters, bytes of the whole journal."""

    waiting: int
    oldest_us: int | None
    refused: int
    bytes: int


class DeadLetter(NamedTuple):
    """A fact that PostgreSQL refused, why, when first and last, and how often."""

    fact: Fact
    reason: str
    first_ms: int
    last_ms: int
    attempts: int


class Journal:
    """A connection to the file."""

    def __init__(self, path: Path) -> None:
        """Opens or creates it.

        Raises:
            DataLoss: the file is no journal any more.
            FailedPrecondition: it is another version's.
            apsw.Error: the disk failed.
        """
        self.distrusted = False  # whether PostgreSQL may lack what is inserted: then it counts as unwritten for readers
        try:
            self._db = connect(path)
            self._db.pragma("secure_delete", 1)  # always, or pages that were split keep copies of what is erased
            with Transaction(self._db):
                if not self._db.table_exists("main", "meta"):
                    self._db.execute(_SCHEMA)
                    self._db.execute("INSERT INTO meta VALUES ('format_version', ?)", (FORMAT_VERSION,))
                if self._meta("journal") is None:
                    self._db.execute("INSERT INTO meta VALUES ('journal', ?)", (str(uuid4()),))
        except DAMAGED as error:
            raise DataLoss(f"{path} is damaged ({error}); move it away to start without the facts in it") from error
        version = self._meta("format_version")
        if version != FORMAT_VERSION:
            self.close()
            raise FailedPrecondition(f"{path} has format {version}, this program reads {FORMAT_VERSION}")

    @property
    def db(self) -> apsw.Connection:
        """For what is done in files of its own (`erasing`)."""
        return self._db

    @property
    def identity(self) -> str | None:
        """The database that the inserted facts are in."""
        found = self._meta("identity")
        return None if found is None else str(found)

    @property
    def id(self) -> UUID:
        """Which journal this is, among all that give facts to a database."""
        return UUID(str(self._meta("journal")))

    @property
    def position(self) -> Position:
        """How far that database was when it had the last of them."""
        return Position(*(int(str(self._meta(key) or 0)) for key in _POSITION))

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages in use; the file may be larger."""
        used = int(self._db.pragma("page_count")) - int(self._db.pragma("freelist_count"))
        return used * int(self._db.pragma("page_size"))

    def append(self, facts: Sequence[Fact], limit_bytes: int) -> list[Fact | OpenManagerError]:
        """Stores facts in one transaction; returns after the sync what is stored under each one's id.

        That is an earlier fact where there is one; or why this one was not taken. Behind one that found no room none
        of the same kind and subject is taken, for its place may be behind that (audit events).
        """
        answers: list[Fact | OpenManagerError] = []
        refused: set[tuple[str, str]] = set()
        with Transaction(self._db):
            room = limit_bytes - self.used_bytes
            wanted = sum(fact.bytes for fact in facts)
            while room < wanted and self._make_room():
                room = limit_bytes - self.used_bytes
            for fact in facts:
                about = (fact.kind, fact.subject)
                if (room < fact.bytes or about in refused) and self.find(fact.kind, fact.id) is None:
                    refused.add(about)
                    answers.append(_full(limit_bytes))
                    continue
                self._db.execute(INSERT, (fact.kind, fact.id, fact.subject, fact.created_us, fact.payload))
                if self._db.changes():
                    room -= fact.bytes
                    answers.append(fact)
                else:
                    answers.append(self.find(fact.kind, fact.id) or fact)
        return answers

    def _make_room(self) -> int:
        """Deletes the oldest of what PostgreSQL has, before its 24 hours are over; returns how many."""
        self._db.execute(
            "DELETE FROM facts WHERE sequence IN (SELECT sequence FROM facts WHERE state = 1 ORDER BY inserted_ms"
            " LIMIT ?)",
            (ROOM_FACTS,),
        )
        return self._db.changes()

    def find(self, kind: str, fact_id: str, *, unwritten: bool = False) -> Fact | None:
        """The fact with an id; `unwritten`: only if PostgreSQL does not have it."""
        condition = "AND state <> 1" if unwritten and not self.distrusted else ""
        rows = fetch(
            self._db,
            f"SELECT {_FACT} FROM facts WHERE kind = ? AND id = ? {condition}",  # noqa: S608  a constant
            (kind, fact_id),
        )
        return _fact(rows[0]) if rows else None

    def waiting(self, limit: int, limit_bytes: int) -> list[Waiting]:
        """The first facts that wait, in order, at least one if there is any."""
        found: list[Waiting] = []
        size = 0
        cursor = self._db.execute(
            f"SELECT sequence, {_FACT} FROM facts WHERE state = 0 ORDER BY sequence LIMIT ?",  # noqa: S608
            (limit,),
        )
        for sequence, *values in cursor:
            fact = _fact(values)
            size += fact.bytes
            if found and size > limit_bytes:
                break
            found.append(Waiting(sequence, fact))
        cursor.close(True)
        return found

    def first_waiting(self, kind: str) -> int | None:
        """The sequence of the first of a kind that waits."""
        return self._waiting_end(kind, "min")

    def last_waiting(self, kind: str) -> int | None:
        """The sequence of the last of a kind that waits."""
        return self._waiting_end(kind, "max")

    def _waiting_end(self, kind: str, end: str) -> int | None:
        statement = f"SELECT {end}(sequence) FROM {UNWRITTEN} WHERE kind = ? AND state <> 1 AND state = 0"  # noqa: S608
        rows = fetch(self._db, statement, (kind,))
        return None if rows[0][0] is None else int(str(rows[0][0]))

    def note_inserted(self, sequences: Sequence[int], now_ms: int, position: Position = UNSAID) -> None:
        """PostgreSQL has these, and is so far with them."""
        with Transaction(self._db):
            self._note_position(position)
            self._db.executemany(
                "UPDATE facts SET state = 1, inserted_ms = ? WHERE sequence = ? AND state = 0",
                [(now_ms, sequence) for sequence in sequences],
            )
            self._db.executemany("DELETE FROM dead_letters WHERE sequence = ?", [(one,) for one in sequences])

    def note_refused(self, sequence: int, reason: str, now_ms: int) -> None:
        """PostgreSQL will not keep this one."""
        with Transaction(self._db):
            self._db.execute("UPDATE facts SET state = 2 WHERE sequence = ?", (sequence,))
            if not self._db.changes():  # erased while it was on its way
                return
            self._db.execute(
                "INSERT INTO dead_letters VALUES (?, ?, ?, ?, 1) ON CONFLICT (sequence) DO UPDATE SET"
                " reason = excluded.reason, last_ms = excluded.last_ms, attempts = attempts + 1",
                (sequence, reason, now_ms, now_ms),
            )

    def wait_again(self, most: int) -> int:
        """Has some of what was inserted wait again, as all is to do for another database; returns how many."""
        with Transaction(self._db):
            self._db.execute(
                "UPDATE facts SET state = 0, inserted_ms = NULL WHERE sequence IN"
                " (SELECT sequence FROM facts WHERE state = 1 LIMIT ?)",
                (most,),
            )
            return self._db.changes()

    def begin_identity(self, identity: str, position: Position = UNSAID) -> int:
        """Another database answers from now on: what was inserted into the last one waits again. Returns how many."""
        with Transaction(self._db):
            again = 0
            if self.identity not in {None, identity}:
                self._db.execute("UPDATE facts SET state = 0, inserted_ms = NULL WHERE state = 1")
                again = self._db.changes()
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('identity', ?)", (identity,))
            self._note_position(position)
        return again

    def _note_position(self, position: Position) -> None:
        if position != UNSAID:
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", zip(_POSITION, position, strict=True))

    def sweep(self, now_ms: int, most: int = BUNDLE) -> int:
        """Deletes what PostgreSQL has for 24 hours, the oldest first, and gives free pages back; returns how many facts
        went.

        What a wrong clock stamped with a far time goes too, after 24 hours of the right one at most.
        """
        with Transaction(self._db):
            self._db.execute("UPDATE facts SET inserted_ms = ?1 WHERE state = 1 AND inserted_ms > ?1", (now_ms,))
            self._db.execute(
                "DELETE FROM facts WHERE sequence IN (SELECT sequence FROM facts WHERE state = 1 AND inserted_ms < ?"
                " ORDER BY inserted_ms LIMIT ?)",
                (now_ms - KEPT_MS, most),
            )
            gone = self._db.changes()
        if int(self._db.pragma("freelist_count")) > int(self._db.pragma("page_count")) // 2:
            give_back(self._db, SHRINK_PAGES)
        return gone

    def backlog(self) -> Backlog:
        """What PostgreSQL lacks now."""
        ((waiting, oldest_us),) = fetch(
            self._db,
            "SELECT count(*), (SELECT created_us FROM facts WHERE state = 0 ORDER BY sequence LIMIT 1)"
            " FROM facts WHERE state = 0",
        )
        ((refused,),) = fetch(self._db, "SELECT count(*) FROM facts WHERE state <> 1 AND state = 2")
        return Backlog(waiting, oldest_us, refused, self.used_bytes)

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read meanwhile is of one moment."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    def _asked(self, wanted: Newest) -> tuple[str, tuple[str | int | float, ...]]:
        return asked(wanted._replace(unwritten=wanted.unwritten and not self.distrusted))

    def newest(self, wanted: Newest, before: tuple[int, str] | None, limit: int) -> list[Fact]:
        """Facts in descending order of (time, id), those before a (time, id) only."""
        source, values = self._asked(wanted)
        if before is not None:
            source += " AND (created_us, id) < (?, ?)"
            values += before
        statement = f"SELECT {_FACT} {source} ORDER BY created_us DESC, id DESC LIMIT ?"
        return [_fact(row) for row in fetch(self._db, statement, (*values, limit))]

    def unwritten(self, kind: str) -> list[Fact]:
        """All of a kind that PostgreSQL does not have, in the order in which they came."""
        source, values = self._asked(Newest(kind))
        return [_fact(row) for row in fetch(self._db, f"SELECT {_FACT} {source} ORDER BY sequence", values)]

    def last_of_subjects(self, kind: str, number: str) -> list[Fact]:
        """Of each subject the fact of a kind with the highest number under a name in its payload."""
        rows = fetch(
            self._db,
            f"SELECT {_FACT}, max(CAST(payload ->> ?1 AS INTEGER)) FROM facts WHERE kind = ?2 GROUP BY subject",  # noqa: S608
            (number, kind),
        )
        return [_fact(row[:5]) for row in rows]

    def count(self, wanted: Newest) -> int:
        """How many there are."""
        source, values = self._asked(wanted)
        ((found,),) = fetch(self._db, f"SELECT count(*) {source}", values)
        return int(found)

    def first_ids(self, wanted: Newest, limit: int) -> list[str]:
        """The ids of those that came first: the next to be inserted, or just being so."""
        source, values = self._asked(wanted)
        return [text for (text,) in fetch(self._db, f"SELECT id {source} ORDER BY sequence LIMIT ?", (*values, limit))]

    def beginning(self, kind: str, prefix: str, *, unwritten: bool) -> list[Fact]:
        """The facts whose ids begin with a text, in order of their times."""
        condition = "AND state <> 1" if unwritten and not self.distrusted else ""
        rows = fetch(
            self._db,
            f"SELECT {_FACT} FROM facts WHERE kind = ? AND id >= ? AND id < ? {condition} ORDER BY created_us",  # noqa: S608
            (kind, prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)),
        )
        return [_fact(row) for row in rows]

    def dead_letters(self) -> list[DeadLetter]:
        """Every refused fact, in order."""
        rows = fetch(
            self._db,
            "SELECT kind, id, subject, created_us, payload, reason, first_ms, last_ms, attempts"
            " FROM dead_letters JOIN facts USING (sequence) WHERE state = 2 ORDER BY sequence",
        )
        return [DeadLetter(_fact(row[:5]), *row[5:]) for row in rows]

    def retry(self, ids: Sequence[str] | None) -> list[str]:
        """Has refused facts wait again, all of them for None; returns the ids of those that do."""
        return self._for_refused("UPDATE facts SET state = 0 WHERE sequence = ?", ids)

    def drop(self, ids: Sequence[str] | None) -> list[str]:
        """Deletes refused facts for good, all of them for None; returns their ids."""
        return self._for_refused("DELETE FROM facts WHERE sequence = ?", ids)

    def _for_refused(self, statement: str, ids: Sequence[str] | None) -> list[str]:
        with Transaction(self._db):
            rows = fetch(self._db, "SELECT sequence, id FROM facts WHERE state <> 1 AND state = 2")
            chosen = [(sequence, text) for sequence, text in rows if ids is None or text in ids]
            self._db.executemany(statement, [(sequence,) for sequence, _ in chosen])
            self._db.execute("DELETE FROM dead_letters WHERE sequence NOT IN (SELECT sequence FROM facts)")
        return [text for _, text in chosen]

    def _meta(self, key: str) -> object:
        rows = fetch(self._db, "SELECT value FROM meta WHERE key = ?", (key,))
        return rows[0][0] if rows else None

    def close(self) -> None:
        """Ends the connection."""
        with suppress(apsw.Error):  # what is committed is durable; a log that could not be copied is at the next start
            self._db.close()


def _fact(row: Sequence[object]) -> Fact:
    kind, fact_id, subject, created_us, payload = row
    return Fact(
        kind=str(kind), id=str(fact_id), subject=str(subject), created_us=int(str(created_us)), payload=str(payload)
    )


def _full(limit_bytes: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"the journal of facts that wait for PostgreSQL has its {limit_bytes} bytes (METADATA_JOURNAL_LIMIT): bring"
        " PostgreSQL back, or raise the limit",
        reason="JOURNAL_FULL",
    )
