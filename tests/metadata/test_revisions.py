"""A revision that was told of a server's record stands for one content, whatever database answers later: the live state
and who sends an etag go by it."""

from datetime import datetime, timedelta
from pathlib import Path
from uuid import uuid4

from fleet.model import ServerDescriptor, etag_of
from runtime.clock import SystemClock
from runtime.errors import NotFound
from services.metadata.maintenance import MaintenanceStore, NewWindow
from services.metadata.queries import instant_of
from services.metadata.server_copy import seen_of
from services.metadata.store import Remarks, ServerRecord
from tests.harness import eventually
from tests.harness.postgres import PostgresServer
from tests.metadata.parts import Parts, opened

MINE = Remarks(labels=(("team", "shop"),))
THEIRS = Remarks(labels=(("team", "db"),))
A_ROW = "INSERT INTO servers (id, hostname, revision, updated_at) VALUES ('a', 'a', $1, $2)"


def server(server_id: str) -> ServerDescriptor:
    return ServerDescriptor(server_id=server_id, hostname=server_id)


async def moved_on(parts: Parts, seen: ServerRecord, server_id: str = "a") -> ServerRecord:
    """The record once it is behind what was seen of it."""

    async def later() -> ServerRecord | None:
        try:
            found = await parts.store.get_server(server_id)
        except NotFound:
            return None
        return found if found.details.revision > seen.details.revision else None

    return await eventually(later, 30.0)


async def set_back(parts: Parts, row: ServerRecord) -> None:
    """What a standby has that lost all changes since: the row as it was."""
    async with parts.database.connection() as connection:
        await connection.execute("DELETE FROM servers WHERE id = 'a'")
        await connection.execute(A_ROW, row.details.revision, row.update_time)


async def test_a_change_after_a_fail_over_has_another_revision_than_the_one_that_was_lost(parts: Parts) -> None:
    before = await parts.store.create_server(server("a"))
    lost = await parts.store.update_server(server("a"), ["labels"], remarks=MINE)
    await set_back(parts, before)
    again = await parts.store.update_server(server("a"), ["labels"], remarks=THEIRS)
    assert etag_of(again.details.revision) == etag_of(lost.details.revision)  # nobody could know at once
    found = await moved_on(parts, lost)
    assert found.details.labels == THEIRS.labels
    await eventually(lambda: has_seen(parts, found))


async def test_what_is_told_of_a_revision_after_the_copy_has_read_another_content_of_it_counts(parts: Parts) -> None:
    """Who changed the lost one may be answered last."""
    await parts.store.create_server(server("a"))
    known = await parts.store.update_server(server("a"), ["labels"], remarks=MINE)
    await eventually(lambda: has_seen(parts, known))
    parts.copy.changed(seen_of(known)._replace(update_time=known.update_time - timedelta(seconds=1)))
    assert (await moved_on(parts, known)).details.labels == MINE.labels


async def test_a_record_that_a_fail_over_set_back_is_told_to_who_knows_the_lost_one(parts: Parts) -> None:
    before = await parts.store.create_server(server("a"))
    windows = MaintenanceStore(parts.database, clock=SystemClock(), changed=parts.copy.changed)
    end = instant_of(SystemClock().now_ms() * 1_000) + timedelta(hours=1)
    for _ in range(3):
        new = NewWindow(server_id="a", start_time=None, end_time=end, id=str(uuid4()))
        _, lost = await windows.add(new)
    await set_back(parts, before)
    async with parts.database.connection() as connection:
        await connection.execute("UPDATE servers SET updated_at = now() WHERE id = 'a'")
    watched = parts.store.watch_servers()
    parts.copy.changed()
    told = {record.descriptor.server_id: record.details for record in await anext(watched)}
    await watched.aclose()
    assert told["a"].revision > lost.revision
    assert told["a"].maintenance == ()


async def test_revisions_go_on_in_a_database_that_begins_anew(embedded_server: PostgresServer, tmp_path: Path) -> None:
    async with opened(await embedded_server.fresh_database(), tmp_path) as parts:
        for server_id in ("a", "b"):
            await parts.store.create_server(server(server_id))
        for _ in range(5):
            seen = await parts.store.update_server(server("a"), ["labels"], remarks=MINE)
        await eventually(lambda: has_seen(parts, seen))
    async with opened(await embedded_server.fresh_database(), tmp_path) as parts:
        await parts.store.register_servers([server("a"), server("b")])
        assert (await moved_on(parts, seen)).details.labels == ()
        assert (await parts.store.get_server("b")).details.revision <= 2


async def has_seen(parts: Parts, wanted: ServerRecord) -> bool:
    found = await parts.copy.get(wanted.descriptor.server_id)
    return found is not None and found.details == wanted.details


async def test_records_that_are_as_they_were_seen_are_left_alone(
    embedded_server: PostgresServer, tmp_path: Path
) -> None:
    target = await embedded_server.fresh_database()
    async with opened(target, tmp_path) as parts:
        for server_id in ("a", "b"):
            await parts.store.create_server(server(server_id))
        for remarks in (MINE, THEIRS):
            latest = await parts.store.update_server(server("a"), ["labels"], remarks=remarks)
        await eventually(lambda: has_seen(parts, latest))
        kept = [await parts.store.get_server(server_id) for server_id in ("a", "b")]
    async with opened(target, tmp_path) as parts:
        known = parts.copy.as_of
        await eventually(lambda: has_asked(parts, known))
        assert [await parts.store.get_server(server_id) for server_id in ("a", "b")] == kept


async def has_asked(parts: Parts, since: datetime | None) -> bool:
    return parts.copy.as_of != since
