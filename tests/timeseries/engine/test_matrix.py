"""Every kind of query, over data in every place it can lie, equals the oracle."""

import itertools
import random
from pathlib import Path

import pytest

from fleet.model import Metric, MetricSet, Rows
from runtime.clock import ManualClock
from runtime.errors import InvalidArgument
from services.timeseries.engine import Aggregation, Engine, EngineSettings, Query
from tests.timeseries.engine.model import (
    EVERYTHING,
    NAN,
    Model,
    ask,
    assert_same,
    everything,
    last,
    metric_set,
    rows,
)

MIDNIGHT = 19_700 * 86_400_000
FULL = metric_set("cpu_usage", "memory_usage", "requests_total", "constant", "never")
PART = metric_set("requests_total", "cpu_usage", "extra")
SETTINGS = EngineSettings(head_rows=7, maintenance_interval_s=1e9, close_group_heads=2, partition_connections=2)


class Source:
    """A seeded sender of everything that is normal and awkward: late, doubled, re-sent, out of order, with holes."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.counter = dict.fromkeys("abc", 0.0)

    def batch(self, number: int) -> tuple[MetricSet, Rows]:
        of_set = self.rng.choice((FULL, FULL, PART))
        lines = []
        for _ in range(self.rng.randint(1, 6)):
            server = self.rng.choice("abc")
            time = MIDNIGHT - 600_000 + number * 20_000 + self.rng.choice((0, 0, 0, 1, -20_000, -400_000, 7_000_000))
            if self.rng.random() < 0.1:
                time -= 3 * 86_400_000
            self.counter[server] += self.rng.randint(0, 50)
            if self.rng.random() < 0.1:
                self.counter[server] = float(self.rng.randint(0, 3))
            values = {
                "cpu_usage": round(self.rng.gauss(50, 20), 2),
                "memory_usage": self.rng.random() * 1e6,
                "requests_total": self.counter[server],
                "constant": 4.25,
                "never": NAN,
                "extra": float(self.rng.randint(-3, 3)),
            }
            lines.append((server, time, [NAN if self.rng.random() < 0.2 else values[m.name] for m in of_set.metrics]))
        return of_set, rows(of_set, lines)


async def fill(engine: Engine, model: Model, source: Source, numbers: range, close_every: int | None) -> None:
    for number in numbers:
        of_set, batch = source.batch(number)
        await engine.append(batch, metric_sets=(of_set,))
        model.append(of_set, batch)
        if close_every and number % close_every == 0:
            await engine.maintain(everything=True)


def queries(rng: random.Random) -> list[Query]:
    found = []
    for aggregation, step in itertools.product(Aggregation, (1_000, 30_000, 60_000, 3_600_000, 7_777, 86_400_000)):
        start = MIDNIGHT - rng.choice((600_000, 86_400_000 * 4, 123_456))
        end = MIDNIGHT + rng.choice((0, 600_000, 12_345_678))
        if rng.random() < 0.5:
            start, end = start // step * step, end // step * step
        metrics = ("requests_total",) if aggregation is Aggregation.RATE else None
        found.append(
            Query(
                metrics=metrics,
                server_ids=rng.choice((None, ("a",), ("b", "c", "unknown"))),
                start_ms=min(start, end),
                end_ms=end,
                step_ms=step,
                aggregation=aggregation,
            )
        )
    return found


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("place", ["head", "block", "mixed", "restarted"])
async def test_every_query_equals_the_oracle(tmp_path: Path, place: str, seed: int) -> None:
    model, source, clock = Model(), Source(seed), ManualClock(MIDNIGHT)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        await fill(engine, model, source, range(80), {"head": None, "block": 8}.get(place, 13))
        if place == "block":
            await engine.maintain(everything=True)
            assert (await engine.status()).head_points == 0
        if place != "restarted":
            await compare(engine, model, seed)
            return
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        await compare(engine, model, seed)
        await fill(engine, model, source, range(80, 120), 9)
        await compare(engine, model, seed)


async def compare(engine: Engine, model: Model, seed: int) -> None:
    rng = random.Random(seed)
    part = Query(metrics=None, start_ms=MIDNIGHT - 300_000, end_ms=MIDNIGHT + 300_000)
    assert_same(await everything(engine), model.query(EVERYTHING))
    assert_same(await ask(engine, part), model.query(part))
    for query in queries(rng):
        assert_same(await ask(engine, query), model.query(query), query.aggregation)
    assert await last(engine) == model.last()


async def test_a_set_that_shares_a_metric_is_resolved_by_sequence_between_closes(tmp_path: Path) -> None:
    """Rows 1 and 3 are of one cohort and merge into one block; row 2, of another, lies between them."""
    model = Model()
    async with Engine.open(tmp_path, clock=ManualClock(MIDNIGHT), settings=SETTINGS) as engine:
        for of_set, values in (
            (FULL, [1.0, NAN, 1.0, NAN, NAN]),
            (PART, [2.0, 2.0, NAN]),
            (FULL, [NAN, 3.0, NAN, NAN, NAN]),
        ):
            batch = rows(of_set, [("a", MIDNIGHT, values)])
            await engine.append(batch, metric_sets=(of_set,))
            model.append(of_set, batch)
        assert_same(await everything(engine), model.query(EVERYTHING))
        await engine.maintain(everything=True)
        found = await everything(engine)
        assert_same(found, model.query(EVERYTHING))
        assert found["a", "cpu_usage"] == [(MIDNIGHT, 2.0)]


async def test_labels_selectors_kinds_and_unknown_names(tmp_path: Path) -> None:
    of_set = MetricSet(
        metrics=(
            Metric(name="disk_used", unit="By", labels=(("mount", "/"),)),
            Metric(name="disk_used", unit="By", labels=(("mount", "/data"),)),
            Metric(name="load"),
        )
    )
    whole = {"start_ms": 0, "end_ms": 1 << 50}
    async with Engine.open(tmp_path, clock=ManualClock(MIDNIGHT), settings=SETTINGS) as engine:
        await engine.append(rows(of_set, [("a", 5, [1.0, 2.0, 3.0])]), metric_sets=(of_set,))
        named = await ask(engine, Query(metrics=("disk_used",), **whole))
        assert list(named) == [("a", 'disk_used{mount="/"}'), ("a", 'disk_used{mount="/data"}')]
        exact = await ask(engine, Query(metrics=('disk_used{mount="/data"}',), **whole))
        assert exact == {("a", 'disk_used{mount="/data"}'): [(5, 2.0)]}
        assert await ask(engine, Query(metrics=("nothing",), **whole)) == {}
        assert await ask(engine, Query(metrics=(), **whole)) == {}
        infos = await engine.list_metrics()
        assert [(info.key, info.metric.unit, info.servers) for info in infos] == [
            ('disk_used{mount="/"}', "By", 1),
            ('disk_used{mount="/data"}', "By", 1),
            ("load", "", 1),
        ]
        assert await engine.list_metrics("nobody") == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        (Query(metrics=None, start_ms=2, end_ms=1), "start_time"),
        (Query(metrics=None, start_ms=0, end_ms=1, step_ms=-1), "step"),
        (Query(metrics=None, start_ms=0, end_ms=1, step_ms=1_000, aggregation=Aggregation.RATE), "aggregation"),
    ],
)
async def test_a_query_that_makes_no_sense_names_its_field(tmp_path: Path, query: Query, field: str) -> None:
    async with Engine.open(tmp_path, clock=ManualClock(MIDNIGHT), settings=SETTINGS) as engine:
        await engine.append(rows(FULL, [("a", 5, [1.0] * 5)]), metric_sets=(FULL,))
        with pytest.raises(InvalidArgument) as refused:
            await ask(engine, query)
        assert refused.value.field == field


async def test_the_look_back_of_rate_counts_from_the_clipped_start(tmp_path: Path) -> None:
    """The sample at 400 s is in the window of 250 s; the one before it is 300 s old only where the range begins."""
    of_set = metric_set("requests_total")
    model = Model()
    async with Engine.open(tmp_path, clock=ManualClock(MIDNIGHT), settings=SETTINGS) as engine:
        batch = rows(of_set, [("a", MIDNIGHT + at * 1_000, [at * 2.0]) for at in (0, 400, 500)])
        await engine.append(batch, metric_sets=(of_set,))
        model.append(of_set, batch)
        for start_s in (1, 299, 300, 301, 399):
            query = Query(
                metrics=None,
                start_ms=MIDNIGHT + start_s * 1_000,
                end_ms=MIDNIGHT + 450_000,
                step_ms=250_000,
                aggregation=Aggregation.RATE,
            )
            wanted = model.query(query)
            assert bool(wanted) == (start_s <= 300)
            assert_same(await ask(engine, query), wanted, Aggregation.RATE)
