"""The follower and the reader on a real Mimir whose nodes are killed. What is there is counted by PromQL."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import pytest_asyncio

from fleet.model import Rows
from services.timeseries.engine import Aggregation, Engine, Query
from services.timeseries.followers.backend import TaggedRows
from services.timeseries.followers.follower import Follower
from services.timeseries.followers.prometheus import PrometheusBackend
from services.timeseries.remote.prometheus import PrometheusHistory
from tests.harness import eventually
from tests.harness.mimir import MimirCluster, mimir_cluster
from tests.timeseries.followers.samples import CLOCK, caught_up, descriptor, metric_set, rows

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]

WIDE: Final = metric_set(*(f"metric_{number}" for number in range(511)))
AWAY_S: Final = 60.0


@pytest_asyncio.fixture(scope="module")
async def mimir() -> AsyncIterator[MimirCluster]:
    async with mimir_cluster() as cluster:
        yield cluster


class Stream:
    """Ticks of 20 servers x 511 metrics, 100 ms apart in their times, appended and acknowledged."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.servers = tuple(f"{name}-{number:02}" for number in range(20))
        self.begins_ms = CLOCK.now_ms() - 600_000
        self.ticks = 0
        self.slowest_s = 0.0
        self._engine = engine

    async def write(self, ticks: int, pause_s: float) -> None:
        for _ in range(ticks):
            at = self.begins_ms + self.ticks * 100
            values = np.full((20, 511), float(self.ticks))
            batch = Rows(
                metric_set_id=WIDE.id, server_ids=self.servers, times_ms=np.full(20, at, np.int64), values=values
            )
            told = [descriptor(server) for server in self.servers] if self.ticks == 0 else []
            started_s = time.monotonic()
            await self._engine.append(batch, metric_sets=(WIDE,), servers=told)
            self.slowest_s = max(self.slowest_s, time.monotonic() - started_s)
            self.ticks += 1
            await asyncio.sleep(pause_s)

    async def assert_all_there(self, mimir: MimirCluster) -> None:
        await mimir.choose()
        counts = await mimir.points(CLOCK.now_ms())
        found = {server: counts.get((server, "production", "web"), 0) for server in self.servers}
        assert found == dict.fromkeys(self.servers, self.ticks * 511)
        assert sum(count for (server, _, _), count in counts.items() if server in found) == self.ticks * 10_220


@asynccontextmanager
async def following(folder: Path, mimir: MimirCluster, name: str) -> AsyncIterator[tuple[Stream, Engine, Follower]]:
    backend = PrometheusBackend(write_urls=mimir.write_urls, query_urls=mimir.query_urls, clock=CLOCK)
    async with (
        Engine.open(folder, clock=CLOCK) as engine,
        Follower(engine, backend, CLOCK, random.Random(1)) as follower,
    ):
        yield Stream(engine, name), engine, follower


async def last_seen(mimir: MimirCluster, stream: Stream, asked: list[float], urls: Sequence[str]) -> None:
    """Asks again and again, as a dashboard would; every answer must hold all servers and never less than before."""
    history = PrometheusHistory(query_urls=urls, clock=CLOCK)
    query = Query(
        metrics=("metric_7",),
        server_ids=stream.servers,
        start_ms=stream.begins_ms,
        end_ms=stream.begins_ms + 600_000,
        step_ms=600_000,
        aggregation=Aggregation.COUNT,
    )
    try:
        while True:
            totals: dict[str, float] = {}
            async for result in history.query(query, {}):
                totals[result.server_id] = totals.get(result.server_id, 0.0) + float(result.values.sum())
            if asked:
                assert set(totals) == set(stream.servers)
                assert sum(totals.values()) >= asked[-1]
            if len(totals) == len(stream.servers):
                asked.append(sum(totals.values()))
            await asyncio.sleep(0.2)
    finally:
        await history.close()


async def test_what_mimir_refuses_is_counted_exactly_though_it_says_that_it_wrote_it(mimir: MimirCluster) -> None:
    backend = PrometheusBackend(write_urls=mimir.write_urls, query_urls=mimir.query_urls, clock=CLOCK)
    small, now_ms = metric_set("a", "b", "c"), CLOCK.now_ms()

    def part(lines: list[tuple[str, int, list[float]]]) -> TaggedRows:
        batch = rows(small, lines)
        return TaggedRows(metric_set=small, rows=batch, descriptors=tuple(map(descriptor, batch.server_ids)))

    await backend.ship([part([("refused", now_ms, [1.0, 2.0, 3.0])])])
    old_ms = now_ms - 40 * 86_400_000
    receipt = await backend.ship(
        [part([("refused", now_ms, [1.0, 9.0, 3.0]), ("refused", old_ms, [1.0] * 3), ("taken", now_ms, [1.0] * 3)])]
    )
    assert dict(receipt.refused) == {"DUPLICATE_TIMESTAMP": 1, "TOO_OLD": 3} and receipt.shipped == 5
    found = await backend.probe()
    assert found.note == "takes samples that are out of order, by an hour at least"
    assert found.version == "Grafana Mimir unknown, remote write 2.0"
    counts = await mimir.points(CLOCK.now_ms())
    assert (counts["refused", "production", "web"], counts["taken", "production", "web"]) == (3, 3)
    await backend.close()


@pytest.mark.fault("Mimir: a node killed")
async def test_a_killed_node_loses_nothing_and_queries_go_on(mimir: MimirCluster, tmp_path: Path) -> None:
    first, second, _ = mimir.nodes
    async with following(tmp_path, mimir, "kill") as (stream, engine, follower):
        asked: list[float] = []
        asking = asyncio.create_task(last_seen(mimir, stream, asked, mimir.query_urls))
        streaming = asyncio.create_task(stream.write(60, 0.1))
        await eventually(lambda: follower.shipped_points > 10 * 10_220 and len(asked) > 3, within_s=60)
        first.kill()  # the one that takes writes and answers
        answered = len(asked)
        await streaming
        await caught_up(engine, within_s=60)
        await eventually(lambda: asking.done() or len(asked) > answered + 3, within_s=60)
        assert not asking.done(), asking.exception()
        assert not follower.refusals
        await stream.assert_all_there(mimir)
        found = await follower.probe()
        assert found.down == "" and found.lag_points == 0
        # with one of three left nothing is acknowledged
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        second.kill()
        cursor = (await engine.status()).followers[0].cursor
        await stream.write(5, 0.0)
        await eventually(lambda: follower._failures > 2, within_s=60)
        assert (await engine.status()).followers[0].cursor <= cursor  # what was acknowledged lately is not sure
        await mimir.start()
        await caught_up(engine, within_s=120)
        assert not follower.refusals
        await stream.assert_all_there(mimir)
    # the node that was away for longest and another one: what only two had is still found
    mimir.nodes[1].kill()
    await stream.assert_all_there(mimir)
    await mimir.start()


@pytest.mark.fault("Mimir: cluster away for a minute")
async def test_a_cluster_that_was_away_for_a_minute_gets_everything_once(mimir: MimirCluster, tmp_path: Path) -> None:
    async with following(tmp_path, mimir, "away") as (stream, engine, follower):
        await stream.write(10, 0.05)
        await caught_up(engine, within_s=60)
        streaming = asyncio.create_task(stream.write(round(AWAY_S / 0.5) + 20, 0.5))
        await eventually(lambda: stream.ticks > 15, within_s=60)
        mimir.end()
        down_s, ticks = time.monotonic(), stream.ticks + 90
        await eventually(lambda: stream.ticks > ticks and time.monotonic() - down_s > AWAY_S, within_s=2 * AWAY_S)
        away = await follower.probe()
        assert "does not answer" in away.down and away.lag_points > 80 * 10_220
        await mimir.start()
        await streaming
        await caught_up(engine, within_s=120)
        assert stream.slowest_s < AWAY_S / 3 and not follower.refusals, "no append waits until it is back"
        assert follower.shipped_points >= stream.ticks * 10_220
        await stream.assert_all_there(mimir)
        assert (await follower.probe()).down == ""
