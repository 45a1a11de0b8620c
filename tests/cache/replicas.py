"""Replicas of the cache on one Redis, for the tests of how they agree and of what they survive."""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

import orjson
from redis.asyncio import Redis, RedisCluster

from fleet.model import ServerDescriptor
from runtime.clock import Clock, SystemClock
from services.cache.core import Cache
from services.cache.model import ServerState
from services.cache.state import Update
from services.cache.store_redis import RedisStateStore
from tests.cache.samples import HEADLINE, WIDE, ids, rows_of, tick
from tests.harness.redis import RedisServer

_ARGUMENT: Final = re.compile(r'"((?:[^"\\]|\\.)*)"')
MAX_LINE_BYTES: Final = 16 << 20


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@asynccontextmanager
async def replica(url: str, epoch: str, clock: Clock | None = None) -> AsyncIterator[Cache]:
    """A running replica."""
    async with Cache(RedisStateStore(url), clock or SystemClock(), epoch=epoch, rng=random.Random(1)) as cache:
        yield cache


def at_once(call: Coroutine[Any, Any, None]) -> None:
    """Makes a call that must be done without waiting for anything, were it the event loop's next turn."""
    try:
        call.send(None)
    except StopIteration:
        return
    finally:
        call.close()
    raise AssertionError("the call waits")


async def report(cache: Cache, *server_ids: str, cpu: float = 10.0) -> None:
    """A row of the headline metrics for each."""
    rows = rows_of(HEADLINE, dict.fromkeys(server_ids, (cpu, 10.0, 10.0)), now_ms())
    await cache.update(Update(batches=[rows]), [HEADLINE])


async def report_tick(cache: Cache, count: int, cpu: float) -> None:
    """A row of 511 metrics for each of `count` servers. None falls silent in a test: that would be news of its own."""
    servers = [ServerDescriptor(server_id=one, hostname=one, report_interval_ms=600_000) for one in ids(count)]
    rows = tick(count, now_ms(), cpu=cpu, seed=int(cpu))
    await cache.update(Update(descriptors=servers, batches=[rows]), [WIDE])


def content(cache: Cache) -> dict[str, object]:
    """What replicas must agree on, by server."""
    return {state.server_id: _content(state) for state in cache.states()[0]}


def _content(state: ServerState) -> object:
    units = {metric.unit for sample in state.samples for metric in sample.metric_set.metrics}
    return state.descriptor, state.status, state.observed_ms, state.received_ms, state.metrics(), units <= {"%", ""}


def agree(first: Cache, second: Cache) -> bool:
    """Whether two replicas hold the same."""
    assert content(first) == content(second)
    assert first.summary() == second.summary()
    return True


async def holds(raw: "Redis | RedisCluster", cache: Cache) -> bool:
    """Whether Redis holds what a replica holds: every server with all its metrics, and the three keys of the fleet."""
    states, _, _ = cache.states()
    summary = cache.summary()
    assert int(await raw.get("servers:count") or -1) == summary.total
    assert int(await raw.get("servers:healthy") or -1) == summary.healthy
    listed = orjson.loads(await raw.get("servers:all") or b"[]")
    assert [entry["id"] for entry in listed] == [state.server_id for state in states]
    for state, entry in zip(states, listed, strict=True):
        document = orjson.loads(await raw.get(f"server:{state.server_id}") or b"{}")
        assert {key: document.get(key) for key in state.metrics()} == state.metrics()
        assert document["status"] == entry["status"] == state.status.name.lower()
        assert entry.get("cpu_usage") == state.metrics().get("cpu_usage")
    return True


class Recorder:
    """Every value that was ever set under the keys of servers, as Redis itself tells it."""

    def __init__(self) -> None:
        self.documents: dict[str, list[dict[str, object]]] = {}
        self.fleets: list[list[str]] = []

    def cpus(self, server_id: str) -> list[object]:
        return [document.get("cpu_usage") for document in self.documents.get(f"server:{server_id}", ())]

    def take(self, line: str) -> None:
        """One line of MONITOR: time and client, then each argument in quotes."""
        command, key, value = ([*_ARGUMENT.findall(line), "", "", ""])[:3]
        if command != "SET":
            return
        content = value.replace('\\"', '"').replace("\\\\", "\\")
        if key.startswith("server:"):
            self.documents.setdefault(key, []).append(orjson.loads(content))
        elif key == "servers:all":
            self.fleets.append([f"{entry['id']}={entry.get('cpu_usage')}" for entry in orjson.loads(content)])


@asynccontextmanager
async def recording(server: RedisServer) -> AsyncIterator[Recorder]:
    """Records what is written while the block runs."""
    recorder = Recorder()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=MAX_LINE_BYTES)
    writer.write(b"MONITOR\r\n")
    assert await reader.readline() == b"+OK\r\n"

    async def record() -> None:
        async for line in reader:
            recorder.take(line.decode())

    task = asyncio.create_task(record(), name="record")
    try:
        yield recorder
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        writer.close()
        await writer.wait_closed()
