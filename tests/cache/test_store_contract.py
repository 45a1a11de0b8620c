"""What every StateStore promises, asked of each adapter: the memory store and a real Redis."""

import math

import pytest
from redis.crc import key_slot

from fleet.model import Metric, MetricSet
from services.cache.model import ServerState, Stored
from services.cache.store_redis import note_key, server_key
from tests.cache.kits import LIST_EXPIRES, SHORT, Kit, everything, facts, get, put
from tests.cache.samples import HEADLINE, T0, World, descriptor, ids, rows_of, set_of, tick

LABELLED = MetricSet(
    (Metric(name="disk_used", labels=(("mount", '/a"b\\c\nd'), ("type", "x,y}"))), Metric(name="plain"))
)


def basic(state: Stored) -> object:
    assert isinstance(state, ServerState)
    shown = [None if math.isnan(value) else value for value in state.headline()]
    who = state.descriptor
    return who.server_id, who.hostname, who.environment, who.role, who.location, state.status, state.observed_ms, shown


async def test_what_was_written_is_read_back(kit: Kit, world: World) -> None:
    world.describe(descriptor("server-00000", report_interval_ms=5_000))
    world.rows(tick(3, T0 + 123))
    await put(kit.store, world, *ids(3))
    for server_id in ids(3):
        assert facts(await get(kit.store, server_id)) == facts(world.live.get(server_id))
    listed = await kit.store.list_basic()
    assert listed is not None
    assert [basic(state) for state in listed] == [basic(state) for state in world.fleet().states]
    assert (await kit.store.count(), await kit.store.healthy()) == (3, 3)


async def test_what_was_never_written_is_none(kit: Kit) -> None:
    assert await get(kit.store, "nobody") is None
    assert await kit.store.list_basic() is None
    assert await kit.store.count() is None
    assert await kit.store.healthy() is None
    assert await everything(kit.store) == []


async def test_a_fleet_of_none_is_not_an_expired_one(kit: Kit, world: World) -> None:
    await put(kit.store, world)
    assert await kit.store.list_basic() == []
    assert (await kit.store.count(), await kit.store.healthy()) == (0, 0)


async def test_a_later_write_wins(kit: Kit, world: World) -> None:
    world.report("a", 10)
    await put(kit.store, world, "a")
    world.report("a", 97, at_ms=T0 + 1)
    await put(kit.store, world, "a")
    assert facts(await get(kit.store, "a")) == facts(world.live.get("a"))
    assert [basic(state) for state in await kit.store.list_basic() or ()] == [basic(world.fleet().states[0])]
    assert (await kit.store.count(), await kit.store.healthy()) == (1, 0)


async def test_a_removed_server_is_gone_and_removing_one_that_is_not_there_is_no_error(kit: Kit, world: World) -> None:
    world.report("a", 10)
    world.report("b", 10)
    await put(kit.store, world, "a", "b")
    world.live.remove(["a", "never-there"])
    await put(kit.store, world, "a", "never-there")
    assert await get(kit.store, "a") is None
    assert facts(await get(kit.store, "b")) == facts(world.live.get("b"))
    listed = await kit.store.list_basic()
    assert listed is not None
    assert [state.server_id for state in listed] == ["b"]
    assert await kit.store.count() == 1


async def test_values_that_are_not_finite_are_absent(kit: Kit, world: World) -> None:
    metric_set = set_of("cpu_usage", "memory_usage", "x", "y")
    world.rows(rows_of(metric_set, {"a": (math.nan, math.inf, -math.inf, 1.5)}, T0))
    await put(kit.store, world, "a")
    assert facts(await get(kit.store, "a")) == facts(world.live.get("a"))
    found = await get(kit.store, "a")
    assert found is not None
    assert found.metrics() == {"y": 1.5}


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e308, 5e-324, -0.0, 123456789.123456789, 2.0**53])
async def test_values_come_back_bit_for_bit(kit: Kit, world: World, value: float) -> None:
    world.rows(rows_of(set_of("x"), {"a": (value,)}, T0))
    await put(kit.store, world, "a")
    found = await get(kit.store, "a")
    assert found is not None
    assert found.metrics()["x"].hex() == value.hex()


async def test_labelled_metrics_and_overlapping_sets(kit: Kit, world: World) -> None:
    world.rows(rows_of(LABELLED, {"a": (1, 2)}, T0), rows_of(set_of("plain", "z"), {"a": (3, 4)}, T0 + 1))
    await put(kit.store, world, "a")
    found = await get(kit.store, "a")
    assert found is not None
    assert found.metrics() == {LABELLED.metrics[0].key: 1, "plain": 3, "z": 4}
    labels = {metric.labels for sample in found.samples for metric in sample.metric_set.metrics}
    assert labels == {LABELLED.metrics[0].labels, ()}


async def test_text_of_any_kind_in_ids_and_names(kit: Kit, world: World) -> None:
    server_id = "größe:ü*[x] 🖥"
    world.describe(descriptor(server_id, hostname='a"b\\c', environment="", location="東京"))
    await put(kit.store, world, server_id)
    assert facts(await get(kit.store, server_id)) == facts(world.live.get(server_id))
    loaded = await everything(kit.store)
    assert [state.server_id for state in loaded] == [server_id]


async def test_a_server_that_never_reported(kit: Kit, world: World) -> None:
    world.describe(descriptor("a"))
    await put(kit.store, world, "a")
    found = await get(kit.store, "a")
    assert found is not None
    assert (found.observed_ms, found.received_ms, found.samples) == (None, None, ())


async def test_everything_ends_with_its_lifetime_and_lives_on_with_the_next_write(kit: Kit, world: World) -> None:
    world.report("a", 10)
    await put(kit.short, world, "a")
    assert await get(kit.short, "a") is not None
    assert await kit.short.list_basic() is not None
    assert (await kit.short.count(), await kit.short.healthy()) == (1, 1)
    await kit.pass_time(SHORT.all_s)
    assert (await kit.short.list_basic(), await kit.short.healthy()) == (None, None)
    await kit.pass_time(SHORT.server_s - SHORT.all_s)
    assert (await get(kit.short, "a"), await kit.short.count()) == (None, None)
    await put(kit.short, world, "a")
    assert await get(kit.short, "a") is not None
    assert await kit.short.count() == 1


async def test_a_write_says_whether_the_one_before_is_still_there(kit: Kit, world: World) -> None:
    assert not (await put(kit.short, world)).intact
    assert (await put(kit.short, world)).intact
    await kit.pass_time(SHORT.all_s)
    assert (await put(kit.short, world)).intact
    await kit.pass_time(SHORT.count_s)
    assert not (await put(kit.short, world)).intact


async def test_writing_nobody_keeps_what_is_known_of_all(kit: Kit, world: World) -> None:
    world.report("a", 10)
    await put(kit.short, world, "a")
    await kit.pass_time(SHORT.all_s)
    await put(kit.short, world)
    assert await kit.short.list_basic() is not None
    await kit.pass_time(SHORT.server_s - SHORT.all_s)
    assert await get(kit.short, "a") is None
    assert await kit.short.count() == 1


async def test_loading_gives_every_server_once_also_after_the_list_has_expired(kit: Kit, world: World) -> None:
    world.rows(tick(250, T0))
    await put(kit.list_expires, world, *ids(250))
    for _ in range(2):
        loaded = await everything(kit.list_expires)
        assert sorted(state.server_id for state in loaded) == list(ids(250))
        by_id = {state.server_id: state for state in loaded}
        assert all(facts(by_id[server_id]) == facts(world.live.get(server_id)) for server_id in ids(250))
        await kit.pass_time(LIST_EXPIRES.all_s)
    assert await kit.list_expires.list_basic() is None


async def test_a_server_that_only_the_list_has_is_loaded_from_there(kit: Kit, world: World) -> None:
    world.report("a", 10)
    await put(kit.store, world)  # only what is known of all
    loaded = await everything(kit.store)
    assert [basic(state) for state in loaded] == [basic(state) for state in world.fleet().states]


async def test_many_servers_are_written_whole(kit: Kit, world: World) -> None:
    world.rows(rows_of(HEADLINE, dict.fromkeys(ids(1203), (1, 2, 3)), T0))
    await put(kit.store, world, *ids(1_203))
    assert await kit.store.count() == 1_203
    assert facts(await get(kit.store, "server-01202")) == facts(world.live.get("server-01202"))
    listed = await kit.store.list_basic()
    assert listed is not None
    assert [state.server_id for state in listed] == list(ids(1_203))


async def test_it_says_what_it_is(kit: Kit) -> None:
    first, second = await kit.store.ping(), await kit.store.ping()
    assert first == second
    assert first.version
    assert first.life


async def test_metric_sets_come_back_as_they_were_split(kit: Kit, world: World) -> None:
    left, right = set_of("x", "y", "z"), set_of("z", "w")
    world.rows(rows_of(left, {"a": (1, math.nan, 3)}, T0), rows_of(right, {"a": (4, 5)}, T0 + 1))
    await put(kit.store, world, "a")
    fresh = World("e2")
    for metric_set in (left, right):
        fresh.live._sets.add(metric_set)
    fresh.live.absorb(await everything(kit.store))
    mine, theirs = world.live.get("a"), fresh.live.get("a")
    assert mine is not None
    assert theirs is not None
    assert [(one.metric_set, one.time_ms, one.received_ms) for one in theirs.samples] == [
        (one.metric_set, one.time_ms, one.received_ms) for one in mine.samples
    ]
    assert theirs.metrics() == mine.metrics()


@pytest.mark.parametrize("server_id", ["a{b}c", "a}b", "}{", "{", "{}", "a{}b{c}"])
def test_a_note_lies_in_the_slot_of_its_key(server_id: str) -> None:
    key = server_key(server_id)
    assert key_slot(note_key(key).encode()) == key_slot(key.encode())
    assert note_key(key) != key
