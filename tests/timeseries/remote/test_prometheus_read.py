"""What is read back from real Prometheus-compatible stores is what the oracle says, whoever was asked and how."""

import itertools
import math
import random

import numpy as np
import pytest

from fleet.model import Metric, MetricSet
from services.timeseries.engine import Aggregation, Query
from services.timeseries.followers.backend import TaggedRows
from services.timeseries.remote import prometheus as reader
from tests.harness.prometheus import PrometheusServer
from tests.timeseries.engine.model import NAN, Model, assert_same, metric_set, rows
from tests.timeseries.remote.prometheus_stores import CLOCK, DAY_MS, Store, ask, reading, shipped, tagged

SET = metric_set("cpu_usage", "memory_usage", "requests_total", "constant")
OTHER_SET = metric_set("requests_total", "cpu_usage", "extra")


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
    store = Store(prometheus, [prometheus.write_url], [prometheus.url])
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
    await shipped(Store(prometheus, [prometheus.write_url], []), [tagged(of_set, batch)])
    async with reading([prometheus.url]) as history:
        query = Query(metrics=("value",), start_ms=at, end_ms=at + 100)
        (result,) = [result async for result in history.query(query, {})]
        assert result.values.tobytes() == np.array(values).tobytes()
        assert result.times_ms.tolist() == [at + number for number in range(len(values))]
        query = Query(metrics=("value",), start_ms=at, end_ms=at + 100, step_ms=1_000)
        assert [result async for result in history.query(query, {})] == [], "infinities that cancel are no value"
