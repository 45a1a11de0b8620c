"""A writer's own file: its events from before they are acknowledged until they are shipped, and where its chain ends.

    counted ──minute over──> event ──shipped──> gone
                            change ─┘

What must stay true: an event has its number, the hash of the one before and its own in the transaction that stores it,
and `append` returns after the sync; the chain's end outlives the events, so that a number is never given twice; a new
file is a new writer.

Synchronous, one thread. Refused calls are counted here by minute (`refusals.py`), so that a kill loses none that was
written, and have a share of the file of their own.
"""

import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import apsw
import orjson

from fleet.audit.event import START, Draft, Event, Link, from_json, placed, to_json
from runtime.errors import DataLoss, FailedPrecondition, OpenManagerError, ResourceExhausted
from runtime.local_file import DAMAGED, connect
from runtime.sqlite import Transaction, fetch

FORMAT_VERSION: Final = 1
ROW_OVERHEAD_BYTES: Final = 100
AUTOCHECKPOINT_PAGES: Final = 4_096
"""A commit that copies the log back syncs three times; that is one of a thousand, and `tidy` does it when idle."""
TIDY_PAGES: Final = 512

_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE events (seq INTEGER PRIMARY KEY, aggregated INTEGER NOT NULL, bytes INTEGER NOT NULL,
    payload TEXT NOT NULL) STRICT;
CREATE TABLE counted (minute_us INTEGER NOT NULL, said TEXT NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (minute_us, said)) STRICT, WITHOUT ROWID;
"""

_OVER: Final = "minute_us <> ?"

Counted = tuple[int, str]
"""The minute and, as JSON, what calls have in common that are one event: fields of a Draft."""


class AuditJournal:
    """A connection to the file."""

    def __init__(self, path: Path, name: str) -> None:
        """Opens or creates it.

        Args:
            path: of the file.
            name: of the process; a new writer's id begins with it.

        Raises:
            DataLoss: the file is no journal any more.
            FailedPrecondition: it is another version's.
            apsw.Error: the disk failed.
        """
        try:
            self._db = connect(path)
            self._db.pragma("wal_autocheckpoint", AUTOCHECKPOINT_PAGES)
            with Transaction(self._db):
                if not self._db.table_exists("main", "meta"):
                    self._db.execute(_SCHEMA)
                    self._put(format_version=FORMAT_VERSION, writer_id=f"{name}-{secrets.token_hex(8)}")
                    self._put_end(START)
        except DAMAGED as error:
            raise DataLoss(f"{path} is damaged ({error}); move it away to begin a new chain without it") from error
        if self._meta("format_version") != FORMAT_VERSION:
            version = self._meta("format_version")
            self.close()
            raise FailedPrecondition(f"{path} has format {version}, this program reads {FORMAT_VERSION}")
        self.writer_id = str(self._meta("writer_id"))
        self.end = Link(int(str(self._meta("end_seq"))), bytes.fromhex(str(self._meta("end_hash"))))
        self.forgotten_through = 0
        """Up to this number events that were shipped are gone, as far as is known since the start."""
        sizes = fetch(self._db, "SELECT aggregated, sum(bytes) FROM events GROUP BY aggregated")
        by_kind = {int(kind): int(size) for kind, size in sizes}
        self._bytes = [by_kind.get(0, 0), by_kind.get(1, 0)]

    @property
    def waiting_bytes(self) -> int:
        """About what the events take that are not shipped, aggregated ones aside."""
        return self._bytes[0]

    def append(self, drafts: Sequence[Draft], limit_bytes: int, shipped_through: int) -> list[Event | OpenManagerError]:
        """Stores drafts in order in one transaction, and forgets what was shipped; returns after the sync.

        An error stands for a draft that was not taken.
        """
        return self._append(drafts, limit_bytes, shipped_through, aggregated=False)

    def count(self, counted: Mapping[Counted, int], before_us: int, limit_bytes: int, shipped_through: int) -> int:
        """Adds to what is counted, and makes events of the minutes that began before `before_us`.

        Of those that began later, too: a clock was ahead, and that they are over might be years from now.
        Returns how many calls were left out because the events of such already take `limit_bytes`.
        """
        with Transaction(self._db):
            self._db.executemany(
                "INSERT INTO counted VALUES (?, ?, ?)"
                " ON CONFLICT (minute_us, said) DO UPDATE SET count = count + excluded.count",
                [(minute_us, said, count) for (minute_us, said), count in counted.items()],
            )
            rows = fetch(self._db, f"SELECT minute_us, said, count FROM counted WHERE {_OVER}", (before_us,))  # noqa: S608
        if not rows:
            return 0
        drafts = [
            Draft(**orjson.loads(said), id=str(uuid4()), time_us=minute_us, count=count)
            for minute_us, said, count in rows
        ]
        stored = self._append(drafts, limit_bytes, shipped_through, aggregated=True, counted_before_us=before_us)
        return sum(said.count for said, done in zip(drafts, stored, strict=True) if isinstance(done, OpenManagerError))

    def _append(
        self,
        drafts: Sequence[Draft],
        limit_bytes: int,
        shipped_through: int,
        *,
        aggregated: bool,
        counted_before_us: int = 0,
    ) -> list[Event | OpenManagerError]:
        end, rows = self.end, []
        answers: list[Event | OpenManagerError] = []
        bytes_before, done = list(self._bytes), False
        try:
            with Transaction(self._db):
                self._forget(shipped_through)
                for said in drafts:
                    event = placed(said, self.writer_id, end)
                    payload = to_json(event)
                    size = len(payload.encode()) + ROW_OVERHEAD_BYTES
                    if self._bytes[aggregated] + size > limit_bytes:
                        answers.append(_full(limit_bytes))
                        continue
                    self._bytes[aggregated] += size
                    rows.append((event.seq, int(aggregated), size, payload))
                    answers.append(event)
                    end = event.link
                self._db.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", rows)
                if counted_before_us:
                    self._db.execute(f"DELETE FROM counted WHERE {_OVER}", (counted_before_us,))  # noqa: S608
                self._put_end(end)
            done = True
        finally:
            if not done:
                self._bytes = bytes_before
        self.end = end
        return answers

    def begin_anew(self, shipped_through: int) -> None:
        """A new chain for everything that waits: the numbers of this one were given to other events before.

        That is so when the file was put back from a copy. Ids and contents stay, so what was shipped is not in it.
        """
        with Transaction(self._db):
            self._forget(shipped_through)
            rows = fetch(self._db, "SELECT payload, aggregated, bytes FROM events ORDER BY seq")
            self._db.execute("DELETE FROM events")
            writer_id, end = f"{self.writer_id.rpartition('-')[0]}-{secrets.token_hex(8)}", START
            for payload, aggregated, size in rows:
                event = placed(from_json(payload), writer_id, end)
                self._db.execute(
                    "INSERT INTO events VALUES (?, ?, ?, ?)", (event.seq, aggregated, size, to_json(event))
                )
                end = event.link
            self._put(writer_id=writer_id)
            self._put_end(end)
        self.writer_id, self.end, self.forgotten_through = writer_id, end, 0

    def _forget(self, through: int) -> None:
        gone = fetch(self._db, "DELETE FROM events WHERE seq <= ? RETURNING aggregated, bytes", (through,))
        for aggregated, size in gone:
            self._bytes[aggregated] -= size
        self.forgotten_through = max(self.forgotten_through, through)

    def waiting(self, after: int, limit: int, limit_bytes: int) -> tuple[list[Event], int]:
        """The first events behind number `after`, in order, and the number of the last one that there is or was.

        At most `limit`, and `limit_bytes` of payload, but at least one if there is any.
        """
        found: list[Event] = []
        size = 0
        cursor = self._db.execute("SELECT payload FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit))
        for (payload,) in cursor:
            size += len(str(payload).encode())
            if found and size > limit_bytes:
                break
            found.append(from_json(str(payload)))
        cursor.close(True)
        return found, self.end.seq

    def tidy(self, shipped_through: int) -> None:
        """Forgets what was shipped; where the log has grown, copies it back. Shows whether the file can be written."""
        with Transaction(self._db):
            self._forget(shipped_through)
            self._put_end(self.end)
        ((_, pages, _),) = fetch(self._db, "PRAGMA wal_checkpoint(NOOP)")
        if int(pages) > TIDY_PAGES:
            fetch(self._db, "PRAGMA wal_checkpoint(PASSIVE)")

    def noted(self, key: str) -> str:
        """What was noted under a name; empty: nothing."""
        rows = fetch(self._db, "SELECT value FROM meta WHERE key = ?", (f"note {key}",))
        return str(rows[0][0]) if rows else ""

    def note(self, key: str, text: str) -> None:
        """Notes something beside the events."""
        with Transaction(self._db):
            self._put(**{f"note {key}": text})

    def _put(self, **values: Any) -> None:
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(values.items()))

    def _put_end(self, end: Link) -> None:
        self._put(end_seq=end.seq, end_hash=end.hash.hex())

    def _meta(self, key: str) -> object:
        ((value,),) = fetch(self._db, "SELECT value FROM meta WHERE key = ?", (key,))
        return value

    def close(self) -> None:
        """Ends the connection."""
        with suppress(apsw.Error):  # what is committed is durable
            self._db.close()


def _full(limit_bytes: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"the journal of audit events that metadata does not take has its {limit_bytes} bytes (AUDIT_JOURNAL_LIMIT):"
        " bring metadata back, or raise the limit",
        reason="AUDIT_JOURNAL_FULL",
    )
