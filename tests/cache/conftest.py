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

        async def age(seconds: float) -> None:
            """Every lifetime that is left is so much shorter, which is all of time that Redis knows."""
            async for key in raw.scan_iter():
                left_ms = await raw.pttl(key)
                if left_ms >= 0:
                    await raw.pexpire(key, left_ms - round(seconds * 1_000))

        try:
            yield Kit(*stores, age)
        finally:
            for store in stores:
                await store.close()
            await raw.aclose()


@pytest.fixture
def world() -> World:
    return World()
