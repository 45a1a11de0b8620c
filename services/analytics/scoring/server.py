"""A server's series become one score: how many of them depart at once, and how far.

The score of a server is the mean of the highest quarter of its series' departures, copies of one series counted once,
smoothed over two windows, against what is usual for that server. One series alone pages nobody; where a server has
only one, its score is the series' own, and rests after an alarm.

What must stay true: series that are constant, missing or still learning neither count nor hold the others down; the
order of a server's series changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

import numpy as np

from services.analytics.scoring import parameters as p
from services.analytics.scoring.arrays import Columns, Flags, Floats, Integers, State
from services.analytics.scoring.copies import Copies
from services.analytics.scoring.series import SeriesScorer, SeriesWindow
from services.analytics.scoring.threshold import Thresholds

TOP_SERIES: Final = 10
"""Series named with a server's finding."""


@dataclass(slots=True, eq=False)
class ServerState(Columns):
    """The newest windows of each server, row 0 the newest."""

    recent: Floats

    SHAPES: ClassVar[dict[str, tuple[tuple[int, ...], Any, float]]] = {
        "recent": ((len(p.SMOOTHING),), np.float64, 0.0),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerWindow:
    """One window of all servers; shape (S,) each.

    Attributes:
        score: 0 to 1; 0 while learning or without a value.
        raw: what the score was made of.
        alarm: whether `raw` is above the server's own level.
        level: that level; infinite while it is not known.
        is_finding: whether there is an alarm that is worth telling somebody.
        series: the window of all series.
    """

    score: Floats
    raw: Floats
    alarm: Flags
    level: Floats
    is_finding: Flags
    series: SeriesWindow


class FleetScorer:
    """Scores servers by their series, window by window."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """`sizes`: how many series each server has; a server's lie beside each other, in the order of the servers."""
        self._sizes = np.array(sizes, np.int64)
        self._starts = np.concatenate(([0], np.cumsum(self._sizes)))
        self.series = SeriesScorer(int(self._starts[-1]))
        self.copies = Copies(self._starts)
        self.thresholds = Thresholds(len(sizes))
        self.state = ServerState.fresh(len(sizes))
        self._table = _table(self._sizes, self._starts)

    def update(self, time_s: float, values: Floats) -> ServerWindow:
        """Judges and learns one window.

        Args:
            time_s: start of the window, seconds since the epoch, later than the one before.
            values: of all series; NaN is no value.
        """
        series = self.series.update(time_s, values)
        weights = self.copies.update(time_s, self.series.step_s, series.departure, series.counts)
        raw, judged = self._raw(series, np.where(series.counts, weights, 0.0))
        level, usual = self.thresholds.levels(), self.thresholds.usual()
        alarm = self.thresholds.update(time_s, self.series.step_s, raw, judged)
        relative = raw / (p.SERVER_ALARM ** (1.0 - p.OWN_SHARE) * usual**p.OWN_SHARE)
        score = np.where(judged, relative / (1.0 + relative), 0.0)
        alone = np.flatnonzero(self._sizes == 1)
        score[alone] = series.rested[self._starts[alone]]
        return ServerWindow(
            score=score, raw=raw, alarm=alarm, level=level, is_finding=alarm & (raw >= p.FINDING_LEVEL), series=series
        )

    def _raw(self, series: SeriesWindow, weights: Floats) -> tuple[Floats, Flags]:
        departures, weight = np.append(series.departure, 0.0)[self._table], np.append(weights, 0.0)[self._table]
        order = np.argsort(-departures, axis=1, kind="stable")
        departures, weight = np.take_along_axis(departures, order, 1), np.take_along_axis(weight, order, 1)
        before = np.cumsum(weight, axis=1) - weight
        total = weight.sum(axis=1)
        wanted = np.maximum(np.ceil(total * p.TOP_SHARE - 1e-6), 1.0)
        taken = np.clip(wanted[:, None] - before, 0.0, weight)
        judged = total > 0
        mean = (departures * taken).sum(axis=1) / np.where(judged, np.minimum(wanted, total), 1.0)
        recent = self.state.recent
        recent[1:] = np.where(judged, recent[:-1], recent[1:])
        recent[0] = np.where(judged, mean, recent[0])
        raw = np.where(judged, np.array(p.SMOOTHING) @ recent, 0.0)
        alone = np.flatnonzero(self._sizes == 1)
        raw[alone] = series.views[self._starts[alone]]
        return raw, judged

    def contributors(self, window: ServerWindow, server: int, count: int = TOP_SERIES) -> list[int]:
        """The server's series that departed furthest in a window, furthest first, by their place in the server."""
        part = slice(int(self._starts[server]), int(self._starts[server + 1]))
        departure = window.series.departure[part]
        order = np.argsort(-departure, kind="stable")[:count]
        return [int(place) for place in order if departure[place] > 0]

    def learned(self) -> Floats:
        """How much of what must be known before judging is known of each server, 0 to 1: the mean of its series."""
        seen = self.series.state.count > 0
        shares = np.append(np.where(seen, self.series.learned(), 0.0), 0.0)[self._table].sum(axis=1)
        known: Floats = shares / np.maximum(np.append(seen, False)[self._table].sum(axis=1), 1)
        return known

    def rearranged(self, sizes: Sequence[int], servers: Integers, series: Integers) -> Self:
        """This scorer for other servers or series.

        Args:
            sizes: of the servers, as to begin with.
            servers: for each of them its place in this scorer, -1 for a new one.
            series: for each of their series its place in this scorer, -1 for a new one.
        """
        new = type(self)(sizes)
        new.series.restore(self.series.arrays(), len(self.series))
        new.series.state = self.series.state.rearranged(series)
        new.copies.state = self.copies.state.rearranged(series)
        new.thresholds.restore(self.thresholds.arrays(), len(self._sizes))
        new.thresholds.state = self.thresholds.state.rearranged(servers)
        new.state = self.state.rearranged(servers)
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of state."""
        return self.series.state.nbytes + self.copies.state.nbytes + self.thresholds.state.nbytes + self.state.nbytes

    def arrays(self) -> State:
        """All that is known, to be saved."""
        return {
            "sizes": self._sizes.copy(),
            **self.series.arrays(),
            **self.copies.arrays(),
            **self.thresholds.arrays(),
            **self.state.arrays("server."),
        }

    @classmethod
    def of_arrays(cls, arrays: State) -> Self:
        """The scorer that `arrays` gave; goes on with equal scores.

        Raises:
            ValueError: the arrays are not those of a scorer.
        """
        sizes = arrays.get("sizes")
        if sizes is None or sizes.dtype != np.int64 or sizes.ndim != 1 or (sizes < 0).any():
            raise ValueError("the array sizes is not one of counts")
        scorer = cls([int(size) for size in sizes])
        scorer.series.restore(arrays, int(sizes.sum()))
        scorer.copies.restore(arrays)
        scorer.thresholds.restore(arrays, len(sizes))
        scorer.state = ServerState.of_arrays(arrays, "server.", len(sizes))
        return scorer


def _table(sizes: Integers, starts: Integers) -> Integers:
    """For each server the places of its series, filled up with the place behind the last."""
    widest = int(sizes.max(initial=1))
    places = starts[:-1, None] + np.arange(widest)
    table: Integers = np.where(np.arange(widest) < sizes[:, None], places, starts[-1])
    return table
