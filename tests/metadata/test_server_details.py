"""What people say of a server, and that nobody's change overwrites another's: labels, notes, etags, deleted ones."""

import asyncio

import pytest

from fleet.model import ServerDescriptor, etag_of
from runtime.errors import Aborted, AlreadyExists, InvalidArgument, NotFound
from services.metadata import store_postgres
from services.metadata.queries import ServerQuery
from services.metadata.store import MetadataStore, Remarks, ServerFilter, ServerRecord
from tests.harness import eventually
from tests.metadata.parts import Parts

WEB = Remarks(labels=(("team", "shop"), ("tier", "front")), notes="Ask Ann before a restart.\nRack 7.")


def server(server_id: str, **fields: str) -> ServerDescriptor:
    return ServerDescriptor(server_id=server_id, hostname=server_id, **fields)


def etag(record: ServerRecord) -> str:
    return etag_of(record.details.revision)


async def ids(store: MetadataStore, filters: ServerFilter) -> list[str]:
    return [record.descriptor.server_id for record in (await store.list_servers(filters)).items]


async def test_labels_and_notes_are_kept_and_changed_apart(store: MetadataStore) -> None:
    created = await store.create_server(server("a"), WEB)
    assert (created.details.labels, created.notes, created.details.has_notes) == (WEB.labels, WEB.notes, True)
    assert await store.get_server("a") == created
    relabelled = await store.update_server(server("a"), ["labels"], remarks=Remarks(labels=(("team", "db"),)))
    assert (relabelled.details.labels, relabelled.notes) == ((("team", "db"),), WEB.notes)
    silent = await store.update_server(server("a"), ["notes"])
    assert (silent.details.labels, silent.notes, silent.details.has_notes) == ((("team", "db"),), "", False)
    assert (await store.get_server("a")).descriptor == server("a")


async def test_a_sender_changes_nothing_of_what_people_said(store: MetadataStore) -> None:
    await store.create_server(server("a"), WEB)
    await store.register_servers([server("a", role="web")])
    found = await store.get_server("a")
    assert (found.descriptor.role, found.details.labels, found.notes) == ("web", WEB.labels, WEB.notes)


async def test_of_changes_for_one_revision_one_wins(store: MetadataStore) -> None:
    before = await store.create_server(server("a"))
    tries = [store.update_server(server("a", role=f"r{number}"), ["role"], etag=etag(before)) for number in range(8)]
    results = await asyncio.gather(*tries, return_exceptions=True)
    won = [result for result in results if isinstance(result, ServerRecord)]
    lost = [result for result in results if isinstance(result, Aborted)]
    assert (len(won), len(lost)) == (1, 7)
    assert {error.reason for error in lost} == {"ETAG_MISMATCH"}
    assert (await store.get_server("a")).descriptor == won[0].descriptor
    assert etag(won[0]) != etag(before)


async def test_every_change_has_an_etag_of_its_own(store: MetadataStore) -> None:
    seen = [etag(await store.create_server(server("a")))]
    seen.append(etag(await store.update_server(server("a"), ["role"])))
    await store.register_servers([server("a", role="web")])
    seen.append(etag(await store.get_server("a")))
    await store.register_servers([server("a", role="web")])  # nothing differs
    assert etag(await store.get_server("a")) == seen[-1]
    seen.append(etag(await store.delete_server("a", etag=seen[-1])))
    seen.append(etag(await store.undelete_server("a", etag=seen[-1])))
    assert len(set(seen)) == 5


async def test_delete_and_undelete_compare_etags_too(store: MetadataStore) -> None:
    before = await store.create_server(server("a"))
    after = await store.update_server(server("a"), ["role"], etag=etag(before))
    for stale in (etag(before), "r", "7", "r-1", "rr1", 'W/"r1"', "r" + "9" * 30, "r١"):
        with pytest.raises(Aborted) as refused:
            await store.delete_server("a", etag=stale)
        assert (refused.value.reason, refused.value.field) == ("ETAG_MISMATCH", "etag")
    deleted = await store.delete_server("a", etag=etag(after))
    with pytest.raises(Aborted):
        await store.undelete_server("a", etag=etag(after))
    with pytest.raises(NotFound):  # whatever the etag
        await store.update_server(server("a"), etag=etag(deleted))
    assert (await store.undelete_server("a", etag=etag(deleted))).delete_time is None
    with pytest.raises(NotFound):
        await store.delete_server("nobody", etag="r1")


async def test_whatever_is_wanted_of_a_server_that_is_not_there_the_reason_is_the_one_that_reads_give(
    store: MetadataStore,
) -> None:
    for call in (
        store.get_server("nobody"),
        store.update_server(server("nobody"), ["role"]),
        store.delete_server("nobody"),
        store.undelete_server("nobody"),
    ):
        with pytest.raises(NotFound) as refused:
            await call
        assert (refused.value.reason, refused.value.field) == ("SERVER_NOT_FOUND", "server_id")


async def test_who_sent_no_etag_is_told_of_none_whatever_others_do_meanwhile(
    store: MetadataStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.create_server(server("a"))
    monkeypatch.setattr(store_postgres, "_IS_DELETED", "SELECT true WHERE $1::text = 'a'")  # since a moment ago
    with pytest.raises(AlreadyExists):
        await store.undelete_server("a")
    await store.delete_server("a")
    monkeypatch.setattr(store_postgres, "_IS_DELETED", "SELECT false WHERE $1::text = 'a'")  # not any more
    for call in (store.delete_server("a"), store.update_server(server("a"), ["role"])):
        with pytest.raises(NotFound):
            await call


async def test_servers_are_found_by_label_and_deleted_ones_apart(store: MetadataStore, parts: Parts) -> None:
    for number, labels in enumerate(
        [(("a", "1"), ("b", "2")), (("a", "1"),), (("a", "2"), ("b", "2")), (), (("b", ""),), (("'", '"; --'),)]
    ):
        await store.create_server(server(f"s{number}"), Remarks(labels=labels))
    await store.delete_server("s1")
    wanted = {
        ServerFilter(labels=(("a", "1"),)): ["s0"],
        ServerFilter(labels=(("a", "1"),), show_deleted=True): ["s0", "s1"],
        ServerFilter(labels=(("a", "1"), ("b", "2"))): ["s0"],
        ServerFilter(labels=(("b", ""),)): ["s0", "s2", "s4"],
        ServerFilter(labels=(("c", ""),)): [],
        ServerFilter(labels=(("'", '"; --'),)): ["s5"],
        ServerFilter(only_deleted=True): ["s1"],
        ServerFilter(after_id="s2"): ["s3", "s4", "s5"],
    }
    for filters, expected in wanted.items():
        assert await ids(store, filters) == expected, filters

    async def copied() -> bool:
        return [
            [record.descriptor.server_id for record in (await parts.copy.list(ServerQuery.of(filters, 0, "")))[0]]
            for filters in wanted
        ] == list(wanted.values())

    await eventually(copied)
    assert (await store.list_servers(ServerFilter(after_id="s3"), page_size=1)).total_size == 5


async def test_the_copy_has_all_that_the_record_has(store: MetadataStore, parts: Parts) -> None:
    created = await store.create_server(server("a"), WEB)

    async def copied() -> bool:
        return await parts.copy.get("a") == created

    await eventually(copied)


async def test_who_watches_hears_of_changes_of_others_and_by_hand(store: MetadataStore, parts: Parts) -> None:
    changes = store.watch_servers()
    heard: dict[str, ServerRecord] = {}

    async def listen() -> None:
        async for changed in changes:
            heard.update((record.descriptor.server_id, record) for record in changed)

    listening = asyncio.create_task(listen())
    created = await store.create_server(server("a"))
    await eventually(lambda: heard.get("a") == created)
    async with parts.database.connection() as connection:
        await connection.execute("UPDATE servers SET notes = 'by hand', updated_at = now() WHERE id = 'a'")
    await eventually(lambda: heard["a"].notes == "by hand")
    assert etag(heard["a"]) != etag(created)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await changes.aclose()


@pytest.mark.parametrize(
    ("remarks", "field"),
    [
        (Remarks(labels=tuple((f"k{number}", "") for number in range(65))), "labels"),
        (Remarks(labels=(("", "x"),)), "labels"),
        (Remarks(labels=(("a:b", "x"),)), "labels"),
        (Remarks(labels=(("é" * 32, "x"),)), "labels"),
        (Remarks(labels=(("a", "x" * 64),)), "labels"),
        (Remarks(labels=(("a", "x\0"),)), "labels"),
        (Remarks(labels=(("a\n", "x"),)), "labels"),
        (Remarks(notes="x" * ((64 << 10) + 1)), "notes"),
        (Remarks(notes="a\0"), "notes"),
    ],
)
async def test_labels_and_notes_over_their_limits_are_refused_by_name(
    blind_store: MetadataStore, remarks: Remarks, field: str
) -> None:
    for call in (
        blind_store.create_server(server("a"), remarks),
        blind_store.update_server(server("a"), remarks=remarks),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await call
        assert refused.value.field == field


async def test_the_longest_labels_and_notes_fit(store: MetadataStore) -> None:
    labels = tuple(sorted((f"k{number:02}" + "x" * 60, "日" * 21) for number in range(64)))
    created = await store.create_server(server("a"), Remarks(labels=labels, notes="x" * (64 << 10)))
    assert created.details.labels == labels
    assert len((await store.get_server("a")).notes) == 64 << 10
