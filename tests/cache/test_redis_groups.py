"""Redis behind Sentinels and as a cluster: after a fail-over the cache writes again by itself, and all is there."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.cache.core import Cache
from tests.cache.replicas import agree, holds, replica, report, report_tick
from tests.cache.samples import ids
from tests.harness import eventually
from tests.harness.redis import RedisServer
from tests.harness.redis_groups import Cluster, redis_cluster, sentinel_group

SERVERS = 40
FAILOVER_BOUND_S = 40.0
ODD = ("a{b}c", "a}b", "}{", "größe:ü*[x] 🖥")
"""Ids that a cluster would hash by a part of them."""


@pytest.mark.fault("Redis: primary killed, Sentinel fails over")
@pytest.mark.full
async def test_after_a_fail_over_of_sentinel_everything_is_written_again() -> None:
    async with sentinel_group() as group, replica(group.url, "e1") as cache, replica(group.url, "e2") as other:
        await report_tick(cache, SERVERS, 10)
        primary = await group.primary()
        async with primary.client() as raw:
            await eventually(lambda: holds(raw, cache), within_s=15)
        await eventually(lambda: agree(cache, other), within_s=15)
        primary.kill()
        await report_tick(cache, SERVERS - 1, 50)
        await eventually(lambda: _is_down(cache))

        async def another() -> RedisServer | None:
            found = await group.primary()
            return found if found is not primary else None

        promoted = await eventually(another, within_s=FAILOVER_BOUND_S)
        async with promoted.client() as raw:
            await eventually(lambda: holds(raw, cache), within_s=FAILOVER_BOUND_S)
        await eventually(lambda: agree(cache, other), within_s=FAILOVER_BOUND_S)
        await primary.start()  # as a primary that has lost everything, until the Sentinels tell it who is
        await report_tick(other, SERVERS, 60)
        async with promoted.client() as raw:
            await eventually(lambda: holds(raw, other), within_s=FAILOVER_BOUND_S)
        await eventually(lambda: agree(cache, other), within_s=FAILOVER_BOUND_S)


@pytest.mark.full
async def test_one_sentinel_is_enough_to_start_with() -> None:
    async with sentinel_group(replicas=0) as group:
        for sentinel in group.sentinels[:2]:
            sentinel.kill()
        async with replica(group.url, "e1") as cache, (await _server(group.servers)).client() as raw:
            await report_tick(cache, SERVERS, 10)
            await eventually(lambda: holds(raw, cache), within_s=15)


async def _server(servers: list[RedisServer]) -> RedisServer:
    return servers[0]


@pytest.mark.fault("Redis Cluster: a primary killed, its replica takes over")
@pytest.mark.full
async def test_after_a_fail_over_in_a_cluster_everything_is_written_again() -> None:
    async with (
        redis_cluster(3, 1) as cluster,
        replica(cluster.url, "e1") as cache,
        replica(cluster.url, "e2") as other,
    ):
        await report_tick(cache, SERVERS, 10)
        await report(cache, *ODD)
        async with client(cluster) as raw:
            await eventually(lambda: holds(raw, cache), within_s=15)
        await eventually(lambda: agree(cache, other), within_s=15)
        primary = await cluster.primary_of("servers:all")
        primary.kill()
        await report_tick(cache, SERVERS, 50)
        async with client(cluster) as raw:
            await eventually(lambda: _holds(raw, cache), within_s=FAILOVER_BOUND_S)
        await eventually(lambda: agree(cache, other), within_s=FAILOVER_BOUND_S)
        await report_tick(other, SERVERS, 60)
        await eventually(lambda: agree(cache, other), within_s=FAILOVER_BOUND_S)


@pytest.mark.fault("Redis Cluster: a node away, coverage")
@pytest.mark.full
@pytest.mark.parametrize("coverage", ["yes", "no"])
async def test_a_node_that_was_away_gets_what_it_lacks_and_the_others_go_on(coverage: str) -> None:
    async with (
        redis_cluster(3, 0, "--cluster-require-full-coverage", coverage) as cluster,
        replica(cluster.url, "e1") as cache,
    ):
        await report_tick(cache, SERVERS, 10)
        async with client(cluster) as raw:
            await eventually(lambda: holds(raw, cache), within_s=15)
        owners = {server_id: await cluster.primary_of(f"server:{server_id}") for server_id in ids(SERVERS)}
        dead = owners[ids(1)[0]]
        dead.kill()
        await report_tick(cache, SERVERS, 50)
        await eventually(lambda: _is_troubled(cache), within_s=FAILOVER_BOUND_S)
        if coverage == "no":
            alive = next(server_id for server_id, owner in owners.items() if owner is not dead)
            waiting = 511 * sum(owner is dead for owner in owners.values())
            await eventually(lambda: cache.follower.lag()[0] == waiting, within_s=FAILOVER_BOUND_S)
            async with owners[alive].client() as raw:
                await eventually(lambda: _has(raw, f"server:{alive}", b'"cpu_usage":50.0'), within_s=FAILOVER_BOUND_S)
        await dead.start()
        await cluster.is_whole(dead)
        async with client(cluster) as raw:
            await eventually(lambda: _holds(raw, cache), within_s=FAILOVER_BOUND_S)
        await eventually(lambda: cache.follower.lag() == (0, 0.0), within_s=FAILOVER_BOUND_S)


async def test_a_restart_reads_a_cluster_back_and_removals_hold_there() -> None:
    async with redis_cluster() as cluster:
        async with replica(cluster.url, "e1") as cache, replica(cluster.url, "e2") as other, client(cluster) as raw:
            await report(cache, *ids(SERVERS), *ODD)
            await eventually(lambda: agree(cache, other), within_s=15)
            other.remove(["a{b}c", ids(1)[0]])
            await eventually(lambda: agree(cache, other), within_s=15)
            assert cache.summary().total == SERVERS + len(ODD) - 2
            await eventually(lambda: holds(raw, cache), within_s=15)
            assert not await raw.exists("server:a{b}c")
            before = _metrics(cache)
        async with replica(cluster.url, "e3") as restarted:
            await eventually(lambda: _metrics(restarted) == before, within_s=15)


@asynccontextmanager
async def client(cluster: Cluster) -> AsyncIterator[RedisCluster]:
    """A client of the driver's own, to look at what is really there."""
    nodes = [ClusterNode("127.0.0.1", node.port) for node in cluster.nodes]
    found = RedisCluster(
        startup_nodes=nodes, require_full_coverage=False, retry=Retry(NoBackoff(), 0), protocol=2, socket_timeout=2.0
    )
    try:
        yield found
    finally:
        await found.aclose()


def _metrics(cache: Cache) -> dict[str, dict[str, float]]:
    return {state.server_id: state.metrics() for state in cache.states()[0]}


async def _holds(raw: RedisCluster, cache: Cache) -> bool:
    try:
        return await holds(raw, cache)
    except RedisError as error:
        await raw.aclose()  # so that it learns anew who has what
        raise AssertionError(str(error)) from error


async def _has(raw: object, key: str, text: bytes) -> bool:
    return text in (await raw.get(key) or b"")  # type: ignore[attr-defined]


async def _is_down(cache: Cache) -> bool:
    return bool((await cache.follower.probe()).down)


async def _is_troubled(cache: Cache) -> bool:
    probe = await cache.follower.probe()
    return bool(probe.down or probe.degraded)
