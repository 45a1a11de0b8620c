"""The oracle of roll-ups: windows of 5 min and 1 h must say what all points would that were ever acknowledged.

Also where the points, or the finer roll-ups, have gone since. So a bucket that was lost, made of a part of its points,
or made anew of those that came after the others had gone, is found. What is excused: days whose roll-ups have gone too,
and those that the disk's limit took without, as the engine said.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from services.timeseries.engine import Aggregation, Engine, Query
from tests.timeseries.engine.history import DAY_MS, History, Moment, gone_through
from tests.timeseries.engine.model import Answer, ask

STEPS_MS: Final = {1: 300_000, 2: 3_600_000}
"""The width of each tier's buckets."""
WORKED_OUT: Final[Mapping[Aggregation, Callable[[Sequence[float]], float]]] = {
    Aggregation.COUNT: len,
    Aggregation.MIN: min,
    Aggregation.MAX: max,
    Aggregation.SUM: math.fsum,
    Aggregation.LAST: lambda values: values[-1],
}
Windows = dict[tuple[str, str], dict[int, list[float]]]


async def rolled_faults(
    engine: Engine, history: History, moment: Moment, aggregations: Iterable[Aggregation] = WORKED_OUT
) -> list[str]:
    """What is wrong with the roll-ups of a store that was cut off at a moment, in words."""
    wanted = {tier: _windows(history, engine.last_sequence, moment, tier) for tier in STEPS_MS}
    faults = []
    for aggregation in aggregations:
        for tier, (windows, unknown) in wanted.items():
            step_ms = STEPS_MS[tier]
            query = Query(metrics=None, start_ms=0, end_ms=1 << 62, step_ms=step_ms, aggregation=aggregation)
            difference = _difference(windows, unknown, await ask(engine, query), aggregation)
            if difference:
                faults.append(f"rolled up {step_ms // 60_000} min {aggregation.name}: {difference}")
    return faults


def _windows(history: History, end: int, moment: Moment, tier: int) -> tuple[Windows, set[int]]:
    """The values of each window in order of time, and the days of which nothing can be said."""
    evictions = [eviction for eviction in moment.evictions if eviction.tier == tier]
    gone = gone_through(eviction for eviction in evictions if eviction.done)
    begun = {day: through for day, through in gone_through(evictions).items() if through > gone.get(day, 0)}
    finer = [eviction for eviction in moment.evictions if eviction.tier == tier - 1]
    finer_gone = gone_through(finer).keys()  # of other days the finer tier answers when this one's are gone
    begun |= gone_through(
        eviction for eviction in finer if not eviction.done and not gone.keys().isdisjoint(eviction.days)
    )
    newest: dict[tuple[str, str], dict[int, float]] = {}
    for sequence, name, time, value in history.points(end):
        day = time // DAY_MS
        if sequence > gone.get(day, 0) or day not in finer_gone:
            newest.setdefault(name, {})[time] = value
    unknown, windows = history.excused | begun.keys(), Windows()
    for name, points in newest.items():
        for time, value in sorted(points.items()):
            label = time // STEPS_MS[tier] * STEPS_MS[tier]
            if label // DAY_MS not in unknown:
                windows.setdefault(name, {}).setdefault(label, []).append(value)
    return windows, unknown


def _difference(windows: Windows, unknown: set[int], found: Answer, aggregation: Aggregation) -> str:
    answers = {
        name: known
        for name, series in found.items()
        if (known := {label: value for label, value in series if label // DAY_MS not in unknown})
    }
    for name in windows.keys() | answers.keys():
        of_series, answer = windows.get(name, {}), answers.get(name, {})
        if missing := of_series.keys() - answer.keys():
            return f"missing: {len(missing)} windows of {name}, such as {min(missing)}"
        if more := answer.keys() - of_series.keys():
            return f"came back: {len(more)} windows of {name}, such as {min(more)}"
        for label, values in of_series.items():
            right = WORKED_OUT[aggregation](values)
            if not math.isclose(answer[label], right, rel_tol=1e-9 if aggregation is Aggregation.SUM else 0.0):
                return f"{name} at {label}: {answer[label]}, should be {right}"
    return ""
