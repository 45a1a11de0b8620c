"""The product with its stores behind proxies: real servers, real processes, and what breaks them.

A store can be killed (SIGKILL, and started again on the same port), cut off, delayed by 5 s, or made to lose packets
(half open). What is in it afterwards is asked of the store itself, past the proxy.
"""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import asyncpg
import numpy as np

from fleet.writer import FleetWriter
from openmanager.fleet.v1 import history_pb2, status_pb2
from openmanager.gateway.v1 import storage_pb2, storage_pb2_grpc
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc
from runtime.channel import Channel, calling
from runtime.clock import SystemClock
from runtime.errors import OpenManagerError
from tests.faults.load import FLEET, METRICS, SERVERS, SET, Facts, Readers, Sender
from tests.harness import eventually
from tests.harness.fault_proxy import FaultProxy, fault_proxy
from tests.harness.influxdb import ORG, TOKEN, InfluxServer, influx_server
from tests.harness.postgres import PostgresServer, debian_postgres
from tests.harness.product import Product
from tests.harness.redis import RedisServer, redis_server
from tests.harness.victoria import VictoriaServer, victoria_server

BUCKET: Final = "metrics"
DELAY_S: Final = 5.0
CATCH_UP_S: Final = 180.0
SHOWN_WITHIN_S: Final = 20.0
"""VictoriaMetrics was seen to take 5 s (services.timeseries.backfill counts again, too); after this it is missing."""
PROCESSES: Final = ("metadata", "timeseries", "cache", "gateway")
SETTINGS: Final = {
    "influxdb": "INFLUXDB_URL",
    "prometheus": "PROMETHEUS_WRITE_URL",
    "redis": "REDIS_URL",
    "postgresql": "DATABASE_URL",
}


@dataclass(slots=True, kw_only=True)
class Found:
    """What a store has of what was acknowledged."""

    found: int
    missing: int
    doubled: int


class Store(Protocol):
    """A real server, which may be killed and comes back on the same port."""

    name: str
    port: int

    async def kill(self) -> None: ...

    async def start(self) -> None: ...

    async def count(self, stand: "Stand") -> Found:
        """Looks into the store."""


class Killable:
    """A server of the harness, killed and started again as it is."""

    def __init__(self, server: InfluxServer | VictoriaServer | RedisServer) -> None:
        self._killed = server
        self.port = server.port

    async def kill(self) -> None:
        await asyncio.to_thread(self._killed.kill)

    async def start(self) -> None:
        await self._killed.start()


class Influx(Killable):
    name = "influxdb"

    def __init__(self, server: InfluxServer) -> None:
        super().__init__(server)
        self._server = server

    async def count(self, stand: "Stand") -> Found:
        by_tags = await self._server.points(BUCKET)
        ours = {(server.server_id, server.environment, server.role) for server in stand.sender.fleet} | stand.moved
        return counted(sum(by_tags.values()), stand.sender.acknowledged_points, strange=len(by_tags.keys() - ours))


class Victoria(Killable):
    name = "prometheus"

    def __init__(self, server: VictoriaServer) -> None:
        super().__init__(server)
        self._server = server

    async def count(self, stand: "Stand") -> Found:
        """Counts again for SHOWN_WITHIN_S where something is missing: it shows later what it has acknowledged."""
        ends = time.monotonic() + SHOWN_WITHIN_S
        while True:
            await self._server.flush()
            by_tags = await self._server.points(int(time.time() * 1_000), range_s=86_400)
            found = counted(sum(by_tags.values()), stand.sender.acknowledged_points)
            if not found.missing or time.monotonic() > ends:
                return found
            await asyncio.sleep(0.5)


class Redis(Killable):
    """Holds the current state: the last acknowledged tick of each server, which is all that is asked of it."""

    name = "redis"

    def __init__(self, server: RedisServer) -> None:
        super().__init__(server)
        self._server = server

    async def count(self, stand: "Stand") -> Found:
        last = max(stand.sender.acknowledged)
        found = 0
        async with self._server.client() as client:
            listed = json.loads(await client.get("servers:all") or "[]")
            assert [one["id"] for one in listed] == [server.server_id for server in FLEET]
            for place, server in enumerate(FLEET):
                state = json.loads(await client.get(f"server:{server.server_id}") or "{}")
                wanted = [last + place / 100 + column / 10_000 for column in range(3, METRICS)]
                current = [state.get(metric) for metric in (f"metric_{number:03}" for number in range(METRICS - 3))]
                found += METRICS if np.allclose(np.array(current, np.float64), wanted) else 0
        return counted(found, SERVERS * METRICS)


class Postgres:
    """Holds facts and the record of servers."""

    name = "postgresql"

    def __init__(self, server: PostgresServer, database: str) -> None:
        self._server = server
        self.port = int(server.admin["port"])
        self.database = database

    async def kill(self) -> None:
        await asyncio.to_thread(self._server.stop, signal.SIGKILL)

    async def start(self) -> None:
        """As soon as what the killed one left behind has noticed and ended."""

        def start() -> bool:
            self._server.start()
            return True

        await eventually(lambda: asyncio.to_thread(start), within_s=30)

    async def count(self, stand: "Stand") -> Found:
        connection = await asyncpg.connect(**{**self._server.admin, "database": self.database})
        try:
            ids = [str(row[0]) for row in await connection.fetch("SELECT id FROM ai_interactions")]
            servers = {row[0] for row in await connection.fetch("SELECT id FROM servers")}
        finally:
            await connection.close()
        assert servers == {server.server_id for server in FLEET}
        missing = len(stand.facts.acknowledged - set(ids))
        return Found(found=len(set(ids)), missing=missing, doubled=len(ids) - len(set(ids)))


def counted(found: int, wanted: int, strange: int = 0) -> Found:
    """Of points that can only be there once each, or under other tags."""
    return Found(found=found, missing=max(0, wanted - found), doubled=max(0, found - wanted) + strange)


class Stand:
    """Everything, running."""

    def __init__(
        self, product: Product, stores: Mapping[str, Store], proxies: Mapping[str, FaultProxy], sender: Sender
    ) -> None:
        self.product = product
        self.stores = stores
        self.proxies = proxies
        self.sender = sender
        self.gateway = product.channel("gateway")
        self.facts = Facts(self.gateway)
        self.readers = Readers(self.gateway, sender)
        self.moved: set[tuple[str, str, str]] = set()

    async def break_(self, name: str, how: str) -> None:
        """Does it to a store."""
        proxy = self.proxies[name]
        if how == "kill":
            await self.stores[name].kill()
        elif how == "cut":
            await proxy.cut()
        elif how == "delay":
            proxy.delay_s = DELAY_S
        else:
            proxy.half_open()

    async def mend(self, name: str, how: str) -> None:
        """Undoes it."""
        if how == "kill":
            await self.stores[name].start()
        else:
            await self.proxies[name].restore()

    async def statuses(self) -> dict[str, status_pb2.StoreStatus]:
        """The stores by name, as the gateway tells of them."""
        stub = storage_pb2_grpc.StorageServiceStub(self.gateway.grpc)
        async with calling("gateway"):
            answer = await stub.GetStorageStatus(storage_pb2.GetStorageStatusRequest())
        return {status.name: status for status in answer.stores}

    async def shown(self, names: tuple[str, ...]) -> float:
        """Seconds until the status shows that stores are not up."""
        started = time.monotonic()

        async def not_up() -> bool:
            statuses = await self.statuses()
            return all(statuses[name].state != status_pb2.STORE_STATE_UP for name in names)

        await eventually(not_up, within_s=30)
        return time.monotonic() - started

    async def caught_up(self) -> float:
        """Seconds until every store is up and lacks nothing."""
        started = time.monotonic()

        async def nothing_is_missing() -> bool:
            statuses = await self.statuses()
            late = {
                name: (status_pb2.StoreState.Name(status.state), status.lag_points, status.last_error)
                for name, status in statuses.items()
                if status.state != status_pb2.STORE_STATE_UP or status.lag_points
            }
            assert not late, late
            return statuses.keys() >= self.stores.keys()

        await eventually(nothing_is_missing, within_s=CATCH_UP_S)
        return time.monotonic() - started

    async def engine(self) -> Found:
        """What the engine has."""
        query = history_pb2.HistoryQuery(metrics=[metric.name for metric in SET.metrics])
        query.start_time.FromMilliseconds(self.sender.start_ms)
        query.end_time.FromMilliseconds(int(time.time() * 1_000) + 60_000)
        found = doubled = 0
        async with self.product.channel("timeseries") as channel, calling("timeseries"):
            stub = timeseries_pb2_grpc.TimeSeriesServiceStub(channel.grpc)
            last: dict[tuple[str, str], float] = {}
            async for answer in stub.Query(timeseries_pb2.QueryRequest(query=query)):
                for series in answer.series:
                    name, times = (series.server_id, series.metric), np.array(series.times)
                    steps = np.diff(times, prepend=last.get(name, -1.0))
                    doubled += int(np.count_nonzero(steps <= 0))
                    found += len(times)
                    last[name] = float(times[-1])
        wanted = self.sender.acknowledged_points
        return Found(found=found, missing=max(0, wanted - found), doubled=doubled + max(0, found - wanted))


Open = Callable[[AsyncExitStack], Awaitable[Store]]


async def _influx(stack: AsyncExitStack) -> Store:
    server = await stack.enter_async_context(influx_server())
    await server.make_bucket(BUCKET)
    return Influx(server)


async def _victoria(stack: AsyncExitStack) -> Store:
    return Victoria(await stack.enter_async_context(victoria_server()))


async def _redis(stack: AsyncExitStack) -> Store:
    return Redis(await stack.enter_async_context(redis_server()))


async def _postgres(stack: AsyncExitStack) -> Store:
    server = stack.enter_context(debian_postgres())
    target = await server.fresh_database()
    return Postgres(server, target.address.rpartition("/")[2])


OPEN: Final[dict[str, Open]] = {
    "influxdb": _influx,
    "prometheus": _victoria,
    "redis": _redis,
    "postgresql": _postgres,
}


def _url(store: Store, port: int) -> dict[str, str]:
    if isinstance(store, Influx):
        return {
            "INFLUXDB_URL": f"http://127.0.0.1:{port}",
            "INFLUXDB_TOKEN": TOKEN,
            "INFLUXDB_ORG": ORG,
            "INFLUXDB_BUCKET": BUCKET,
        }
    if isinstance(store, Victoria):
        return {
            "PROMETHEUS_WRITE_URL": f"http://127.0.0.1:{port}/api/v1/write",
            "PROMETHEUS_QUERY_URL": f"http://127.0.0.1:{port}",
        }
    if isinstance(store, Redis):
        return {"REDIS_URL": f"redis://127.0.0.1:{port}"}
    assert isinstance(store, Postgres)
    return {"DATABASE_URL": store._server.url(store.database).replace(f":{store.port}/", f":{port}/")}


@asynccontextmanager
async def stand(folder: Path, *names: str, ticks: int) -> AsyncIterator[Stand]:
    """The product with the stores of those names.

    Args:
        folder: for its data and logs.
        names: of OPEN.
        ticks: how many will be sent at most.
    """
    async with AsyncExitStack() as stack:
        stores = {name: await OPEN[name](stack) for name in names}
        proxies = {name: await stack.enter_async_context(fault_proxy(store.port)) for name, store in stores.items()}
        settings: dict[str, str] = {}
        for name, store in stores.items():
            settings |= _url(store, proxies[name].port)
        product = await stack.enter_async_context(Product(folder, **settings))
        await product.start(*PROCESSES)
        channels: dict[str, Channel] = {}
        for name in ("timeseries", "cache", "metadata"):
            channels[name] = await stack.enter_async_context(product.channel(name))
        writer = await stack.enter_async_context(
            FleetWriter(
                timeseries=[channels["timeseries"]],
                cache=channels["cache"],
                metadata=channels["metadata"],
                clock=SystemClock(),
            )
        )
        made = Stand(product, stores, proxies, Sender(writer, ticks=ticks))
        stack.push_async_callback(made.gateway.close)
        yield made


async def tried(action: Callable[[], Awaitable[Any]]) -> bool:
    """Whether it did not fail."""
    try:
        await action()
    except OpenManagerError:
        return False
    return True
