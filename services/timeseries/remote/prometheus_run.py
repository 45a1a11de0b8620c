"""One query of a remote store as it runs: what is wanted, and how much there was of it so far."""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fleet.model import Metric, MetricKind
from runtime.errors import InvalidArgument
from services.timeseries.engine.aggregate import Aggregation, Windows, lookback_ms
from services.timeseries.engine.query import Query
from services.timeseries.engine.settings import MIN_TIME_MS
from services.timeseries.prometheus.labels import name_of
from services.timeseries.remote.prometheus_answers import Found, Points
from services.timeseries.remote.promql import Part


@dataclass(slots=True)
class Run:
    """One query as it runs. `selectors` are the wanted keys and names, None for all; `closed_left` says whether a range
    of the store includes its left edge."""

    query: Query
    metrics: Mapping[str, Metric]
    start_ms: int
    end_ms: int
    selectors: frozenset[str] | None
    cancel: threading.Event = field(default_factory=threading.Event)
    closed_left: bool = False
    read: int = 0
    returned: int = 0
    series: int = 0

    @property
    def read_from_ms(self) -> int:
        """Where points are read back from."""
        return max(MIN_TIME_MS, self.start_ms - lookback_ms(self.query.aggregation, self.query.step_ms))

    def width(self, part: Part) -> int:
        """The range to ask for so that it is a window of the part."""
        return max(1, part.width_ms - 1) if self.closed_left else part.width_ms

    def wants(self, found: Found) -> bool:
        if self.selectors is None:
            return True
        return not self.selectors.isdisjoint((found.identity[1], name_of(found.labels)))


def windowed(run: Run, found: Mapping[tuple[str, str], Points]) -> dict[tuple[str, str], Points]:
    """The engine's windows of points."""
    windows = Windows(run.start_ms, run.query.step_ms, run.query.aggregation)
    return {identity: windows.of(times, values) for identity, (times, values) in found.items()}


def check_rate(run: Run, keys: Iterable[str]) -> None:
    """Refuses RATE of what is known to be no counter, as the engine does."""
    if run.query.aggregation is Aggregation.RATE and run.query.step_ms:
        for key in keys:
            metric = run.metrics.get(key)
            if metric is not None and metric.kind is MetricKind.GAUGE:
                raise InvalidArgument(f"RATE wants a counter, {key} is a gauge", field="aggregation")
