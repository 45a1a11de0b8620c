"""The follower: Redis's exact keys, and what happens to it and to us when Redis is away, back, empty or old."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from fleet.health import ServerStatus
from fleet.model import HEADLINE_METRICS
from runtime.clock import Clock, ManualClock, SystemClock
from services.cache import core as core_module
from services.cache.core import Cache
from services.cache.state import Update
from services.cache.store import StateStore
from services.cache.store_redis import RedisStateStore
from tests.cache.replicas import at_once
from tests.cache.samples import HEADLINE, WIDE, descriptor, ids, rows_of, tick
from tests.harness import eventually
from tests.harness.redis import RedisServer

SERVERS = 20


@asynccontextmanager
async def caching(store: StateStore, clock: Clock | None = None) -> AsyncIterator[Cache]:
    async with Cache(store, clock or SystemClock(), epoch="e", rng=random.Random(1)) as cache:
        yield cache


async def report(cache: Cache, cpu: float = 10.0, count: int = SERVERS) -> None:
    await cache.update(Update(batches=[tick(count, time.time_ns() // 1_000_000, cpu=cpu)]), [WIDE])


async def agrees(raw: Redis, cache: Cache) -> bool:
    """Whether Redis holds what the service answers."""
    states, _, _ = cache.states()
    summary = cache.summary()
    counted, healthy, listed = (
        await raw.get("servers:count"),
        await raw.get("servers:healthy"),
        await raw.get("servers:all"),
    )
    assert counted is not None
    assert healthy is not None
    assert listed is not None
    assert (int(counted), int(healthy)) == (summary.total, summary.healthy)
    assert [document["id"] for document in orjson.loads(listed)] == [state.server_id for state in states]
    for state, entry in zip(states, orjson.loads(listed), strict=True):
        assert entry["status"] == state.status.name.lower()
        assert entry.get("cpu_usage") == state.metrics().get("cpu_usage")
        document = orjson.loads(await raw.get(f"server:{state.server_id}") or b"{}")
        assert document.get("status") == state.status.name.lower()
        assert {key: document.get(key) for key in state.metrics()} == state.metrics()
    keys = {key.decode() async for key in raw.scan_iter() if not key.startswith(b"openmanager:{")}
    assert keys == {"servers:all", "servers:count", "servers:healthy", *(f"server:{s.server_id}" for s in states)}
    return True


async def test_the_keys_their_lifetimes_and_their_forms(redis: RedisServer) -> None:
    async with caching(RedisStateStore(redis.url)) as cache, redis.client() as raw:
        await cache.update(Update(descriptors=[descriptor(server_id) for server_id in ids(SERVERS)]))
        started_s = time.monotonic()
        await report(cache)
        await eventually(lambda: agrees(raw, cache))
        for key, seconds in (
            ("servers:all", 60),
            ("servers:count", 300),
            ("servers:healthy", 60),
            (f"server:{ids(1)[0]}", 300),
        ):
            left_s = await raw.ttl(key)
            assert seconds - (time.monotonic() - started_s) - 1 <= left_s <= seconds
        assert (await raw.get("servers:count"), await raw.get("servers:healthy")) == (b"20", b"20")
        document = orjson.loads(await raw.get("server:server-00003") or b"")
        assert len(set(document) & set(WIDE.keys)) == 511
        assert document["hostname"] == "server-00003.example"
        listed = orjson.loads(await raw.get("servers:all") or b"")
        shown = {"id", "hostname", "environment", "role", "location", "status", "observed_time", *HEADLINE_METRICS}
        assert all(set(entry) == shown for entry in listed)


async def test_a_tick_is_one_round_trip(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pipelines: list[int] = []
    execute = Pipeline.execute

    async def counted(self: Pipeline, raise_on_error: bool = True) -> list[object]:
        pipelines.append(len(self.command_stack))
        return await execute(self, raise_on_error)

    monkeypatch.setattr(Pipeline, "execute", counted)
    async with caching(RedisStateStore(redis.url)) as cache, redis.client() as raw:
        await report(cache)
        await eventually(lambda: agrees(raw, cache))
        pipelines.clear()
        await report(cache, 11)
        await eventually(lambda: agrees(raw, cache))
        assert pipelines == [SERVERS + 5]  # the servers, three keys of the fleet, is the count there, telling it


async def test_a_removed_server_leaves_redis(redis: RedisServer) -> None:
    async with caching(RedisStateStore(redis.url)) as cache, redis.client() as raw:
        await report(cache)
        await eventually(lambda: agrees(raw, cache))
        assert cache.remove([ids(1)[0]]) == 1
        await eventually(lambda: agrees(raw, cache))
        assert await raw.exists(f"server:{ids(1)[0]}") == 0


async def test_offline_servers_are_told_to_redis(redis: RedisServer) -> None:
    clock = ManualClock()
    async with caching(RedisStateStore(redis.url), clock) as cache, redis.client() as raw:
        await eventually(lambda: cache.is_current)
        clock.advance(1)
        await cache.update(Update(batches=[rows_of(HEADLINE, {"a": (1, 1, 1)}, clock.now_ms())]), [HEADLINE])
        await eventually(lambda: agrees(raw, cache))
        clock.advance(31)
        await eventually(lambda: cache.get("a").status == ServerStatus.OFFLINE)
        clock.advance(1)
        await eventually(lambda: agrees(raw, cache))
        assert await raw.get("servers:healthy") == b"0"


async def test_while_redis_is_dead_no_call_waits_and_afterwards_it_has_everything(redis: RedisServer) -> None:
    async with caching(RedisStateStore(redis.url)) as cache, redis.client() as raw:
        await report(cache)
        await eventually(lambda: agrees(raw, cache))
        redis.kill()
        for step in range(50):
            at_once(report(cache, cpu=10.0 + step))
            assert cache.get(ids(1)[0]).headline()[0] == 10.0 + step
            await asyncio.sleep(0.01)  # the pace of the ticks, not a wait for anything
        await cache.update(Update(descriptors=[descriptor("told-while-away")]))
        cache.remove([ids(2)[1]])
        await eventually(lambda: cache.follower.lag()[0] == (SERVERS - 1) * 511)
        assert cache.follower.lag()[1] > 0
        probe = await cache.follower.probe()
        assert "Connection" in probe.down
        assert probe.lag_points == (SERVERS - 1) * 511
        await redis.start()
        await eventually(lambda: agrees(raw, cache), within_s=15)  # no new row is needed, nor the refresh after 20 s
        await eventually(lambda: cache.follower.lag() == (0, 0.0))


async def test_a_redis_that_comes_back_empty_also_gets_what_did_not_change(redis: RedisServer) -> None:
    async with caching(RedisStateStore(redis.url)) as cache, redis.client() as raw:
        await report(cache)
        await eventually(lambda: agrees(raw, cache))
        redis.kill()
        await report(cache, cpu=50, count=1)
        await eventually(lambda: cache.follower.lag()[0] == 511)
        await redis.start()
        await eventually(lambda: agrees(raw, cache), within_s=15)


async def test_a_redis_that_was_flushed_is_filled_again_by_the_next_tick(redis: RedisServer) -> None:
    async with caching(RedisStateStore(redis.url)) as cache, redis.client() as raw:
        await report(cache)
        await eventually(lambda: agrees(raw, cache))
        await raw.flushall()
        await report(cache, cpu=50, count=1)
        await eventually(lambda: agrees(raw, cache))


async def test_a_redis_that_was_restarted_between_two_writes_is_filled_again(redis: RedisServer) -> None:
    async with caching(RedisStateStore(redis.url)) as cache, redis.client() as raw:
        await report(cache)
        await eventually(lambda: agrees(raw, cache))
        await cache.follower.probe()
        redis.kill()
        await redis.start()
        await eventually(cache.follower.probe)  # as the monitor does every 2 s
        await eventually(lambda: agrees(raw, cache), within_s=15)


async def test_a_refused_write_shows_as_degraded_and_is_told(redis: RedisServer) -> None:
    async with caching(RedisStateStore(redis.url)) as cache, redis.client() as raw:
        told: list[str] = []
        cache.follower.tell_errors(told.append)
        await report(cache)
        await eventually(lambda: agrees(raw, cache))
        await raw.config_set("maxmemory", "1mb")
        await report(cache, 11)
        await eventually(lambda: told)
        assert "OutOfMemoryError" in told[0]
        assert "server-000" not in told[0]  # no key and no value, just what is wrong
        assert "OutOfMemoryError" in (await cache.follower.probe()).degraded
        await raw.config_set("maxmemory", "0")
        await eventually(lambda: agrees(raw, cache))
        assert (await cache.follower.probe()).degraded == ""


async def test_a_probe_tells_version_address_and_latency_but_no_password(redis: RedisServer) -> None:
    async with redis.client() as raw:
        await raw.config_set("requirepass", "hunter2-very-secret")
    url = redis.url.replace("redis://", "redis://:hunter2-very-secret@")
    async with caching(RedisStateStore(url)) as cache:
        probe = await cache.follower.probe()
        assert probe.server_version.startswith("Redis 7.")
        assert probe.address == f"127.0.0.1:{redis.port}"
        assert 0 < probe.latency_ms < 1_000


async def test_a_start_reads_back_what_redis_has(redis: RedisServer) -> None:
    async with caching(RedisStateStore(redis.url)) as cache:
        await cache.update(
            Update(descriptors=[descriptor(server_id, report_interval_ms=60_000) for server_id in ids(SERVERS)])
        )
        await report(cache, cpu=90)
        async with redis.client() as raw:
            await eventually(lambda: agrees(raw, cache))
        before = {state.server_id: state for state in cache.states()[0]}
    clock = ManualClock(now_ms=time.time_ns() // 1_000_000)
    async with caching(RedisStateStore(redis.url), clock) as cache:
        for server_id, old in before.items():
            state = cache.get(server_id)
            assert state.metrics() == old.metrics()
            assert (state.descriptor, state.status) == (old.descriptor, ServerStatus.WARNING)
            assert (state.observed_ms, state.received_ms) == (old.observed_ms, old.received_ms)
        assert cache.summary().warning == SERVERS
        clock.advance(1)
        await report(cache, cpu=78)  # within the margin: hysteresis outlives a restart
        assert cache.summary().warning == SERVERS
        assert all(len(state.samples) == 1 for state in cache.states()[0])  # the restored samples are covered
        clock.advance(179)
        await asyncio.sleep(0)
        assert cache.summary().offline == 0
        clock.advance(2)
        await eventually(lambda: cache.summary().offline == SERVERS)


async def test_a_start_without_redis_is_cold_and_quick(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "LOAD_TIMEOUT_S", 60.0)  # what is refused is not waited for
    redis.kill()
    async with asyncio.timeout(20), caching(RedisStateStore(redis.url)) as cache:
        assert cache.summary().total == 0
        await report(cache)
        await redis.start()
        async with redis.client() as raw:
            await eventually(lambda: agrees(raw, cache), within_s=15)


async def test_a_redis_that_accepts_and_says_nothing_delays_a_start_by_two_seconds_at_most(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert core_module.LOAD_TIMEOUT_S <= 2
    monkeypatch.setattr(core_module, "LOAD_TIMEOUT_S", 0.5)
    held: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _reader, writer: held.append(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with caching(RedisStateStore(f"redis://127.0.0.1:{port}")) as cache:
        assert "no answer within 0.5 s" in caplog.text  # that bound ended it, none of the driver's
        await asyncio.sleep(0)
        at_once(report(cache))
        at_once(report(cache, 11))
        assert cache.summary().total == SERVERS
    for writer in held:
        writer.close()
    silent.close()


async def test_foreign_content_under_our_keys_does_not_stop_a_start(redis: RedisServer) -> None:
    async with redis.client() as raw:
        await raw.set("server:a", b"not json")
        await raw.set("server:b", b'{"id":"b"}')
        await raw.lpush("server:c", "x")
        ours = {"hostname": "d", "environment": "", "role": "", "location": "", "status": "healthy"}
        await raw.set("server:d", orjson.dumps({"id": "d", **ours}))
        await raw.set("server:e", orjson.dumps({"id": "not-e", **ours}))
    async with caching(RedisStateStore(redis.url)) as cache:
        assert [state.server_id for state in cache.states()[0]] == ["d"]
