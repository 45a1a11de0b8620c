"""Two timeseries replicas on one store: who dies, what moves, and what a reader is told meanwhile.

The same story on VictoriaMetrics in the quick tests and on a real three-node Mimir in the full ones.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from fleet.model import Metric, MetricSet, Rows, ServerDescriptor, WriteBatch
from fleet.writer import FleetWriter
from openmanager.fleet.v1 import history_pb2, status_pb2, status_pb2_grpc
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc
from runtime.channel import Channel, calling
from runtime.clock import SystemClock
from runtime.errors import OpenManagerError, Unavailable
from tests.harness import eventually
from tests.harness.fault_proxy import FaultProxy, fault_proxy
from tests.harness.mimir import MimirCluster, mimir_cluster
from tests.harness.product import Product
from tests.harness.prometheus import PrometheusApi
from tests.harness.victoria import victoria_server

SECRET: Final = "the-secret-of-two-replicas"
SERVERS: Final = [ServerDescriptor(server_id=f"s{n:02}", hostname=f"s{n:02}", environment="staging") for n in range(12)]
SET: Final = MetricSet((Metric(name="cpu_usage", unit="%"), Metric(name="load", unit="1")))
TICK_MS: Final = 100
"""All ticks are less ahead of the clock than a test takes."""
CATCH_UP_S: Final = 120.0


@dataclass(slots=True)
class Replicated:
    """Two replicas, their store behind proxies, and a sender that knows what was acknowledged."""

    products: list[Product]
    proxies: list[FaultProxy]
    store: PrometheusApi
    writer: FleetWriter
    start_ms: int
    ticks: int = 0
    acknowledged: list[int] = field(default_factory=list)

    async def send(self, ticks: int) -> None:
        """Sends ticks, each until it is acknowledged."""
        for _ in range(ticks):
            rows = Rows(
                metric_set_id=SET.id,
                server_ids=tuple(server.server_id for server in SERVERS),
                times_ms=np.full(len(SERVERS), self.start_ms + self.ticks * TICK_MS),
                values=np.add.outer(np.arange(len(SERVERS)) / 100, np.array([0.0, 0.5])) + self.ticks,
            )
            while not await self._acknowledges(WriteBatch(metric_set=SET, rows=rows, servers=tuple(SERVERS))):
                await asyncio.sleep(0.05)
            self.acknowledged.append(self.ticks)
            self.ticks += 1

    async def _acknowledges(self, batch: WriteBatch) -> bool:
        try:
            await self.writer.write(batch)
        except OpenManagerError:
            return False
        return True

    async def read(self, replica: int, **options: Any) -> tuple[dict[str, np.ndarray[Any, Any]], list[str]]:
        """The ticks that a replica finds of each server, by value, and what it says it could not ask."""
        query = history_pb2.HistoryQuery(metrics=["cpu_usage"], **options)
        query.start_time.FromMilliseconds(self.start_ms)
        query.end_time.FromMilliseconds(self.start_ms + self.ticks * TICK_MS)
        found: dict[str, list[float]] = {}
        incomplete: list[str] = []
        async with self.products[replica].channel("timeseries") as channel, calling("timeseries"):
            stub = timeseries_pb2_grpc.TimeSeriesServiceStub(channel.grpc)
            async for answer in stub.Query(timeseries_pb2.QueryRequest(query=query), timeout=60):
                for series in answer.series:
                    found.setdefault(series.server_id, []).extend(series.values)
                incomplete += answer.incomplete
        return {name: np.floor(np.array(values)).astype(int) for name, values in found.items()}, incomplete

    async def check(self, replica: int) -> None:
        """A replica has every acknowledged tick of every server, once, and says that nothing is missing."""
        found, incomplete = await self.read(replica)
        assert incomplete == []
        assert sorted(found) == [server.server_id for server in SERVERS]
        for name, ticks in found.items():
            assert ticks.tolist() == self.acknowledged, (name, len(ticks), len(self.acknowledged))
        counted, incomplete = await self.read(replica, step={"seconds": 1}, aggregation=history_pb2.AGGREGATION_COUNT)
        assert incomplete == []
        assert {name: int(counts.sum()) for name, counts in counted.items()} == dict.fromkeys(
            counted, len(self.acknowledged)
        )

    async def shipped(self, *replicas: int) -> None:
        """Waits until replicas have shipped everything."""
        for replica in replicas:

            async def nothing_waits(replica: int = replica) -> bool:
                try:
                    async with self.products[replica].channel("timeseries") as channel, calling("timeseries"):
                        stub = status_pb2_grpc.StoreStatusServiceStub(channel.grpc)
                        answer = await stub.ListStoreStatuses(status_pb2.ListStoreStatusesRequest())
                except Unavailable:
                    return False  # connections to one that was killed are tried again for up to 2 s
                (status,) = [status for status in answer.stores if status.name == "prometheus"]
                assert status.state == status_pb2.STORE_STATE_UP and not status.lag_points, status
                return True

            await eventually(nothing_waits, within_s=CATCH_UP_S)

    async def check_store(self) -> None:
        """The store itself has every acknowledged sample once, those of one server under one set of tags."""
        wanted = {(server.server_id, "staging", ""): 2 * len(self.acknowledged) for server in SERVERS}

        async def all_there() -> bool:
            assert await self.store.points(int(time.time() * 1_000), range_s=7_200) == wanted
            return True

        await eventually(all_there, within_s=30)  # VictoriaMetrics shows them some seconds later

    async def cut(self) -> None:
        for proxy in self.proxies:
            await proxy.cut()

    async def restore(self) -> None:
        for proxy in self.proxies:
            await proxy.restore()


@asynccontextmanager
async def replicated(
    folder: Path, store: PrometheusApi, writes: Sequence[str], queries: Sequence[str]
) -> AsyncIterator[Replicated]:
    """Two replicas on a store.

    Args:
        folder: for their data and logs.
        store: to be looked into by the test, past the proxies.
        writes: addresses of remote write on 127.0.0.1.
        queries: bases of the query API, on the same ports.
    """
    async with AsyncExitStack() as stack:
        ports = [int(url.split(":")[2].split("/")[0]) for url in writes]
        proxies = {port: await stack.enter_async_context(fault_proxy(port)) for port in ports}

        def through(urls: Sequence[str]) -> str:
            proxied = []
            for port, url in zip(ports, urls, strict=True):
                proxied.append(url.replace(f":{port}", f":{proxies[port].port}"))
            return ",".join(proxied)

        settings = {
            "SERVICE_SECRET": SECRET,
            "TIMESERIES_READ": "remote",
            "PROMETHEUS_WRITE_URL": through(writes),
            "PROMETHEUS_QUERY_URL": through(queries),
        }
        products = []
        for name in ("a", "b"):
            (folder / name).mkdir()
            products.append(await stack.enter_async_context(Product(folder / name, **settings)))
        for product, other in zip(products, reversed(products), strict=True):
            product.environ["TIMESERIES_PEERS"] = other.addresses["timeseries"]
            await product.start("timeseries")
        channels = [
            await stack.enter_async_context(Channel(product.addresses["timeseries"], secret=SECRET))
            for product in products
        ]
        nobody = await stack.enter_async_context(Channel("127.0.0.1:9"))
        writer = await stack.enter_async_context(
            FleetWriter(timeseries=channels, cache=nobody, metadata=nobody, clock=SystemClock())
        )
        # Of what is older than the replicas the store may have more than they; windows begin with a second.
        start_ms = (int(time.time()) + 1) * 1_000
        yield Replicated(products, list(proxies.values()), store, writer, start_ms)


async def the_story(made: Replicated, away_s: float) -> None:
    """What may happen to two replicas and their store in a night."""
    await made.send(20)
    for replica in (0, 1):
        await made.check(replica)

    await made.cut()  # the store is away: while both live there is no gap, whoever is asked
    ends = time.monotonic() + away_s
    await made.send(40)
    while time.monotonic() < ends:
        await made.send(1)
        await asyncio.sleep(min(0.5, away_s / 20))
    for replica in (0, 1):
        await made.check(replica)

    await made.products[1].kill("timeseries")  # and one replica, with what it alone has
    await made.send(20)  # its servers' rows go to the other
    _, incomplete = await made.read(0)
    assert any(f"replica {made.products[1].addresses['timeseries']} does not answer" in text for text in incomplete)

    await made.restore()
    await made.shipped(0)
    found, incomplete = await made.read(0)
    assert any("what it has not shipped to prometheus is missing" in text for text in incomplete), incomplete
    assert sorted(found) == [server.server_id for server in SERVERS], "what it had shipped is there"

    await made.products[1].start("timeseries")  # it comes back, catches up, and its servers return to it
    await made.send(20)
    await made.shipped(0, 1)

    async def whole() -> bool:
        await made.check(0)
        return True

    await eventually(whole, within_s=30)  # the circuit to it closes with the next trial
    await made.check(1)
    await made.check_store()


@pytest.mark.full
@pytest.mark.fault("two timeseries replicas: store cut off, a replica killed")
@pytest.mark.timeout(300)
async def test_two_replicas_on_one_store(tmp_path: Path) -> None:
    async with (
        victoria_server() as store,
        replicated(tmp_path, store, [store.write_url], [store.query_url()]) as made,
    ):
        await the_story(made, away_s=3)


@pytest.mark.fault("two timeseries replicas on Mimir: the same, a node killed")
@pytest.mark.full
@pytest.mark.timeout(900)
async def test_two_replicas_on_a_mimir_of_three_nodes_one_of_which_dies(tmp_path: Path) -> None:
    async with (
        mimir_cluster() as store,
        replicated(tmp_path, store, store.write_urls, store.query_urls) as made,
    ):
        await made.send(30)
        await _killed_in_mid_stream(made, store)
        await the_story(made, away_s=60)


async def _killed_in_mid_stream(made: Replicated, store: MimirCluster) -> None:
    sending = asyncio.create_task(made.send(200))
    store.nodes[0].kill()
    await store.choose()
    for _ in range(5):  # queries go on meanwhile
        found, incomplete = await made.read(0)
        assert len(found) == len(SERVERS) and incomplete == []
    await sending
    await made.shipped(0, 1)
    await made.check(1)
    await made.check_store()
    await store.start()
