"""Rows that are news, and the samples that a server has after them.

What must stay true: of each metric set there is one sample, the newest; a sample holds no batch in memory; a set that
its server has stopped reporting, while it reports others, goes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from fleet.model import MetricSet, Rows
from services.cache.merge import SAMPLE_LIFETIME_MS
from services.cache.model import AHEAD_MS, Sample, headline_of, order_of

MAX_SAMPLES_PER_SERVER: Final = 64
"""Metric sets that one server reports; the sample with the oldest time gives way."""
SAMPLE_LIFETIME_S: Final = SAMPLE_LIFETIME_MS / 1_000
_MAX_COVERINGS: Final = 1_024


@dataclass(frozen=True, slots=True)
class Arrival:
    """A row that is news: where it lies in its batch, and the headline metrics in it."""

    metric_set: MetricSet
    headline_columns: tuple[int, int, int]
    rows: Rows
    index: int
    time_ms: int

    def sample(self, now_ms: int, now_s: float) -> Sample:
        """What is kept of it."""
        # A copy (0.4 us for 511 values): a view would keep the whole batch alive for as long as one server is silent.
        values = self.rows.values[self.index].copy()
        return Sample(
            metric_set=self.metric_set,
            time_ms=self.time_ms,
            received_ms=now_ms,
            received_s=now_s,
            values=values,
            headline=headline_of(values, self.headline_columns),
        )


Arrivals = dict[str, dict[str, Arrival]]
"""By server id and metric set id."""


def is_newer(time_ms: int, known: Arrival | Sample, now_ms: int) -> bool:
    """Whether a row that comes now is news beside what is known of its set: a later one, or the first ones of a clock
    that was ahead and is set right. Where that was our own, what came by it has a time that nobody can vouch for."""
    if time_ms >= known.time_ms or isinstance(known, Arrival):
        return time_ms > known.time_ms
    if known.received_ms > now_ms + AHEAD_MS:
        return time_ms <= now_ms + AHEAD_MS
    return time_ms <= now_ms + AHEAD_MS and order_of(time_ms, now_ms) > known.order


class SampleMerger:
    """Joins arrivals with the samples before; remembers which sets hold all metrics of which."""

    def __init__(self) -> None:
        self._coverings: dict[tuple[str, str], bool] = {}

    def merged(
        self, samples: Iterable[Sample], arrivals: Mapping[str, Arrival], now_ms: int, now_s: float, max_values: int
    ) -> tuple[Sample, ...]:
        """The samples of one server after rows of some sets, the newest last; beside those rows the oldest give way
        where all have more than `max_values`."""
        kept = [
            sample
            for sample in samples
            if sample.set_id not in arrivals
            and now_s - sample.received_s < SAMPLE_LIFETIME_S
            and not (sample.restored and self._is_covered(sample, arrivals.values()))
        ]
        kept.extend(arrival.sample(now_ms, now_s) for arrival in arrivals.values())
        if len(kept) > 1:
            kept.sort(key=lambda sample: (sample.order, sample.received_s))
            kept = _within(kept, arrivals, max_values)
        return tuple(kept[-MAX_SAMPLES_PER_SERVER:])

    def _is_covered(self, sample: Sample, arrivals: Iterable[Arrival]) -> bool:
        """Whether a set that has arrived has all metrics of a restored sample, which is then of no more use."""
        for arrival in arrivals:
            pair = sample.metric_set.id, arrival.metric_set.id
            covers = self._coverings.get(pair)
            if covers is None:
                covers = set(arrival.metric_set.keys).issuperset(sample.metric_set.keys)
                if len(self._coverings) >= _MAX_COVERINGS:
                    self._coverings.clear()
                self._coverings[pair] = covers
            if covers:
                return True
        return False


def _within(samples: list[Sample], arrivals: Mapping[str, Arrival], max_values: int) -> list[Sample]:
    """Those for which there is room, in the same order."""
    over = sum(len(sample.values) for sample in samples) - max_values
    kept: list[Sample] = []
    for sample in samples:
        if over > 0 and sample.set_id not in arrivals:
            over -= len(sample.values)
        else:
            kept.append(sample)
    return kept
