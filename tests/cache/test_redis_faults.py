"""Redis away in every way a network knows: no call notices, the status tells, and afterwards everything is there."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from openmanager.fleet.v1 import status_pb2
from services.cache import core as core_module
from services.cache.core import Cache
from services.cache.state import Update
from services.cache.store_redis import RedisStateStore
from tests.cache.replicas import at_once, holds, replica, report, report_tick
from tests.cache.samples import descriptor, ids
from tests.harness import eventually
from tests.harness.fault_proxy import FaultProxy, fault_proxy
from tests.harness.redis import RedisServer, redis_server

SERVERS = 20
CALLS = 100
SHOWS_WITHIN_S = 30.0
"""Promise 3 says 5 s, which tests/fleet/test_status.py adds up; a busy machine has more."""

Fault = Callable[[FaultProxy, RedisServer], Awaitable[None]]


async def cut(proxy: FaultProxy, _redis: RedisServer) -> None:
    await proxy.cut()


async def half_open(proxy: FaultProxy, _redis: RedisServer) -> None:
    proxy.half_open()


async def delay(proxy: FaultProxy, _redis: RedisServer) -> None:
    proxy.delay_s = 5.0


async def kill(_proxy: FaultProxy, redis: RedisServer) -> None:
    redis.kill()


async def stop(_proxy: FaultProxy, redis: RedisServer) -> None:
    redis.pause()


async def repair(proxy: FaultProxy, redis: RedisServer, fault: Fault) -> None:
    if fault is kill:
        await redis.start()
    elif fault is stop:
        redis.resume()
    await proxy.restore()


@asynccontextmanager
async def proxied(redis: RedisServer) -> AsyncIterator[tuple[FaultProxy, Cache]]:
    async with fault_proxy(redis.port) as proxy, replica(f"redis://127.0.0.1:{proxy.port}", "e1") as cache:
        yield proxy, cache


async def slowest_calls_s(cache: Cache, cpu: float) -> tuple[float, float]:
    """Median and 90th percentile of calls that tell and read, at a pace that leaves the follower its turns. None waits,
    so what counts is the processor's time: others have the same processors."""
    taken_s = []
    for step in range(CALLS):
        started_s = time.thread_time()
        at_once(report_tick(cache, SERVERS, cpu))
        assert cache.get(ids(1)[0]).headline()[0] == cpu
        cache.states()
        taken_s.append(time.thread_time() - started_s)
        await asyncio.sleep(0.005 if step else 0)  # the pace of the calls, not a wait for anything
    taken_s.sort()
    return taken_s[CALLS // 2], taken_s[CALLS * 9 // 10]


@pytest.mark.fault("Redis away")
@pytest.mark.parametrize(
    "fault", [delay, *(pytest.param(one, marks=pytest.mark.full) for one in (cut, half_open, kill, stop))]
)
async def test_redis_away_slows_no_call_shows_and_is_made_good(redis: RedisServer, fault: Fault) -> None:
    async with proxied(redis) as (proxy, cache), cache.monitor("redis") as monitor, redis.client() as raw:

        def is_state(state: int) -> bool:
            return monitor.statuses()[0].state == state

        await report_tick(cache, SERVERS, 10)
        await eventually(lambda: holds(raw, cache))
        await eventually(lambda: is_state(status_pb2.STORE_STATE_UP))
        median_s, slow_s = await slowest_calls_s(cache, 20)
        await eventually(lambda: holds(raw, cache))
        attempts_before = proxy.accepted
        await fault(proxy, redis)
        started_s = time.monotonic()
        median_away_s, slow_away_s = await slowest_calls_s(cache, 30)
        await eventually(lambda: is_state(status_pb2.STORE_STATE_DOWN), within_s=SHOWS_WITHIN_S)
        await cache.update(Update(descriptors=[descriptor("told-while-away")]))
        cache.remove([ids(SERVERS)[-1]])
        await eventually(lambda: cache.follower.lag()[0] >= (SERVERS - 1) * 511)
        status = monitor.statuses()[0]
        assert status.last_error
        assert status.lag_points >= 0
        assert median_away_s < 3 * median_s + 0.001
        assert slow_away_s < 3 * slow_s + 0.002
        away_s = time.monotonic() - started_s
        assert proxy.accepted - attempts_before <= 20 + 4 * away_s  # one at a time, with pauses: no storm
        await repair(proxy, redis, fault)
        await eventually(lambda: holds(raw, cache), within_s=20)
        await eventually(lambda: cache.follower.lag() == (0, 0.0))
        await eventually(lambda: is_state(status_pb2.STORE_STATE_UP), within_s=20)
        assert await raw.exists(f"server:{ids(SERVERS)[-1]}") == 0


@pytest.mark.full
async def test_resets_are_made_good_at_once(redis: RedisServer) -> None:
    async with proxied(redis) as (proxy, cache), redis.client() as raw:
        for step in range(5):
            await report_tick(cache, SERVERS, 10 + step)
            proxy.reset()
            await report(cache, f"new-{step}")
            await eventually(lambda: holds(raw, cache), within_s=20)


@pytest.mark.full
async def test_connections_that_a_firewall_forgot_are_given_up(redis: RedisServer) -> None:
    async with proxied(redis) as (proxy, cache), redis.client() as raw:
        await report_tick(cache, SERVERS, 10)
        await eventually(lambda: holds(raw, cache))
        await eventually(lambda: cache.is_current)
        proxy.strand()
        await report_tick(cache, SERVERS, 20)
        await eventually(lambda: holds(raw, cache), within_s=20)
        await eventually(lambda: cache.is_current, within_s=20)


async def test_a_redis_that_refuses_is_not_stormed() -> None:
    attempts = 0

    def refuse(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with replica(f"redis://127.0.0.1:{port}", "e1") as cache, cache.monitor("redis"):
            await report_tick(cache, SERVERS, 10)
            await eventually(lambda: attempts >= 4)
            before = attempts
            await asyncio.sleep(3)  # the span in which attempts are counted
            assert attempts - before <= 15


async def test_a_slow_redis_costs_a_start_no_more_than_a_dead_one(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(core_module, "LOAD_TIMEOUT_S", 0.5)
    async with fault_proxy(redis.port) as proxy:
        proxy.delay_s = 5.0
        async with replica(f"redis://127.0.0.1:{proxy.port}", "e1") as cache:
            assert "no answer within 0.5 s" in caplog.text  # and not the 5 s of an answer
            await report_tick(cache, SERVERS, 10)
            assert cache.summary().total == SERVERS
            await proxy.restore()
            async with redis.client() as raw:
                await eventually(lambda: holds(raw, cache), within_s=20)


async def test_a_right_to_listen_that_is_missing_is_named_and_stops_nobody(redis: RedisServer) -> None:
    async with redis.client() as raw:
        commands = ("+@read", "+@write", "+@scripting", "+@pubsub", "+@connection", "+info", "+cluster")
        rights = (*commands, "~server:*", "~servers:*", "~openmanager:*", "resetchannels")  # docs/operations.md
        await raw.execute_command("ACL", "SETUSER", "om", "on", ">hunter2-very-secret", *rights)
        url = f"redis://om:hunter2-very-secret@127.0.0.1:{redis.port}"
        async with replica(url, "e1") as cache:
            told: list[str] = []
            cache.follower.tell_errors(told.append)
            await report_tick(cache, SERVERS, 10)
            await eventually(lambda: told)
            probe = await cache.follower.probe()
            assert "channel" in probe.degraded
            assert "hunter2" not in probe.degraded
            assert cache.summary().total == SERVERS
            await raw.execute_command("ACL", "SETUSER", "om", "&openmanager:changes")
            await eventually(lambda: holds(raw, cache), within_s=15)


@pytest.mark.parametrize("kind", ["redis+cluster://{}", "redis+sentinel://{}/service"])
async def test_a_url_of_the_wrong_kind_shows_as_down_and_stops_nobody(redis: RedisServer, kind: str) -> None:
    async with replica(kind.format(f"127.0.0.1:{redis.port}"), "e1") as cache:
        await report_tick(cache, SERVERS, 10)
        assert cache.summary().total == SERVERS
        down = await eventually(lambda: _down(cache))
        assert "cluster" in down.lower() or "sentinel" in down.lower()


async def _down(cache: Cache) -> str:
    return (await cache.follower.probe()).down


@pytest.mark.full
async def test_a_large_change_is_written_in_parts_and_nobody_twice(redis: RedisServer) -> None:
    servers = 3_000
    async with replica(redis.url, "e1") as cache, redis.client() as raw:
        await report(cache, *ids(servers))
        await eventually(lambda: holds_count(raw, servers), within_s=30)
        await eventually(lambda: cache.follower.lag() == (0, 0.0), within_s=30)
        written: list[int] = []
        write = RedisStateStore.write

        async def counted(self: RedisStateStore, changed, bases, fleet):  # type: ignore[no-untyped-def]
            written.append(len(changed) if fleet is None else -len(changed))
            return await write(self, changed, bases, fleet)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RedisStateStore, "write", counted)
            await report(cache, *ids(servers), cpu=99)
            await eventually(lambda: cache.follower.lag() == (0, 0.0), within_s=30)
        parts = [count for count in written if count]
        assert sum(abs(count) for count in parts) <= servers * 1.2  # nobody is written twice
        assert all(abs(count) <= 100 for count in parts)
        assert sum(count < 0 for count in parts) <= 2  # the fleet as a whole: not once a part, let alone a server


async def holds_count(raw: object, servers: int) -> bool:
    return int(await raw.get("servers:healthy") or 0) == servers  # type: ignore[attr-defined]


async def test_a_primary_that_became_a_replica_is_left_for_the_one_behind_the_same_address(redis: RedisServer) -> None:
    """As behind a managed service's endpoint: it leads to the new primary, and connections to the old one stay."""
    async with redis_server() as other, proxied(redis) as (proxy, cache), redis.client() as old, other.client() as new:
        await report_tick(cache, SERVERS, 10)
        await eventually(lambda: holds(old, cache))
        proxy.target_port = other.port
        await old.execute_command("REPLICAOF", "127.0.0.1", str(other.port))
        await report_tick(cache, SERVERS, 20)
        await eventually(lambda: holds(new, cache), within_s=20)
        await eventually(lambda: cache.follower.lag() == (0, 0.0))
        await old.execute_command("REPLICAOF", "NO", "ONE")
