"""What one minute foretells of all servers, kept as arrays and made into words for those that are asked about.

What must stay true: nothing in it changes any more, so that it can be read while the next minute is judged; the shares
of a prediction's reasons are 1 together; what is listed is in order of probability, then of ids.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Self

import numpy as np

from fleet.anomaly import Contribution
from services.analytics.prediction import parameters as p
from services.analytics.prediction.climbs import ClimbWindow
from services.analytics.prediction.symptoms import SymptomWindow
from services.analytics.scoring.arrays import Floats, Integers

MAX_RESOURCES: Final = 5
"""Resources that are named with one server, the likeliest."""
MAX_MINUTES: Final = 10 * p.HORIZON_MINUTES
"""No date that is further away is given."""
HORIZON_MS: Final = p.HORIZON_MINUTES * 60_000
_LEAST: Final = 1e-9


class Kind(Enum):
    """What foretells; the values are the names in the proto, less their prefix."""

    ANOMALY_DENSITY = "ANOMALY_DENSITY"
    SATURATION = "SATURATION"
    FLAPPING = "FLAPPING"
    ERRORS = "ERRORS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """One reason; None where it has no such number.

    Attributes:
        metric: the resource, or the counter of errors that is furthest from usual; empty for other kinds.
        value: percent; errors a second; the abnormal part of the last minutes; falls lately.
        limit: percent; the highest usual rate; the abnormal part of the hours before.
        slope_per_hour: percent.
        date_ms: when the limit is reached, milliseconds since the epoch.
        probability: of failing for this reason alone.
        share: its part in the prediction.
    """

    kind: Kind
    metric: str = ""
    value: float
    limit: float | None = None
    slope_per_hour: float | None = None
    date_ms: int | None = None
    probability: float
    share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How likely a server is to fail within `HORIZON_MS`.

    Attributes:
        date_ms, low_ms, high_ms: when the likeliest resource comes to its limit, and the 80 % interval; None where none
            does, `high_ms` also where it may never be.
        reasons: weightiest first.
        computed_ms: the end of the minute that it was made of.
    """

    server_id: str
    probability: float
    date_ms: int | None
    low_ms: int | None
    high_ms: int | None
    reasons: tuple[Reason, ...]
    computed_ms: int


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where everything is: the servers; of their resources and counters of errors the place among all series, the
    server, in order, and the name."""

    server_ids: tuple[str, ...]
    places: dict[str, int]
    resources: Integers
    resource_owners: Integers
    resource_names: tuple[str, ...]
    errors: Integers
    error_owners: Integers
    error_names: tuple[str, ...]

    @classmethod
    def empty(cls) -> Self:
        """Of no servers."""
        nothing: Integers = np.zeros(0, np.int64)
        return cls((), {}, nothing, nothing, (), nothing, nothing, ())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Foresight:
    """What a minute foretells.

    Attributes:
        end_ms: the end of the minute.
        probability: of each server, shape (S,).
        saturation: that for a resource alone: of the likeliest one, as several names of one disk are no independent
            signs.
        climbs: of the resources.
        symptoms: of the servers.
        falls, flapping: how often each server fell lately, and the probability for that alone.
        rates, usual_rates, departures: of the counters of errors, the last as `scoring.series` has it.
    """

    end_ms: int
    layout: Layout
    probability: Floats
    saturation: Floats
    climbs: ClimbWindow
    symptoms: SymptomWindow
    falls: Floats
    flapping: Floats
    rates: Floats
    usual_rates: Floats
    departures: Floats

    def of(self, server_ids: Iterable[str], least: float = 0.0) -> tuple[list[Prediction], int]:
        """The predictions of those servers that are watched and at least so likely to fail, in order, and how many of
        them are watched."""
        probability, places = self.probability, self.layout.places
        known = [(server_id, places[server_id]) for server_id in dict.fromkeys(server_ids) if server_id in places]
        wanted = sorted(
            (-float(probability[place]), server_id, place) for server_id, place in known if probability[place] >= least
        )
        return [self.prediction(place) for _, _, place in wanted], len(known)

    def prediction(self, server: int) -> Prediction:
        """That of one server, by its place."""
        resources = self._resources_of(server)
        named = [*self._saturating(resources), *self._errors(server)]
        reasons = [*(reason for reason, _ in named), *self._others(server)]
        date_ms = low_ms = high_ms = None
        if resources and self._date_ms(float(self.climbs.minutes[resources[0]])) is not None:
            date_ms, low_ms, high_ms = (
                self._date_ms(float(minutes[resources[0]]))
                for minutes in (self.climbs.minutes, self.climbs.soonest, self.climbs.latest)
            )
        return Prediction(
            server_id=self.layout.server_ids[server],
            probability=float(self.probability[server]),
            date_ms=date_ms,
            low_ms=low_ms,
            high_ms=high_ms,
            reasons=_shared(reasons),
            computed_ms=self.end_ms,
        )

    def contributions(self, server: int, low: Floats, high: Floats) -> tuple[Contribution, ...]:
        """The metrics that foretell it, as a finding names them.

        Args:
            server: its place.
            low, high: what was expected of all series, shape (N,).
        """
        named = [*self._saturating(self._resources_of(server)), *self._errors(server)]
        reasons = sorted(named, key=lambda pair: -pair[0].probability)
        return tuple(
            Contribution(
                metric=reason.metric,
                value=reason.value,
                expected_low=float(low[series]),
                expected_high=float(high[series]),
                score=reason.probability,
            )
            for reason, series in reasons
        )

    def _resources_of(self, server: int) -> list[int]:
        """The likeliest resources of a server, by their place."""
        owners = self.layout.resource_owners
        first, end = np.searchsorted(owners, [server, server + 1])
        order = np.argsort(-self.climbs.probability[first:end], kind="stable")[:MAX_RESOURCES]
        return [int(first) + int(place) for place in order]

    def _saturating(self, resources: list[int]) -> Iterator[tuple[Reason, int]]:
        """A reason for each, and its place among all series."""
        climbs = self.climbs
        for place in resources:
            if climbs.probability[place] > 0:
                slope = float(climbs.slope[place])
                reason = Reason(
                    kind=Kind.SATURATION,
                    metric=self.layout.resource_names[place],
                    value=float(climbs.value[place]),
                    limit=p.LIMIT,
                    slope_per_hour=60.0 * slope if math.isfinite(slope) else None,
                    date_ms=self._date_ms(float(climbs.minutes[place])),
                    probability=float(climbs.probability[place]),
                )
                yield reason, int(self.layout.resources[place])

    def _errors(self, server: int) -> Iterator[tuple[Reason, int]]:
        """The counter that is furthest above what is usual, and its place among all series; none where none is."""
        first, end = np.searchsorted(self.layout.error_owners, [server, server + 1])
        part = slice(int(first), int(end))
        growing = self.rates[part] > self.usual_rates[part]
        if self.symptoms.errors[server] > 0 and growing.any():
            place = int(first) + int(np.argmax(np.where(growing, self.departures[part], -1.0)))
            reason = Reason(
                kind=Kind.ERRORS,
                metric=self.layout.error_names[place],
                value=float(self.rates[place]),
                limit=float(self.usual_rates[place]),
                probability=float(self.symptoms.errors[server]),
            )
            yield reason, int(self.layout.errors[place])

    def _others(self, server: int) -> Iterator[Reason]:
        """The reasons without a metric."""
        symptoms = self.symptoms
        if symptoms.anomalies[server] > 0:
            yield Reason(
                kind=Kind.ANOMALY_DENSITY,
                value=float(symptoms.lately[server]),
                limit=float(symptoms.before[server]),
                probability=float(symptoms.anomalies[server]),
            )
        if self.flapping[server] > 0:
            yield Reason(kind=Kind.FLAPPING, value=float(self.falls[server]), probability=float(self.flapping[server]))

    def _date_ms(self, minutes: float) -> int | None:
        return self.end_ms + round(minutes * 60_000) if minutes <= MAX_MINUTES else None


def _shared(reasons: list[Reason]) -> tuple[Reason, ...]:
    """The reasons with their shares, weightiest first: independent signs weigh as the logarithm of what they spare; the
    resources weigh together as the likeliest of them."""
    weights = [-math.log(max(1.0 - reason.probability, _LEAST)) for reason in reasons]
    full = [weight for weight, reason in zip(weights, reasons, strict=True) if reason.kind is Kind.SATURATION]
    shrink = max(full) / sum(full) if full else 1.0
    weights = [
        weight * (shrink if reason.kind is Kind.SATURATION else 1.0)
        for weight, reason in zip(weights, reasons, strict=True)
    ]
    whole = sum(weights)
    order = sorted(range(len(reasons)), key=lambda place: -weights[place])
    return tuple(replace(reasons[place], share=weights[place] / whole) for place in order)
