"""Puts answers of several sources together: points of the same series, and parts of a range that follow each other.

What must stay true: equal times of one series come out once, the value of the later source; the result is in order of
server id and metric key.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from services.timeseries.engine.aggregate import Windows
from services.timeseries.engine.query import Query, SeriesResult

Name = tuple[str, str]
"""A server and a metric's key."""


def merged(sources: Iterable[Iterable[SeriesResult]]) -> list[SeriesResult]:
    """The points of all sources, series by series; of equal times those of the later source."""
    found: dict[Name, list[SeriesResult]] = {}
    for source in sources:
        for result in source:
            found.setdefault((result.server_id, result.metric_key), []).append(result)
    return [_union(found[name]) for name in sorted(found)]


def _union(parts: Sequence[SeriesResult]) -> SeriesResult:
    if len(parts) == 1:
        return parts[0]
    times = np.concatenate([part.times_ms for part in parts])
    order = np.argsort(times, kind="stable")
    times = times[order]
    last = np.append(times[1:] != times[:-1], True)
    values = np.concatenate([part.values for part in parts])[order]
    resolution_ms = max(part.resolution_ms for part in parts)
    return replace(parts[-1], times_ms=times[last], values=values[last], resolution_ms=resolution_ms)


def windowed(points: Iterable[SeriesResult], query: Query) -> list[SeriesResult]:
    """What the query makes of points, which may begin before its range where RATE looks for them.

    Args:
        points: each series once.
        query: its range, step and aggregation.
    """
    windows = Windows(query.start_ms, query.step_ms, query.aggregation) if query.step_ms else None
    found = []
    for series in points:
        times, values = series.times_ms, series.values
        end = int(times.searchsorted(query.end_ms))
        if windows is None:
            start = int(times.searchsorted(query.start_ms))
            times, values = times[start:end], values[start:end]
        else:
            times, values = windows.of(times[:end], values[:end])
        if len(times):
            found.append(replace(series, times_ms=times, values=values))
    return found


def concatenated(parts: Iterable[Iterable[SeriesResult]]) -> list[SeriesResult]:
    """One answer out of those to parts of a range that follow each other."""
    found: dict[Name, list[SeriesResult]] = {}
    for part in parts:
        for result in part:
            found.setdefault((result.server_id, result.metric_key), []).append(result)
    return [_chain(found[name]) for name in sorted(found)]


def _chain(parts: Sequence[SeriesResult]) -> SeriesResult:
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[-1],
        times_ms=np.concatenate([part.times_ms for part in parts]),
        values=np.concatenate([part.values for part in parts]),
        resolution_ms=max(part.resolution_ms for part in parts),
    )
