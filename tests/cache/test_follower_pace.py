"""The pace of the follower: how long it waits, what waits, in which order it writes; its stores fail or hang."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

import pytest

from fleet.health import ServerStatus
from runtime.clock import ManualClock, SystemClock
from runtime.errors import Unavailable
from services.cache import core as core_module
from services.cache.model import Fleet, ServerState, Stored
from services.cache.state import Update
from services.cache.store import Difference, Written
from services.cache.store_memory import MemoryStateStore
from tests.cache.samples import HEADLINE, World, ids, rows_of
from tests.cache.test_follower import caching
from tests.harness import eventually


class FailingStore(MemoryStateStore):
    """A memory store that refuses writes while `down`."""

    down = False
    writes = 0
    last_written: tuple[str, ...] = ()
    gate: asyncio.Event | None = None

    async def write(self, changed: Sequence[Stored], bases: Mapping[str, str], fleet: Fleet | None) -> Written:
        self.writes += 1
        if self.gate is not None:
            await self.gate.wait()
        self.last_written = tuple(stored.server_id for stored in changed)
        if self.down:
            raise Unavailable("down")
        return await super().write(changed, bases, fleet)

    async def get(self, server_id: str) -> ServerState | None:
        found = [one for one in await self.read([server_id]) if isinstance(one, ServerState)]
        return found[0] if found else None


class HangingStore(MemoryStateStore):
    """A memory store that gives one server back and then nothing more."""

    async def differences(self, versions: Mapping[str, str]) -> AsyncGenerator[Difference, None]:
        world = World()
        world.report("a", 10)
        yield Difference(found=list(world.fleet().states))
        await asyncio.Event().wait()


async def test_reading_back_takes_a_bounded_time_and_what_came_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "LOAD_TIMEOUT_S", 0.05)
    async with asyncio.timeout(5), caching(HangingStore(SystemClock())) as cache:
        assert cache.get("a").headline()[0] == 10


async def test_nothing_expires_while_the_service_lives_though_nothing_changes() -> None:
    clock = ManualClock()
    store = FailingStore(clock)
    async with caching(store, clock) as cache:
        await cache.update(Update(batches=[rows_of(HEADLINE, {"a": (1, 1, 1)}, clock.now_ms())]), [HEADLINE])
        await eventually(lambda: store.writes >= 1)
        for second in range(400):
            clock.advance(1)
            for _ in range(8):
                await asyncio.sleep(0)
            assert await store.list_basic() is not None, second
            assert await store.healthy() is not None, second
            assert await store.get("a") is not None, second
        found = await store.get("a")
        assert found is not None
        assert found.status == ServerStatus.OFFLINE
        assert store.writes < 40  # not a write a second


async def test_an_outage_of_any_length_keeps_one_slot_a_server_and_retries_with_pauses() -> None:
    clock = ManualClock()
    store = FailingStore(clock)
    async with caching(store, clock) as cache:
        store.down = True
        for step in range(360):
            values = dict.fromkeys(ids(3), (step % 70, 1, 1))
            await cache.update(Update(batches=[rows_of(HEADLINE, values, clock.now_ms())]), [HEADLINE])
            clock.advance(10)
            for _ in range(8):
                await asyncio.sleep(0)
        assert cache.follower.lag()[0] == 3 * 3
        assert 3_580 <= cache.follower.lag()[1] <= 3_600
        assert store.writes < 800
        store.down = False
        clock.advance(10)
        await eventually(lambda: cache.follower.lag() == (0, 0.0))
        found = await store.get(ids(1)[0])
        assert found is not None
        assert found.headline()[0] == 359 % 70


async def settle() -> None:
    """Lets every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_after_a_failed_write_every_server_is_written_and_the_oldest_wait_counts() -> None:
    clock = ManualClock()
    store = FailingStore(clock)

    async def change(*server_ids: str) -> None:
        rows = rows_of(HEADLINE, dict.fromkeys(server_ids, (1, 1, 1)), clock.now_ms())
        await cache.update(Update(batches=[rows]), [HEADLINE])
        await settle()

    async with caching(store, clock) as cache:
        await change("a", "b", "c")
        clock.advance(1)
        await settle()
        store.down, store.gate = True, asyncio.Event()
        await change("a")  # its write hangs ...
        clock.advance(10)
        await change("a")  # ... while it changes again ...
        store.gate.set()
        await settle()  # ... and fails
        assert cache.follower.lag() == (3, 10.0)
        store.down = False
        clock.advance(3)
        await settle()
        assert sorted(store.last_written) == ["a", "b", "c"]


async def test_over_two_thousand_servers_are_spread_over_the_tick_and_fewer_are_written_at_once() -> None:
    clock = ManualClock()
    store = FailingStore(clock)
    async with caching(store, clock) as cache:
        for count, at_once in ((2_000, 20), (2_100, 1)):
            await settle()
            clock.advance(10)
            await settle()
            rows = rows_of(HEADLINE, dict.fromkeys(ids(count), (1, 1, 1)), clock.now_ms())
            cache._live.update(Update(batches=[rows]))  # in one go, as a request of many small rows is
            store.writes = 0
            cache.follower.mark(ids(count))
            for _ in range(100):
                await settle()
            assert store.writes == at_once
            for _ in range(20):
                clock.advance(0.032)
                await settle()
        assert store.writes == 21
