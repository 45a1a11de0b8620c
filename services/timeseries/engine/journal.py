"""journal.db: everything acknowledged, in order, until blocks and followers have it; and the catalog.

The tables are drawn in docs/formats/journal.md. What must stay true:

* one connection writes, in one thread (`writer.py`); a batch, and every set, server and cohort it is the first to
  use, are stored in the same transaction, and COMMIT returns after the sync;
* sequences grow by one for each batch and are never used again, also when all rows are swept: the highest swept
  sequence stays in `meta`;
* a sweep deletes from the front only, so what is kept is always a run without holes;
* an evicted day is noted here before its file goes, with the sequence up to which its rows are gone, since the
  `blocked_through` that kept a replay from bringing them back goes with the file.
"""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

import apsw

from runtime.errors import FailedPrecondition, InvalidArgument
from runtime.sqlite import Transaction, fetch, give_back, sync_folder
from services.timeseries.engine import catalog as catalog_codec
from services.timeseries.engine.catalog import Additions, Catalog, Cohort, StoredSet
from services.timeseries.engine.database import (
    FORMAT_VERSION,
    JOURNAL_PAGE_BYTES,
    connect,
    truncate_log,
    unreadable_journal,
)
from services.timeseries.engine.journal_reader import SELECT, JournalRow, rows_of
from services.timeseries.engine.left import add_left_table, forget_left, note_left
from services.timeseries.engine.told import add_cut_table, forget

_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE metric_sets (id INTEGER PRIMARY KEY, content_id TEXT NOT NULL UNIQUE, metrics TEXT NOT NULL) STRICT;
CREATE TABLE servers (id INTEGER PRIMARY KEY, server_id TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE cohorts (id INTEGER PRIMARY KEY, server INTEGER NOT NULL, metric_set INTEGER NOT NULL,
    UNIQUE (server, metric_set)) STRICT;
CREATE TABLE descriptors (server INTEGER NOT NULL, sequence INTEGER NOT NULL, descriptor TEXT NOT NULL,
    PRIMARY KEY (server, sequence)) STRICT, WITHOUT ROWID;
CREATE INDEX descriptors_by_sequence ON descriptors (sequence);
CREATE TABLE batches (sequence INTEGER PRIMARY KEY, received_ms INTEGER NOT NULL, metric_set INTEGER,
    row_count INTEGER NOT NULL, points INTEGER NOT NULL, payload BLOB NOT NULL) STRICT;
CREATE TABLE followers (name TEXT PRIMARY KEY, cursor INTEGER NOT NULL, updated_ms INTEGER NOT NULL)
    STRICT, WITHOUT ROWID;
"""

_EVICTIONS: Final = """
CREATE TABLE IF NOT EXISTS evictions (day INTEGER PRIMARY KEY, through INTEGER NOT NULL, unlinked INTEGER NOT NULL)
    STRICT
"""

_ENDED: Final = """
CREATE TABLE IF NOT EXISTS ended (tier INTEGER NOT NULL, day INTEGER NOT NULL, through INTEGER NOT NULL,
    PRIMARY KEY (tier, day)) STRICT, WITHOUT ROWID
"""

_SETTLED: Final = """
CREATE TABLE IF NOT EXISTS settled (name TEXT PRIMARY KEY, cursor INTEGER NOT NULL) STRICT, WITHOUT ROWID
"""

_OWED: Final = """
CREATE TABLE IF NOT EXISTS owed (name TEXT PRIMARY KEY, cursor INTEGER NOT NULL) STRICT, WITHOUT ROWID
"""

_PARTITIONS: Final = """
CREATE TABLE partitions (tier INTEGER NOT NULL, day INTEGER NOT NULL, days INTEGER NOT NULL,
    PRIMARY KEY (tier, day)) STRICT, WITHOUT ROWID
"""
_FROM_SPANS: Final = """
INSERT INTO partitions SELECT 0, day, days FROM spans WHERE day NOT IN (SELECT day FROM ended WHERE tier = 0);
DROP TABLE spans
"""
_FORGET_PARTITION: Final = "DELETE FROM partitions WHERE tier = ? AND day = ?"

_INSERT: Final = "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)"
_INSERTS: Final = [_INSERT + ", (?, ?, ?, ?, ?, ?)" * more for more in range(16)]
"""So many batches are stored by one statement: each one more is another time to wait for the interpreter's lock."""

_CHECKPOINT_PAGES: Final = 1_000
"""The log is copied into the file every 8 MB, by the commit that reaches it. Measured with four senders of 82 KB: the
longest commit is 16 to 23 ms then, with 16 MB 27 to 60, with 48 MB no batch a second more. A thread of
its own for it gains nothing: only the copy that catches up with the log syncs the file, and that took as long."""
_SPARE_PAGES: Final = 32  # 256 KiB: so much may stay free in any case
_SHRINK_PAGES: Final = 4_096  # 32 MiB at once

_ORPHANED: Final = "there are blocks whose series it names, and it is missing or empty"


class Journal:
    """The one writing connection. Not thread-safe: whoever opens it hands it to the writer thread."""

    def __init__(self, path: Path, *, may_create: bool, now_ms: int) -> None:
        new = not path.exists()
        if new and not may_create:
            raise unreadable_journal(path, _ORPHANED)
        self.path = path
        self._db = connect(path, JOURNAL_PAGE_BYTES)
        self._db.wal_autocheckpoint(_CHECKPOINT_PAGES)
        try:
            with self._db:
                if not self._db.table_exists("main", "meta"):
                    if not may_create:
                        raise unreadable_journal(path, _ORPHANED)
                    self._create(now_ms)
                add_missing_tables(self._db)
            if new:
                sync_folder(path.parent)
            version = self._meta("format_version")
            if version != FORMAT_VERSION:
                raise FailedPrecondition(f"{path.name} has format {version}, this program reads {FORMAT_VERSION}")
            self.identity = str(self._meta("identity"))
            self.swept_through = int(str(self._meta("swept_through")))
            self.stored_through = int(str(self._meta("stored_through") or 0))
            self.whole_from_ms = int(str(self._meta("whole_from") or 0))
            """What was written before this instant came to another folder, if to any."""
            self.lacks_ms = int(str(self._meta("lacks_from") or 0)), int(str(self._meta("lacks_until") or 0))
            """As was what came between these."""
            self.partitions = noted_partitions(self._db)
            """The partitions that there are, but for the newest: tier and first day -> days, also should a file not be
            able to say so any more, or not be there."""
            self._descriptors_from = min([self.swept_through, *self.followers().values()])
            ((highest,),) = fetch(self._db, "SELECT max(sequence) FROM batches")
            self.last_sequence = max(self.swept_through, highest or 0)
        except BaseException:
            self._db.close()
            raise

    def _create(self, now_ms: int) -> None:
        self._db.execute(_SCHEMA)
        self._db.executemany(
            "INSERT INTO meta VALUES (?, ?)",
            [
                ("format_version", FORMAT_VERSION),
                ("identity", secrets.token_hex(16)),
                ("swept_through", 0),
                ("whole_from", now_ms),
            ],
        )

    def _meta(self, key: str) -> object:
        rows = fetch(self._db, "SELECT value FROM meta WHERE key = ?", (key,))
        return rows[0][0] if rows else None

    def load(self) -> Catalog:
        """Reads the catalog."""
        return load_catalog(self._db)

    def rows(self, after: int = 0) -> Iterator[JournalRow]:
        """Every batch with a higher sequence, in order: for the replay at start."""
        yield from rows_of(self._db.execute(f"{SELECT} WHERE sequence > ? ORDER BY sequence", (after,)))

    def commit(self, additions: Additions, rows: Sequence[JournalRow]) -> None:
        """Stores batches and what they need in one transaction; returns after the sync, raises `apsw.Error`."""
        values = [(r.sequence, r.received_ms, r.metric_set, r.row_count, r.points, r.payload) for r in rows]
        if additions.unpublished or not 0 < len(values) <= len(_INSERTS):
            with Transaction(self._db):
                self._store_additions(additions)
                self._db.executemany(_INSERT, values)
        else:  # one statement is a transaction by itself
            self._db.execute(_INSERTS[len(values) - 1], list(chain.from_iterable(values)))
        if rows:
            self.last_sequence = rows[-1].sequence

    def _store_additions(self, additions: Additions) -> None:
        db = self._db
        db.executemany(
            "INSERT INTO metric_sets VALUES (?, ?, ?)",
            [(s.id, s.metric_set.id, catalog_codec.encode_set(s.metric_set)) for s in additions.sets.values()],
        )
        db.executemany("INSERT INTO servers VALUES (?, ?)", [(n, server) for server, n in additions.servers.items()])
        db.executemany("INSERT INTO cohorts VALUES (?, ?, ?)", [(c.id, *key) for key, c in additions.cohorts.items()])
        db.executemany(
            "INSERT OR REPLACE INTO descriptors VALUES (?, ?, ?)",
            [(server, seq, catalog_codec.encode_descriptor(d)) for server, seq, d in additions.descriptors],
        )

    def sweep(self, through: int, keep_received_ms: range, limit: int) -> int:
        """Deletes up to `limit` batches from the front, none above `through` nor received in `keep_received_ms`.

        That range ends soon after now, so that what a wrong clock stamped with a far time is not kept until then.
        Returns how many went.
        """
        last, count = self.swept_through, 0
        for sequence, received_ms in fetch(
            self._db,
            "SELECT sequence, received_ms FROM batches WHERE sequence <= ? ORDER BY sequence LIMIT ?",
            (through, limit),
        ):
            if received_ms in keep_received_ms:
                break
            last, count = sequence, count + 1
        if count:
            with Transaction(self._db):
                note_left(self._db, self.followers(), last)
                self._db.execute("DELETE FROM batches WHERE sequence <= ?", (last,))
                self._db.execute("UPDATE meta SET value = ? WHERE key = 'swept_through'", (last,))
                self._forget_descriptors(last + 1)
                self._db.execute("DELETE FROM evictions WHERE unlinked AND through <= ?", (last,))
            self.swept_through = last
        return count

    def _forget_descriptors(self, kept_from: int) -> None:
        """Forgets what was said too many changes ago; but never what is valid for a batch that is still kept, or that a
        follower may be sent from blocks."""
        first = min([kept_from, *(cursor + 1 for cursor in self.followers().values())])
        if first <= self._descriptors_from:
            return
        forget(self._db, self._descriptors_from, first)
        self._descriptors_from = first

    def note_lack(self, from_ms: int, until_ms: int) -> None:
        """Notes that what was written between two instants is not here, beside what is noted already."""
        if self.lacks_ms[1]:
            from_ms, until_ms = min(from_ms, self.lacks_ms[0]), max(until_ms, self.lacks_ms[1])
        with Transaction(self._db):
            found = [("lacks_from", from_ms), ("lacks_until", until_ms)]
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", found)
        self.lacks_ms = from_ms, until_ms

    def note_stored(self, through: int) -> None:
        """Notes that no head needs the batches up to a sequence, so that a replay begins after it."""
        with Transaction(self._db):
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('stored_through', ?)", (through,))
        self.stored_through = through

    def begin_eviction(self, days: Iterable[int], through: int) -> None:
        """Notes durably that the rows of the days of a file up to a sequence are gone: from here on the eviction is
        finished, after a crash at the next start."""
        gone = [(day, through) for day in days]
        with Transaction(self._db):
            self._db.executemany("INSERT OR REPLACE INTO evictions VALUES (?, ?, 0)", gone)
            self._db.executemany("INSERT OR REPLACE INTO ended VALUES (0, ?, ?)", gone)
            self._db.executemany(_FORGET_PARTITION, [(0, day) for day, _ in gone])
        self._forgotten((0, day) for day, _ in gone)

    def finish_eviction(self, days: Iterable[int]) -> None:
        """Notes that the days' file is gone, so that one that is made later for them stays."""
        with Transaction(self._db):
            self._db.executemany("UPDATE evictions SET unlinked = 1 WHERE day = ?", [(day,) for day in days])
            self._db.execute("DELETE FROM evictions WHERE unlinked AND through <= ?", (self.swept_through,))

    def end(self, tier: int, day: int, through: int) -> None:
        """Notes durably that a partition of roll-ups goes, with all that was made of rows up to a sequence."""
        with Transaction(self._db):
            self._db.execute("INSERT OR REPLACE INTO ended VALUES (?, ?, ?)", (tier, day, through))
            self._db.execute(_FORGET_PARTITION, (tier, day))
        self._forgotten([(tier, day)])

    def _forgotten(self, gone: Iterable[tuple[int, int]]) -> None:
        for partition in gone:
            self.partitions.pop(partition, None)

    def ended(self) -> list[tuple[int, int, int]]:
        """The partitions that went: tier, first day, and the sequence up to which rows went with them."""
        return fetch(self._db, "SELECT tier, day, through FROM ended")

    def evictions(self) -> dict[int, tuple[int, bool]]:
        """The evicted days of which batches may be kept: up to which sequence they went, whether the file is gone."""
        rows = fetch(self._db, "SELECT day, through, unlinked FROM evictions")
        return {day: (through, bool(unlinked)) for day, through, unlinked in rows}

    def note_partitions(self, there: Mapping[tuple[int, int], int]) -> None:
        """Notes that there are these, as in `partitions`, and no others; call it while none is on its way out."""
        if there == self.partitions:
            return
        with Transaction(self._db):
            self._db.execute("DELETE FROM partitions")
            self._db.executemany("INSERT INTO partitions VALUES (?, ?, ?)", [(*of, there[of]) for of in there])
        self.partitions = dict(there)

    def shrink(self, *, urgent: bool = False) -> bool:
        """Gives free pages back when most of the file is free, as after a follower's long outage, or it is urgent.

        Otherwise the next batches use them: moving the rest of the file to the front would write everything twice.
        Returns whether it is worth while to go on.
        """
        free, pages = self._db.pragma("freelist_count"), self._db.pragma("page_count")
        if free <= (pages // 8 if urgent else max(pages // 2, _SPARE_PAGES)):
            return False
        give_back(self._db, _SHRINK_PAGES)
        return True

    def truncate_log(self) -> None:
        """Gives the log back, which also cuts the file to its pages; does nothing while somebody reads."""
        truncate_log(self._db)

    def followers(self) -> dict[str, int]:
        """The followers' names and the last sequence each has shipped."""
        return dict(fetch(self._db, "SELECT name, cursor FROM followers"))

    def register_follower(self, name: str, now_ms: int) -> int:
        """Adds a follower that has shipped nothing of what is kept, or finds it; returns its cursor."""
        with Transaction(self._db):
            self._db.execute("INSERT OR IGNORE INTO followers VALUES (?, ?, ?)", (name, self.swept_through, now_ms))
        return self.followers()[name]

    def settled(self, name: str) -> int:
        """What a follower's store had surely kept when its cursor was moved last."""
        rows = fetch(
            self._db,
            "SELECT min(followers.cursor, settled.cursor) FROM followers JOIN settled USING (name) WHERE name = ?",
            (name,),
        )
        return int(rows[0][0]) if rows else self.followers()[name]

    def advance_cursor(self, name: str, sequence: int, settled: int, now_ms: int) -> int:
        """Moves a cursor forward, never back, and notes up to where the store has surely kept what it took; returns
        where the cursor is."""
        if sequence > self.last_sequence:
            raise InvalidArgument(f"{sequence} is past the journal's end {self.last_sequence}", field="sequence")
        if name not in self.followers():
            raise InvalidArgument(f"no follower {name!r} is registered", field="name")
        with Transaction(self._db):
            self._db.execute(
                "UPDATE followers SET cursor = max(cursor, ?), updated_ms = ? WHERE name = ?", (sequence, now_ms, name)
            )
            self._db.execute("INSERT OR REPLACE INTO settled VALUES (?, ?)", (name, settled))
            if sequence >= self.swept_through:
                forget_left(self._db, name)
        return self.followers()[name]

    def owe(self, name: str, sequence: int) -> None:
        """Notes that a follower's cursor is to be moved back, and how far."""
        with Transaction(self._db):
            self._db.execute("INSERT OR REPLACE INTO owed VALUES (?, ?)", (name, sequence))

    def owed(self, name: str) -> int | None:
        """Where a follower's cursor is to be moved back to; None: it stays."""
        rows = fetch(self._db, "SELECT cursor FROM owed WHERE name = ?", (name,))
        return int(rows[0][0]) if rows else None

    def rewind_cursor(self, name: str, sequence: int, now_ms: int) -> int:
        """Moves a cursor back, never forward, as is owed; returns where it is."""
        if name not in self.followers():
            raise InvalidArgument(f"no follower {name!r} is registered", field="name")
        with Transaction(self._db):
            self._db.execute(
                "UPDATE followers SET cursor = min(cursor, ?), updated_ms = ? WHERE name = ?", (sequence, now_ms, name)
            )
            self._db.execute("DELETE FROM owed WHERE name = ?", (name,))
        return self.followers()[name]

    def forget_follower(self, name: str) -> None:
        """Drops a follower, so that it no longer holds the journal back."""
        with Transaction(self._db):
            self._db.execute("DELETE FROM followers WHERE name = ?", (name,))
            self._db.execute("DELETE FROM settled WHERE name = ?", (name,))
            self._db.execute("DELETE FROM owed WHERE name = ?", (name,))
            forget_left(self._db, name)

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages in use; the file may be larger."""
        used = int(self._db.pragma("page_count")) - int(self._db.pragma("freelist_count"))
        return used * int(self._db.pragma("page_size"))  # an older file has larger ones

    def close(self) -> None:
        self._db.close()


def add_missing_tables(db: apsw.Connection) -> None:
    """Adds what a journal from before there was retention, or roll-ups, or lasting descriptors, does not have."""
    db.execute(_EVICTIONS)
    db.execute(_ENDED)
    add_cut_table(db)
    add_left_table(db)
    db.execute(_SETTLED)
    db.execute(_OWED)
    if not db.table_exists("main", "partitions"):
        db.execute(_PARTITIONS)
        if db.table_exists("main", "spans"):  # which had only those of several days
            db.execute(_FROM_SPANS)


def noted_partitions(db: apsw.Connection) -> dict[tuple[int, int], int]:
    """The partitions that a journal notes: tier and first day -> days; an older one may note none."""
    if not db.table_exists("main", "partitions"):
        return {}
    return {(tier, day): days for tier, day, days in fetch(db, "SELECT tier, day, days FROM partitions")}


def load_catalog(db: apsw.Connection) -> Catalog:
    """Reads the catalog of a journal."""
    catalog = Catalog()
    for number, text in db.execute("SELECT id, metrics FROM metric_sets ORDER BY id"):
        catalog.add_set(StoredSet.of(number, catalog_codec.decode_set(text)))
    for number, server_id in db.execute("SELECT id, server_id FROM servers"):
        catalog.add_server(server_id, number)
    for number, server, metric_set in db.execute("SELECT id, server, metric_set FROM cohorts ORDER BY id"):
        stored, server_id = catalog.sets_by_id[metric_set], catalog.server_ids[server]
        catalog.add_cohort(Cohort(id=number, server_id=server_id, stored_set=stored))
    for (text,) in db.execute("SELECT descriptor FROM descriptors ORDER BY sequence"):
        descriptor = catalog_codec.decode_descriptor(text)
        catalog.descriptors[descriptor.server_id] = descriptor
    return catalog
