"""The contract of the store (`services.metadata.store`) for servers, held by PostgreSQL 18 and 15 alike."""

import asyncio
from dataclasses import replace

import pytest

from fleet.model import ServerDescriptor
from runtime import paging
from runtime.errors import AlreadyExists, InvalidArgument, NotFound
from services.metadata import checks
from services.metadata.connector import Connector
from services.metadata.store import InteractionFilter, MetadataStore, NewInteraction, ServerFilter
from services.metadata.store_connection import Database
from services.metadata.target import DatabaseTarget
from tests.harness import eventually
from tests.metadata.parts import waits_for_a_lock

ALL = ServerFilter()
INJECTIONS = (
    "'; DROP TABLE servers; --",
    "' OR '1'='1",
    '"; DELETE FROM servers; --',
    "$1",
    "%s %(x)s {x}",
    "\\'; SELECT pg_sleep(9); --",
    "$$; DROP TABLE servers; $$",
    "ünïcødé 日本 😀",
)


def server(server_id: str, **fields: object) -> ServerDescriptor:
    return ServerDescriptor(**({"server_id": server_id, "hostname": f"{server_id}.example"} | fields))  # type: ignore[arg-type]


async def listed(store: MetadataStore, filters: ServerFilter = ALL, page_size: int = 0) -> list[str]:
    found, token = [], ""
    while True:
        page = await store.list_servers(filters, page_size=page_size, page_token=token)
        found += [record.descriptor.server_id for record in page.items]
        token = page.next_page_token
        if not token:
            return found


async def test_a_created_server_comes_back_as_it_was_given(store: MetadataStore) -> None:
    given = server("web-1", environment="production", role="web", location="eu-1", report_interval_ms=15_000)
    created = await store.create_server(given)
    assert created.descriptor == given
    assert created.create_time == created.update_time
    assert created.create_time.utcoffset() is not None
    assert created.delete_time is None
    assert await store.get_server("web-1") == created
    plain = await store.create_server(ServerDescriptor(server_id="plain", hostname=""))
    assert plain.descriptor == ServerDescriptor(server_id="plain", hostname="plain")


async def test_missing_and_taken_ids_are_told(store: MetadataStore) -> None:
    with pytest.raises(NotFound):
        await store.get_server("nobody")
    await store.create_server(server("a"))
    with pytest.raises(AlreadyExists):
        await store.create_server(server("a"))
    await store.delete_server("a")
    with pytest.raises(AlreadyExists):
        await store.create_server(server("a"))


async def test_update_changes_the_named_fields_only(store: MetadataStore) -> None:
    before = await store.create_server(server("a", environment="prod", role="web", location="eu"))
    changed = ServerDescriptor(server_id="a", hostname="new", environment="", role="db", report_interval_ms=5_000)
    after = await store.update_server(changed, ["environment", "role"])
    assert after.descriptor == server("a", role="db", location="eu")
    assert after.update_time > before.update_time
    assert after.create_time == before.create_time
    assert (await store.update_server(changed)).descriptor == changed
    with pytest.raises(InvalidArgument) as refused:
        await store.update_server(changed, ["hostname", "server_id"])
    assert refused.value.field == "update_mask"
    with pytest.raises(NotFound):
        await store.update_server(server("nobody"))


async def test_delete_hides_and_undelete_restores(store: MetadataStore) -> None:
    await store.create_server(server("a"))
    await store.create_server(server("b"))
    deleted = await store.delete_server("a")
    assert deleted.delete_time is not None
    for refused in (store.get_server("a"), store.delete_server("a"), store.update_server(server("a"))):
        with pytest.raises(NotFound):
            await refused
    assert await listed(store) == ["b"]
    assert await listed(store, ServerFilter(show_deleted=True)) == ["a", "b"]
    restored = await store.undelete_server("a")
    assert restored.delete_time is None
    assert restored.create_time == deleted.create_time
    assert await listed(store) == ["a", "b"]
    with pytest.raises(AlreadyExists):
        await store.undelete_server("a")
    with pytest.raises(NotFound):
        await store.undelete_server("nobody")


async def test_listing_filters_orders_and_counts(store: MetadataStore) -> None:
    ids = ["a", "B", "_", "ä", "a1", "A", "日", "10", "9"]
    for number, server_id in enumerate(ids):
        role = "web" if number % 2 else "db"
        await store.create_server(server(server_id, environment="prod" if number < 6 else "test", role=role))
    assert await listed(store) == sorted(ids, key=str.encode)
    assert await listed(store, page_size=1) == sorted(ids, key=str.encode)
    prod = await store.list_servers(ServerFilter(environment="prod", role="web"), page_size=2)
    assert [r.descriptor.server_id for r in prod.items] == sorted(["B", "ä", "A"], key=str.encode)[:2]
    assert prod.total_size == 3
    assert prod.next_page_token
    assert await listed(store, ServerFilter(ids=("9", "a", "nobody"))) == ["9", "a"]
    nothing = await store.list_servers(ServerFilter(environment="PROD"))
    assert (nothing.items, nothing.total_size, nothing.next_page_token) == ((), 0, "")


async def test_pages_hold_every_server_once_while_others_come_and_go(store: MetadataStore) -> None:
    lasting = [f"s{number:03}" for number in range(0, 40, 2)]
    await store.register_servers([server(server_id) for server_id in lasting])
    found, token, size = [], "", 7
    while True:
        page = await store.list_servers(ALL, page_size=size, page_token=token)
        found += [record.descriptor.server_id for record in page.items]
        if not (token := page.next_page_token):
            break
        await store.create_server(server(found[-1] + "-later"))
        await store.create_server(server("a" + found[-1]))  # sorts before everything shown
        await store.delete_server(found[0]) if len(found) == size else None
    assert [server_id for server_id in found if server_id in lasting] == lasting
    assert len(found) == len(set(found))


@pytest.mark.parametrize("bad", ["x", "....", "aaaaaaaaaaaaaaaaaaaaaaaa", "é", "A" * 5000, "AAAA=AAA", "\0"])
async def test_a_page_token_that_is_none_is_refused(blind_store: MetadataStore, bad: str) -> None:
    for listing in (
        blind_store.list_servers(ALL, page_token=bad),
        blind_store.list_interactions(InteractionFilter(), page_token=bad),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await listing
        assert refused.value.field == "page_token"


async def test_a_page_token_is_bound_to_its_listing_and_filters(store: MetadataStore) -> None:
    await store.register_servers([server("a", role="web"), server("b", role="web"), server("c", role="web")])
    token = (await store.list_servers(ServerFilter(role="web"), page_size=1)).next_page_token
    assert (await store.list_servers(ServerFilter(role="web"), page_size=2, page_token=token)).total_size == 3
    swapped = token[:-1] + ("A" if token[-1] != "A" else "B")
    for refused in (
        store.list_servers(ALL, page_token=token),
        store.list_servers(ServerFilter(role="web", show_deleted=True), page_token=token),
        store.list_servers(ServerFilter(role="web"), page_token=swapped),
        store.list_servers(ServerFilter(role="web"), page_token=token[:-4]),
        store.list_interactions(InteractionFilter(), page_token=token),
    ):
        with pytest.raises(InvalidArgument) as error:
            await refused
        assert error.value.field == "page_token"


@pytest.mark.parametrize("key", [["a\0b"], ["x" * 300], [""]])
async def test_a_forged_server_token_is_refused_like_any_input(
    blind_store: MetadataStore, key: list[str | int]
) -> None:
    token = paging.page_token("servers", ["", "", None, False], key)
    with pytest.raises(InvalidArgument) as refused:
        await blind_store.list_servers(ALL, page_token=token)
    assert refused.value.field == "page_token"


async def test_page_sizes_have_a_default_and_a_maximum(store: MetadataStore) -> None:
    await store.register_servers([server(f"s{number:04}") for number in range(1_101)])
    first = await store.list_servers(ALL)
    assert (len(first.items), first.total_size) == (100, 1_101)
    assert len((await store.list_servers(ALL, page_size=2_000)).items) == 1_000
    for refused in (store.list_servers(ALL, page_size=-1), store.list_interactions(InteractionFilter(), page_size=-1)):
        with pytest.raises(InvalidArgument) as error:
            await refused
        assert error.value.field == "page_size"


async def test_register_adds_and_updates_what_differs(store: MetadataStore) -> None:
    assert await store.register_servers([]) == 0
    both = [server("a", environment="prod", report_interval_ms=10_000), server("b")]
    assert await store.register_servers(both) == 2
    assert await store.register_servers(both) == 0
    assert await store.register_servers([server("a", environment="test"), server("b"), server("c")]) == 2
    # What a sender leaves out stays as it was recorded.
    assert await store.register_servers([ServerDescriptor(server_id="a", hostname="")]) == 0
    kept = (await store.get_server("a")).descriptor
    assert kept == server("a", environment="test", report_interval_ms=10_000)
    # Of several descriptors of one server the last counts.
    assert await store.register_servers([server("d", role="one"), server("d", role="two")]) == 1
    assert (await store.get_server("d")).descriptor.role == "two"


async def test_register_neither_writes_nor_locks_what_does_not_differ(store: MetadataStore, database: Database) -> None:
    await store.register_servers([server("a", role="web"), server("b", role="web")])
    physical = "SELECT id, ctid::text, xmin::text, xmax::text FROM servers ORDER BY id"
    async with database.connection() as connection:
        before = [tuple(row) for row in await connection.fetch(physical)]
    assert await store.register_servers([server("a", role="web"), server("b", role="db")]) == 1
    async with database.connection() as connection:
        after = [tuple(row) for row in await connection.fetch(physical)]
    assert after[0] == before[0]
    assert after[1] != before[1]


async def test_what_a_sender_does_not_say_stays_as_somebody_changes_it_meanwhile(
    store: MetadataStore, target: DatabaseTarget
) -> None:
    await store.create_server(server("a", environment="staging", role="web", location="here", report_interval_ms=1_000))
    other = await Connector(target, 30.0).connect(30.0)
    change = other.transaction()
    await change.start()
    await other.execute("UPDATE servers SET hostname = 'new', environment = 'production', location = NULL")
    sent = ServerDescriptor(server_id="a", hostname="", role="db")
    registering = asyncio.create_task(store.register_servers([sent]))
    await eventually(lambda: waits_for_a_lock(other))
    await change.commit()
    await other.close()
    assert await registering == 1
    said = server("a", hostname="new", environment="production", role="db", report_interval_ms=1_000)
    assert (await store.get_server("a")).descriptor == said


async def test_register_leaves_a_deleted_server_deleted(store: MetadataStore) -> None:
    await store.register_servers([server("a")])
    await store.delete_server("a")
    assert await store.register_servers([server("a")]) == 0
    assert await store.register_servers([server("a", role="db")]) == 1
    assert await listed(store) == []
    with pytest.raises(NotFound):
        await store.get_server("a")
    assert (await store.undelete_server("a")).descriptor.role == "db"


async def test_concurrent_registrations_do_not_deadlock(store: MetadataStore) -> None:
    ids = [f"s{number}" for number in range(60)]
    rounds = [
        store.register_servers([server(i, role=f"r{n}") for i in (ids if n % 2 else reversed(ids))]) for n in range(12)
    ]
    assert all(changed == 60 for changed in await asyncio.gather(*rounds))
    assert (await store.list_servers(ALL)).total_size == 60


async def test_registering_the_whole_fleet_at_once_works_and_is_bounded(store: MetadataStore) -> None:
    fleet = [server(f"s{number}") for number in range(checks.MAX_REGISTERED_SERVERS + 1)]
    with pytest.raises(InvalidArgument) as refused:
        await store.register_servers(fleet)
    assert refused.value.field == "servers"
    assert await store.register_servers(fleet[:-1]) == checks.MAX_REGISTERED_SERVERS


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("server_id", ""),
        ("server_id", "x" * 256),
        ("server_id", "a/b"),
        ("server_id", "a\0b"),
        ("hostname", "x" * 256),
        ("hostname", "a\0"),
        ("environment", "x" * 51),
        ("environment", "\ud800"),
        ("role", "x" * 51),
        ("role", "a\0"),
        ("location", "x" * 101),
        ("location", "a\0"),
        ("report_interval_ms", -1),
        ("report_interval_ms", 86_400_001),
    ],
)
async def test_fields_that_no_column_can_hold_are_refused_by_name(
    blind_store: MetadataStore, field: str, bad: object
) -> None:
    wrong = replace(server("ok"), **{field: bad})  # type: ignore[arg-type]
    name = field.removesuffix("_ms")
    for call, where in (
        (blind_store.create_server(wrong), "descriptor"),
        (blind_store.update_server(wrong), "descriptor"),
        (blind_store.register_servers([server("fine"), wrong]), "servers[1]"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await call
        assert refused.value.field == f"{where}.{name}"


async def test_the_longest_texts_fit(store: MetadataStore) -> None:
    longest = ServerDescriptor(
        server_id="😀" * 255,
        hostname="日" * 255,
        environment="é" * 50,
        role="日" * 50,
        location="😀" * 100,
        report_interval_ms=86_400_000,
    )
    assert (await store.create_server(longest)).descriptor == longest
    await store.create_server(replace(longest, server_id="😀" * 254 + "😁"))
    assert len(await listed(store, page_size=1)) == 2  # the token of such an id works too


@pytest.mark.parametrize("bad", ["", "a\0", "x" * 256])
async def test_ids_that_no_server_can_have_are_refused_when_looked_up(blind_store: MetadataStore, bad: str) -> None:
    for call in (blind_store.get_server(bad), blind_store.delete_server(bad), blind_store.undelete_server(bad)):
        with pytest.raises(InvalidArgument) as refused:
            await call
        assert refused.value.field == "server_id"
    with pytest.raises(InvalidArgument) as refused:
        await blind_store.list_servers(ServerFilter(ids=("a", bad)))
    assert refused.value.field == "ids[1]"


@pytest.mark.parametrize(
    ("filters", "field"),
    [
        (ServerFilter(environment="a\0"), "environment"),
        (ServerFilter(environment="x" * 51), "environment"),
        (ServerFilter(role="a\0"), "role"),
        (ServerFilter(ids=tuple("x" * 1_001)), "ids"),
    ],
)
async def test_bad_filters_are_refused_by_name(blind_store: MetadataStore, filters: ServerFilter, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await blind_store.list_servers(filters)
    assert refused.value.field == field


@pytest.mark.parametrize("text", INJECTIONS)
async def test_hostile_text_stays_data(store: MetadataStore, text: str) -> None:
    hostile = ServerDescriptor(server_id=text, hostname=text, environment=text, role=text, location=text)
    await store.create_server(hostile)
    await store.update_server(hostile)
    await store.register_servers([hostile, server("other", role="web")])
    assert (await store.get_server(text)).descriptor == hostile
    assert await listed(store, ServerFilter(environment=text, role=text, ids=(text,))) == [text]
    await store.delete_server(text)
    await store.undelete_server(text)
    said = await store.record_interaction(NewInteraction(session_id=text, query=text, response=text))
    assert (said.session_id, said.query, said.response) == (text, text, text)
    found = await store.list_interactions(InteractionFilter(session_id=text))
    assert [interaction.id for interaction in found.items] == [said.id]
    assert (await store.list_servers(ALL)).total_size == 2
