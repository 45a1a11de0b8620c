"""The metric sets that rows may name by id.

What must stay true: forgetting a set loses nothing, since every sample holds its own and a sender that names a
forgotten one is told METRIC_SET_UNKNOWN and sends it again; so the bounds may be reached at any time.
"""

from collections import OrderedDict

from fleet.model import MetricSet
from services.cache.model import headline_columns

MAX_METRIC_SETS = 4_096
MAX_SET_METRICS_TOTAL = 2_000_000
"""Metrics of all known sets together, about 400 bytes each."""


class MetricSets:
    """Known sets by id, the one used longest ago first."""

    def __init__(self, max_sets: int = MAX_METRIC_SETS, max_metrics: int = MAX_SET_METRICS_TOTAL) -> None:
        self._max_sets = max_sets
        self._max_metrics = max_metrics
        self._sets: OrderedDict[str, tuple[MetricSet, tuple[int, int, int]]] = OrderedDict()
        self._metrics = 0

    def get(self, set_id: str) -> MetricSet | None:
        """A known set, or None. Using it keeps it."""
        known = self._sets.get(set_id)
        if known is None:
            return None
        self._sets.move_to_end(set_id)
        return known[0]

    def add(self, metric_set: MetricSet) -> None:
        """Learns a set; beyond a bound, those used longest ago are forgotten, but never this one."""
        if self.get(metric_set.id) is not None:
            return
        self._sets[metric_set.id] = metric_set, headline_columns(metric_set)
        self._metrics += len(metric_set)
        while len(self._sets) > 1 and (len(self._sets) > self._max_sets or self._metrics > self._max_metrics):
            _, (dropped, _) = self._sets.popitem(last=False)
            self._metrics -= len(dropped)

    def headline_columns(self, metric_set: MetricSet) -> tuple[int, int, int]:
        """Where the set has the headline metrics."""
        known = self._sets.get(metric_set.id)
        return headline_columns(metric_set) if known is None else known[1]

    def __len__(self) -> int:
        return len(self._sets)
