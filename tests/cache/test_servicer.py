"""openmanager.cache.v1.CacheService over a real gRPC server."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from fleet.codec import ms_from_duration, ms_from_timestamp
from fleet.model import Rows
from fleet.status import StoreStatusServicer
from fleet.validation import MAX_BATCH_ROWS
from openmanager.cache.v1 import cache_pb2, cache_pb2_grpc
from openmanager.fleet.v1 import metric_pb2, status_pb2, status_pb2_grpc
from runtime.channel import Channel, calling
from runtime.clock import SystemClock
from runtime.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from services.cache import core as core_module
from services.cache import room
from services.cache import watch as watch_module
from services.cache.core import Cache
from services.cache.servicer import CacheServicer
from services.cache.state import Update
from services.cache.store import StateStore
from services.cache.store_memory import MemoryStateStore
from services.cache.store_redis import RedisStateStore
from tests.cache.samples import HEADLINE, WIDE, descriptor, ids, request, rows_of, set_of, tick
from tests.harness import eventually
from tests.harness.redis import RedisServer

Stub = Any


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Serving:
    """A cache on a real server, with and without Redis."""

    def __init__(self, cache: Cache, channel: Channel) -> None:
        self.cache = cache
        self.stub: Stub = cache_pb2_grpc.CacheServiceStub(channel.grpc)
        self.stores: Stub = status_pb2_grpc.StoreStatusServiceStub(channel.grpc)

    async def update(self, *args: Any, **kwargs: Any) -> cache_pb2.UpdateServersResponse:
        async with calling("cache"):
            response: cache_pb2.UpdateServersResponse = await self.stub.UpdateServers(request(*args, **kwargs))
            return response

    async def raw_update(self, message: cache_pb2.UpdateServersRequest) -> cache_pb2.UpdateServersResponse:
        async with calling("cache"):
            response: cache_pb2.UpdateServersResponse = await self.stub.UpdateServers(message)
            return response


@asynccontextmanager
async def serve(store: StateStore, store_name: str | None) -> AsyncIterator[Serving]:
    cache = Cache(store, SystemClock(), epoch="epoch-1", rng=random.Random(1))
    async with cache, cache.monitor(store_name) as monitor:
        bound = [
            bind("openmanager.cache.v1.CacheService", CacheServicer(cache)),
            bind("openmanager.fleet.v1.StoreStatusService", StoreStatusServicer(monitor)),
        ]
        assert all(not service.missing for service in bound)
        server = GrpcServer(bound, Interception())
        address = await server.start("127.0.0.1:0")
        try:
            async with Channel(address) as channel:
                yield Serving(cache, channel)
        finally:
            await server.stop(0)


@pytest_asyncio.fixture
async def serving() -> AsyncIterator[Serving]:
    async with serve(MemoryStateStore(SystemClock()), None) as found:
        yield found


@pytest_asyncio.fixture
async def serving_redis(redis: RedisServer) -> AsyncIterator[Serving]:
    async with serve(RedisStateStore(redis.url), "redis") as found:
        yield found


@pytest.mark.parametrize("senders", [25, 400])
async def test_one_server_too_many_does_not_stop_those_that_are_here(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, senders: int
) -> None:
    monkeypatch.setattr(room, "MAX_SERVERS", 20)
    await serving.update(tick(20, now_ms() - 1_000, cpu=42))
    servers = [descriptor(server_id, location="moved") for server_id in ids(senders)]
    with pytest.raises(ResourceExhausted, match="MAX_SERVERS"):
        await serving.update(tick(senders, now_ms(), cpu=43), servers=servers)
    states, _, _ = serving.cache.states()
    assert {state.server_id for state in states} == set(ids(20))
    assert {(state.metrics()["cpu_usage"], state.descriptor.location) for state in states} == {(43.0, "moved")}


async def test_a_tick_is_read_back_whole(serving: Serving) -> None:
    time_ms = now_ms() - 1_500
    batch = tick(20, time_ms, cpu=42)
    response = await serving.update(batch, servers=[descriptor(server_id) for server_id in ids(20)])
    assert (response.updated, response.ignored_rows) == (20, 0)
    answer = await serving.stub.GetServerState(cache_pb2.GetServerStateRequest(server_id=ids(20)[7]))
    state = answer.state
    assert state.descriptor.hostname == "server-00007.example"
    assert state.status == status_pb2.SERVER_STATUS_HEALTHY
    assert ms_from_timestamp(state.observed_time) == time_ms
    assert abs(ms_from_timestamp(state.receive_time) - now_ms()) < 10_000
    skew = ms_from_timestamp(state.observed_time) - ms_from_timestamp(state.receive_time)
    assert ms_from_duration(state.clock_skew) == skew <= -1_500
    assert [sample.metric_set_id for sample in state.samples] == [WIDE.id]
    assert ms_from_timestamp(state.samples[0].time) == time_ms
    np.testing.assert_array_equal(np.array(state.samples[0].values), batch[1].values[7])
    assert [(found.id, len(found.metrics)) for found in answer.metric_sets] == [(WIDE.id, 511)]
    assert answer.metric_sets[0].metrics[0].unit == "%"

    everything = await serving.stub.ListServerStates(cache_pb2.ListServerStatesRequest())
    assert [state.descriptor.server_id for state in everything.states] == list(ids(20))
    assert [found.id for found in everything.metric_sets] == [WIDE.id]
    assert (everything.version.epoch, everything.version.sequence) == ("epoch-1", 20)
    assert everything.states[7] == state

    again = await serving.update(batch, with_sets=False)
    assert (again.updated, again.ignored_rows) == (0, 20)


async def test_the_summary_counts(serving: Serving) -> None:
    values = {"a": (10, 1, 1), "b": (82, 1, 1), "c": (1, 96, 1), "d": (1, 1, 88)}
    await serving.update(rows_of(HEADLINE, values, now_ms()))
    summary = await serving.stub.GetFleetSummary(cache_pb2.GetFleetSummaryRequest())
    assert (summary.total, summary.healthy, summary.warning, summary.critical, summary.offline) == (4, 1, 2, 1, 0)


async def test_an_unknown_server_is_not_found(serving: Serving) -> None:
    with pytest.raises(NotFound) as caught:
        async with calling("cache"):
            await serving.stub.GetServerState(cache_pb2.GetServerStateRequest(server_id="nobody"))
    assert caught.value.field == "server_id"


async def test_a_set_that_is_not_known_is_asked_for_and_nothing_is_applied(serving: Serving) -> None:
    known, unknown = rows_of(HEADLINE, {"a": (1, 1, 1)}, now_ms()), rows_of(set_of("x"), {"b": (1,)}, now_ms())
    message = request(known, unknown)
    del message.metric_sets[1]
    with pytest.raises(FailedPrecondition) as caught:
        await serving.raw_update(message)
    assert (caught.value.reason, caught.value.field) == ("METRIC_SET_UNKNOWN", "batches[1].metric_set_id")
    assert serving.cache.summary().total == 0
    assert (await serving.update(known, unknown)).updated == 2
    assert (await serving.update(rows_of(set_of("x"), {"b": (2,)}, now_ms() + 1), with_sets=False)).updated == 1


def bad_values(message: cache_pb2.UpdateServersRequest) -> None:
    message.batches[0].values.append(1.0)


def bad_id(message: cache_pb2.UpdateServersRequest) -> None:
    message.metric_sets[0].id = "0" * 32


def twice(message: cache_pb2.UpdateServersRequest) -> None:
    message.metric_sets[0].id = ""
    message.metric_sets[0].metrics.append(metric_pb2.Metric(name="cpu_usage"))


def bad_server(message: cache_pb2.UpdateServersRequest) -> None:
    message.servers.add(server_id="a/b")


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (bad_values, "batches[0].values"),
        (bad_id, "metric_sets[0].id"),
        (twice, "metric_sets[0].metrics[3]"),
        (bad_server, "servers[0].server_id"),
    ],
)
async def test_structural_faults_are_refused_by_field_and_nothing_is_applied(
    serving: Serving, spoil: Any, field: str
) -> None:
    message = request(rows_of(HEADLINE, {"a": (1, 1, 1)}, now_ms()))
    spoil(message)
    with pytest.raises(InvalidArgument) as caught:
        await serving.raw_update(message)
    assert caught.value.field == field
    assert serving.cache.summary().total == 0


async def test_rows_that_cannot_be_taken_are_counted_and_the_others_taken(serving: Serving) -> None:
    late, good = now_ms() + 2 * 3_600_000, now_ms()
    response = await serving.update(
        rows_of(HEADLINE, {"ahead": (1, 1, 1)}, late), rows_of(HEADLINE, {"a/b": (1, 1, 1), "ok": (1, 1, 1)}, good)
    )
    assert (response.updated, response.ignored_rows) == (1, 2)


async def test_a_request_larger_than_a_slice_is_applied_whole(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_module, "ROWS_PER_SLICE", 7)
    response = await serving.update(tick(50, now_ms()), servers=[descriptor(server_id) for server_id in ids(60)])
    assert (response.updated, response.ignored_rows) == (60, 0)
    assert serving.cache.get(ids(50)[49]).cells == 511


async def test_a_batch_of_most_rows_is_in_the_cache_well_before_its_callers_time_is_over(serving: Serving) -> None:
    at_once, now = set_of("at_once"), now_ms()
    many = Rows(
        metric_set_id=at_once.id,
        server_ids=("a",) * MAX_BATCH_ROWS,
        times_ms=now - np.arange(MAX_BATCH_ROWS, dtype=np.int64)[::-1],
        values=np.arange(MAX_BATCH_ROWS, dtype=np.float64).reshape(-1, 1),
    )
    update = Update(batches=[(at_once, many)])
    before_s = time.process_time()
    outcome = await serving.cache.update(update, [at_once])
    whole_s = time.process_time() - before_s
    assert outcome.changed == ("a",)
    (sample,) = serving.cache.get("a").samples
    assert (sample.time_ms, list(sample.values)) == (now, [MAX_BATCH_ROWS - 1])
    before_s, size = time.process_time(), MAX_BATCH_ROWS // 10
    for start in range(0, MAX_BATCH_ROWS, size):
        some = slice(start, start + size)
        times_ms = many.times_ms[some] + MAX_BATCH_ROWS
        part = replace(many, server_ids=many.server_ids[some], times_ms=times_ms, values=many.values[some])
        await serving.cache.update(Update(batches=[(at_once, part)]), [at_once])
    in_parts_s = time.process_time() - before_s
    assert whole_s < 2 * in_parts_s, "looking at all rows for each slice takes five times as long"


async def test_servers_without_room_are_refused_by_the_bounds_name_and_keep_nobody_out(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MAX_SERVERS", 2)
    monkeypatch.setattr(core_module, "ROWS_PER_SLICE", 2)
    await serving.update(rows_of(HEADLINE, {"a": (1, 1, 1)}, now_ms() - 1_000))
    with pytest.raises(ResourceExhausted, match="MAX_SERVERS") as refused:
        await serving.update(rows_of(HEADLINE, dict.fromkeys("cda", (2, 2, 2)), now_ms()))
    assert refused.value.metadata["limit"] == "MAX_SERVERS"
    everything = await serving.stub.ListServerStates(cache_pb2.ListServerStatesRequest())
    assert [(state.descriptor.server_id, state.samples[0].values[0]) for state in everything.states] == [
        ("a", 2.0),
        ("c", 2.0),
    ]


async def test_removed_servers_and_their_return(serving: Serving) -> None:
    await serving.update(rows_of(HEADLINE, {"a": (1, 1, 1), "b": (1, 1, 1)}, now_ms()))
    removed = await serving.stub.RemoveServers(cache_pb2.RemoveServersRequest(server_ids=["a", "unknown"]))
    assert removed.removed == 1
    assert (await serving.update(rows_of(HEADLINE, {"a": (1, 1, 1)}, now_ms() + 5))).ignored_rows == 1
    assert (await serving.update(servers=[descriptor("a")], admit_removed=True)).updated == 1
    assert (await serving.update(rows_of(HEADLINE, {"a": (1, 1, 1)}, now_ms() + 5))).updated == 1
    with pytest.raises(InvalidArgument) as caught:
        async with calling("cache"):
            await serving.stub.RemoveServers(cache_pb2.RemoveServersRequest(server_ids=["a", ""]))
    assert caught.value.field == "server_ids[1]"
    with pytest.raises(InvalidArgument) as caught:
        async with calling("cache"):
            await serving.stub.RemoveServers(cache_pb2.RemoveServersRequest(server_ids=["a", "b"], revisions=[1]))
    assert caught.value.field == "revisions"


async def test_a_watch_gives_a_snapshot_then_changes_and_removals(serving: Serving) -> None:
    await serving.update(rows_of(HEADLINE, {"a": (1, 1, 1), "b": (2, 1, 1)}, now_ms()))
    stream = serving.stub.WatchServers(cache_pb2.WatchServersRequest())
    first = await asyncio.wait_for(stream.read(), 5)
    assert first.snapshot
    assert sorted(state.descriptor.server_id for state in first.states) == ["a", "b"]
    assert [found.id for found in first.metric_sets] == [HEADLINE.id]
    await serving.update(rows_of(HEADLINE, {"b": (97, 1, 1)}, now_ms() + 5))
    second = await asyncio.wait_for(stream.read(), 5)
    assert [(s.descriptor.server_id, s.status) for s in second.states] == [("b", status_pb2.SERVER_STATUS_CRITICAL)]
    await serving.stub.RemoveServers(cache_pb2.RemoveServersRequest(server_ids=["a"]))
    third = await asyncio.wait_for(stream.read(), 5)
    assert list(third.removed_server_ids) == ["a"]
    stream.cancel()


async def test_a_slow_watcher_skips_states_and_never_servers(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "WATCH_INTERVAL_S", 0.0)
    stream = serving.stub.WatchServers(cache_pb2.WatchServersRequest())
    await asyncio.wait_for(stream.read(), 5)
    ticks, start_ms = 600, now_ms()
    for step in range(ticks):  # 50 MB of states; a paused reader's transport buffers a few of them
        await serving.update(tick(20, start_ms + step, cpu=step % 70, seed=step), with_sets=step == 0)
    read, known = 0, {}
    while True:
        message = await asyncio.wait_for(stream.read(), 5)
        read += 1
        known |= {state.descriptor.server_id: state.samples[0].values[0] for state in message.states}
        if message.version.sequence == ticks * 20:
            break
    assert read < ticks / 2
    assert known == dict.fromkeys(ids(20), float((ticks - 1) % 70))
    stream.cancel()
    await eventually(lambda: len(serving.cache._watchers) == 0)


async def test_watchers_over_the_bound_are_refused_by_its_name(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "MAX_WATCHERS", 1)
    stream = serving.stub.WatchServers(cache_pb2.WatchServersRequest())
    await asyncio.wait_for(stream.read(), 5)
    with pytest.raises(ResourceExhausted, match="MAX_WATCHERS"):
        async with calling("cache"):
            await asyncio.wait_for(serving.stub.WatchServers(cache_pb2.WatchServersRequest()).read(), 5)
    stream.cancel()


async def test_the_status_of_redis_is_the_truth(serving_redis: Serving, redis: RedisServer) -> None:
    serving = serving_redis

    async def store() -> status_pb2.StoreStatus:
        response = await serving.stores.ListStoreStatuses(status_pb2.ListStoreStatusesRequest())
        (found,) = response.stores
        assert isinstance(found, status_pb2.StoreStatus)
        return found

    async def in_state(state: int) -> bool:
        return (await store()).state == state

    await serving.update(tick(20, now_ms()))
    await eventually(lambda: in_state(status_pb2.STORE_STATE_UP), within_s=20)
    found = await store()
    assert (found.name, found.role, found.service) == ("redis", "follower", "cache")
    assert found.server_version.startswith("Redis 7.")
    assert found.address == f"127.0.0.1:{redis.port}"
    redis.kill()
    await eventually(lambda: in_state(status_pb2.STORE_STATE_DOWN), within_s=20)
    assert "Connection" in (await store()).last_error
    await redis.start()
    await eventually(lambda: in_state(status_pb2.STORE_STATE_UP), within_s=20)


async def test_without_redis_there_is_no_store_to_tell_of(serving: Serving) -> None:
    response = await serving.stores.ListStoreStatuses(status_pb2.ListStoreStatusesRequest())
    assert not response.stores
