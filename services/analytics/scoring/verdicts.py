"""What people said of findings, as it moves what is found later.

    false   an incident as far from normal as that one is not found again on its server, and the metrics that had the
            most part in it weigh less there
    real    half of what earlier verdicts took away is given back; where nothing was, a little more is found

What must stay true: without verdicts nothing is scored differently; no verdict makes a server deaf for good.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from services.analytics.scoring.arrays import Columns, Floats, Integers, State

MARGIN: Final = 1.05
"""A finding that was false is missed by this much."""
LEAST_STEP: Final = 1.1
BARS: Final = (0.8, 4.0)
"""The level from which on there is a finding, in parts of the shipped one."""
WEIGHT_STEP: Final = 1.5
LEAST_WEIGHT: Final = 1.0 / 8.0


@dataclass(slots=True, eq=False)
class _Servers(Columns):
    bar: Floats

    SHAPES: ClassVar = {"bar": ((), np.float64, 1.0)}


@dataclass(slots=True, eq=False)
class _Series(Columns):
    weight: Floats

    SHAPES: ClassVar = {"weight": ((), np.float64, 1.0)}


class Verdicts:
    """The level of S servers and the weights of N series."""

    def __init__(self, servers: int, series: int) -> None:
        self._servers, self._series = _Servers.fresh(servers), _Series.fresh(series)

    @property
    def bars(self) -> Floats:
        """For each server the level of a finding, in parts of the shipped one."""
        return self._servers.bar

    @property
    def weights(self) -> Floats:
        """For each series by how much its departure counts."""
        return self._series.weight

    def false(self, server: int, series: Sequence[int], relative: float) -> None:
        """A finding of a server was false.

        Args:
            server: its place.
            series: places of the series that had the most part in it.
            relative: how far it was, in parts of the shipped level of a finding.
        """
        bar, weight = self._servers.bar, self._series.weight
        bar[server] = np.clip(max(LEAST_STEP * bar[server], MARGIN * relative), *BARS)
        weight[list(series)] = np.maximum(weight[list(series)] / WEIGHT_STEP, LEAST_WEIGHT)

    def real(self, server: int, series: Sequence[int]) -> None:
        """A finding of a server was real; as `false`."""
        bar, weight = self._servers.bar, self._series.weight
        less = (1.0 + bar[server]) / 2 if bar[server] > 1.0 else bar[server] / LEAST_STEP
        bar[server] = np.clip(less, *BARS)
        weight[list(series)] = (1.0 + weight[list(series)]) / 2

    def rearranged(self, servers: Integers, series: Integers) -> "Verdicts":
        """For each place the one that it had, -1 for a new one."""
        new = Verdicts(0, 0)
        new._servers, new._series = self._servers.rearranged(servers), self._series.rearranged(series)
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of state."""
        return self._servers.nbytes + self._series.nbytes

    def arrays(self) -> State:
        """All that is known."""
        return self._servers.arrays("verdicts.servers.") | self._series.arrays("verdicts.series.")

    def restore(self, arrays: State, servers: int, series: int) -> None:
        """Takes over what `arrays` gave; ValueError, and nothing changed, when it does not fit."""
        of_servers = _Servers.of_arrays(arrays, "verdicts.servers.", servers)
        self._series = _Series.of_arrays(arrays, "verdicts.series.", series)
        self._servers = of_servers
