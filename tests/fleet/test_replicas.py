"""Several timeseries replicas: who gets which rows, and what happens while one is away."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
import pytest

from fleet.codec import metric_set_to_pb, rows_from_pb, rows_to_pb
from fleet.model import Metric, MetricSet, Rows, ServerDescriptor
from fleet.replicas import Replicas
from openmanager.fleet.v1 import metric_pb2
from openmanager.timeseries.v1 import timeseries_pb2
from runtime.channel import Channel
from runtime.clock import ManualClock
from runtime.errors import FailedPrecondition, InvalidArgument, OpenManagerError, ResourceExhausted, Unavailable
from runtime.interception import Interception
from runtime.server import GrpcServer, bind

SET = MetricSet((Metric(name="a"), Metric(name="b")))
SERVERS = [f"server-{number:02}" for number in range(30)]
KNOWN = {name: ServerDescriptor(server_id=name, hostname=name, environment="staging") for name in SERVERS}


class Store:
    """A timeseries process as senders see it."""

    def __init__(self) -> None:
        self.fails: OpenManagerError | None = None
        self.late: set[str] = set()
        self.known_sets: set[str] = set()
        self.told: dict[str, str] = {}
        self.rows: dict[tuple[str, int], list[float]] = {}
        self.calls = 0

    async def Append(self, request: timeseries_pb2.AppendRequest, _context: Any) -> timeseries_pb2.AppendResponse:
        self.calls += 1
        if self.fails is not None:
            raise self.fails
        self.known_sets |= {message.id for message in request.metric_sets}
        self.told.update((server.server_id, server.environment) for server in request.servers)
        if request.batch.rows and request.batch.metric_set_id not in self.known_sets:
            raise FailedPrecondition("unknown", reason="METRIC_SET_UNKNOWN")
        response = timeseries_pb2.AppendResponse(sequence=self.calls)
        rows = rows_from_pb(request.batch, len(SET))
        for place, (server_id, time_ms) in enumerate(zip(rows.server_ids, rows.times_ms.tolist(), strict=True)):
            if server_id in self.late:
                response.errors.add(row=place, field=f"rows[{place}].time", reason="TOO_LATE", message="too late")
                response.rejected_points += len(SET)
            else:
                self.rows[server_id, time_ms] = rows.values[place].tolist()
                response.accepted_points += len(SET)
        return response


class Cluster:
    def __init__(self, stores: list[Store], replicas: Replicas, clock: ManualClock) -> None:
        self.stores = stores
        self.replicas = replicas
        self.clock = clock

    async def send(
        self, tick: int, news: Sequence[ServerDescriptor] = (), servers: Sequence[str] = SERVERS
    ) -> timeseries_pb2.AppendResponse:
        return await self.replicas.append(batch(tick, servers), metric_set_to_pb(SET), news, KNOWN)

    def holders(self, server_id: str, tick: int) -> list[int]:
        return [number for number, store in enumerate(self.stores) if (server_id, tick * 1_000) in store.rows]


def batch(tick: int, servers: Sequence[str] = SERVERS) -> metric_pb2.MetricBatch:
    values = np.array([[tick, place] for place in range(len(servers))], np.float64).reshape(len(servers), 2)
    times = np.full(len(servers), tick * 1_000)
    return rows_to_pb(Rows(metric_set_id=SET.id, server_ids=tuple(servers), times_ms=times, values=values))


@asynccontextmanager
async def running(count: int) -> AsyncIterator[Cluster]:
    stores, clock = [Store() for _ in range(count)], ManualClock()
    async with AsyncExitStack() as stack:
        channels = []
        for store in stores:
            server = GrpcServer([bind("openmanager.timeseries.v1.TimeSeriesService", store)], Interception(None))
            address = await server.start("127.0.0.1:0")
            stack.push_async_callback(server.stop, 0)
            channels.append(await stack.enter_async_context(Channel(address)))
        yield Cluster(stores, Replicas(channels, clock), clock)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running(3) as made:
        yield made


async def test_each_server_has_one_replica_and_always_the_same(cluster: Cluster) -> None:
    for tick in (1, 2, 3):
        response = await cluster.send(tick)
        assert response.accepted_points == 2 * len(SERVERS)
    owners = {server_id: cluster.holders(server_id, 1) for server_id in SERVERS}
    assert all(len(holders) == 1 for holders in owners.values())
    assert {holder for holders in owners.values() for holder in holders} == {0, 1, 2}
    assert all(cluster.holders(server_id, tick) == owners[server_id] for server_id in SERVERS for tick in (2, 3))
    rows = {name: values for store in cluster.stores for name, values in store.rows.items()}
    assert rows == {(name, tick * 1_000): [tick, place] for tick in (1, 2, 3) for place, name in enumerate(SERVERS)}


async def test_of_two_senders_both_choose_alike(cluster: Cluster) -> None:
    await cluster.send(1)
    other = Replicas([Channel(replica.target) for replica in reversed(cluster.replicas._replicas)], ManualClock())
    await other.append(batch(2), metric_set_to_pb(SET), (), KNOWN)
    assert all(cluster.holders(name, 1) == cluster.holders(name, 2) for name in SERVERS)


async def test_rows_of_a_replica_that_is_away_go_to_the_next_with_set_and_descriptors(cluster: Cluster) -> None:
    await cluster.send(1)
    cluster.stores[1].fails = Unavailable("away")
    response = await cluster.send(2)
    assert response.accepted_points == 2 * len(SERVERS), "all rows are acknowledged"
    moved = [name for name in SERVERS if cluster.holders(name, 1) == [1]]
    assert moved
    for name in SERVERS:
        (holder,) = cluster.holders(name, 2)
        assert (holder == cluster.holders(name, 1)[0]) == (name not in moved)
        assert cluster.stores[holder].told[name] == "staging", "its tags are known where its rows are"
    assert {cluster.holders(name, 2)[0] for name in moved} == {0, 2}, "its servers are spread over the rest"


async def test_a_sender_that_was_started_anew_tells_the_next_replica_what_is_known_elsewhere(cluster: Cluster) -> None:
    """Its agents told it of themselves before, and do not again."""
    await cluster.send(1)
    asked: list[str] = []

    def describe(server_id: str) -> ServerDescriptor | None:
        asked.append(server_id)
        return KNOWN.get(server_id)

    channels = [Channel(replica.target) for replica in cluster.replicas._replicas]
    anew = Replicas(channels, cluster.clock, describe)
    cluster.stores[1].fails = Unavailable("away")
    for tick in (2, 3):
        asked.clear()
        await anew.append(batch(tick, [*SERVERS, "nobody-knows"]), metric_set_to_pb(SET), (), {})
    moved = [name for name in SERVERS if cluster.holders(name, 1) == [1]]
    assert moved and all(cluster.stores[cluster.holders(name, 2)[0]].told[name] == "staging" for name in moved)
    assert not any("nobody-knows" in store.told for store in cluster.stores)
    assert set(asked) <= {*moved, "nobody-knows"}, "what a replica was told is not asked of again"
    for channel in channels:
        await channel.close()


async def test_a_replica_that_is_away_is_left_alone_until_a_trial_succeeds(cluster: Cluster) -> None:
    cluster.stores[1].fails = Unavailable("away")
    await cluster.send(1)
    await cluster.send(2)
    calls = cluster.stores[1].calls
    await cluster.send(3)
    assert cluster.stores[1].calls == calls, "its circuit is open"
    cluster.stores[1].fails = None
    cluster.clock.advance(60)
    await cluster.send(4)
    assert {cluster.holders(name, 4)[0] for name in SERVERS} == {0, 1, 2}, "it has its servers back"


@pytest.mark.parametrize("reason", ["DISK_FULL", "HEADS_FULL"])
async def test_rows_of_a_replica_that_is_full_go_to_the_next(cluster: Cluster, reason: str) -> None:
    await cluster.send(1)
    cluster.stores[1].fails = ResourceExhausted("full", reason=reason)
    for tick in (2, 3, 4):
        assert (await cluster.send(tick)).accepted_points == 2 * len(SERVERS)
        assert {cluster.holders(name, tick)[0] for name in SERVERS} == {0, 2}
    for store in (cluster.stores[0], cluster.stores[2]):
        store.fails = ResourceExhausted("full", reason=reason)
    with pytest.raises(ResourceExhausted, match="full"):
        await cluster.send(5)
    for store in cluster.stores:
        store.fails = None
    await cluster.send(5)
    assert [cluster.holders(name, 5) for name in SERVERS] == [cluster.holders(name, 1) for name in SERVERS]


async def test_a_replica_with_too_much_to_do_holds_its_senders_back_and_burdens_no_other(cluster: Cluster) -> None:
    await cluster.send(1)
    cluster.stores[1].fails = ResourceExhausted("so many wait", reason="TOO_MANY_WAITING")
    with pytest.raises(ResourceExhausted, match="so many wait"):
        await cluster.send(2)


async def test_nobody_acknowledges_what_no_replica_takes(cluster: Cluster) -> None:
    for store in cluster.stores:
        store.fails = Unavailable("away")
    with pytest.raises(Unavailable):
        await cluster.send(1)
    with pytest.raises(Unavailable):
        await cluster.send(1)
    cluster.clock.advance(60)
    for store in cluster.stores:
        store.fails = None
    assert (await cluster.send(1)).accepted_points == 2 * len(SERVERS)


async def test_errors_name_the_rows_as_they_were_sent(cluster: Cluster) -> None:
    late = {"server-03", "server-17", "server-29"}
    for store in cluster.stores:
        store.late = late
    response = await cluster.send(1)
    assert {(error.row, error.field) for error in response.errors} == {
        (int(name[-2:]), f"rows[{int(name[-2:])}].time") for name in late
    }
    assert (response.accepted_points, response.rejected_points) == (2 * (len(SERVERS) - 3), 6)


async def test_news_reach_the_replica_of_the_server_even_without_rows(cluster: Cluster) -> None:
    await cluster.send(1)
    moved = ServerDescriptor(server_id="server-05", hostname="server-05", environment="production")
    await cluster.replicas.append(metric_pb2.MetricBatch(), None, [moved], KNOWN)
    (holder,) = cluster.holders("server-05", 1)
    assert cluster.stores[holder].told["server-05"] == "production"


async def test_a_structural_fault_is_found_before_anything_is_sent(cluster: Cluster) -> None:
    message = batch(1)
    message.values.append(1.0)
    with pytest.raises(InvalidArgument, match="values"):
        await cluster.replicas.append(message, metric_set_to_pb(SET), (), KNOWN)
    assert [store.calls for store in cluster.stores] == [0, 0, 0]


@pytest.mark.parametrize("count", [1, 3])
async def test_a_replica_that_lost_its_data_is_told_the_set_and_its_servers_again(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.replicas.SERVERS_TOGETHER", 3)
    async with running(count) as cluster:
        await cluster.send(1, news=list(KNOWN.values()))
        told = [dict(store.told) for store in cluster.stores]
        assert all(told)
        for store in cluster.stores:
            store.known_sets.clear()
            store.told.clear()
        assert (await cluster.send(2)).accepted_points == 2 * len(SERVERS)
        assert [store.told for store in cluster.stores] == told


@pytest.mark.parametrize("noticed", [True, False], ids=["it was gone", "nobody asked meanwhile"])
@pytest.mark.parametrize("count", [1, 3])
async def test_a_replica_that_was_restored_from_a_backup_is_told_its_servers_again(count: int, noticed: bool) -> None:
    """It has the set, and not what servers said since then: their rows would have no tags, or old ones."""
    async with running(count) as cluster:
        for tick in (1, 2, 3):
            await cluster.send(tick, news=list(KNOWN.values()))
        told = [dict(store.told) for store in cluster.stores]
        for store in cluster.stores:
            store.fails = Unavailable("gone", reason="PEER_UNAVAILABLE") if noticed else None
        if noticed:
            with pytest.raises(Unavailable):
                await cluster.send(4)
        for store in cluster.stores:
            store.fails, store.calls = None, 0
            store.told.clear()
        for tick in (5, 6)[noticed:]:  # noticed before any row, or by the first
            await cluster.send(tick)
        assert [store.told for store in cluster.stores] == told
        calls = [store.calls for store in cluster.stores]
        await cluster.send(7)
        assert [store.calls for store in cluster.stores] == [number + 1 for number in calls], "once"


@pytest.mark.parametrize("count", [1, 3])
async def test_rows_that_leave_no_room_for_their_set_in_a_message_follow_it(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a set of 100,000 metrics and a batch as large as one may be: a sender sends them one after the other."""
    limit = batch(1).ByteSize() + 10
    monkeypatch.setattr("runtime.handlers.MAX_MESSAGE_BYTES", limit)
    monkeypatch.setattr("fleet.replicas.MAX_MESSAGE_BYTES", limit)
    async with running(count) as cluster:
        for tick in (1, 2):
            news = [KNOWN[server_id] for server_id in SERVERS[tick::10]]
            assert (await cluster.send(tick, news)).accepted_points == 2 * len(SERVERS)
            for store in cluster.stores:
                store.known_sets.clear()
        only = ["server-05"] * len(SERVERS)  # all of it goes to one of them
        assert (await cluster.send(3, list(KNOWN.values())[:2], only)).accepted_points == 2 * len(SERVERS)


async def test_a_single_replica_is_asked_each_time_whatever_happened_before() -> None:
    async with running(1) as cluster:
        cluster.stores[0].fails = Unavailable("away")
        for _ in range(4):
            with pytest.raises(Unavailable):
                await cluster.send(1)
        cluster.stores[0].fails = None
        assert (await cluster.send(1)).accepted_points == 2 * len(SERVERS)
