"""A server's series become one score: how many of them depart at once, and how far.

The score of a server is the mean of the highest quarter of its series' departures, copies of one series counted once,
smoothed over two windows, against what is usual for that server. One series alone pages nobody; where a server has
only one, its score is the series' own, and rests after an alarm.

What must stay true: series that are constant, missing or still learning neither count nor hold the others down; the
order of a server's series changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Self

import numpy as np

from services.analytics.scoring import parameters as p
from services.analytics.scoring.arrays import Columns, Flags, Floats, Integers, State
from services.analytics.scoring.copies import Copies
from services.analytics.scoring.series import SeriesScorer, SeriesWindow
from services.analytics.scoring.threshold import Thresholds
from services.analytics.scoring.verdicts import Verdicts

TOP_SERIES: Final = 10
"""Series named with a server's finding."""
_TOGETHER: Final = 64
"""Servers of at most so many series, or twice as many and so on, are judged in one table."""


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
        judged: whether there was anything to judge it by.
        series: the window of all series.
    """

    score: Floats
    raw: Floats
    alarm: Flags
    level: Floats
    is_finding: Flags
    judged: Flags
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
        self.verdicts = Verdicts(len(sizes), len(self.series))
        self.state = ServerState.fresh(len(sizes))
        self._groups = _groups(self._sizes)

    def update(self, time_s: float, values: Floats) -> ServerWindow:
        """Judges and learns one window.

        Args:
            time_s: start of the window, seconds since the epoch, later than the one before.
            values: of all series; NaN is no value.
        """
        series = self.series.update(time_s, values)
        series = replace(series, departure=series.departure * self.verdicts.weights)
        weights = self.copies.update(time_s, self.series.step_s, series.departure, series.counts)
        raw, judged = self._raw(series, np.where(series.counts, weights, 0.0))
        level, usual = self.thresholds.levels(), self.thresholds.usual()
        alarm = self.thresholds.update(time_s, self.series.step_s, raw, judged)
        relative = raw / _middle(usual)
        score = np.where(judged, relative / (1.0 + relative), 0.0)
        alone = np.flatnonzero(self._sizes == 1)
        score[alone] = series.rested[self._starts[alone]]
        return ServerWindow(
            score=score,
            raw=raw,
            alarm=alarm,
            level=level,
            is_finding=alarm & (raw >= p.FINDING_LEVEL * self.verdicts.bars),
            judged=judged,
            series=series,
        )

    def _raw(self, series: SeriesWindow, weights: Floats) -> tuple[Floats, Flags]:
        mean, total = np.zeros(len(self._sizes)), np.zeros(len(self._sizes))
        for servers in self._groups:
            table = _table(self._sizes[servers], self._starts[servers], len(series.departure))
            mean[servers], total[servers] = _top(
                np.append(series.departure, 0.0)[table], np.append(weights, 0.0)[table]
            )
        judged = total > 0
        recent = self.state.recent
        recent[1:] = np.where(judged, recent[:-1], recent[1:])
        recent[0] = np.where(judged, mean, recent[0])
        raw = np.where(judged, np.array(p.SMOOTHING) @ recent, 0.0)
        alone = np.flatnonzero(self._sizes == 1)
        raw[alone] = series.views[self._starts[alone]]
        return raw, judged

    @property
    def starts(self) -> Integers:
        """The first series of each server, and behind the last."""
        return self._starts

    def judge(self, server: int, score: float, series: Sequence[int], *, is_real: bool) -> None:
        """Takes what people said of a finding of a server.

        Args:
            server: its place.
            score: the finding's.
            series: places of the series that had the most part in it.
            is_real: whether something was wrong.
        """
        if is_real:
            self.verdicts.real(server, series)
            return
        raw = score / max(1.0 - score, 1e-9) * float(_middle(self.thresholds.usual()[server]))
        self.verdicts.false(server, series, raw / p.FINDING_LEVEL)

    def contributors(self, window: ServerWindow, server: int, count: int = TOP_SERIES) -> list[int]:
        """The server's series that departed furthest in a window, furthest first, by their place in the server."""
        part = slice(int(self._starts[server]), int(self._starts[server + 1]))
        departure = window.series.departure[part]
        order = np.argsort(-departure, kind="stable")[:count]
        return [int(place) for place in order if departure[place] > 0]

    def learned(self) -> Floats:
        """How much of what must be known before judging is known of each server, 0 to 1: the mean of its series."""
        seen = self.series.state.count > 0
        owners, count = np.repeat(np.arange(len(self._sizes)), self._sizes)[seen], len(self._sizes)
        shares = np.bincount(owners, self.series.learned()[seen], minlength=count)
        known: Floats = shares / np.maximum(np.bincount(owners, minlength=count), 1)
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
        new.verdicts = self.verdicts.rearranged(servers, series)
        new.state = self.state.rearranged(servers)
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of state."""
        parts = (self.series.state, self.copies.state, self.thresholds.state, self.verdicts, self.state)
        return sum(part.nbytes for part in parts)

    def arrays(self) -> State:
        """All that is known, to be saved."""
        return {
            "sizes": self._sizes.copy(),
            **self.series.arrays(),
            **self.copies.arrays(),
            **self.thresholds.arrays(),
            **self.verdicts.arrays(),
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
        scorer.verdicts.restore(arrays, len(sizes), int(sizes.sum()))
        scorer.state = ServerState.of_arrays(arrays, "server.", len(sizes))
        return scorer


def _middle(usual: Any) -> Any:
    """The `raw` that is a score of .5, by what is usual of a server."""
    return p.SERVER_ALARM ** (1.0 - p.OWN_SHARE) * usual**p.OWN_SHARE


def _groups(sizes: Integers) -> list[Integers]:
    """Servers of about as many series each, so that one with thousands does not make the tables of all as wide."""
    kinds = np.ceil(np.log2(np.maximum(sizes, 1) / _TOGETHER)).clip(0)
    return [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]


def _table(sizes: Integers, starts: Integers, end: int) -> Integers:
    """For each server the places of its series, filled up with the place `end`."""
    places = starts[:, None] + np.arange(int(sizes.max(initial=1)))
    table: Integers = np.where(places < (starts + sizes)[:, None], places, end)
    return table


def _top(departures: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """The weighted mean of each row's highest part, and the sum of its weights."""
    order = np.argsort(-departures, axis=1, kind="stable")
    departures, weights = np.take_along_axis(departures, order, 1), np.take_along_axis(weights, order, 1)
    before = np.cumsum(weights, axis=1) - weights
    total = weights.sum(axis=1)
    wanted = np.maximum(np.ceil(total * p.TOP_SHARE - 1e-6), 1.0)
    taken = np.clip(wanted[:, None] - before, 0.0, weights)
    mean: Floats = (departures * taken).sum(axis=1) / np.where(total > 0, np.minimum(wanted, total), 1.0)
    return mean, total
