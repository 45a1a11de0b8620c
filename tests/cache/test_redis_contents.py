"""Redis holds what has expired, or what others put there: nobody stops for it, and it is replaced."""

import contextlib

import orjson
import pytest
from redis.asyncio import Redis

from services.cache.store_redis import note_key
from tests.cache.replicas import holds, replica, report
from tests.harness import eventually
from tests.harness.redis import RedisServer

NOT_OURS = [b"text", b"[]", b"{}", b"null", b"1", b'{"id":"a"}', b"\xff"]


async def test_a_cache_that_was_away_for_longer_than_documents_live_writes_its_servers_again(
    redis: RedisServer,
) -> None:
    async with redis.client() as raw:
        async with replica(redis.url, "e1") as cache:
            await report(cache, "a", "b")
            await eventually(lambda: holds(raw, cache))
        for key in await raw.keys():
            left_ms = await raw.pttl(key)
            await raw.pexpire(key, left_ms - 300_000)  # as five minutes later
        assert [key for key in await raw.keys() if not key.startswith(b"openmanager:")] == []
        async with replica(redis.url, "e2") as cache:
            await report(cache, "a", "b", cpu=20)
            await eventually(lambda: holds(raw, cache))


@pytest.mark.parametrize("document", NOT_OURS)
async def test_a_document_that_is_not_ours_is_replaced(redis: RedisServer, document: bytes) -> None:
    async with redis.client() as raw:
        async with replica(redis.url, "e1") as cache:
            await report(cache, "a")
            await eventually(lambda: holds(raw, cache))
        await raw.set("server:a", document)
        async with replica(redis.url, "e2") as cache:
            await report(cache, "a", cpu=20)
            await eventually(lambda: _has(raw, 20.0))


async def _has(raw: Redis, cpu: float) -> bool:
    """Whether the document of the server is ours and has this."""
    with contextlib.suppress(orjson.JSONDecodeError):
        document = orjson.loads(await raw.get("server:a") or b"{}")
        return isinstance(document, dict) and document.get("cpu_usage") == cpu
    return False


@pytest.mark.parametrize(
    "key", ["servers:all", "servers:count", "server:a", note_key("servers:all"), note_key("server:a")]
)
async def test_a_key_of_another_type_is_replaced_and_keeps_nothing_else_from_being_read(
    redis: RedisServer, key: str
) -> None:
    async with redis.client() as raw:
        async with replica(redis.url, "e1") as cache:
            await report(cache, "a", "b")
            await eventually(lambda: holds(raw, cache))
        await raw.delete(key)
        await raw.rpush(key, "text")
        async with replica(redis.url, "e2") as cache:
            assert cache.get("b").headline()[0] == 10
            await report(cache, "a", cpu=20)
            await eventually(lambda: _is_text(raw, key))
            await eventually(lambda: holds(raw, cache))


async def _is_text(raw: Redis, key: str) -> bool:
    return bool(await raw.type(key) == b"string")
