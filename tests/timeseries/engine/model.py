"""The oracle: the engine's answers, worked out the slow and obvious way; and small makers of sets and rows.

It keeps every point of every series in a dictionary and answers each window by looking at all of them, in plain
Python. It shares no code with the engine beyond the words of a query, so that one can prove the other wrong.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fleet.model import Metric, MetricKind, MetricSet, Rows
from services.timeseries.engine import Aggregation, Engine, Query

NAN = float("nan")
Series = list[tuple[int, float]]
Answer = dict[tuple[str, str], Series]

EXACT = {Aggregation.MIN, Aggregation.MAX, Aggregation.COUNT, Aggregation.FIRST, Aggregation.LAST}


def metric_set(*names: str, kind: MetricKind = MetricKind.GAUGE, unit: str = "1") -> MetricSet:
    """A set of plain metrics; a name that ends in ``_total`` is a counter."""
    return MetricSet(
        metrics=tuple(
            Metric(name=name, unit=unit, kind=MetricKind.COUNTER if name.endswith("_total") else kind) for name in names
        )
    )


def rows(of_set: MetricSet, lines: Iterable[tuple[str, int, Sequence[float]]]) -> Rows:
    """Rows from (server, time, values)."""
    listed = list(lines)
    return Rows(
        metric_set_id=of_set.id,
        server_ids=tuple(server for server, _, _ in listed),
        times_ms=np.array([time for _, time, _ in listed], np.int64),
        values=np.array([values for _, _, values in listed], np.float64).reshape(len(listed), len(of_set)),
    )


class Model:
    """Everything that was appended, the newest value of each (server, metric, time)."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, str], dict[int, float]] = {}
        self.metrics: dict[str, Metric] = {}

    def append(self, of_set: MetricSet, batch: Rows) -> None:
        for metric in of_set.metrics:
            self.metrics[metric.key] = metric
        for server, time, values in zip(batch.server_ids, batch.times_ms.tolist(), batch.values.tolist(), strict=True):
            for metric, value in zip(of_set.metrics, values, strict=True):
                if not math.isnan(value):
                    self.series.setdefault((server, metric.key), {})[time] = value

    @property
    def points(self) -> int:
        return sum(len(series) for series in self.series.values())

    def query(self, query: Query) -> Answer:
        answer = {}
        for (server, key), points in sorted(self.series.items()):
            wanted_server = query.server_ids is None or server in query.server_ids
            wanted_metric = query.metrics is None or {key, self.metrics[key].name} & set(query.metrics)
            if not (wanted_server and wanted_metric):
                continue
            series = sorted(points.items())
            found = self._windows(series, query) if query.step_ms else self._inside(series, query)
            if found:
                answer[server, key] = found
        return answer

    def last(self) -> dict[tuple[str, str], tuple[int, float]]:
        return {name: max(points.items()) for name, points in self.series.items()}

    @staticmethod
    def _inside(series: Series, query: Query) -> Series:
        return [(time, value) for time, value in series if query.start_ms <= time < query.end_ms]

    def _windows(self, series: Series, query: Query) -> Series:
        windows: dict[int, Series] = {}
        for time, value in self._inside(series, query):
            windows.setdefault(time // query.step_ms * query.step_ms, []).append((time, value))
        found = []
        for label, points in sorted(windows.items()):
            if query.aggregation is Aggregation.RATE:
                value = self._rate(series, points, max(label, query.start_ms), query.step_ms)
            else:
                value = _aggregate([value for _, value in points], query.aggregation)
            if not math.isnan(value):
                found.append((label, value))
        return found

    @staticmethod
    def _rate(series: Series, points: Series, begins: int, step: int) -> float:
        earlier = [point for point in series if point[0] < begins]
        if earlier and begins - earlier[-1][0] <= max(step, 300_000):
            points = [earlier[-1], *points]
        if len(points) < 2:
            return NAN
        pairs = itertools.pairwise(points)
        increase = math.fsum(after - before if after >= before else after for (_, before), (_, after) in pairs)
        return increase / ((points[-1][0] - points[0][0]) / 1_000)


def _aggregate(values: list[float], aggregation: Aggregation) -> float:
    match aggregation:
        case Aggregation.AVG:
            return math.fsum(values) / len(values)
        case Aggregation.MIN:
            return min(values)
        case Aggregation.MAX:
            return max(values)
        case Aggregation.SUM:
            return math.fsum(values)
        case Aggregation.COUNT:
            return len(values)
        case Aggregation.FIRST:
            return values[0]
        case Aggregation.LAST:
            return values[-1]
    raise AssertionError(aggregation)


async def ask(engine: Engine, query: Query) -> Answer:
    """The engine's answer in the oracle's form; asserts the order of the series."""
    results = [result async for result in engine.query(query)]
    names = [(result.server_id, result.metric_key) for result in results]
    assert names == sorted(names)
    return {
        name: list(zip(result.times_ms.tolist(), result.values.tolist(), strict=True))
        for name, result in zip(names, results, strict=True)
    }


async def last(engine: Engine, *asked: tuple[str, ...] | None) -> dict[tuple[str, str], tuple[int, float]]:
    """The engine's newest points in the oracle's form; asserts the order of servers and metrics."""
    found = await engine.last_values(*asked)
    servers = [of_server.server_id for of_server in found]
    assert servers == sorted(set(servers))
    answer = {}
    for of_server in found:
        assert list(of_server.names.keys) == sorted(set(of_server.names.keys))
        points = zip(of_server.names.keys, of_server.times_ms.tolist(), of_server.values.tolist(), strict=True)
        there = {(of_server.server_id, key): (time, value) for key, time, value in points if not math.isnan(value)}
        assert len(there) == np.count_nonzero(of_server.times_ms >= 0), "a time for each value, and for no other"
        answer.update(there)
    return answer


EVERYTHING = Query(metrics=None, start_ms=0, end_ms=1 << 62)


async def everything(engine: Engine) -> Answer:
    """All points."""
    return await ask(engine, EVERYTHING)


def assert_same(
    found: Answer, wanted: Mapping[tuple[str, str], Series], aggregation: Aggregation | None = None
) -> None:
    """Equal bit by bit; sums within 1e-9 relative, since their order may differ."""
    assert found.keys() == wanted.keys()
    for name, series in wanted.items():
        assert [time for time, _ in found[name]] == [time for time, _ in series], name
        values = [value for _, value in found[name]]
        if aggregation is None or aggregation in EXACT:
            assert values == [value for _, value in series], name
        else:
            for value, (_, expected) in zip(values, series, strict=True):
                assert math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9), name


def written(folder: Path) -> list[tuple[str, int, int]]:
    """What tells whether a store's files have changed."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
