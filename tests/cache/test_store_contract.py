"""What every StateStore promises, asked of each adapter: the memory store and a real Redis."""

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

import pytest
import pytest_asyncio
from redis.crc import key_slot

from fleet.model import Metric, MetricSet
from runtime.clock import ManualClock
from services.cache.model import ServerState, Stored
from services.cache.store import LIFETIMES, Lifetimes, StateStore, Written
from services.cache.store_memory import MemoryStateStore
from services.cache.store_redis import RedisStateStore, note_key, server_key
from tests.cache.samples import HEADLINE, T0, World, descriptor, ids, rows_of, set_of, tick
from tests.harness import eventually
from tests.harness.redis import redis_server

SHORT = Lifetimes(all_s=0.4, count_s=0.8, healthy_s=0.4, server_s=0.8)
LIST_EXPIRES = Lifetimes(all_s=0.2)
LABELLED = MetricSet(
    (Metric(name="disk_used", labels=(("mount", '/a"b\\c\nd'), ("type", "x,y}"))), Metric(name="plain"))
)


@dataclass
class Kit:
    """A store under test, others on the same data with shorter lifetimes, and how time passes for it."""

    store: StateStore
    short: StateStore
    list_expires: StateStore
    pass_time: Callable[[float], Awaitable[None]]


@pytest_asyncio.fixture(params=["memory", "redis"])
async def kit(request: pytest.FixtureRequest) -> AsyncIterator[Kit]:
    if request.param == "memory":
        clock = ManualClock()

        async def advance(seconds: float) -> None:
            clock.advance(seconds)

        yield Kit(*(MemoryStateStore(clock, lives) for lives in (LIFETIMES, SHORT, LIST_EXPIRES)), advance)
        return
    async with redis_server() as server:
        stores = [RedisStateStore(server.url, lives) for lives in (LIFETIMES, SHORT, LIST_EXPIRES)]
        raw = server.client()

        async def wait(seconds: float) -> None:
            seconds_, micros = await raw.time()
            ends = seconds_ + micros / 1e6 + seconds

            async def passed() -> bool:
                now_s, now_us = await raw.time()
                return bool(now_s + now_us / 1e6 >= ends)

            await eventually(passed)

        try:
            yield Kit(*stores, wait)
        finally:
            for store in stores:
                await store.close()
            await raw.aclose()


@pytest.fixture
def world() -> World:
    return World()


def facts(state: Stored | None) -> object:
    """What a store must give back of a state."""
    assert isinstance(state, ServerState)
    return state.descriptor, state.status, state.observed_ms, state.received_ms, state.metrics()


def basic(state: Stored) -> object:
    assert isinstance(state, ServerState)
    shown = [None if math.isnan(value) else value for value in state.headline()]
    who = state.descriptor
    return who.server_id, who.hostname, who.environment, who.role, who.location, state.status, state.observed_ms, shown


async def put(store: StateStore, world: World, *server_ids: str) -> Written:
    """Writes these as they are now, removed ones too, and the fleet."""
    stored = [found for server_id in server_ids if (found := world.live.stored(server_id)) is not None]
    written = await store.write(stored, world.live.bases, world.fleet())
    newer = {one.server_id for one in written.newer}
    world.live.bases.update({one.server_id: one.version for one in stored if one.server_id not in newer})
    return written


async def get(store: StateStore, server_id: str) -> ServerState | None:
    found = [one for one in await store.read([server_id]) if isinstance(one, ServerState)]
    return found[0] if found else None


async def everything(store: StateStore, versions: Mapping[str, str] | None = None) -> list[Stored]:
    return [stored async for part in store.differences(versions or {}) for stored in part.found]


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


async def test_who_has_not_seen_what_is_there_gets_it_back_and_changes_nothing(kit: Kit, world: World) -> None:
    old = World("e2")
    old.report("a", 50)
    await put(kit.store, old, "a")
    world.live.absorb(await everything(kit.store))
    world.clock.advance(1)
    world.report("a", 97)
    assert not (await put(kit.store, world, "a")).newer
    old.clock.advance(100)
    old.report("a", 60, at_ms=T0 + 1)  # a later stamp, but made without seeing the newer row
    written = await put(kit.store, old, "a")
    assert [facts(one) for one in written.newer] == [facts(world.live.get("a"))]
    assert facts(await get(kit.store, "a")) == facts(world.live.get("a"))
    absorbed = old.live.absorb(written.newer)
    assert (absorbed.changed, absorbed.ahead) == (("a",), ())
    assert facts(old.live.get("a")) == facts(world.live.get("a"))


async def test_an_older_write_of_the_same_writer_that_arrives_later_changes_nothing(kit: Kit, world: World) -> None:
    world.report("a", 10)
    late, bases = [world.live.stored("a")], dict(world.live.bases)
    world.clock.advance(1)
    world.report("a", 97)
    await put(kit.store, world, "a")
    written = await kit.store.write(late, bases, None)  # type: ignore[arg-type]
    assert len(written.newer) == 1
    assert facts(await get(kit.store, "a")) == facts(world.live.get("a"))


async def test_a_write_whose_answer_was_lost_may_be_followed_by_a_newer_one(kit: Kit, world: World) -> None:
    world.report("a", 10)
    stored = world.live.stored("a")
    assert stored is not None
    await kit.store.write([stored], {}, None)  # the writer does not learn that this was done
    world.clock.advance(1)
    world.report("a", 97)
    assert not (await put(kit.store, world, "a")).newer
    assert facts(await get(kit.store, "a")) == facts(world.live.get("a"))


async def test_a_removed_server_stays_removed_for_who_has_not_heard_until_it_is_admitted(
    kit: Kit, world: World
) -> None:
    other = World("e2")
    world.report("a", 10)
    await put(kit.store, world, "a")
    other.live.absorb(await everything(kit.store))
    world.clock.advance(1)
    world.live.remove(["a"])
    assert not (await put(kit.store, world, "a")).newer
    other.clock.advance(60)
    other.report("a", 20)
    written = await put(kit.store, other, "a")
    assert await get(kit.store, "a") is None
    assert other.live.absorb(written.newer).ahead == ()
    assert other.live.is_removed("a")
    world.clock.advance(120)
    world.describe(descriptor("a"), admit_removed=True)
    assert not (await put(kit.store, world, "a")).newer
    assert await get(kit.store, "a") is not None
    other.live.absorb(await everything(kit.store))
    assert other.report("a", 30).changed == ("a",)


async def test_who_has_not_heard_of_a_fleet_does_not_replace_it(kit: Kit, world: World) -> None:
    other = World("e2")
    other.report("old", 10)
    assert (await put(kit.store, other)).listed
    world.live.fleet_bases.append(other.fleet().version)
    older = world.fleet()
    world.report("a", 10)
    assert (await put(kit.store, world)).listed
    other.clock.advance(60)
    other.report("old", 11)  # a later stamp, but made without the other's
    assert not (await put(kit.store, other)).listed
    assert [state.server_id for state in await kit.store.list_basic() or ()] == ["a"]
    world.clock.advance(1)
    world.report("b", 10)
    assert (await put(kit.store, world)).listed
    assert not (await kit.store.write([], {}, older)).listed  # our own, arriving late
    assert await kit.store.count() == 2
    fleets = [fleet async for part in kit.store.differences({}) for fleet in part.fleets]
    other.live.fleet_bases.extend(fleets)
    assert (await put(kit.store, other)).listed
    assert await kit.store.count() == 1


async def test_only_what_differs_is_read_again_and_what_is_missing_is_named(kit: Kit, world: World) -> None:
    for server_id in ("a", "b", "c"):
        world.report(server_id, 10)
    await put(kit.store, world, "a", "b", "c")
    versions = {state.server_id: state.version for state in world.fleet().states}
    assert await everything(kit.store, versions) == []
    world.clock.advance(1)
    world.report("b", 20)
    world.live.remove(["c"])
    await put(kit.store, world, "b", "c")
    parts = [part async for part in kit.store.differences(versions | {"d": "another"})]
    assert sorted(stored.server_id for part in parts for stored in part.found) == ["b", "c"]
    assert [server_id for part in parts for server_id in part.missing] == ["d"]


async def test_a_base_that_is_gone_shows_as_lost(kit: Kit, world: World) -> None:
    world.report("a", 10)
    assert not (await put(kit.store, world, "a")).lost
    assert not (await put(kit.store, world, "a")).lost
    world.report("b", 10)
    world.live.bases["b"] = "another"
    assert (await put(kit.store, world, "b")).lost


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
