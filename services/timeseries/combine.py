"""From one series a server to one for all of them, or to those of the servers that have most.

Both work on what a query of single series returns, so they see each point once and in the same windows. What must stay
true: a window counts the servers that have it and no others (a gap is no zero); what comes out as NaN (infinities that
cancel) is absent, as it is of a single series, and the least of the means; memory is bounded: AVG, MIN, MAX and SUM
keep one number a window, PERCENTILE keeps values up to ``MAX_COMBINED_POINTS``, top keeps the best series only.
"""

import asyncio
import heapq
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleet.model import MetricKind
from runtime.errors import ResourceExhausted
from services.timeseries.engine.query import Query, SeriesResult
from services.timeseries.engine.settings import MAX_TIME_MS, MIN_TIME_MS

MAX_COMBINED_POINTS: Final = 10_000_000
"""Values that percentiles may be taken of, and windows of all metrics together: 80 MB."""

DEFAULT_PERCENTILE: Final = 95.0
MAX_TOP: Final = 1_000


class Across(IntEnum):
    """How servers are put together; the numbers are those of ``openmanager.fleet.v1.ServerAggregation``."""

    NONE = 0
    AVG = 1
    MIN = 2
    MAX = 3
    SUM = 4
    PERCENTILE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """What becomes of the single series.

    Attributes:
        across: how servers are put together; needs a query with a step.
        percentile: which one, 0 to 100.
        top: how many servers' series are kept for each metric; 0: all.
    """

    across: Across = Across.NONE
    percentile: float = DEFAULT_PERCENTILE
    top: int = 0

    @property
    def changes(self) -> bool:
        """Whether anything but the single series as they are is wanted."""
        return self.across is not Across.NONE or bool(self.top)


@dataclass(slots=True)
class _Metric:
    """What is known of one metric so far; arrays have one cell for each window of the query."""

    unit: str
    kind: MetricKind
    counts: NDArray[np.int64]
    reduced: NDArray[np.float64]
    places: list[NDArray[np.int64]] = field(default_factory=list)
    values: list[NDArray[np.float64]] = field(default_factory=list)
    resolution_ms: int = 0


def combined(results: AsyncIterator[SeriesResult], query: Query, how: Combination) -> AsyncIterator[SeriesResult]:
    """The series after ``how``: by metric, then, for top, the largest mean first.

    Raises:
        ResourceExhausted: MAX_COMBINED_POINTS.
    """
    if how.across is not Across.NONE:
        return _across(results, query, how)
    return _top(results, how.top) if how.top else results


async def _across(results: AsyncIterator[SeriesResult], query: Query, how: Combination) -> AsyncIterator[SeriesResult]:
    first = max(query.start_ms, MIN_TIME_MS) // query.step_ms  # there are no points beyond these
    windows = -(-min(query.end_ms, MAX_TIME_MS + 1) // query.step_ms) - first
    metrics: dict[str, _Metric] = {}
    points = 0
    async for result in results:
        metric = metrics.get(result.metric_key)
        if metric is None:
            points += windows
            _check(points)
            metric = metrics[result.metric_key] = _Metric(
                result.unit, result.kind, np.zeros(windows, np.int64), _empty(windows, how.across)
            )
        metric.resolution_ms = max(metric.resolution_ms, result.resolution_ms)
        if how.across is Across.PERCENTILE:
            points += len(result.times_ms)
            _check(points)
        _add(metric, result.times_ms // query.step_ms - first, result.values, how.across)
    for key in sorted(metrics):
        found = await asyncio.to_thread(_reduced, metrics[key], how)
        there = np.flatnonzero((metrics[key].counts > 0) & ~np.isnan(found))
        if not len(there):
            continue
        yield SeriesResult(
            server_id="",
            metric_key=key,
            unit=metrics[key].unit,
            kind=metrics[key].kind,
            times_ms=(there + first) * query.step_ms,
            values=found[there],
            resolution_ms=metrics[key].resolution_ms,
        )


def _check(points: int) -> None:
    if points > MAX_COMBINED_POINTS:
        raise ResourceExhausted(
            f"more than {MAX_COMBINED_POINTS} values to combine (MAX_COMBINED_POINTS): widen the step",
            reason="MAX_COMBINED_POINTS",
        )


def _empty(windows: int, across: Across) -> NDArray[np.float64]:
    fill = {Across.MIN: np.inf, Across.MAX: -np.inf}.get(across, 0.0)
    return np.full(0 if across is Across.PERCENTILE else windows, fill)


@np.errstate(invalid="ignore", over="ignore")
def _add(metric: _Metric, places: NDArray[np.int64], values: NDArray[np.float64], across: Across) -> None:
    metric.counts[places] += 1  # a series has each window at most once
    if across is Across.PERCENTILE:
        metric.places.append(places)
        metric.values.append(values)
    elif across is Across.MIN:
        metric.reduced[places] = np.minimum(metric.reduced[places], values)
    elif across is Across.MAX:
        metric.reduced[places] = np.maximum(metric.reduced[places], values)
    else:
        metric.reduced[places] += values


@np.errstate(invalid="ignore")
def _reduced(metric: _Metric, how: Combination) -> NDArray[np.float64]:
    if how.across is Across.AVG:
        return metric.reduced / np.maximum(metric.counts, 1)
    if how.across is not Across.PERCENTILE:
        return metric.reduced
    places, values = np.concatenate(metric.places), np.concatenate(metric.values)
    order = np.lexsort((values, places))
    values = values[order]
    ends = np.cumsum(metric.counts)
    rank = (metric.counts - 1).clip(0) * (how.percentile / 100)
    low = (ends - metric.counts + np.floor(rank).astype(np.int64)).clip(0, len(values) - 1)
    high = (ends - metric.counts + np.ceil(rank).astype(np.int64)).clip(0, len(values) - 1)
    share = rank - np.floor(rank)
    found: NDArray[np.float64] = np.where(share > 0, values[low] * (1 - share) + values[high] * share, values[low])
    return found


async def _top(results: AsyncIterator[SeriesResult], count: int) -> AsyncIterator[SeriesResult]:
    best: dict[str, list[tuple[float, int, SeriesResult]]] = {}
    order = 0
    async for result in results:
        heap = best.setdefault(result.metric_key, [])
        order -= 1  # of equal means the earlier server stays, and results are never compared
        entry = (_mean(result.values), order, result)
        if len(heap) < count:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
    for key in sorted(best):
        for result in _largest_first(best[key]):
            yield result


@np.errstate(invalid="ignore", over="ignore")
def _mean(values: NDArray[np.float64]) -> float:
    mean = float(np.mean(values))
    return -np.inf if np.isnan(mean) else mean


def _largest_first(heap: list[tuple[float, int, SeriesResult]]) -> Iterator[SeriesResult]:
    for _, _, result in sorted(heap, key=lambda entry: entry[:2], reverse=True):
        yield result
