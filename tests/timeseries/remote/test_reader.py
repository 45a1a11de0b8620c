"""Several replicas and a store that lags: every query equals the oracle, or says what it lacks.

The replicas are real engines. The store is the oracle itself, fed with what was shipped, so that it is exact and may
be taken away; real stores have tests of their own.
"""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fleet.model import Metric, MetricSet, Rows
from runtime import deadline
from runtime.clock import ManualClock
from runtime.errors import InvalidArgument, Unavailable
from services.timeseries.engine import Aggregation, Engine, EngineSettings, Query
from services.timeseries.engine.query import SeriesResult
from services.timeseries.remote.history import Guarded
from services.timeseries.remote.reader import Reader
from services.timeseries.remote.replica import Held, ThisReplica
from tests.timeseries.engine.model import Answer, Model, assert_same, metric_set, rows

NOON = 19_700 * 86_400_000 + 43_200_000
STORE = "prometheus"
SET = metric_set("cpu_usage", "requests_total")
SETTINGS = EngineSettings(head_rows=50, maintenance_interval_s=1e9, journal_keep_s=0.0)


class OracleStore:
    """A remote history that is the oracle; `away` makes it unreachable."""

    name = STORE

    def __init__(self) -> None:
        self.model = Model()
        self.away = False
        self.asked: list[Query] = []

    async def close(self) -> None:
        """Nothing is open."""

    async def query(self, query: Query, metrics: Mapping[str, Metric]) -> AsyncIterator[SeriesResult]:
        self.asked.append(query)
        if self.away:
            raise Unavailable("connection refused")
        for (server_id, key), series in sorted(self.model.query(query).items()):
            metric = metrics[key]
            times, values = zip(*series, strict=True)
            yield SeriesResult(
                server_id=server_id,
                metric_key=key,
                unit=metric.unit,
                kind=metric.kind,
                times_ms=np.array(times, np.int64),
                values=np.array(values, np.float64),
            )


class Neighbour(ThisReplica):
    """Another replica in the same process; `away` makes it unreachable."""

    name = "timeseries replica b:50052"
    away = False

    async def query(self, query: Query) -> list[SeriesResult]:
        if self.away:
            raise Unavailable("b is not reachable")
        return await super().query(query)

    async def unshipped(self, query: Query, follower: str) -> Held:
        if self.away:
            raise Unavailable("b is not reachable")
        return await super().unshipped(query, follower)

    async def metrics(self) -> Mapping[str, Metric]:
        if self.away:
            raise Unavailable("b is not reachable")
        return await super().metrics()


class Cluster:
    """Two replicas, the store, and the oracle of everything that was acknowledged."""

    def __init__(self, engines: list[Engine], clock: ManualClock, seed: int = 1) -> None:
        self.engines = engines
        self.clock = clock
        self.rng = random.Random(seed)
        self.store = OracleStore()
        self.everything = Model()
        self.neighbour = Neighbour(engines[1])
        self.reader = Reader(engines[0], self.store, peers=[self.neighbour], max_points=1_000_000)
        self.waiting: list[list[tuple[int, MetricSet, Rows]]] = [[] for _ in engines]
        self.counter = dict.fromkeys("abcd", 0.0)

    async def append(self, replica: int, batch: Rows) -> None:
        sequence = await self.engines[replica].append(batch, metric_sets=(SET,))
        self.everything.append(SET, batch)
        self.waiting[replica].append((sequence, SET, batch))

    async def ship(self, replica: int, count: int) -> None:
        """Has the store take the oldest batches of a replica that it has not yet."""
        for sequence, of_set, batch in self.waiting[replica][:count]:
            self.store.model.append(of_set, batch)
            await self.engines[replica].cursors.advance(STORE, sequence)
        del self.waiting[replica][:count]

    def batch(self, number: int, servers: str) -> Rows:
        lines = []
        for server in servers:
            self.counter[server] += self.rng.randint(0, 40)
            if self.rng.random() < 0.05:
                self.counter[server] = 1.0
            late = self.rng.choice((0, 0, 0, 0, -30_000, -1_800_000))
            time = NOON + number * 10_000 + late
            value = float("nan") if self.rng.random() < 0.2 else self.rng.random() * 100
            lines.append((server, time, [value, self.counter[server]]))
        return rows(SET, lines)

    async def asked(self, query: Query) -> tuple[Answer, list[str]]:
        answer = await self.reader.read(query)
        names = [(result.server_id, result.metric_key) for result in answer.results]
        assert names == sorted(set(names))
        found = {
            name: list(zip(result.times_ms.tolist(), result.values.tolist(), strict=True))
            for name, result in zip(names, answer.results, strict=True)
        }
        return found, answer.incomplete


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    clock = ManualClock(NOON - 43_200_000)  # before the first row, for late ones and RATE's look back are here, too
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(Engine.open(tmp_path / name, clock=clock, settings=SETTINGS))
            for name in "ab"
        ]
        for engine in engines:
            await engine.cursors.register(STORE)
        clock.advance(43_200)
        made = Cluster(engines, clock)
        for number in range(120):  # a, b write to one, c to the other, and d moves in between
            await made.append(0, made.batch(number, "ab" if number % 40 < 20 else "abd"))
            await made.append(1, made.batch(number, "cd" if number % 40 < 20 else "c"))
        clock.advance(120 * 10)
        yield made


def queries(rng: random.Random) -> list[Query]:
    found = []
    for aggregation, step in itertools.product(Aggregation, (0, 1_000, 60_000, 7_777, 3_600_000)):
        start = NOON + rng.choice((-2_000_000, 0, 123_456))
        end = NOON + rng.choice((1_200_000, 777_777, 4_000_000))
        found.append(
            Query(
                metrics=("requests_total",) if aggregation is Aggregation.RATE else ("cpu_usage", "requests_total"),
                start_ms=start,
                end_ms=end,
                step_ms=step,
                aggregation=aggregation,
                server_ids=rng.choice((None, None, ("a", "d"))),
            )
        )
    return found


async def compare(cluster: Cluster, seed: int) -> list[str]:
    """Compares all queries with the oracle; returns all that was said to be incomplete."""
    said: list[str] = []
    for query in queries(random.Random(seed)):
        found, incomplete = await cluster.asked(query)
        assert_same(found, cluster.everything.query(query), query.aggregation if query.step_ms else None)
        said += incomplete
    return said


@pytest.mark.parametrize("shipped", [(0, 0), (60, 100), (118, 90), (120, 120), (3, 120)])
async def test_what_is_shipped_and_what_is_not_are_one_answer(cluster: Cluster, shipped: tuple[int, int]) -> None:
    for replica, count in enumerate(shipped):
        await cluster.ship(replica, count)
    assert await compare(cluster, seed=sum(shipped)) == []


async def test_long_after_all_is_shipped_the_store_is_asked_for_windows_and_not_for_points(cluster: Cluster) -> None:
    for replica in range(2):
        await cluster.ship(replica, 120)
    cluster.clock.advance(3_600)
    assert await compare(cluster, seed=5) == []
    cluster.store.asked.clear()
    await cluster.asked(
        Query(metrics=("cpu_usage",), start_ms=NOON, end_ms=NOON + 1_200_000, step_ms=60_000, server_ids=("a",))
    )
    assert [query.step_ms for query in cluster.store.asked] == [60_000]


async def test_while_the_store_is_away_replicas_have_no_gap_and_nothing_is_said(cluster: Cluster) -> None:
    await cluster.ship(0, 60)
    await cluster.ship(1, 30)
    cluster.store.away = True
    said: list[str] = []
    for query in queries(random.Random(7)):
        query_here = Query(
            metrics=query.metrics,
            start_ms=max(query.start_ms, NOON),  # before that nobody has ever had anything
            end_ms=query.end_ms,
            step_ms=query.step_ms,
            aggregation=query.aggregation,
            server_ids=query.server_ids,
        )
        found, incomplete = await cluster.asked(query_here)
        wanted = cluster.everything.query(query_here)
        assert_same(found, wanted, query.aggregation if query.step_ms else None)
        said += incomplete
    assert said == []


async def test_while_the_store_is_away_what_a_restored_replica_lacks_is_said(cluster: Cluster) -> None:
    cluster.store.away = True
    engine = cluster.engines[0]
    query = Query(metrics=("cpu_usage",), start_ms=NOON, end_ms=NOON + 1_200_000)
    assert (await cluster.asked(query))[1] == []
    await asyncio.wrap_future(
        engine._writer.call(lambda: engine._store.journal.note_lack(NOON + 60_000, NOON + 180_000))
    )
    _, incomplete = await cluster.asked(query)
    assert incomplete[1:] == [
        "from 2023-12-09T12:01:00+00:00 to 2023-12-09T12:03:00+00:00 only what replicas hold is shown"
    ]


async def test_windows_are_answered_however_much_waits_for_the_store(cluster: Cluster) -> None:
    """All points of it would be too many: hours of a large fleet, of which a few windows are wanted."""
    await cluster.ship(0, 10)
    settings = replace(SETTINGS, max_points=100)
    for engine in cluster.engines:
        engine._store.settings = settings
    for start_ms, is_whole in ((NOON, True), (NOON - 50_000_000, False)):
        query = Query(metrics=("cpu_usage",), start_ms=start_ms, end_ms=NOON + 1_200_000, step_ms=300_000)
        found, incomplete = await cluster.asked(query)
        assert_same(found, cluster.everything.query(query), query.aggregation)
        assert (incomplete == []) is is_whole
    assert "is not asked, it lacks too much to be put together" in incomplete[0]


async def test_a_replica_that_is_away_is_named(cluster: Cluster) -> None:
    await cluster.ship(0, 120)
    await cluster.ship(1, 100)
    cluster.neighbour.away = True
    query = Query(metrics=("cpu_usage",), start_ms=NOON, end_ms=NOON + 1_200_000)
    found, incomplete = await cluster.asked(query)
    assert incomplete == [f"timeseries replica b:50052 does not answer: what it has not shipped to {STORE} is missing"]
    assert ("c", "cpu_usage") in found, "what it has shipped is there"

    cluster.store.away = True
    found, incomplete = await cluster.asked(query)
    assert "prometheus is away (connection refused)" in incomplete[0]
    assert "rows that it alone holds are missing" in incomplete[-1]
    assert ("a", "cpu_usage") in found


async def test_what_is_shipped_while_a_query_runs_is_not_missed(cluster: Cluster) -> None:
    """A store that takes all that waits just after it has answered: replicas must have been asked before."""
    cluster.clock.advance(3_600)  # so that nothing is read from replicas only because it is young
    shipped = False

    async def answer_and_ship(query: Query, metrics: Mapping[str, Metric]) -> AsyncIterator[SeriesResult]:
        nonlocal shipped
        async for result in OracleStore.query(cluster.store, query, metrics):
            yield result
        shipped = True
        for replica in range(2):
            await cluster.ship(replica, 120)

    cluster.store.query = answer_and_ship  # type: ignore[method-assign]
    query = Query(metrics=("cpu_usage",), start_ms=NOON, end_ms=NOON + 1_200_000)
    found, _ = await cluster.asked(query)
    assert shipped
    assert_same(found, cluster.everything.query(query))


async def test_a_guarded_store_that_is_away_is_not_asked_by_everybody(cluster: Cluster) -> None:
    guarded = Guarded(cluster.store, cluster.clock)
    reader = Reader(cluster.engines[0], guarded, peers=[cluster.neighbour], max_points=1_000_000)
    query = Query(metrics=("cpu_usage",), start_ms=NOON, end_ms=NOON + 1_200_000)
    cluster.store.away = True
    for _ in range(5):
        assert len((await reader.read(query)).results) == 4, "replicas answer"
    assert len(cluster.store.asked) == 2
    cluster.store.away = False
    cluster.clock.advance(60)
    await reader.read(query)
    assert len(cluster.store.asked) > 2


async def test_a_store_that_says_nothing_costs_no_caller_the_answer(cluster: Cluster) -> None:
    """One that is patient for longer than its callers: they hear of it in time, and so does the circuit."""

    async def silence(query: Query, metrics: Mapping[str, Metric]) -> AsyncIterator[SeriesResult]:
        cluster.store.asked.append(query)
        await asyncio.Event().wait()
        async for result in OracleStore.query(cluster.store, query, metrics):
            yield result

    cluster.store.query = silence  # type: ignore[method-assign]
    guarded = Guarded(cluster.store, cluster.clock)
    reader = Reader(cluster.engines[0], guarded, peers=[cluster.neighbour], max_points=1_000_000)
    query = Query(metrics=("cpu_usage",), start_ms=0, end_ms=NOON + 1_200_000)
    for _ in range(4):
        token = deadline.current.set(deadline.CallDeadline(time.monotonic() + 2.5))
        try:
            async with asyncio.timeout(20.0):
                answer = await reader.read(query)
            left_s = deadline.remaining_s()
            assert left_s is not None and left_s > 0.0, "in time"
        finally:
            deadline.current.reset(token)
        assert len(answer.results) == 4, "replicas answer"
        assert "prometheus is away" in answer.incomplete[0]
    assert len(cluster.store.asked) == 2


async def test_rate_of_a_gauge_is_refused_whoever_would_answer(cluster: Cluster) -> None:
    query = Query(metrics=("cpu_usage",), start_ms=NOON, end_ms=NOON + 1, step_ms=60_000, aggregation=Aggregation.RATE)
    with pytest.raises(InvalidArgument, match="cpu_usage is a gauge"):
        await cluster.reader.read(query)


@pytest.mark.parametrize("moves_at_min", [0, 30], ids=["between two windows", "within one"])
async def test_while_the_store_is_away_what_replicas_have_as_roll_ups_of_a_server_that_moved_is_shown(
    tmp_path: Path, moves_at_min: int
) -> None:
    """A replica that was restarted has had its servers elsewhere, and no points of long ago."""
    clock = ManualClock(NOON)
    settings = replace(SETTINGS, raw_retention_s=2 * 86_400, late_grace_s=0.0, sparse_points_a_day=0)
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(Engine.open(tmp_path / name, clock=clock, settings=settings))
            for name in "ab"
        ]
        cluster = Cluster(engines, clock)
        cluster.store.away = True
        for day in range(6):
            for hour in range(24):
                lines: list[list[tuple[str, int, list[float]]]] = [[], []]
                for at in range((24 * day + hour) * 60, (24 * day + hour) * 60 + 60, 10):
                    lines[(at - moves_at_min) // 1_440 % 2].append(("a", NOON + at * 60_000, [at % 97 / 8, float(at)]))
                for replica, of_one in enumerate(lines):
                    if of_one:
                        await cluster.append(replica, rows(SET, of_one))
            clock.advance(86_400)
            for engine in engines:
                await engine.maintain(everything=True)
        held_ms = max(engine.held_from_ms(0) for engine in engines)
        assert held_ms > NOON + 86_400_000, "points went"
        for aggregation in set(Aggregation) - {Aggregation.RATE}:
            query = Query(
                metrics=("cpu_usage",),
                start_ms=NOON,
                end_ms=NOON + 6 * 86_400_000,
                step_ms=3_600_000,
                aggregation=aggregation,
            )
            found, incomplete = await cluster.asked(query)
            wanted = cluster.everything.query(query)
            assert bool(incomplete) == bool(moves_at_min)
            if moves_at_min:  # the windows of the moves are as one replica has them, and that is said
                ((name, series),) = wanted.items()
                assert [at for at, _ in found[name]] == [at for at, _ in series]
                assert sum(got != want for got, want in zip(found[name], series, strict=True)) <= 5
                assert "a window in which a server moved may show what one replica has of it" in incomplete[1]
            else:
                assert_same(found, wanted, aggregation)
