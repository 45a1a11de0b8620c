"""Many servers at once: all or nothing or what can be, and a dry run that says the same."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from fleet.model import ServerDescriptor
from runtime.errors import Aborted, InvalidArgument
from services.metadata import imports
from services.metadata.connector import Connector
from services.metadata.imports import FIELDS, ImportedServer, Outcome, ServerImports
from services.metadata.store import MetadataStore, Remarks, ServerFilter
from services.metadata.target import DatabaseTarget
from tests.harness import eventually
from tests.metadata.parts import Parts, waits_for_a_lock


def said(server_id: str, *, labels: tuple[tuple[str, str], ...] = (), notes: str = "", **fields: str) -> ImportedServer:
    names = set(fields) | ({"labels"} if labels else set()) | ({"notes"} if notes else set())
    return ImportedServer(
        descriptor=ServerDescriptor(**({"server_id": server_id, "hostname": server_id} | fields)),  # type: ignore[arg-type]
        remarks=Remarks(labels=labels, notes=notes),
        fields=frozenset(names),
    )


@pytest.fixture
async def importer(store: MetadataStore, parts: Parts) -> ServerImports:
    await store.create_server(ServerDescriptor(server_id="old", hostname="h", role="web"), Remarks(notes="keep"))
    await store.create_server(ServerDescriptor(server_id="gone", hostname="gone"))
    await store.delete_server("gone")
    return ServerImports(parts.database, changed=parts.copy.changed)


async def everything(store: MetadataStore) -> list[Any]:
    return list((await store.list_servers(ServerFilter(show_deleted=True))).items)


GOOD = (said("new", role="db", labels=(("team", "shop"),)), said("old", role="db"), said("old2"))


async def test_servers_are_created_and_changed_in_what_is_said(importer: ServerImports, store: MetadataStore) -> None:
    results, applied = await importer.run(GOOD)
    assert applied
    assert [result.outcome for result in results] == [Outcome.CREATED, Outcome.UPDATED, Outcome.CREATED]
    old = await store.get_server("old")
    assert (old.descriptor.hostname, old.descriptor.role, old.notes) == ("h", "db", "keep")
    new = await store.get_server("new")
    assert (new.descriptor.role, new.details.labels) == ("db", (("team", "shop"),))
    before = await everything(store)
    again, applied = await importer.run(GOOD)
    assert not applied
    assert {result.outcome for result in again} == {Outcome.UNCHANGED}
    assert await everything(store) == before  # revisions too
    cleared = replace(said("old"), fields=frozenset(FIELDS))
    await importer.run([cleared])
    after = await store.get_server("old")
    assert (after.descriptor, after.notes) == (ServerDescriptor(server_id="old", hostname="old"), "")


BAD = (
    said("fine"),
    said("gone"),
    said("a/b"),
    said("x", role="r" * 51),
    said("y", labels=(("", "v"),)),
    said("z", notes="\0"),
    said("fine"),
)


async def test_one_that_cannot_be_keeps_all_out_unless_the_others_are_wanted(
    importer: ServerImports, store: MetadataStore
) -> None:
    before = await everything(store)
    for options, is_applied in (({}, False), ({"dry_run": True}, False), ({"dry_run": True, "partial": True}, True)):
        results, applied = await importer.run(BAD, **options)
        assert applied is is_applied
        assert await everything(store) == before
        assert [(result.outcome.name, result.field) for result in results] == [
            ("CREATED", ""),
            ("FAILED", "id"),
            ("FAILED", "id"),
            ("FAILED", "role"),
            ("FAILED", "labels"),
            ("FAILED", "notes"),
            ("FAILED", "id"),
        ]
        assert all(result.message for result in results[1:])
    results, applied = await importer.run(BAD, partial=True)
    assert applied
    assert {record.descriptor.server_id for record in await everything(store)} == {"fine", "gone", "old"}


async def test_what_a_row_does_not_say_of_a_server_that_is_recorded_meanwhile_stays(
    importer: ServerImports, store: MetadataStore, target: DatabaseTarget
) -> None:
    other = await Connector(target, 30.0).connect(30.0)
    recording = other.transaction()
    await recording.start()
    await other.execute("INSERT INTO servers (id, hostname, environment) VALUES ('a', 'a.example', 'production')")
    importing = asyncio.create_task(importer.run([said("a", labels=(("team", "shop"),))]))
    await eventually(lambda: waits_for_a_lock(other))
    await recording.commit()
    await other.close()
    with pytest.raises(Aborted):
        await importing
    await importer.run([said("a", labels=(("team", "shop"),))])
    found = await store.get_server("a")
    assert (found.descriptor.hostname, found.descriptor.environment) == ("a.example", "production")
    assert found.details.labels == (("team", "shop"),)


async def test_so_many_may_be_imported_at_once(importer: ServerImports, store: MetadataStore) -> None:
    fleet = [said(f"s{number}", role="web") for number in range(imports.MAX_IMPORTED_SERVERS + 1)]
    with pytest.raises(InvalidArgument):
        await importer.run(fleet)
    results, _ = await importer.run(fleet[:-1])
    assert {result.outcome for result in results} == {Outcome.CREATED}
    assert (await store.list_servers(ServerFilter())).total_size == imports.MAX_IMPORTED_SERVERS + 1
