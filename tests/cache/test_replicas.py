"""Two replicas of the cache with one real Redis: they agree, and an old memory never overwrites a newer state."""

import asyncio
import os
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fleet.health import ServerStatus
from openmanager.cache.v1 import cache_pb2, cache_pb2_grpc
from runtime.channel import Channel
from runtime.clock import ManualClock
from services.cache import peers as peers_module
from services.cache.core import Cache
from services.cache.model import version_of
from services.cache.state import Update
from services.cache.store_redis import note_key
from tests.cache.replicas import agree, content, holds, now_ms, recording, replica, report, report_tick
from tests.cache.samples import HEADLINE, descriptor, ids, request, rows_of, set_of
from tests.cache.test_process import SECRET, answered, process
from tests.harness import eventually, free_port
from tests.harness.fault_proxy import fault_proxy
from tests.harness.redis import RedisServer

OTHER = set_of("x", "y")


async def test_what_one_replica_is_told_the_other_knows(redis: RedisServer) -> None:
    async with replica(redis.url, "e1") as first, replica(redis.url, "e2") as second, redis.client() as raw:
        await eventually(lambda: first.is_current and second.is_current)
        await report_tick(first, 30, 10)
        await eventually(lambda: agree(first, second))
        assert len(content(second)) == 30
        await report_tick(second, 20, 97)
        await first.update(Update(descriptors=[descriptor(ids(25)[24], role="moved", report_interval_ms=600_000)]))
        await eventually(lambda: agree(first, second))
        assert first.summary().critical == 20
        assert second.get(ids(25)[24]).descriptor.role == "moved"
        first.remove(ids(5))
        await eventually(lambda: agree(first, second))
        assert second.summary().total == 25
        await report(second, ids(1)[0])  # its rows are ignored there too
        assert second.summary().total == 25
        await second.update(Update(descriptors=[descriptor(ids(1)[0])], admit_removed=True))
        await report(second, ids(1)[0])
        await eventually(lambda: agree(first, second))
        assert first.summary().total == 26
        await eventually(lambda: holds(raw, first))


async def test_a_change_reaches_the_other_replica_within_a_second(redis: RedisServer) -> None:
    clock = ManualClock(now_ms())
    async with replica(redis.url, "e1", clock) as first, replica(redis.url, "e2", clock) as second:
        await eventually(lambda: first.is_current and second.is_current)
        for step in range(10):
            clock.advance(1)  # and then it stands still: neither replica pauses on the way
            await report(first, "a", cpu=10 + step)
            await eventually(partial(_shows, second, 10.0 + step))


def _shows(cache: Cache, cpu: float) -> bool:
    return bool(cache.summary().total) and cache.get("a").headline()[0] == cpu


def _knows(cache: Cache) -> bool:
    return bool(cache.summary().total)


async def test_sets_and_descriptors_told_to_different_replicas_at_once_are_all_kept(redis: RedisServer) -> None:
    async with replica(redis.url, "e1") as first, replica(redis.url, "e2") as second, redis.client() as raw:
        for step in range(10):
            time_ms = now_ms()
            left = rows_of(HEADLINE, {"a": (step, 1, 1)}, time_ms)
            right = rows_of(OTHER, {"a": (step, step)}, time_ms)
            moved = [descriptor("a", role=f"role-{step}")]
            await asyncio.gather(
                first.update(Update(batches=[left]), [HEADLINE]),
                second.update(Update(batches=[right], descriptors=moved), [OTHER]),
            )
            both = {"cpu_usage": step, "memory_usage": 1, "disk_usage": 1, "x": step, "y": step}
            await eventually(partial(_both_have, first, second, both))
            await eventually(partial(_has_role, first, f"role-{step}"))
        await eventually(lambda: holds(raw, first))
        await eventually(lambda: agree(first, second))


def _both_have(first: Cache, second: Cache, metrics: Mapping[str, float]) -> bool:
    return first.get("a").metrics() == second.get("a").metrics() == metrics


def _has_role(cache: Cache, role: str) -> bool:
    return cache.get("a").descriptor.role == role


@pytest.mark.fault("Redis: a replica with an old memory comes back")
@pytest.mark.parametrize("fault", ["cut", "half_open"])
async def test_an_old_memory_that_comes_back_overwrites_nothing_newer(redis: RedisServer, fault: str) -> None:
    async with (
        fault_proxy(redis.port) as proxy,
        replica(redis.url, "e1") as first,
        replica(f"redis://127.0.0.1:{proxy.port}", "e2") as second,
        redis.client() as raw,
    ):
        await report(second, "a", "b", "removed", cpu=10)
        await eventually(lambda: first.summary().total == 3)
        await eventually(lambda: agree(first, second))
        await (proxy.cut() if fault == "cut" else asyncio.to_thread(proxy.half_open))
        await eventually(lambda: not second.is_current, within_s=20)
        async with recording(redis) as recorder:
            await report(second, "b", cpu=20)  # news of its own, so that it has something to write ...
            await second.update(Update(descriptors=[descriptor("a", role="told-while-away")]))
            await report(first, "a", cpu=30)  # ... and what it does not know of
            first.remove(["removed"])
            await eventually(lambda: recorder.cpus("a") == [30.0])
            await eventually(lambda: len(recorder.fleets) >= 1)
            await eventually(lambda: holds(raw, first))
            await proxy.restore()
            await eventually(lambda: first.get("a").descriptor.role == "told-while-away", within_s=20)
            await eventually(lambda: first.get("b").headline()[0] == 20, within_s=20)
            await eventually(lambda: agree(first, second))
            await eventually(lambda: holds(raw, second))
        assert set(recorder.cpus("a")) == {30.0}
        assert recorder.cpus("removed") == []
        assert all("a=30.0" in fleet for fleet in recorder.fleets)
        assert first.summary().total == second.summary().total == 2


async def test_a_replica_that_was_stopped_takes_in_what_it_missed_before_anyone_sees_its_memory(
    redis: RedisServer, tmp_path: Path
) -> None:
    ports = free_port(), free_port()
    async with (
        process(tmp_path / "1", ports[0], REDIS_URL=redis.url),
        process(tmp_path / "2", ports[1], REDIS_URL=redis.url) as second,
        Channel(f"127.0.0.1:{ports[0]}", secret=SECRET) as to_first,
        Channel(f"127.0.0.1:{ports[1]}", secret=SECRET) as to_second,
        redis.client() as raw,
    ):
        stubs: list[Any] = [cache_pb2_grpc.CacheServiceStub(channel.grpc) for channel in (to_first, to_second)]

        async def cpus(stub: Any) -> dict[str, float]:
            answer = await stub.ListServerStates(cache_pb2.ListServerStatesRequest())
            return {state.descriptor.server_id: state.samples[0].values[0] for state in answer.states}

        await answered(lambda: stubs[1].UpdateServers(_headline({"a": 10, "b": 10, "removed": 10})))

        async def know_all() -> bool:
            return [len(await cpus(stub)) for stub in stubs] == [3, 3]

        await answered(know_all)
        os.kill(second.pid, signal.SIGSTOP)
        async with recording(redis) as recorder:
            waiting = asyncio.create_task(_call(stubs[1], _headline({"b": 20})), name="queued")
            await stubs[0].UpdateServers(_headline({"a": 30}))
            await stubs[0].RemoveServers(cache_pb2.RemoveServersRequest(server_ids=["removed"]))

            async def removed() -> bool:
                return not await raw.exists("server:removed") and recorder.cpus("a") == [30.0]

            await eventually(removed)
            fleets_before = len(recorder.fleets)  # of the first one, which has the news by now
            os.kill(second.pid, signal.SIGCONT)
            await waiting

            async def both_know() -> bool:
                return [await cpus(stub) for stub in stubs] == [{"a": 30.0, "b": 20.0}] * 2

            await eventually(both_know, within_s=20)
            await eventually(lambda: recorder.fleets and recorder.fleets[-1] == ["a=30.0", "b=20.0"], within_s=20)
        assert set(recorder.cpus("a")) == {30.0}
        assert recorder.cpus("removed") == []
        assert all("a=10.0" not in fleet for fleet in recorder.fleets[fleets_before:])


def _headline(cpus: dict[str, float]) -> cache_pb2.UpdateServersRequest:
    return request(rows_of(HEADLINE, {name: (cpu, 1, 1) for name, cpu in cpus.items()}, now_ms()))


async def _call(stub: Any, message: cache_pb2.UpdateServersRequest) -> None:
    await stub.UpdateServers(message)


async def test_what_a_dying_writer_did_not_tell_is_found_by_comparing(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replica(redis.url, "e1") as first, redis.client() as raw:
        await report(first, "a")
        await eventually(lambda: holds(raw, first))
        kept = {key: await raw.get(key) async for key in raw.scan_iter()}
    async with redis.client() as raw:
        await raw.flushall()
    monkeypatch.setattr(peers_module, "REREAD_INTERVAL_S", 0.5)
    async with replica(redis.url, "e2") as second:
        await eventually(lambda: second.is_current)
        async with redis.client() as raw:
            for key, value in kept.items():
                await raw.set(key, value or b"")  # written, but not told
        await eventually(lambda: second.summary().total == 1, within_s=20)


async def test_a_fleet_that_nobody_told_of_stands_in_the_way_for_moments_only(redis: RedisServer) -> None:
    async with replica(redis.url, "e1") as first, redis.client() as raw:
        await report(first, "a")
        await eventually(lambda: holds(raw, first))
        for key in ("servers:all", "servers:count", "servers:healthy"):
            await raw.set(note_key(key), version_of(now_ms() + 60_000, "died"), ex=300)
        await report(first, "b")
        await eventually(lambda: holds(raw, first), within_s=20)


async def test_a_replica_does_not_call_silent_what_it_cannot_hear(redis: RedisServer) -> None:
    clock = ManualClock(now_ms())
    async with (
        fault_proxy(redis.port) as proxy,
        replica(redis.url, "e1", clock) as first,
        replica(f"redis://127.0.0.1:{proxy.port}", "e2", clock) as second,
    ):
        await eventually(lambda: first.is_current and second.is_current)
        clock.advance(1)
        await report(first, "a")
        await eventually(lambda: _knows(second) and second.get("a").status == ServerStatus.HEALTHY)
        await proxy.cut()
        await eventually(lambda: not second.is_current)
        clock.advance(31)
        await eventually(lambda: first.get("a").status == ServerStatus.OFFLINE)  # it heard nothing itself
        await report(second, "b")
        clock.advance(31)
        await eventually(lambda: second.get("b").status == ServerStatus.OFFLINE)  # it does judge what it heard
        assert second.get("a").status == ServerStatus.HEALTHY
        await proxy.restore()

        def hears_of_it() -> bool:
            clock.advance(0.1)  # it pauses between its attempts
            return second.get("a").status == ServerStatus.OFFLINE

        await eventually(hears_of_it, within_s=20)


async def test_a_replica_that_is_alone_calls_silent_whom_it_heard_before_it_was_restarted(redis: RedisServer) -> None:
    clock = ManualClock(now_ms())
    async with replica(redis.url, "e1", clock) as before:
        await report(before, "a")
        await eventually(lambda: before.follower.lag() == (0, 0.0))
    async with fault_proxy(redis.port) as proxy, replica(f"redis://127.0.0.1:{proxy.port}", "e2", clock) as after:
        assert after.get("a").status == ServerStatus.HEALTHY
        await eventually(lambda: after.is_current)
        await proxy.cut()
        await eventually(lambda: not after.is_current)

        def is_silent() -> bool:
            clock.advance(1)
            return after.get("a").status == ServerStatus.OFFLINE

        await eventually(is_silent)


async def test_a_removed_server_that_another_replica_writes_again_is_taken_out_at_once(redis: RedisServer) -> None:
    """It did not hear of the removal, which Redis has lost; the version that it writes is one of who removed it."""
    async with (
        fault_proxy(redis.port) as proxy,
        redis.client() as raw,
        replica(redis.url, "e1") as first,
        replica(f"redis://127.0.0.1:{proxy.port}", "e2") as second,
    ):
        await eventually(lambda: first.is_current and second.is_current)
        await report(first, "a", "b")
        await eventually(lambda: agree(first, second) and len(second.states()[0]) == 2)
        await proxy.cut()
        await eventually(lambda: not second.is_current)
        first.remove(["a"])
        await eventually(lambda: first.follower.lag() == (0, 0.0))
        await raw.flushall()
        await proxy.restore()
        await eventually(lambda: agree(first, second) and len(second.states()[0]) == 1, within_s=30)
        await eventually(lambda: holds(raw, first))


@pytest.mark.parametrize("fault", ["full", "read-only"])
async def test_a_replica_does_not_call_silent_what_the_other_cannot_tell(redis: RedisServer, fault: str) -> None:
    """A Redis that takes no writes may be read and listened to."""
    clock = ManualClock(now_ms())
    statuses = set()
    async with (
        redis.client() as raw,
        replica(redis.url, "e1", clock) as first,
        replica(redis.url, "e2", clock) as second,
    ):

        def knows(cpu: float) -> bool:
            clock.advance(0.1)
            statuses.update((first.get("a").status, second.get("a").status))
            return second.get("a").metrics()["cpu_usage"] == cpu

        errors: list[str] = []
        second.follower.tell_errors(errors.append)

        def is_failing() -> bool:
            clock.advance(0.5)
            return bool(errors)

        await eventually(lambda: first.is_current and second.is_current)
        clock.advance(1)
        await first.update(Update(descriptors=[descriptor("a", report_interval_ms=60_000)]))
        await report(first, "a")
        await eventually(lambda: _knows(second) and knows(10))
        if fault == "full":
            await raw.config_set("maxmemory", 1)
        else:
            await raw.execute_command("REPLICAOF", "127.0.0.1", "1")
        await eventually(is_failing)  # it writes the fleet every 20 s
        for cpu in range(11, 56):
            await report(first, "a", cpu=cpu)
            clock.advance(5)
            await asyncio.sleep(0.002)
            assert not knows(cpu)
        if fault == "full":
            await raw.config_set("maxmemory", 0)
        else:
            await raw.execute_command("REPLICAOF", "NO", "ONE")
        await eventually(lambda: knows(55))
        assert statuses == {ServerStatus.HEALTHY}

        def is_silent() -> bool:
            clock.advance(20)
            return second.get("a").status == ServerStatus.OFFLINE

        await eventually(is_silent)  # now it is
