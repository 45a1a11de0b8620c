"""The four kinds of reasons together, minute by minute.

What must stay true: a restart goes on with what `arrays` gave as if it had not been; servers and series get their place
when the scorer's do, but for the falls, which are heard before that.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from services.analytics.prediction import parameters as p
from services.analytics.prediction.climbs import Climbs
from services.analytics.prediction.foresight import Foresight, Layout
from services.analytics.prediction.symptoms import Symptoms, SymptomState
from services.analytics.prediction.words import Role
from services.analytics.scoring.arrays import Floats, Integers, State
from services.analytics.scoring.server import ServerWindow

_MINUTE_MS = 60_000


def layout_of(server_ids: Sequence[str], owners: Integers, roles: NDArray[np.int8], names: Sequence[str]) -> Layout:
    """Where everything is.

    Args:
        server_ids: of S servers.
        owners: the server of each series, shape (N,), ascending.
        roles: what each series foretells (`Role`), shape (N,).
        names: of the series.
    """
    resources, errors = np.flatnonzero(roles == Role.RESOURCE), np.flatnonzero(roles == Role.ERRORS)
    return Layout(
        server_ids=tuple(server_ids),
        places={server_id: place for place, server_id in enumerate(server_ids)},
        resources=resources,
        resource_owners=owners[resources],
        resource_names=tuple(names[place] for place in resources.tolist()),
        errors=errors,
        error_owners=owners[errors],
        error_names=tuple(names[place] for place in errors.tolist()),
    )


class Predictor:
    """Predicts the failures of the servers of a layout."""

    def __init__(self, layout: Layout, climbs: Climbs | None = None, symptoms: Symptoms | None = None) -> None:
        self.layout = layout
        self._climbs = climbs or Climbs.fresh(len(layout.resources))
        self._symptoms = symptoms or Symptoms(SymptomState.fresh(len(layout.server_ids)))

    def update(
        self, start_ms: int, values: Floats, usual_high: Floats, window: ServerWindow, falls: Floats
    ) -> Foresight:
        """Takes one minute.

        Args:
            start_ms: its beginning.
            values: of all series, shape (N,); counters as rates a second, NaN is no value.
            usual_high: the highest that was usual then, shape (N,).
            window: what the scorer said of it.
            falls: how often each server fell silent lately, shape (S,).
        """
        layout, errors = self.layout, self.layout.errors
        climbs = self._climbs.update(start_ms // _MINUTE_MS, values[layout.resources])
        rates, usual_rates, counts = values[errors], usual_high[errors], window.series.counts[errors]
        departures = window.series.departure[errors]
        growing = (rates > usual_rates) & (departures >= p.GROWING)
        abnormal = window.raw >= p.ABNORMAL
        symptoms = self._symptoms.update(abnormal, window.judged, layout.error_owners, growing, counts)
        flapping = np.interp(falls, *p.FALLS)
        saturation = np.zeros(len(layout.server_ids))
        np.maximum.at(saturation, layout.resource_owners, climbs.probability)
        spared = (1.0 - saturation) * (1.0 - flapping) * (1.0 - symptoms.anomalies) * (1.0 - symptoms.errors)
        return Foresight(
            end_ms=start_ms + _MINUTE_MS,
            layout=layout,
            probability=1.0 - spared,
            saturation=saturation,
            climbs=climbs,
            symptoms=symptoms,
            falls=falls,
            flapping=flapping,
            rates=rates,
            usual_rates=usual_rates,
            departures=departures,
        )

    def rearranged(self, layout: Layout, servers: Integers, series: Integers) -> Self:
        """This for other servers or series.

        Args:
            layout: where they are.
            servers: for each of them its place in this, -1 for a new one.
            series: for each of their series its place in this, -1 for a new one.
        """
        own = np.full(int(series.max(initial=-1)) + 2, -1)  # the last is that of new ones
        known = self.layout.resources[self.layout.resources < len(own) - 1]
        own[known] = np.arange(len(known))
        return type(self)(
            layout,
            self._climbs.rearranged(own[series[layout.resources]]),
            Symptoms(self._symptoms.state.rearranged(servers)),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of state."""
        return self._climbs.state.nbytes + self._symptoms.state.nbytes

    def arrays(self) -> State:
        """All that is known; copies."""
        return self._climbs.arrays() | self._symptoms.arrays()

    @classmethod
    def of_arrays(cls, layout: Layout, arrays: State) -> Self:
        """The predictor that `arrays` gave; ValueError when it does not fit the layout."""
        symptoms = Symptoms(SymptomState.of_arrays(arrays, "symptoms.", len(layout.server_ids)))
        return cls(layout, Climbs.of_arrays(arrays, len(layout.resources)), symptoms)
