"""The newest point of each series: in heads and blocks, in several cohorts, on older days, late or doubled."""

import random
from pathlib import Path

import pytest

from runtime.clock import ManualClock
from runtime.errors import ResourceExhausted
from services.timeseries.engine import Engine, EngineSettings
from tests.timeseries.engine.model import EVERYTHING, NAN, Model, everything, last, metric_set, rows

DAY_MS = 86_400_000
NOON = 19_700 * DAY_MS + DAY_MS // 2
SETS = (metric_set("a", "b", "c", "d"), metric_set("d", "c"), metric_set("b", "never"))
SETTINGS = EngineSettings(sparse_points_a_day=0, head_rows=1_000, maintenance_interval_s=1e9, close_group_heads=2)


def random_line(rng: random.Random, width: int, number: int) -> tuple[str, int, list[float]]:
    """Few times, so that equal ones are frequent; the values tell the lines apart."""
    time = NOON + rng.randrange(-1, 1) * DAY_MS + rng.randrange(2) * 10_000
    values = [NAN if rng.random() < 0.5 else number + column / 10 for column in range(width)]
    return rng.choice("xy"), time, values


@pytest.mark.parametrize("seed", range(12))
async def test_the_newest_points_equal_the_oracle_at_any_moment(tmp_path: Path, seed: int) -> None:
    rng, model, number = random.Random(seed), Model(), 0
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        for _ in range(12):
            of_set = rng.choice(SETS)
            lines = []
            for _ in range(rng.randrange(1, 5)):
                number += 1
                lines.append(random_line(rng, len(of_set), number))
            await engine.append(rows(of_set, lines), metric_sets=(of_set,))
            model.append(of_set, rows(of_set, lines))
            if rng.random() < 0.4:
                await engine.maintain(everything=True)
            wanted = model.last()
            assert await last(engine) == wanted
            servers, metrics = tuple(rng.sample("wxy", 2)), tuple(rng.sample("abcde", 2))
            chosen = {name: found for name, found in wanted.items() if name[0] in servers and name[1] in metrics}
            assert await last(engine, servers, metrics) == chosen


async def test_a_row_of_a_block_wins_over_a_head_s_older_one_and_loses_to_a_later_one_of_its_time(
    tmp_path: Path,
) -> None:
    of_set = SETS[1]
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        await engine.append(rows(of_set, [("x", NOON + 5, [1.0, 1.0])]), metric_sets=(of_set,))
        await engine.maintain(everything=True)
        await engine.append(rows(of_set, [("x", NOON, [2.0, 2.0])]))
        assert await last(engine) == {("x", "c"): (NOON + 5, 1.0), ("x", "d"): (NOON + 5, 1.0)}
        await engine.append(rows(of_set, [("x", NOON + 5, [NAN, 3.0])]))
        assert await last(engine) == {("x", "c"): (NOON + 5, 3.0), ("x", "d"): (NOON + 5, 1.0)}


async def test_of_a_batch_s_rows_of_one_time_the_later_wins_also_where_its_blocks_are_cut(tmp_path: Path) -> None:
    """They have one sequence: apart, in blocks that are merged with others, nobody would know which came later."""
    of_set, model, clock = SETS[1], Model(), ManualClock(NOON)
    settings = EngineSettings(head_rows=6, merge_blocks=2, maintenance_interval_s=1e9)
    lines: list[tuple[str, int, list[float]]] = [("x", NOON + second * 1_000, [0.0, 0.0]) for second in range(11)]
    lines += [("x", NOON + 11_000, [1.0, 1.0]), ("x", NOON + 11_000, [2.0, NAN])]
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        for batch in (lines, [("x", NOON - 1_000, [0.0, 0.0])]):
            await engine.append(rows(of_set, batch), metric_sets=(of_set,))
            model.append(of_set, rows(of_set, batch))
            clock.advance(settings.head_age_s)
            await engine.maintain()
            assert await last(engine) == model.last()
            assert await everything(engine) == model.query(EVERYTHING)


async def test_series_further_behind_than_the_look_back_are_left_out(tmp_path: Path) -> None:
    """How far is counted from the newest row of the same server."""
    of_set = SETS[1]
    settings = EngineSettings(sparse_points_a_day=0, maintenance_interval_s=1e9, last_lookback_days=2)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        lines = [("x", NOON - 3 * DAY_MS, [1.0, 1.0]), ("x", NOON - 2 * DAY_MS, [2.0, NAN]), ("x", NOON, [NAN, NAN])]
        await engine.append(rows(of_set, lines), metric_sets=(of_set,))
        assert await last(engine) == {("x", "d"): (NOON - 2 * DAY_MS, 2.0), ("x", "c"): (NOON - 3 * DAY_MS, 1.0)}
        await engine.append(rows(SETS[2], [("x", NOON, [4.0, NAN])]), metric_sets=(SETS[2],))
        newest = {("x", "b"): (NOON, 4.0), ("x", "d"): (NOON - 2 * DAY_MS, 2.0)}
        assert await last(engine) == newest
        await engine.maintain(everything=True)
        assert await last(engine) == newest


async def test_the_limit_of_series_is_named(tmp_path: Path) -> None:
    settings = EngineSettings(sparse_points_a_day=0, maintenance_interval_s=1e9, max_series=4)
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=settings) as engine:
        await engine.append(rows(SETS[0], [("x", NOON, [1.0] * 4)]), metric_sets=(SETS[0],))
        assert len(await last(engine)) == 4
        await engine.append(rows(SETS[0], [("y", NOON, [1.0] * 4)]))
        assert len(await last(engine, ("y",))) == len(await last(engine, None, ("a", "b"))) == 4
        with pytest.raises(ResourceExhausted) as refused:
            await last(engine)
        assert refused.value.reason == "MAX_SERIES" and "max_series = 4" in refused.value.message
