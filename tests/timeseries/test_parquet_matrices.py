"""How single points become matrices: sets come back, and what shares no times costs what it holds."""

import random
from collections.abc import Iterable

import numpy as np

from fleet.model import Metric
from tests.timeseries.parquet_files import matrices, reading


def matrices_of(series: dict[tuple[str, str], Iterable[int]], buffer_sets: matrices.Sets) -> list[matrices.Matrix]:
    """Those of one buffer, in the order of a sorted file."""
    table = [reading.Series(server_id=server, metric=Metric(name=name)) for server, name in series]
    buffer = matrices.Buffer(1_000_000)
    for number, times in enumerate(series.values()):
        at = np.array(list(times), np.int64)
        buffer.add(
            reading.Points(
                series=np.full(len(at), number, np.int32),
                times_ms=at,
                values=at / 7.0 + number,
                rows=np.arange(len(at)),
            )
        )
    return list(buffer.matrices(buffer.size, table, buffer_sets))


def test_series_that_share_times_become_one_matrix() -> None:
    rng, sets = random.Random(3), matrices.Sets()
    ticks = range(0, 864_000, 1_000)
    series: dict[tuple[str, str], Iterable[int]] = {}
    for server in ("a", "b"):
        for metric in range(100):
            series[server, f"gappy_{metric:03}"] = sorted(rng.sample(ticks, 800))
        for metric in range(3):
            series[server, f"rare_{metric}"] = ticks[::300]
        for metric in range(4):
            series[server, f"own_{metric}"] = [at + 1 + metric for at in ticks[:50]]
    made = matrices_of(series, sets)
    sizes = sorted(one.values.shape for one in made)
    assert sizes == [(3, 3)] * 2 + [(50, 1)] * 8 + [(864, 100)] * 2
    assert len({one.metric_set.id for one in made}) == 6
    fewer = {name: times for name, times in series.items() if name[1] != "gappy_050"}
    again = matrices_of(fewer, sets)
    assert {one.metric_set.id for one in again} == {one.metric_set.id for one in made}
    points = sum(int((~np.isnan(one.values)).sum()) for one in again)
    assert points == sum(len(list(times)) for times in fewer.values())


def test_many_series_with_times_of_their_own_cost_what_they_hold() -> None:
    series = {("a", f"m{n}"): range(n, 200_000 + n, 1_000 + n) for n in range(300)}
    made = matrices_of(series, matrices.Sets())
    cells, points = sum(one.values.size for one in made), sum(map(len, series.values()))
    assert points <= cells <= 2 * points
