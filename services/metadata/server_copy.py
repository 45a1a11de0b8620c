"""servers.db: the last known copy of the registry, to be read while PostgreSQL is away, also after a restart.

It follows by asking for what changed, every `POLL_S` and soon after a change of ours. It remembers up to which revision
each server was seen, also one that the record lacks now: PostgreSQL may be replaced by an older copy, an empty database
or a standby that lost the last changes, and a number that stands for something else there is taken by nobody who knows
it. What must stay true: it is never written but from what PostgreSQL answered, in one transaction with the time of the
question; a revision that was told stands for one content; it is a copy, so one that cannot be read is thrown away, and
a failure of its own disk harms nobody.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

import apsw
import orjson

from fleet.model import ServerDescriptor
from runtime import tasks
from runtime.clock import Clock
from runtime.local_file import FileThread, connect
from runtime.sqlite import Transaction, fetch
from runtime.tasks import Backoff, run_forever
from services.metadata.queries import ServerQuery, instant_of, microseconds_of
from services.metadata.store import ServerFilter, ServerRecord
from services.metadata.store_connection import Database
from services.metadata.store_postgres import PostgresStore, details_of

FILE_NAME: Final = "servers.db"
POLL_S: Final = 5.0
SOON_S: Final = 0.5
"""Between a change of ours and the question for it: registrations come in bursts."""
OVERLAP: Final = timedelta(seconds=15)
"""A transaction that began before the last question may commit after it; ours end within 5 s."""
WHOLE_EVERY_S: Final = 600.0
"""All is read again so often, for transactions of others that took longer."""
BACKOFF: Final = Backoff(initial_s=0.5, max_s=2.0)
_PAGE: Final = 1_000
_COLUMNS: Final = """id, hostname, environment, role, location, report_interval_ms, created_us, updated_us, deleted_us,
    revision, labels, notes, windows"""
_SCHEMA: Final = """
CREATE TABLE servers (id TEXT PRIMARY KEY, hostname TEXT NOT NULL, environment TEXT NOT NULL, role TEXT NOT NULL,
    location TEXT NOT NULL, report_interval_ms INTEGER NOT NULL, created_us INTEGER NOT NULL,
    updated_us INTEGER NOT NULL, deleted_us INTEGER, revision INTEGER NOT NULL, labels TEXT NOT NULL,
    notes TEXT NOT NULL, windows TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
"""
_SEEN: Final = """
CREATE TABLE seen (id TEXT PRIMARY KEY, revision INTEGER NOT NULL, updated_us INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO seen SELECT id, revision, updated_us FROM servers;
"""
# Where the same revision was told of two contents, no content of it is the one that was told.
_SEE: Final = """INSERT INTO seen VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET
    updated_us = iif(excluded.revision = revision AND excluded.updated_us <> updated_us, 0, excluded.updated_us),
    revision = excluded.revision WHERE excluded.revision >= revision"""
_MATCHES: Final = """(?1 = '' OR environment = ?1) AND (?2 = '' OR role = ?2)
    AND (?3 IS NULL OR id IN (SELECT value FROM json_each(?3))) AND (?4 OR deleted_us IS NULL)
    AND NOT (?5 AND deleted_us IS NULL) AND NOT EXISTS (SELECT 1 FROM json_each(?6) AS wanted
        WHERE NOT EXISTS (SELECT 1 FROM json_each(servers.labels) AS has
            WHERE has.key = wanted.key AND wanted.value IN ('', has.value)))"""

_MARKS: Final = ", ".join("?" * (_COLUMNS.count(",") + 1))

log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """A server's record as it was told to somebody."""

    server_id: str
    revision: int
    update_time: datetime


def seen_of(server: ServerRecord) -> Seen:
    return Seen(server.descriptor.server_id, server.details.revision, server.update_time)


class CopyFile:
    """The file; synchronous, used by one thread."""

    def __init__(self, path: Path) -> None:
        try:
            self._db = self._open(path)
        except apsw.Error as error:
            log.warning("the copy of the server registry cannot be read and is made anew: %s", error)
            for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
                path.with_name(name).unlink(missing_ok=True)
            self._db = self._open(path)

    def _open(self, path: Path) -> apsw.Connection:
        db = connect(path, durable=False)
        try:
            with Transaction(db):
                if not db.table_exists("main", "servers"):
                    db.execute(_SCHEMA)
                if not db.table_exists("main", "seen"):
                    db.execute(_SEEN)
            fetch(db, f"SELECT count(*) FROM (SELECT {_COLUMNS} FROM servers)")  # noqa: S608
        except BaseException:
            db.close()
            raise
        return db

    @property
    def as_of(self) -> datetime | None:
        """When it was the record; None: never."""
        rows = fetch(self._db, "SELECT value FROM meta WHERE key = 'as_of_us'")
        return instant_of(rows[0][0]) if rows else None

    def store(self, servers: Sequence[ServerRecord], as_of: datetime, *, whole: bool) -> int:
        """Takes changed servers in, or in the place of all; returns how many there are then."""
        with Transaction(self._db):
            if whole:
                self._db.execute("DELETE FROM servers")
            self._db.executemany(
                f"INSERT OR REPLACE INTO servers ({_COLUMNS}) VALUES ({_MARKS})",  # noqa: S608
                [_row(server) for server in servers],
            )
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('as_of_us', ?)", (microseconds_of(as_of),))
            self._see(map(seen_of, servers))
        ((total,),) = fetch(self._db, "SELECT count(*) FROM servers")
        return int(total)

    def see(self, seen: Iterable[Seen]) -> None:
        """Remembers what was told."""
        with Transaction(self._db):
            self._see(seen)

    def _see(self, seen: Iterable[Seen]) -> None:
        self._db.executemany(_SEE, [(server_id, revision, microseconds_of(at)) for server_id, revision, at in seen])

    def overtaken(self, servers: Sequence[ServerRecord]) -> Sequence[Seen]:
        """How those were seen that are behind that now, or have become something else under the same revision."""
        ids = orjson.dumps([server.descriptor.server_id for server in servers]).decode()
        rows = fetch(self._db, "SELECT * FROM seen WHERE id IN (SELECT value FROM json_each(?))", (ids,))
        seen = {str(row[0]): Seen(str(row[0]), int(row[1]), instant_of(int(row[2]))) for row in rows}
        found = ((seen.get(now.server_id, now), now) for now in map(seen_of, servers))
        return [before for before, now in found if before != now and before.revision >= now.revision]

    def list(self, query: ServerQuery) -> tuple[list[ServerRecord], int]:
        """One server more than the page has, and how many match in all."""
        ids = None if query.ids is None else orjson.dumps(query.ids).decode()
        labels = orjson.dumps(dict(query.labels)).decode()
        show_deleted = query.show_deleted or query.only_deleted
        bound = (query.environment, query.role, ids, show_deleted, query.only_deleted, labels)
        rows = fetch(
            self._db,
            f"SELECT {_COLUMNS} FROM servers WHERE {_MATCHES} AND id > ?7 ORDER BY id LIMIT ?8",  # noqa: S608
            (*bound, query.after, query.limit + 1),
        )
        ((total,),) = fetch(
            self._db,
            f"SELECT count(*) FROM servers WHERE {_MATCHES}",  # noqa: S608
            bound,
        )
        return [_server(row) for row in rows], int(total)

    def get(self, server_id: str) -> ServerRecord | None:
        """A server that is not deleted."""
        rows = fetch(
            self._db,
            f"SELECT {_COLUMNS} FROM servers WHERE id = ? AND deleted_us IS NULL",  # noqa: S608
            (server_id,),
        )
        return _server(rows[0]) if rows else None

    def close(self) -> None:
        with suppress(apsw.Error):
            self._db.close()


class _Slot:
    """What a watcher has not read yet: of each server the latest."""

    def __init__(self) -> None:
        self.records: dict[str, ServerRecord] = {}
        self.filled = asyncio.Event()


class ServerCopy:
    """The copy and the task that keeps it up to date, entered for as long as the service runs."""

    def __init__(self, folder: Path, postgres: PostgresStore, database: Database, *, clock: Clock) -> None:
        self._path = folder / FILE_NAME
        self._postgres = postgres
        self._database = database
        self._clock = clock
        self._thread = FileThread("server-copy")
        self._file: CopyFile
        self._changed = asyncio.Event()
        self._asked: datetime | None = None  # the database's time of the last question; None: all is to be read
        self._identity: str | None = None
        self._whole_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._watchers: set[_Slot] = set()
        self._told: dict[str, Seen] = {}  # what is not in the file yet
        self.as_of: datetime | None = None
        """When the copy was the record; None: there is none yet."""
        database.on_return(self._changed.set)

    async def __aenter__(self) -> Self:
        """Opens the file; raises what `FileThread.run` raises."""
        self._file = await self._thread.run(CopyFile, self._path)
        self.as_of = await self._thread.run(lambda: self._file.as_of)
        guarded = run_forever("server-copy", self._follow, BACKOFF, clock=self._clock)
        self._task = tasks.start("server-copy", guarded)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await tasks.cancel(self._task)
        await self._thread.run(self._file.close)
        self._thread.close()

    def changed(self, told: Seen | None = None) -> None:
        """Tells that the record was changed, so that the copy asks soon; and what of that the caller is told."""
        if told is not None:
            before = self._told.get(told.server_id)
            if before is None or before.revision < told.revision:
                self._told[told.server_id] = told
            elif before.revision == told.revision and before.update_time != told.update_time:
                self._told[told.server_id] = before._replace(update_time=instant_of(0))
        self._changed.set()

    async def list(self, query: ServerQuery) -> tuple[list[ServerRecord], int]:
        """As PostgreSQL would have answered at `as_of`."""
        return await self._thread.run(self._file.list, query)

    async def get(self, server_id: str) -> ServerRecord | None:
        """A server that was not deleted at `as_of`."""
        return await self._thread.run(self._file.get, server_id)

    async def watch(self) -> AsyncGenerator[Sequence[ServerRecord], None]:
        """As ``MetadataStore.watch_servers``: what each question finds, at most `_PAGE` records at once."""
        slot = _Slot()
        self._watchers.add(slot)
        try:
            while True:
                await slot.filled.wait()
                taken = list(slot.records)[:_PAGE]
                yield [slot.records.pop(server_id) for server_id in taken]
                if not slot.records:
                    slot.filled.clear()
        finally:
            self._watchers.discard(slot)

    def _tell(self, records: Sequence[ServerRecord]) -> None:
        for slot in self._watchers if records else ():
            slot.records.update((record.descriptor.server_id, record) for record in records)
            slot.filled.set()

    async def _follow(self) -> None:
        while True:
            self._changed.clear()
            if self._database.usable:
                await self._ask()
            try:
                async with asyncio.timeout(POLL_S):
                    await self._changed.wait()
                await self._clock.sleep(SOON_S)
            except TimeoutError:
                continue

    async def _ask(self) -> None:
        """Reads what changed since the last question, or all: at first, from another database, and now and then."""
        identity, now = self._database.identity, self._clock.monotonic()
        told, self._told = self._told, {}
        if told:
            await self._thread.run(self._file.see, told.values())
        if self._asked is None or identity != self._identity or now >= self._whole_at:
            await self._ask_for_all()
            self._identity, self._whole_at = identity, now + WHOLE_EVERY_S
            return
        as_of = instant_of(self._clock.now_ms() * 1_000)
        found, total, asked = await self._postgres.changed_servers(self._asked - OVERLAP)
        changed = await self._in_order(found)
        kept = await self._thread.run(self._file.store, changed, as_of, whole=False)
        self._asked, self.as_of = asked, as_of
        self._tell(changed)
        if kept != total:  # rows were deleted by hand, or came by a long transaction
            await self._ask_for_all()

    async def _ask_for_all(self) -> None:
        as_of = instant_of(self._clock.now_ms() * 1_000)
        _, _, asked = await self._postgres.changed_servers(None)
        servers: list[ServerRecord] = []
        token = ""
        while True:
            query = ServerQuery.of(ServerFilter(show_deleted=True), _PAGE, token)
            found, total = await self._postgres.list_servers(query)
            page = query.page(found, total)
            servers += page.items
            if not (token := page.next_page_token):
                break
        whole = await self._in_order(servers)
        await self._thread.run(self._file.store, whole, as_of, whole=True)
        self._asked, self.as_of = asked, as_of
        self._tell(whole)

    async def _in_order(self, servers: Sequence[ServerRecord]) -> Sequence[ServerRecord]:
        """The records, after those were moved on that somebody knows a later revision of, or another content."""
        overtaken = await self._thread.run(self._file.overtaken, servers)
        if not overtaken:
            return servers
        moved: dict[str, ServerRecord] = {}
        for start in range(0, len(overtaken), _PAGE):
            for record in await self._postgres.move_on(overtaken[start : start + _PAGE]):
                moved[record.descriptor.server_id] = record
        log.warning("%d records of servers are older than what was known of them: they go on after that", len(moved))
        return [moved.get(server.descriptor.server_id, server) for server in servers]


def _row(server: ServerRecord) -> tuple[str | int | None, ...]:
    said, deleted = server.descriptor, server.delete_time
    return (
        said.server_id,
        said.hostname,
        said.environment,
        said.role,
        said.location,
        said.report_interval_ms,
        microseconds_of(server.create_time),
        microseconds_of(server.update_time),
        None if deleted is None else microseconds_of(deleted),
        server.details.revision,
        orjson.dumps(dict(server.details.labels)).decode(),
        server.notes,
        orjson.dumps(server.details.maintenance).decode(),
    )


def _server(row: Sequence[object]) -> ServerRecord:
    server_id, hostname, environment, role, location, report_interval_ms, *times = row[:9]
    revision, labels, notes, windows = row[9:]
    created, updated, deleted = (None if time is None else instant_of(int(str(time))) for time in times)
    assert created is not None
    assert updated is not None
    return ServerRecord(
        descriptor=ServerDescriptor(
            server_id=str(server_id),
            hostname=str(hostname),
            environment=str(environment),
            role=str(role),
            location=str(location),
            report_interval_ms=int(str(report_interval_ms)),
        ),
        create_time=created,
        update_time=updated,
        delete_time=deleted,
        details=details_of(int(str(revision)), str(labels), bool(notes), str(windows)),
        notes=str(notes),
    )
