"""A real Redis for the tests that need one, and each StateStore for those of what all promise."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from runtime.clock import ManualClock
from services.cache.store import LIFETIMES
from services.cache.store_memory import MemoryStateStore
from services.cache.store_redis import RedisStateStore
from tests.cache.kits import LIST_EXPIRES, SHORT, Kit
from tests.cache.samples import World
from tests.harness import eventually
from tests.harness.redis import RedisServer, redis_server


@pytest_asyncio.fixture
async def redis() -> AsyncIterator[RedisServer]:
    async with redis_server() as server:
        yield server


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
