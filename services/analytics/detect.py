"""Detectors: what turns rows into findings. The rest of the service knows only the protocol.

What must stay true of every detector:

* it is a function of the batches it was shown and of nothing else: its time is the tail's (when batches were
  journaled), no clock, no chance, so that a replay from saved state gives the same findings with the same ids;
* a row that comes again, in the same batch or another, changes nothing;
* what it keeps is bounded, and all of it is in `state`.

A batch is shown in three steps: `advance` to its time, `observe` its rows, part by part, and `settle`. Only `advance`
may take long; it says so before (`due`), and may then run in a thread while nothing else of the detector is called but
`name`, `learned`, `learned_of`, `is_partly_judged`, `about`, `foresight`, `unwatched_rows`, `untimely_rows` and
`columns_of`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fleet.anomaly import Anomaly
from fleet.model import MetricKind, MetricSet
from services.analytics.prediction.foresight import Foresight
from services.analytics.prediction.words import role_of
from services.analytics.scores import Scored
from services.analytics.scoring.arrays import Floats, Integers

Series = tuple[str, bool, int]
"""What makes a series of a server: the metric's key, whether it is a counter, and what it foretells
(`prediction.words.Role`): a disk that was told in percent and is told in bytes from now on is another series."""


@dataclass(frozen=True)
class SetColumns:
    """A metric set as detectors see it; not slotted, so that what is derived is derived once.

    Attributes:
        set_id: the set's id.
        series: of each column, gauges first, then counters.
        order: the columns of the set in that order.
        gauges: how many of them are gauges.
        roles: what each foretells, in the order of `series`.
    """

    set_id: str
    series: tuple[Series, ...]
    order: Integers
    gauges: int
    roles: NDArray[np.int8]

    @classmethod
    def of(cls, metric_set: MetricSet) -> "SetColumns":
        """The columns of a set."""
        is_counter = np.array([metric.kind is MetricKind.COUNTER for metric in metric_set.metrics], np.bool_)
        order = np.argsort(is_counter, kind="stable")
        roles = np.array([role_of(metric_set.metrics[column]) for column in order.tolist()], np.int8)
        series = tuple(
            (metric_set.keys[column], bool(is_counter[column]), role)
            for column, role in zip(order.tolist(), roles.tolist(), strict=True)
        )
        return cls(metric_set.id, series, order, len(series) - int(is_counter.sum()), roles)

    @cached_property
    def is_in_order(self) -> bool:
        """Whether gauges come first in the set itself."""
        return bool((self.order == np.arange(len(self.order))).all())

    def arranged(self, values: Floats) -> Floats:
        """Values of the set, shape (n, metrics), in the order of `series`."""
        return values if self.is_in_order else values[:, self.order]

    def __len__(self) -> int:
        return len(self.series)


NO_COLUMNS = SetColumns.of(MetricSet(()))
"""Of a batch without rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorState:
    """All that a detector knows, to be saved and handed back; the arrays are copies.

    Attributes:
        texts: names that the arrays refer to by their place.
        open_findings: as they were last told.
    """

    detector: str
    arrays: dict[str, NDArray[Any]]
    texts: dict[str, tuple[str, ...]]
    open_findings: tuple[Anomaly, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a detector is like now.

    Attributes:
        servers, series: how many are watched.
        partly_judged: servers of which some series, or all, are not, as they are beyond the bounds.
        state_bytes: of what is known of them.
        raised, lowered: servers whose level people's verdicts have moved.
    """

    servers: int
    series: int
    partly_judged: int
    state_bytes: int
    raised: int
    lowered: int


class Detector(Protocol):
    """Turns rows into findings; see the module for what must hold."""

    @property
    def name(self) -> str:
        """Whose state it is; at most 63 characters, never changed."""

    @property
    def learned(self) -> float:
        """How much is known of what must be known before servers are judged, 0 to 1; 0 while none is watched.

        Servers of which no series are watched do not count: of them nothing is learnt.
        """

    def learned_of(self, server_id: str) -> float:
        """The same of one server; 0 for one that is not watched, or none of its series."""

    def is_partly_judged(self, server_id: str) -> bool:
        """Whether some series of a server, or all, are beyond the bounds."""

    @property
    def foresight(self) -> Foresight | None:
        """What the last minute foretold of all servers; None before there was one."""

    @property
    def unwatched_rows(self) -> int:
        """Rows so far of servers or series beyond the bounds."""

    @property
    def untimely_rows(self) -> int:
        """Rows so far that came too late to be judged, or whose time lies ahead of the tail's."""

    def columns_of(self, metric_set: MetricSet) -> SetColumns:
        """What the detector wants to know of a set; handed back with each of its rows. Asked once a set."""

    def due(self, now_ms: int) -> int:
        """How many series `advance` would judge."""

    def advance(self, now_ms: int) -> list[Anomaly]:
        """Goes on to a time of the tail; returns findings that opened, grew or closed, as they are now."""

    def observe(
        self, columns: SetColumns, server_ids: Sequence[str], times_ms: Integers, values: Floats, now_ms: int
    ) -> list[Anomaly]:
        """Takes rows.

        Args:
            columns: what `columns_of` said of their set.
            server_ids: n servers, each at most once.
            times_ms: shape (n,).
            values: shape (n, metrics of the set); NaN means no value.
            now_ms: when they were journaled.

        Returns:
            As `advance`.
        """

    def settle(self, now_ms: int) -> list[Anomaly]:
        """Judges what depends on all rows of a batch; returns as `advance`."""

    def take_scores(self) -> list[Scored]:
        """The scores of the minutes that were judged since this was called last."""

    def about(self) -> About:
        """What it is like now; may be called while `advance` runs."""

    def judge(self, finding: Anomaly, *, is_real: bool) -> None:
        """Takes what people said of a finding, which may be anybody's: it moves what is found later."""

    def open_ids(self) -> set[str]:
        """The findings that go on."""

    def hears(self, server_id: str) -> bool:
        """Whether rows of a server come now."""

    def state(self) -> DetectorState:
        """All it knows; takes as long as copying it."""

    def restore(self, state: DetectorState) -> None:
        """Takes over what `state` returned; ValueError, and nothing changed, when it is not of this detector."""
