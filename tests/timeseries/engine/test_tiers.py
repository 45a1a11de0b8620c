"""Roll-ups answer as the points would: every tier, aggregation, step, alignment and place equals the oracle."""

import dataclasses
import itertools
import random
from pathlib import Path

import pytest

from fleet.model import Metric, MetricKind, MetricSet, Rows
from runtime.clock import ManualClock
from services.timeseries.engine import Aggregation, Engine, EngineSettings, Query
from tests.timeseries.engine.model import NAN, Answer, Model, ask, assert_same, metric_set, rows

DAY_MS, HOUR_MS, MINUTE_MS = 86_400_000, 3_600_000, 60_000
TODAY = 19_704 * DAY_MS  # a file of 5 min roll-ups begins here (a multiple of 8 days)
NOON = TODAY + DAY_MS // 2
FULL = metric_set("cpu_usage", "memory_usage", "requests_total", "constant", "never")
PART = metric_set("requests_total", "cpu_usage", "extra")
SETTINGS = EngineSettings(head_rows=40, maintenance_interval_s=1e9, close_group_heads=2, partition_connections=2)
STEPS = (1_000, 5 * MINUTE_MS, 10 * MINUTE_MS, 15 * MINUTE_MS, HOUR_MS, 2 * HOUR_MS, 7_777, DAY_MS, 90 * MINUTE_MS)


class Source:
    """A seeded sender of rows a minute apart over two days, with all that is awkward: late, doubled, holes, resets."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.counter = dict.fromkeys("ab", 0.0)

    def batch(self, number: int) -> tuple[MetricSet, Rows]:
        rng, lines = self.rng, []
        of_set = rng.choice((FULL, FULL, FULL, PART))
        for _ in range(rng.randint(4, 12)):
            server = rng.choice("ab")
            time = NOON - DAY_MS + number * 20 * MINUTE_MS + rng.randint(0, 20 * MINUTE_MS)
            if rng.random() < 0.1:
                time -= rng.choice((HOUR_MS, 20 * HOUR_MS, 5 * MINUTE_MS, DAY_MS))
            if rng.random() < 0.2:
                time = time // (5 * MINUTE_MS) * 5 * MINUTE_MS + rng.choice((0, 0, -1, 1))
            self.counter[server] += rng.randint(0, 50)
            if rng.random() < 0.05:
                self.counter[server] = float(rng.randint(0, 3))
            values = {
                "cpu_usage": round(rng.gauss(50, 20), 2),
                "memory_usage": rng.random() * 1e6,
                "requests_total": self.counter[server],
                "constant": 4.25,
                "never": NAN,
                "extra": float(rng.randint(-3, 3)),
            }
            lines.append((server, time, [NAN if rng.random() < 0.15 else values[m.name] for m in of_set.metrics]))
        return of_set, rows(of_set, lines)


def queries(rng: random.Random, *, aligned: bool = False) -> list[Query]:
    found = []
    for aggregation, step in itertools.product(Aggregation, STEPS):
        start = NOON - DAY_MS - rng.choice((DAY_MS, 0, HOUR_MS)) - rng.choice((0, 0, 123_456, 1, 5 * MINUTE_MS))
        end = NOON + rng.choice((0, DAY_MS, 12_345_678, -HOUR_MS, -1, 10 * MINUTE_MS))
        if aligned or rng.random() < 0.5:
            start, end = start // step * step, -(-end // step) * step
        metrics = ("requests_total",) if aggregation is Aggregation.RATE else rng.choice((None, ("cpu_usage", "extra")))
        found.append(Query(metrics=metrics, start_ms=start, end_ms=end, step_ms=step, aggregation=aggregation))
    return found


async def compare(engine: Engine, model: Model, seed: int) -> None:
    for query in queries(random.Random(seed)):
        assert_same(await ask(engine, query), model.query(query), query.aggregation)


async def append(engine: Engine, model: Model, source: Source, numbers: range, every: int = 0) -> None:
    for number in numbers:
        of_set, batch = source.batch(number)
        await engine.append(batch, metric_sets=(of_set,))
        model.append(of_set, batch)
        if every and number % every == every - 1:
            await engine.maintain(everything=True)


async def resolutions(engine: Engine, step_ms: int, start_ms: int, end_ms: int) -> set[int]:
    query = Query(metrics=None, start_ms=start_ms, end_ms=end_ms, step_ms=step_ms)
    return {result.resolution_ms async for result in engine.query(query)}


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.full) for seed in (2, 3))])
@pytest.mark.parametrize("every", [0, 100, 7, 1], ids=["heads", "rolled once", "mixed", "rolled each time"])
async def test_every_query_equals_the_oracle(tmp_path: Path, every: int, seed: int) -> None:
    model, source, clock = Model(), Source(seed), ManualClock(NOON)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        await append(engine, model, source, range(72), every)
        if every == 100:
            await engine.maintain(everything=True)
            status = await engine.status()
            assert (status.head_points, status.unrolled_marks) == (0, 0)
            start, end = NOON - DAY_MS, NOON
            assert await resolutions(engine, HOUR_MS, start, end) == {HOUR_MS}
            assert await resolutions(engine, 5 * MINUTE_MS, start, end) == {5 * MINUTE_MS}
            assert await resolutions(engine, MINUTE_MS, start, end) == {0}
        await compare(engine, model, seed)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        await compare(engine, model, seed)
        await append(engine, model, source, range(72, 80), 3)
        await compare(engine, model, seed)
        await engine.maintain(everything=True)
        await compare(engine, model, seed)


async def test_roll_ups_outlive_their_points(tmp_path: Path) -> None:
    """After the points went, windows of whole buckets are what they were; then the finer roll-ups go too."""
    model, source, clock = Model(), Source(9), ManualClock(NOON)
    settings = dataclasses.replace(SETTINGS, raw_retention_s=2 * 86_400.0, five_minute_retention_s=20 * 86_400.0)
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        await append(engine, model, source, range(60), 9)
        clock.advance(12 * 86_400)
        await engine.maintain()
        assert list((tmp_path / "blocks").glob("*.db")) == []
        assert await ask(engine, Query(metrics=None, start_ms=0, end_ms=NOON * 2)) == {}
        await _same(engine, model, [query for query in _whole() if query.step_ms % (5 * MINUTE_MS) == 0])
        clock.advance(40 * 86_400)
        await engine.maintain()
        assert list((tmp_path / "rollup-5m").glob("*.db")) == []
        await _same(engine, model, [query for query in _whole() if query.step_ms % HOUR_MS == 0])
        assert await ask(engine, _whole()[1]) == {}
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        await _same(engine, model, [query for query in _whole() if query.step_ms % HOUR_MS == 0])


def _whole() -> list[Query]:
    return queries(random.Random(5), aligned=True)


async def _same(engine: Engine, model: Model, wanted: list[Query]) -> None:
    assert len(wanted) > 8
    for query in wanted:
        assert_same(await ask(engine, query), model.query(query), query.aggregation)


async def test_the_points_of_an_import_older_than_the_retention_are_rolled_up_once(tmp_path: Path) -> None:
    """Three months at once, in pieces: what is there of a bucket counts, and a bucket whose points went is closed."""
    model, clock = Model(), ManualClock(TODAY + 200 * DAY_MS)
    settings = dataclasses.replace(SETTINGS, raw_retention_s=30 * 86_400.0, five_minute_retention_s=180 * 86_400.0)
    of_set = metric_set("cpu_usage", "requests_total")

    def piece(day: int, half: int) -> Rows:
        times = range(TODAY + day * DAY_MS + half * MINUTE_MS, TODAY + (day + 1) * DAY_MS, 10 * MINUTE_MS)
        return rows(of_set, [("a", time, [float(time % 91), float(time % 10_000_000)]) for time in times])

    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        for half in (0, 1):
            for day in range(0, 90, 9):
                batch = piece(day, half)
                late, endings = await engine.too_late(batch.server_ids, batch.times_ms)
                assert not late.any()
                await engine.append(batch, metric_sets=(of_set,), endings=endings)
                model.append(of_set, batch)
            await engine.maintain(everything=True)
            await _same_import(engine, model)
        clock.advance(7_200)
        await engine.maintain()
        await engine.maintain()
        assert list((tmp_path / "blocks").glob("*.db")) == []
        await _same_import(engine, model, HOUR_MS)
        batch = piece(9, 0)
        late, _ = await engine.too_late(batch.server_ids, batch.times_ms)
        assert late.all(), "the points of these buckets are gone"
        other = rows(of_set, [("b", time, [1.0, 2.0]) for time in batch.times_ms.tolist()])
        late, endings = await engine.too_late(other.server_ids, other.times_ms)
        assert not late.any(), "another server has none there"
        await engine.append(other, endings=endings)
        model.append(of_set, other)
        await engine.maintain(everything=True)
        await _same_import(engine, model, HOUR_MS)


async def _same_import(engine: Engine, model: Model, *steps: int) -> None:
    for aggregation, step in itertools.product(Aggregation, steps or (5 * MINUTE_MS, HOUR_MS, DAY_MS)):
        metrics = ("requests_total",) if aggregation is Aggregation.RATE else None
        query = Query(
            metrics=metrics, start_ms=TODAY, end_ms=TODAY + 91 * DAY_MS, step_ms=step, aggregation=aggregation
        )
        assert_same(await ask(engine, query), model.query(query), aggregation)


def test_answers_are_not_all_empty() -> None:
    """Guards the comparisons above."""
    model, source = Model(), Source(1)
    for number in range(60):
        model.append(*source.batch(number))
    answers: list[Answer] = [model.query(query) for query in queries(random.Random(1))]
    assert sum(len(series) for answer in answers for series in answer.values()) > 10_000


@pytest.mark.parametrize("sets", [(FULL, FULL), (FULL, PART), (PART, FULL)], ids=["one set", "a newer", "an older"])
async def test_a_bucket_made_twice_without_a_batch_in_between_is_the_later_one(
    tmp_path: Path, sets: tuple[MetricSet, MetricSet]
) -> None:
    """Some of its rows were in a head the first time: nothing but the order of the making tells which one is right."""
    model, hour = Model(), NOON - 2 * HOUR_MS
    clock = ManualClock(NOON)

    def batch(of_set: MetricSet, times: list[int]) -> Rows:
        return rows(of_set, [("a", time, [1.0] * len(of_set)) for time in times])

    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        await engine.append(rows(PART, [("b", hour, [1.0] * len(PART))]), metric_sets=(PART, FULL))
        first, second = (
            batch(sets[0], [hour + 60_000 * n for n in range(5)]),
            batch(sets[1], [hour - 600_000, hour + 600_000, hour + 660_000]),
        )
        await engine.append(first)
        engine._store.close_heads(lambda: False, everything=True)
        await engine.append(second)
        engine._rollups.run(everything=True)
        for of_set, part in zip(sets, (first, second), strict=True):
            model.append(of_set, part)
        model.append(PART, rows(PART, [("b", hour, [1.0] * len(PART))]))
        for _ in range(2):
            await compare(engine, model, 1)
            for step_ms in (5 * MINUTE_MS, HOUR_MS):
                query = Query(metrics=None, start_ms=0, end_ms=NOON, step_ms=step_ms, aggregation=Aggregation.COUNT)
                assert_same(await ask(engine, query), model.query(query), Aggregation.COUNT)
            engine._store.close_heads(lambda: False, everything=True)
            engine._rollups.run(everything=True)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        await engine.maintain(everything=True)
        await compare(engine, model, 1)


@pytest.mark.parametrize("last", [MetricKind.UNSPECIFIED, MetricKind.COUNTER])
@pytest.mark.parametrize("first", MetricKind)
async def test_rate_is_the_same_on_every_tier_whatever_kind_was_said_first(
    tmp_path: Path, first: MetricKind, last: MetricKind
) -> None:
    """RATE is refused on a gauge only: a sender may not say what its counter is, or say it later, or better."""
    model, clock = Model(), ManualClock(NOON)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        for number, kind in enumerate((first, last)):
            of_set = MetricSet(metrics=(Metric(name="requests", kind=kind), Metric(name=f"other_{number}")))
            start = NOON - (2 - number) * 80 * MINUTE_MS
            lines = [("a", start + n * MINUTE_MS, (float(3 * n % 100), 1.0)) for n in range(80)]
            await engine.append(rows(of_set, lines), metric_sets=[of_set])
            model.append(of_set, rows(of_set, lines))
            await engine.maintain(everything=True)
        for step in (MINUTE_MS, 5 * MINUTE_MS, HOUR_MS):
            query = Query(metrics=("requests",), start_ms=0, end_ms=NOON, step_ms=step, aggregation=Aggregation.RATE)
            assert_same(await ask(engine, query), model.query(query), Aggregation.RATE)


async def test_a_head_of_another_set_hides_no_point_of_a_server(tmp_path: Path) -> None:
    """As scores that analytics writes of a server: few, so that their head is open while the server's own is closed,
    and no bucket is made that it has a row of."""
    model, clock = Model(), ManualClock(NOON)
    others = metric_set("score")
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:

        async def told(of_set: MetricSet, minutes: range, value: float) -> None:
            lines = [("a", NOON - HOUR_MS + n * MINUTE_MS, [value] * len(of_set)) for n in minutes]
            await engine.append(rows(of_set, lines), metric_sets=(of_set,))
            model.append(of_set, rows(of_set, lines))

        await told(FULL, range(0, 60, 2), 1.0)
        await engine.maintain(everything=True)
        await told(others, range(1, 60, 20), 2.0)
        await told(FULL, range(1, 60), 3.0)
        await engine.maintain()
        assert (await engine.status()).head_points == 3, "only the full head is a block"
        for closed in (False, True):
            if closed:
                engine._store.close_heads(lambda: False, everything=True)
            for metric, step_ms in itertools.product(("cpu_usage", "score"), (5 * MINUTE_MS, HOUR_MS)):
                query = Query(metrics=(metric,), start_ms=0, end_ms=NOON, step_ms=step_ms, aggregation=Aggregation.SUM)
                assert_same(await ask(engine, query), model.query(query), Aggregation.SUM)
