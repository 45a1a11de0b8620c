"""The oracle of a store that was cut off: from all that it was told, what it must hold and what it may hold.

Batches are journaled in the order in which the writer takes them, each with the next sequence, so whatever was lost is
the end of that order: a store that ends at sequence `k` holds exactly the first `k` batches, less the days that went.
Of a day that was just going when the store was cut off, either all rows up to the eviction's sequence are there, or
none. What roll-ups must say is in rolled.py.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fleet.model import MetricSet, Rows
from services.timeseries.engine import EngineStatus
from tests.timeseries.engine.model import Answer

DAY_MS = 86_400_000


@dataclass(slots=True)
class Eviction:
    """What a tier holds of the rows of some days up to a sequence goes; `done` once that is durable for certain.

    A file of roll-ups that was going is not looked for at the next start: while it is not `done`, its days may hold
    anything, until age or the limit takes them again.
    """

    days: range
    through: int
    tier: int = 0
    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What was certain, and what had begun, when the store was cut off."""

    acknowledged: int
    sent: int
    evictions: tuple[Eviction, ...]


@dataclass(slots=True, kw_only=True)
class History:
    """All batches in order; the one with sequence `s` is `sent[s - 1]`."""

    sent: list[tuple[MetricSet, Rows]] = field(default_factory=list)
    acknowledged: int = 0
    evictions: list[Eviction] = field(default_factory=list)
    excused: set[int] = field(default_factory=set)
    """Days that the disk's limit took, as the engine said, without all of their roll-ups."""
    re_sent: bool = False
    """Whether points were sent more than once: a store may keep both, so that they cannot be counted."""

    def moment(self, certain: "Moment | None" = None) -> Moment:
        """Now. A cut that takes a while has two ends: what is `certain` was so at its beginning."""
        return Moment(
            acknowledged=self.acknowledged if certain is None else certain.acknowledged,
            sent=len(self.sent),
            evictions=tuple(
                dataclasses.replace(eviction, done=eviction.done and (certain is None or eviction in certain.evictions))
                for eviction in self.evictions
            ),
        )

    def faults(self, found: Answer, status: EngineStatus, moment: Moment) -> list[str]:
        """What is wrong with the points of a store that was cut off at a moment, in words; nothing when all is well."""
        end = status.last_sequence
        faults = []
        if status.damaged:
            faults.append(f"{status.damaged} damaged, the last: {status.last_error}")
        if end < moment.acknowledged:
            faults.append(
                f"acknowledged batches are missing: it ends at {end}, acknowledged were {moment.acknowledged}"
            )
        if end > moment.sent:
            return [*faults, f"it ends at {end}, but only {moment.sent} batches were sent"]
        different = [self._difference(found, status.points, end, gone) for gone in _possible(moment.evictions)]
        if all(different):
            faults.append(min(different, key=len))
        return faults

    def settle(self, found: Answer, status: EngineStatus, moment: Moment) -> None:
        """Takes what a store without faults holds as the truth from here on: it is the one that lives on."""
        del self.sent[status.last_sequence :]
        self.acknowledged = status.last_sequence
        for gone in _possible(moment.evictions):
            if not self._difference(found, status.points, status.last_sequence, gone):
                of_points = [Eviction(range(day, day + 1), through, done=True) for day, through in gone.items()]
                self.evictions = of_points + [eviction for eviction in moment.evictions if eviction.tier]
                return
        raise AssertionError("it has faults")

    def _difference(self, found: Answer, points: int, end: int, gone: Mapping[int, int]) -> str:
        wanted, stored = self._points(end, gone)
        if missing := _minus(wanted, found):
            return f"missing: {len(missing)} points, such as {missing[0]}; it ends at {end}"
        if more := _minus(found, wanted):
            return f"came back or never sent: {len(more)} points, such as {more[0]}"
        if any(_series(wanted[name]) != series for name, series in found.items()):
            return "values differ, or their order"
        if points > stored or (points < stored and not self.re_sent):
            return f"there twice: {points} points are stored of {stored}"
        return ""

    def _points(self, end: int, gone: Mapping[int, int]) -> tuple[dict[tuple[str, str], dict[int, float]], int]:
        """The newest value of each point, and how many points were sent."""
        wanted: dict[tuple[str, str], dict[int, float]] = {}
        stored = 0
        for sequence, name, time, value in self.points(end):
            if sequence > gone.get(time // DAY_MS, 0):
                wanted.setdefault(name, {})[time] = value
                stored += 1
        return wanted, stored

    def points(self, end: int) -> Iterator[tuple[int, tuple[str, str], int, float]]:
        """(sequence, series, time, value) of all points that were taken up to a sequence, in its order."""
        for sequence, (of_set, batch) in enumerate(self.sent[:end], 1):
            for server, time, values in rows_of(batch):
                for key, value in zip(of_set.keys, values, strict=True):
                    if not math.isnan(value):
                        yield sequence, (server, key), time, value


def rows_of(batch: Rows) -> Iterator[tuple[str, int, list[float]]]:
    """(server, time, values) of each row."""
    return zip(batch.server_ids, batch.times_ms.tolist(), batch.values.tolist(), strict=True)


def gone_through(evictions: Iterable[Eviction]) -> dict[int, int]:
    """Up to which sequence the rows of each day are gone."""
    gone: dict[int, int] = {}
    for eviction in evictions:
        for day in eviction.days:
            gone[day] = max(gone.get(day, 0), eviction.through)
    return gone


def _possible(evictions: Sequence[Eviction]) -> Iterator[dict[int, int]]:
    """For each outcome of the evictions of points that were under way: what is gone."""
    certain = [eviction for eviction in evictions if eviction.done and not eviction.tier]
    begun = [eviction for eviction in evictions if not eviction.done and not eviction.tier]
    for count in range(len(begun) + 1):
        for happened in itertools.combinations(begun, count):
            yield gone_through((*certain, *happened))


Times = Mapping[tuple[str, str], Iterable[int] | Sequence[tuple[int, float]]]


def _series(points: Mapping[int, float]) -> list[tuple[int, float]]:
    return sorted(points.items())


def _minus(some: Times, others: Times) -> list[tuple[str, str, int]]:
    """The points of `some` that `others` lack."""

    def times(of: Times, name: tuple[str, str]) -> set[int]:
        return {point if isinstance(point, int) else point[0] for point in of.get(name, ())}

    return [(*name, time) for name in some for time in sorted(times(some, name) - times(others, name))]
