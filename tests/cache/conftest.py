"""A real Redis for the tests that need one."""

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.harness.redis import RedisServer, redis_server


@pytest_asyncio.fixture
async def redis() -> AsyncIterator[RedisServer]:
    async with redis_server() as server:
        yield server
