"""Redis holds what has expired, or what others put there: nobody stops for it, and it is replaced."""

import contextlib

import orjson
import pytest
from redis.asyncio import Redis

from services.cache.store_redis import note_key
from tests.cache.replicas import holds, replica, report
from tests.harness import eventually
from tests.harness.redis import RedisServer

DOCUMENT = (
    b'{"id": "b", "hostname": "", "environment": "", "role": "", "location": "", "status": "healthy", '
    b'"cpu_usage": 1, "observed_time": %b}'
)
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


OF_NO_SERVER = [
    b'{"id": "b"}',
    b'{"id": 5}',
    b'["id"]',
    b'{"id": "b", "hostname": "", "environment": "", "role": "", "location": "", "status": "fine"}',
    DOCUMENT % b'"9999-12-31T23:59:59.9999Z"',
    DOCUMENT % b'"0001-01-01T00:00:00Z"',
    DOCUMENT % b'"2026-01-01T00:00:00Z", "report_interval_ms": 1e300',
]


@pytest.mark.parametrize("document", OF_NO_SERVER)
@pytest.mark.parametrize("is_listed", [True, False])
async def test_what_is_no_servers_document_keeps_no_cache_from_starting_and_nobody_else_out(
    redis: RedisServer, document: bytes, is_listed: bool
) -> None:
    async with redis.client() as raw:
        async with replica(redis.url, "e1") as cache:
            await report(cache, "a")
            await eventually(lambda: holds(raw, cache))
        if is_listed:
            listed = await raw.get("servers:all")
            await raw.set("servers:all", listed[:-1] + b"," + document + b"]")
        else:
            await raw.delete("servers:all")
            await raw.set("server:b", document)
        async with replica(redis.url, "e2") as cache:
            await report(cache, "a", "b", cpu=20)
            await eventually(lambda: holds(raw, cache))


@pytest.mark.parametrize(
    "record", [b"[1, [], false, []]", b"[1e300, {}, false, []]", b"[1, {}, false, [[1e300, 1e300]]]", b"{}"]
)
async def test_a_note_that_is_not_ours_keeps_no_cache_from_starting(redis: RedisServer, record: bytes) -> None:
    note = b'018bcfe56803.e0 {"life": 0, "described": 0, "sets": [], "record": %b}' % record
    async with redis.client() as raw:
        await raw.set("server:a", DOCUMENT.replace(b'"b"', b'"a"') % b'"2026-01-01T00:00:00Z"')
        await raw.set(note_key("server:a"), note)
        async with replica(redis.url, "e2") as cache:
            await report(cache, "a", cpu=20)
            await eventually(lambda: holds(raw, cache))


async def _is_text(raw: Redis, key: str) -> bool:
    return bool(await raw.type(key) == b"string")
