"""Servers put together and the servers that have most, against a naive model."""

from collections.abc import AsyncIterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleet.model import MetricKind
from runtime.errors import ResourceExhausted
from services.timeseries import combine
from services.timeseries.combine import Across, Combination, combined
from services.timeseries.engine.query import Query, SeriesResult

STEP_MS = 10_000
START_MS, END_MS = 1_005_000, 1_205_000
FIRST = START_MS // STEP_MS * STEP_MS
QUERY = Query(metrics=("m",), start_ms=START_MS, end_ms=END_MS, step_ms=STEP_MS)
LABELS = list(range(FIRST, END_MS, STEP_MS))
Points = dict[int, float]


def series(server: str, points: Points, metric: str = "m") -> SeriesResult:
    times = sorted(points)
    return SeriesResult(
        server_id=server,
        metric_key=metric,
        unit="%",
        kind=MetricKind.GAUGE,
        times_ms=np.array(times, np.int64),
        values=np.array([points[time] for time in times]),
    )


async def run(found: list[SeriesResult], how: Combination, query: Query = QUERY) -> list[SeriesResult]:
    async def results() -> AsyncIterator[SeriesResult]:
        for result in found:
            yield result

    return [result async for result in combined(results(), query, how)]


NAIVE = {
    Across.AVG: np.mean,
    Across.MIN: np.min,
    Across.MAX: np.max,
    Across.SUM: np.sum,
}
fleets = st.lists(st.dictionaries(st.sampled_from(LABELS), st.floats(-1e6, 1e6), min_size=1), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fleet=fleets, across=st.sampled_from([*NAIVE, Across.PERCENTILE]), percentile=st.floats(0, 100))
async def test_put_together_equals_the_naive_model(fleet: list[Points], across: Across, percentile: float) -> None:
    found = [series(f"s{index}", points) for index, points in enumerate(fleet)]
    (answer,) = await run(found, Combination(across=across, percentile=percentile))
    expected = {}
    for label in LABELS:
        values = [points[label] for points in fleet if label in points]
        if values:
            reduce = NAIVE.get(across, lambda numbers: np.percentile(numbers, percentile))
            expected[label] = reduce(values)
    assert (answer.server_id, answer.metric_key, answer.unit) == ("", "m", "%")
    assert answer.times_ms.tolist() == list(expected)
    assert answer.values.tolist() == pytest.approx(list(expected.values()), rel=1e-9, abs=1e-6)


async def test_metrics_stay_apart_and_in_order() -> None:
    found = [series("a", {FIRST: 1.0}, "z"), series("a", {FIRST: 5.0}), series("b", {FIRST: 3.0}, "z")]
    answer = await run(found, Combination(across=Across.SUM))
    assert [(one.metric_key, one.values.tolist()) for one in answer] == [("m", [5.0]), ("z", [4.0])]


async def test_top_keeps_the_servers_with_the_largest_mean() -> None:
    found = [series(f"s{index}", {FIRST: float(index), LABELS[1]: float(index)}) for index in (3, 1, 4, 1, 5, 9, 2, 6)]
    answer = await run(found, Combination(top=3))
    assert [one.server_id for one in answer] == ["s9", "s6", "s5"]
    assert len(await run(found, Combination(top=100))) == 8


async def test_of_equal_means_the_earlier_server_stays() -> None:
    found = [series(name, {FIRST: 1.0}) for name in "abcd"]
    assert [one.server_id for one in await run(found, Combination(top=2))] == ["a", "b"]


async def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combine, "MAX_COMBINED_POINTS", 50)
    many = [series(f"s{index}", dict.fromkeys(LABELS, 1.0)) for index in range(4)]
    await run(many, Combination(across=Across.SUM))
    with pytest.raises(ResourceExhausted, match="MAX_COMBINED_POINTS"):
        await run(many, Combination(across=Across.PERCENTILE))
    with pytest.raises(ResourceExhausted):
        await run([series("a", {FIRST: 1.0}, f"m{index}") for index in range(4)], Combination(across=Across.SUM))


@pytest.mark.parametrize("across", [Across.MAX, Across.PERCENTILE])
async def test_a_range_beyond_all_times_costs_no_windows(across: Across) -> None:
    """From the year 1 to the year 9999, as a client says that it wants all there is."""
    query = Query(metrics=("m",), start_ms=-62_135_596_800_000, end_ms=253_402_300_799_000, step_ms=3_600_000)
    (answer,) = await run([series("a", {0: 1.0, 9_223_369_200_000: 2.0})], Combination(across=across), query)
    assert (answer.times_ms.tolist(), answer.values.tolist()) == ([0, 9_223_369_200_000], [1.0, 2.0])


async def test_without_a_combination_nothing_changes() -> None:
    found = [series("b", {FIRST: 1.0}), series("a", {FIRST: 1.0})]
    assert await run(found, Combination()) == found


INF = float("inf")


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("across", [Across.AVG, Across.SUM, Across.PERCENTILE])
async def test_infinities_that_cancel_are_absent(across: Across) -> None:
    """As in the windows of a single series: NaN is no value."""
    found = [series("a", {FIRST: INF, LABELS[1]: 1.0}), series("b", {FIRST: -INF, LABELS[1]: 1.0})]
    (answer,) = await run(found, Combination(across=across, percentile=50))
    assert answer.times_ms.tolist() == [LABELS[1]]
    assert await run([series("a", {FIRST: INF}), series("b", {FIRST: -INF})], Combination(across=across)) == []


@pytest.mark.filterwarnings("error::RuntimeWarning")
async def test_series_without_a_mean_come_after_those_that_have_one() -> None:
    """A NaN is neither larger nor smaller, which would leave the order to chance."""
    without = [series(server, {FIRST: INF, LABELS[1]: -INF}) for server in ("a", "b", "c")]
    found = [series("d", {FIRST: 1.0}), without[0], series("e", {FIRST: 3.0}), *without[1:], series("f", {FIRST: 2.0})]
    assert [result.server_id for result in await run(found, Combination(top=4))] == ["e", "f", "d", "a"]
