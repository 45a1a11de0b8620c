"""What every StateStore promises when several write: nobody undoes what he has not seen, and he is told of it."""

from tests.cache.kits import SHORT, Kit, everything, facts, get, put
from tests.cache.samples import T0, World, descriptor


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


async def test_a_state_that_has_expired_stands_in_nobodys_way_and_is_missing(kit: Kit, world: World) -> None:
    """As after a cache was away for longer than a document lives: what a removal is known by lives for a day."""
    before = World("e0")
    before.report("a", 10)
    before.report("gone", 10)
    before.live.remove(["gone"])
    await put(kit.short, before, "a", "gone")
    await kit.pass_time(SHORT.server_s)
    world.clock.advance(1)
    world.report("a", 20)
    world.report("gone", 20)
    missing = [one async for part in kit.short.differences({"a": "another"}) for one in part.missing]
    assert missing == ["a"]
    written = await put(kit.short, world, "a", "gone")
    assert [one.server_id for one in written.newer] == ["gone"]
    assert not written.failed
    assert facts(await get(kit.short, "a")) == facts(world.live.get("a"))
