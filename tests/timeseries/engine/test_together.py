"""Many series read and put into windows together: the same answers as one after the other, whatever is in the way."""

import random
from collections.abc import Sequence
from pathlib import Path

import apsw
import numpy as np
import pytest

from runtime.clock import ManualClock
from services.timeseries.engine import Engine, EngineSettings, Query, query
from services.timeseries.engine.aggregate import Aggregation, Shared, Times, Values, Windows
from services.timeseries.engine.partition import BlockGoneError, BlockInfo, Partition
from tests.timeseries.engine.model import NAN, Model, ask, assert_same, metric_set, rows

NOON = 19_700 * 86_400_000 + 43_200_000
STEP_MS = 60_000
SET = metric_set("cpu_usage", "memory_usage")
SERVERS = tuple(f"web-{number:02}" for number in range(12))
SETTINGS = EngineSettings(sparse_points_a_day=0, maintenance_interval_s=1e9, head_rows=1_000)
TOGETHER = [one for one in Aggregation if one is not Aggregation.RATE]


def groups_of(rng: random.Random, alike: bool) -> list[Shared]:
    """Series with gaps, some without any value, in groups of one or several, cut into pieces anywhere."""
    noise = np.random.default_rng(rng.randrange(1 << 30))
    made: list[Shared] = []
    times = np.arange(50, dtype=np.int64) * 10_000
    for _ in range(rng.randrange(1, 6)):
        if not alike:
            times = np.cumsum(noise.integers(1, 40_000, rng.randrange(1, 60)))
        columns = []
        for _ in range(rng.choice((1, 1, 4))):
            values = noise.normal(50, 10, len(times))
            values[noise.random(len(times)) < rng.choice((0.0, 0.0, 0.3, 1.0))] = NAN
            values[noise.random(len(times)) < rng.choice((0.0, 0.0, 0.1))] = rng.choice((np.inf, -np.inf))
            cut = rng.randrange(len(times) + 1)
            columns.append([values[:cut], values[cut:]])
        made.append(Shared(times.copy(), columns))
    return made


def one_by_one(groups: Sequence[Shared], aggregation: Aggregation) -> list[tuple[Times, Values]]:
    found = []
    for group in groups:
        for column in group.columns:
            values = np.concatenate(column)
            there = ~np.isnan(values)
            found.append(Windows(0, STEP_MS, aggregation).of(group.times_ms[there], values[there]))
    return found


@pytest.mark.parametrize("aggregation", TOGETHER)
@pytest.mark.parametrize("alike", [True, False])
def test_windows_of_all_are_those_of_each(aggregation: Aggregation, alike: bool) -> None:
    for seed in range(60):
        groups = groups_of(random.Random(seed), alike)
        wanted = one_by_one(groups, aggregation)
        found = list(Windows(0, STEP_MS, aggregation).of_all(groups))
        assert [times.tolist() for times, _ in found] == [times.tolist() for times, _ in wanted], seed
        assert [values.tolist() for _, values in found] == [values.tolist() for _, values in wanted], seed


async def fill(engine: Engine, model: Model) -> None:
    """A merged block of each server and rows in its head; some rows are late, doubled or without a value."""
    rng = random.Random(7)
    for part in range(3):
        for server in SERVERS:
            shift = 0 if server < "web-06" else rng.randrange(9_000)  # half of them have the same times
            lines = [
                (
                    server,
                    NOON + part * 600_000 + n * 10_000 + shift,
                    [rng.randrange(1_000) / 8, NAN if n % 7 == 0 else n],
                )
                for n in range(60)
            ]
            if server in ("web-03", "web-09"):
                lines += [(server, NOON + n * 10_000 + shift, [-1.0, NAN]) for n in range(part, 20, 3)]
            await engine.append(rows(SET, lines), metric_sets=(SET,))
            model.append(SET, rows(SET, lines))
        if part < 2:
            await engine.maintain(everything=True)


def queries() -> list[Query]:
    return [
        Query(metrics=metrics, start_ms=NOON + start, end_ms=NOON + end, step_ms=STEP_MS, aggregation=aggregation)
        for metrics in (("cpu_usage",), None)
        for start, end in ((0, 1_800_000), (95_000, 1_333_000), (650_000, 660_000))
        for aggregation in Aggregation
        if aggregation is not Aggregation.RATE
    ]


@pytest.mark.parametrize(("servers", "cells"), [(64, 500_000), (5, 500_000), (64, 250), (1, 1)])
async def test_servers_read_together_equal_the_oracle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: int, cells: int
) -> None:
    monkeypatch.setattr(query, "SERVERS_TOGETHER", servers)
    monkeypatch.setattr(query, "CELLS_TOGETHER", cells)
    model = Model()
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        await fill(engine, model)
        for asked in queries():
            assert_same(await ask(engine, asked), model.query(asked))


async def test_a_partition_is_lent_once_for_all_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lent = Model(), 0
    asked = queries()[0]
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        await fill(engine, model)
        await ask(engine, asked)
        done = Partition.done

        def counted(partition: Partition) -> None:
            nonlocal lent
            lent += 1
            done(partition)

        monkeypatch.setattr(Partition, "done", counted)
        assert_same(await ask(engine, asked), model.query(asked))
    assert lent == 1


async def test_a_block_that_goes_meanwhile_or_cannot_be_read_is_looked_for_server_by_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each kind of failure, in the middle of reading all servers: each row is still there, and there once."""
    model = Model()
    asked = queries()[0]
    reader = Partition.reader
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        await fill(engine, model)
        for failure in (BlockGoneError(7), apsw.CorruptError("bad page"), apsw.IOError("passing")):
            calls = 0

            def failing(partition: Partition, info: BlockInfo, *rest: object, why: Exception = failure) -> object:
                nonlocal calls
                calls += 1
                if calls == 8:
                    raise why
                return reader(partition, info, *rest)  # type: ignore[arg-type]

            monkeypatch.setattr(Partition, "reader", failing)
            assert_same(await ask(engine, asked), model.query(asked))
            assert calls > len(SERVERS) and (await engine.status()).damaged == 0
