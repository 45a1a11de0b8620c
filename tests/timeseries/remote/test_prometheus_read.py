"""What is read back from real Prometheus-compatible stores is what the oracle says, whoever was asked and how."""

import asyncio
import dataclasses
import itertools
import math
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytest_asyncio

from fleet.model import Metric, MetricKind, MetricSet, Rows
from runtime.clock import SystemClock
from runtime.errors import InvalidArgument, ResourceExhausted, Unavailable
from services.timeseries.engine import Aggregation, Query
from services.timeseries.followers.backend import TaggedRows
from services.timeseries.followers.prometheus import PrometheusBackend
from services.timeseries.remote import prometheus as reader
from services.timeseries.remote.prometheus import PrometheusHistory
from tests.harness import eventually
from tests.harness.fault_proxy import fault_proxy
from tests.harness.mimir import MimirCluster, mimir_cluster
from tests.harness.prometheus import PrometheusApi, PrometheusServer, prometheus_server
from tests.harness.victoria import VictoriaServer, victoria_server
from tests.timeseries.engine.model import NAN, Answer, Model, assert_same, metric_set, rows
from tests.timeseries.followers.samples import descriptor

CLOCK = SystemClock()
DAY_MS = 86_400_000
SET = metric_set("cpu_usage", "memory_usage", "requests_total", "constant")
OTHER_SET = metric_set("requests_total", "cpu_usage", "extra")


class Store(NamedTuple):
    """A running store, how to make what was written visible, and how many digits it keeps."""

    api: PrometheusApi
    write_urls: list[str]
    query_urls: list[str]
    flush: Callable[[], Any]
    digits: int | None = None


async def _nothing() -> None:
    pass


@pytest_asyncio.fixture(scope="module")
async def prometheus() -> AsyncIterator[PrometheusServer]:
    async with prometheus_server() as server:
        yield server


@pytest_asyncio.fixture(scope="module")
async def victoria() -> AsyncIterator[VictoriaServer]:
    async with victoria_server() as server:
        yield server


@pytest_asyncio.fixture(scope="module")
async def mimir() -> AsyncIterator[MimirCluster]:
    async with mimir_cluster() as cluster:
        yield cluster


@pytest.fixture(
    params=["prometheus", "victoria", pytest.param("mimir", marks=[pytest.mark.full, pytest.mark.timeout(300)])]
)
def store(request: pytest.FixtureRequest) -> Store:
    server = request.getfixturevalue(request.param)
    if isinstance(server, MimirCluster):
        return Store(server, server.write_urls, server.query_urls, _nothing)
    if isinstance(server, VictoriaServer):  # it keeps decimal numbers of about 15 digits
        return Store(server, [server.write_url], [server.url], server.flush, digits=12)
    return Store(server, [server.write_url], [server.url], _nothing)


@asynccontextmanager
async def reading(urls: Iterable[str], **bounds: Any) -> AsyncIterator[PrometheusHistory]:
    history = PrometheusHistory(query_urls=list(urls), clock=CLOCK, **bounds)
    try:
        yield history
    finally:
        await history.close()


class Source:
    """A seeded sender of what is normal and awkward: late, unordered, with holes, counter resets, a change of tags.

    Times lie around a day of its own, so that tests share a store. A point is sent once: of two values for a time
    Prometheus keeps the first, the engine the last.
    """

    def __init__(self, seed: int, digits: int | None) -> None:
        self.rng = random.Random(seed)
        self.digits = digits
        self.midnight = (CLOCK.now_ms() // DAY_MS - 1 - seed) * DAY_MS
        self.counter = dict.fromkeys("abc", 0.0)
        self.model = Model()

    def batch(self, number: int) -> TaggedRows:
        of_set = self.rng.choice((SET, SET, OTHER_SET))
        lines: dict[tuple[str, int], list[float]] = {}
        for _ in range(self.rng.randint(1, 6)):
            server = self.rng.choice("abc")
            time = (
                self.midnight - 600_000 + number * 20_000 + self.rng.choice((0, 0, 0, 1, -20_000, -400_000, 7_000_000))
            )
            if self.rng.random() < 0.1:
                time -= 9 * 3_600_000
            self.counter[server] += self.rng.randint(0, 50)
            if self.rng.random() < 0.1:
                self.counter[server] = float(self.rng.randint(0, 3))
            noise = self.rng.random() * 1e6
            values = {
                "cpu_usage": round(self.rng.gauss(50, 20), 2),
                "memory_usage": noise if self.digits is None else float(f"{noise:.{self.digits - 1}g}"),
                "requests_total": self.counter[server],
                "constant": 4.25,
                "extra": float(self.rng.randint(-3, 3)),
            }
            series = self.model.series
            lines[server, time] = [
                NAN if self.rng.random() < 0.2 or time in series.get((server, m.name), {}) else values[m.name]
                for m in of_set.metrics
            ]
        batch = rows(of_set, [(server, time, row) for (server, time), row in lines.items()])
        self.model.append(of_set, batch)
        environment = "staging" if number < 40 else "production"
        return tagged(of_set, batch, environment)

    def queries(self) -> list[Query]:
        found = []
        for aggregation, step in itertools.product(Aggregation, (1_000, 30_000, 60_000, 3_600_000, 7_777, DAY_MS)):
            start = self.midnight - self.rng.choice((600_000, 36_000_000, 123_456))
            end = self.midnight + self.rng.choice((0, 600_000, 12_345_678))
            if self.rng.random() < 0.5:
                start, end = start // step * step, end // step * step
            found.append(
                Query(
                    metrics=("requests_total",) if aggregation is Aggregation.RATE else None,
                    server_ids=self.rng.choice((None, ("a",), ("b", "c", "unknown"))),
                    start_ms=min(start, end),
                    end_ms=end,
                    step_ms=step,
                    aggregation=aggregation,
                )
            )
        return found


def tagged(of_set: MetricSet, batch: Rows, environment: str = "production") -> TaggedRows:
    told = tuple(descriptor(server, environment) for server in batch.server_ids)
    return TaggedRows(metric_set=of_set, rows=batch, descriptors=told)


async def shipped(store: Store, batches: list[TaggedRows]) -> None:
    backend = PrometheusBackend(write_urls=store.write_urls, clock=CLOCK)
    for batch in batches:
        receipt = await backend.ship([batch])
        assert (receipt.shipped, dict(receipt.refused)) == (batch.rows.points, {})
    await backend.close()
    await store.flush()


async def ask(history: PrometheusHistory, query: Query, metrics: dict[str, Metric]) -> Answer:
    """The answer in the oracle's form; asserts the order of the series."""
    results = [result async for result in history.query(query, metrics)]
    names = [(result.server_id, result.metric_key) for result in results]
    assert names == sorted(names)
    for result in results:
        assert result.times_ms.dtype == np.int64
        known = metrics.get(result.metric_key)
        assert (result.unit, result.kind) == ((known.unit, known.kind) if known else ("", MetricKind.UNSPECIFIED))
    return {
        name: list(zip(result.times_ms.tolist(), result.values.tolist(), strict=True))
        for name, result in zip(names, results, strict=True)
    }


@pytest.mark.parametrize("seed", [1])
async def test_every_query_equals_the_oracle(store: Store, seed: int) -> None:
    source = Source(seed, store.digits)
    await shipped(store, [source.batch(number) for number in range(80)])
    assert any(time % 1_000 for points in source.model.series.values() for time in points)
    async with reading(store.query_urls) as history:
        whole = Query(metrics=None, start_ms=source.midnight - DAY_MS // 2, end_ms=source.midnight + DAY_MS // 2)
        found = await ask(history, whole, source.model.metrics)
        assert_same(found, source.model.query(whole))
        assert len(found) == 3 * 5
        for query in source.queries():
            found = await ask(history, query, source.model.metrics)
            try:
                assert_same(found, source.model.query(query), query.aggregation)
            except AssertionError as error:
                raise AssertionError(f"{query}") from error


async def test_small_requests_give_the_same(prometheus: PrometheusServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges, servers and metrics cut into many requests are joined without a seam."""
    monkeypatch.setattr(reader, "POINTS_TOGETHER", 20)
    monkeypatch.setattr(reader, "MAX_STEPS", 7)
    monkeypatch.setattr(reader, "SERVERS_TOGETHER", 2)
    monkeypatch.setattr(reader, "TERMS_TOGETHER", 2)
    monkeypatch.setattr(reader, "SLICES", 5)
    store = Store(prometheus, [prometheus.write_url], [prometheus.url], _nothing)
    source = Source(3, None)
    await shipped(store, [source.batch(number) for number in range(80)])
    dense = rows(SET, [("dense", source.midnight + at, [float(at)] * 4) for at in range(300)])
    source.model.append(SET, dense)
    await shipped(store, [tagged(SET, dense)])
    async with reading(store.query_urls) as history:
        start, end = source.midnight - 100_000, source.midnight + 801_000
        for aggregation, step in itertools.product((*Aggregation, None), (30_000, 7_777)):
            counters = aggregation is Aggregation.RATE
            query = Query(
                metrics=("requests_total",) if counters else ("requests_total", "extra"),
                start_ms=start,
                end_ms=end,
                step_ms=step if aggregation else 0,
                aggregation=aggregation or Aggregation.AVG,
            )
            found = await ask(history, query, source.model.metrics)
            assert len(found) == (4 if counters else 7)
            assert_same(found, source.model.query(query), aggregation)


async def test_one_window_before_and_after_a_change_of_tags_is_one(store: Store) -> None:
    of_set, midnight = metric_set("cpu_usage", "requests_total"), (CLOCK.now_ms() // DAY_MS - 5) * DAY_MS
    model, batches = Model(), []
    for number in range(60):  # the server goes back and forth within windows, and late rows cross the changes
        at = midnight + number * 10_000 - (35_000 if number % 7 == 0 else 0)
        batch = rows(of_set, [("moved", at, [float(number * 37 % 61), float(number)])])
        model.append(of_set, batch)
        batches.append(tagged(of_set, batch, ("staging", "production", "")[number // 8 % 3]))
    await shipped(store, batches)
    async with reading(store.query_urls) as history:
        for aggregation, step in itertools.product(Aggregation, (10_000, 60_000, 3_600_000)):
            query = Query(
                metrics=("requests_total",) if aggregation is Aggregation.RATE else ("cpu_usage", "requests_total"),
                server_ids=("moved",),
                start_ms=midnight - 5_000,
                end_ms=midnight + 595_000,
                step_ms=step,
                aggregation=aggregation,
            )
            assert_same(await ask(history, query, model.metrics), model.query(query), aggregation)


async def test_the_newest_points_are_answered_as_they_are(store: Store) -> None:
    """VictoriaMetrics would repeat the window of half a minute ago in each later one."""
    of_set, now_ms, model = metric_set("newest"), CLOCK.now_ms(), Model()
    batch = rows(of_set, [("newest", now_ms - 60_000 + at * 500, [float(at)]) for at in range(120)])
    model.append(of_set, batch)
    await shipped(store, [tagged(of_set, batch)])
    async with reading(store.query_urls) as history:
        for aggregation in Aggregation:
            if aggregation is not Aggregation.RATE:
                query = Query(
                    metrics=("newest",),
                    start_ms=now_ms - 60_000,
                    end_ms=CLOCK.now_ms(),
                    step_ms=1_000,
                    aggregation=aggregation,
                )
                assert_same(await ask(history, query, {}), model.query(query), aggregation)


async def test_no_name_breaks_out_of_a_query_and_every_key_comes_back(store: Store) -> None:
    awkward = (
        '"} or {a="',
        "a|b",
        ".*",
        "a\\",
        "x{2}",
        "$1",
        "é 名",
        "(?i)a",
        "'",
        "`",
        "[a-b]+",
        "a,b",
        "^a$",
        "\\Q.*\\E",
    )
    metrics = [Metric(name=text) for text in awkward]
    metrics += [Metric(name="lab", labels=((text, other),)) for text, other in itertools.pairwise(awkward)]
    metrics += [
        Metric(name="lab", labels=(("server_id", "x"), ("environment", "y"), ("role", "z"))),
        Metric(name="lab", labels=(("__name__", "x"), ("empty", ""), ("openmanager_metric", "q"))),
        Metric(name="lab"),
        Metric(name="la"),
        Metric(name='lab{a="b"}'),
    ]
    of_set, now_ms = MetricSet(metrics=tuple(metrics)), (CLOCK.now_ms() // DAY_MS - 6) * DAY_MS
    servers = [f"awkward {text}" for text in awkward]
    model, numbers = Model(), itertools.count(1)
    batch = rows(of_set, [(server, now_ms, [float(next(numbers)) for _ in metrics]) for server in servers])
    model.append(of_set, batch)
    await shipped(store, [tagged(of_set, batch, 'e"\\|.*')])
    whole = {"start_ms": now_ms - 1_000, "end_ms": now_ms + 1_000}
    async with reading(store.query_urls) as history:
        for step in (0, 2_000):
            for query in (
                Query(metrics=None, step_ms=step, **whole),
                Query(metrics=("lab",), step_ms=step, aggregation=Aggregation.LAST, **whole),
                *(Query(metrics=None, server_ids=(server,), step_ms=step, **whole) for server in servers),
                Query(metrics=None, server_ids=tuple(servers[::2]), step_ms=step, **whole),
                *(Query(metrics=(metric.key,), server_ids=(servers[0],), step_ms=step, **whole) for metric in metrics),
                Query(metrics=tuple(metric.key for metric in metrics[::2]), step_ms=step, **whole),
                Query(metrics=("nothing", ".+", 'x"}'), step_ms=step, **whole),
            ):
                assert_same(await ask(history, query, model.metrics), model.query(query), query.aggregation)
        # a metric that only the store knows: no unit, no kind, and found by its key all the same
        for metric in metrics:
            query = Query(metrics=(metric.key,), server_ids=(servers[0],), **whole)
            found = await ask(history, query, {})
            assert found.keys() >= {(servers[0], metric.key)} and found.keys() <= model.query(query).keys()


async def test_many_long_names_are_asked_for_in_parts(store: Store) -> None:
    """VictoriaMetrics takes 16 KiB of query."""
    servers = tuple(f"{number:03} " + "long (name) of a server " * 9 for number in range(24))
    labelled = tuple(
        Metric(
            name="long", labels=tuple((f"label_{of}", f"{number} " + "value " * 150) for of in range(1 + number % 5))
        )
        for number in range(6)
    )
    of_set = MetricSet(metrics=(*labelled, *(Metric(name=f"name.{number}" + "*" * 200) for number in range(9))))
    at, model = (CLOCK.now_ms() // DAY_MS - 10) * DAY_MS, Model()
    batch = rows(of_set, [(server, at, [float(number)] * 15) for number, server in enumerate(servers)])
    model.append(of_set, batch)
    await shipped(store, [tagged(of_set, batch)])
    async with reading(store.query_urls) as history:
        for aggregation in (Aggregation.AVG, Aggregation.LAST, Aggregation.FIRST):
            for server_ids in (servers, None):
                query = Query(
                    metrics=tuple(of_set.keys),
                    server_ids=server_ids,
                    start_ms=at,
                    end_ms=at + 5_000,
                    step_ms=1_000,
                    aggregation=aggregation,
                )
                found = await ask(history, query, model.metrics)
                assert len(found) == 24 * 15
                assert_same(found, model.query(query), aggregation)


async def test_values_come_back_bit_for_bit(prometheus: PrometheusServer) -> None:
    of_set, at = metric_set("value"), (CLOCK.now_ms() // DAY_MS - 7) * DAY_MS
    values = [1e-7, 5e-324, 1.7976931348623157e308, -0.0, 0.1 + 0.2, math.inf, -math.inf, 1e22, -1.5]
    batch = rows(of_set, [("bits", at + number, [value]) for number, value in enumerate(values)])
    await shipped(Store(prometheus, [prometheus.write_url], [], _nothing), [tagged(of_set, batch)])
    async with reading([prometheus.url]) as history:
        query = Query(metrics=("value",), start_ms=at, end_ms=at + 100)
        (result,) = [result async for result in history.query(query, {})]
        assert result.values.tobytes() == np.array(values).tobytes()
        assert result.times_ms.tolist() == [at + number for number in range(len(values))]
        query = Query(metrics=("value",), start_ms=at, end_ms=at + 100, step_ms=1_000)
        assert [result async for result in history.query(query, {})] == [], "infinities that cancel are no value"


async def test_bounds_are_said_and_nothing_is_cut(prometheus: PrometheusServer) -> None:
    of_set, at = metric_set("bound_a", "bound_b", "bound_total"), (CLOCK.now_ms() // DAY_MS - 8) * DAY_MS
    batch = rows(of_set, [("bounds", at + number * 1_000, [1.0] * 3) for number in range(100)])
    await shipped(Store(prometheus, [prometheus.write_url], [], _nothing), [tagged(of_set, batch)])
    known = {metric.key: metric for metric in of_set.metrics}

    async def refused(query: Query, **bounds: int) -> tuple[str, str]:
        async with reading([prometheus.url], **bounds) as history:
            with pytest.raises(ResourceExhausted) as caught:
                [result async for result in history.query(query, known)]
            return caught.value.reason, caught.value.message

    whole = {"metrics": ("bound_a", "bound_b"), "start_ms": at, "end_ms": at + 100_000}
    assert (await refused(Query(**whole), max_points=199))[0] == "MAX_POINTS"
    assert (await refused(Query(step_ms=1_000, **whole), max_points=199))[0] == "MAX_POINTS"
    assert (await refused(Query(**whole), max_series=1))[0] == "MAX_SERIES"
    first = Query(step_ms=10_000, aggregation=Aggregation.FIRST, **whole)
    assert await refused(first, max_read_points=199) == (
        "MAX_SCANNED_POINTS",
        "the query reads back more than max_read_points = 199 points",
    )
    async with reading([prometheus.url], max_points=200, max_read_points=200, max_series=2) as history:
        for query in (Query(**whole), Query(step_ms=1_000, **whole), first):
            assert len([result async for result in history.query(query, known)]) == 2
        rate = Query(metrics=("bound_a",), start_ms=at, end_ms=at + 1, step_ms=1, aggregation=Aggregation.RATE)
        for asked in (rate, dataclasses.replace(rate, metrics=None, server_ids=("bounds",))):
            with pytest.raises(InvalidArgument, match="RATE wants a counter"):
                await ask(history, asked, known)
        for nothing in (
            Query(metrics=("bound_a",), start_ms=at, end_ms=at),
            Query(metrics=(), start_ms=at, end_ms=at + 1),
            Query(metrics=None, server_ids=(), start_ms=at, end_ms=at + 1),
        ):
            assert await ask(history, nothing, known) == {}
        with pytest.raises(ResourceExhausted, match="MAX_WINDOWS"):
            await ask(history, Query(metrics=("bound_a",), start_ms=0, end_ms=1 << 62, step_ms=1_000), known)
        endless = Query(metrics=("bound_a",), start_ms=-5, end_ms=1 << 62)
        assert len((await ask(history, endless, known))["bounds", "bound_a"]) == 100
        endless = Query(metrics=("bound_a",), start_ms=0, end_ms=1 << 62, step_ms=DAY_MS, aggregation=Aggregation.COUNT)
        assert await ask(history, endless, known) == {("bounds", "bound_a"): [(at, 100.0)]}


async def test_a_store_that_is_away_or_slow_is_not_waited_for_by_everybody(
    prometheus: PrometheusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "QUERY_TIMEOUT_S", 1.0)
    query = Query(metrics=("nothing",), start_ms=0, end_ms=1_000)
    async with fault_proxy(prometheus.port) as proxy, reading([f"http://127.0.0.1:{proxy.port}"]) as history:
        assert await ask(history, query, {}) == {}
        proxy.delay_s = 5.0
        reasons = []
        for _ in range(4):
            with pytest.raises(Unavailable) as caught:
                await ask(history, query, {})
            reasons.append(caught.value.reason)
        assert reasons == ["STORE_UNAVAILABLE"] * 2 + ["CIRCUIT_OPEN"] * 2
        await proxy.restore()

        async def answered() -> bool:
            try:
                return await ask(history, query, {}) == {}
            except Unavailable as error:
                raise AssertionError(error.message) from error

        await eventually(answered, within_s=15)
        await proxy.cut()
        with pytest.raises(Unavailable, match="does not answer"):
            await ask(history, query, {})
        # with a second address nobody notices
        async with reading([f"http://127.0.0.1:{proxy.port}", prometheus.url]) as two:
            assert await ask(two, query, {}) == {}


async def test_a_caller_that_goes_away_stops_the_query(
    prometheus: PrometheusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "SERVERS_TOGETHER", 1)
    of_set, at = metric_set("many"), (CLOCK.now_ms() // DAY_MS - 9) * DAY_MS
    batch = rows(of_set, [(f"many-{number:03}", at, [1.0]) for number in range(300)])
    await shipped(Store(prometheus, [prometheus.write_url], [], _nothing), [tagged(of_set, batch)])
    asked = []
    async with reading([prometheus.url]) as history:
        request = history._request
        monkeypatch.setattr(history, "_request", lambda *args: (asked.append(args), request(*args))[1])
        results = history.query(Query(metrics=("many",), start_ms=at, end_ms=at + 1), {})
        async with aclosing(results):  # type: ignore[type-var]
            assert (await anext(results)).server_id == "many-000"
        few = len(asked)
        assert few < 10 and asked[0][0].cancel.is_set()
        task = asyncio.create_task(ask(history, Query(metrics=("many",), start_ms=at, end_ms=at + 1), {}))
        await eventually(lambda: len(asked) > few + 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        ended = len(asked)
        assert (
            len(await ask(history, Query(metrics=("many",), server_ids=("many-007",), start_ms=at, end_ms=at + 1), {}))
            == 1
        )
        assert len(asked) <= ended + 3, "nothing of the other query is asked any more"


@pytest.mark.parametrize(
    ("status", "body", "reason", "said"),
    [
        ("401 No", "{}", "STORE_REFUSED", "PROMETHEUS_BEARER_TOKEN"),
        ("403 No", "{}", "STORE_REFUSED", "PROMETHEUS_TENANT"),
        ("404 No", "lost", "STORE_UNREADABLE", "PROMETHEUS_QUERY_URL is no base of a query API"),
        ("200 OK", "<html>", "STORE_UNREADABLE", "PROMETHEUS_QUERY_URL is no base of a query API"),
        (
            "200 OK",
            '{"status":"success","isPartial":true,"data":{"result":[]}}',
            "STORE_UNAVAILABLE",
            "a part of the store",
        ),
        ("503 Away", "starting", "STORE_UNAVAILABLE", "answers 503: starting"),
        ("429 Slow", "too much", "STORE_THROTTLES", "answers 429: too much"),
    ],
)
async def test_an_answer_that_is_none_says_what_to_mend(status: str, body: str, reason: str, said: str) -> None:
    async def serve(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stream.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with reading(
        [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"], bearer_token="a-secret-token"
    ) as history:
        with pytest.raises(Unavailable, match=said) as caught:
            await ask(history, Query(metrics=("a",), start_ms=0, end_ms=1), {})
        assert caught.value.reason == reason and "a-secret-token" not in caught.value.message
    server.close()
