"""A prediction that holds becomes a finding, as what has happened does.

It begins when the probability was high for some minutes, and ends when it was low for some; in between it follows its
peak. What must stay true: a server has at most one open finding; what was found of a server already is not foreseen: as
long as another detector's finding is open, and for the horizon after that, only a resource that is still on its way to
its limit makes one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from fleet.anomaly import Anomaly, Contribution, finding_id
from services.analytics.prediction import parameters as p
from services.analytics.prediction.foresight import HORIZON_MS, Foresight
from services.analytics.scoring.arrays import Columns, Flags, Floats, Integers, State

DETECTOR: Final = "prediction"
MINUTE_MS: Final = 60_000
_NEVER: Final = -(1 << 60)
_NOTHING: Final = Contribution(metric="", value=0.0, expected_low=0.0, expected_high=0.0, score=0.0)


@dataclass(slots=True, eq=False)
class _Course(Columns):
    """Of each server: likely minutes in a row, unlikely ones, since when it has been likely and the last time that it
    was, when another detector's finding was open last, milliseconds; the highest probability of the open finding, -1
    while none is open; and from which probability on it is likely."""

    likely: Integers
    unlikely: Integers
    since_ms: Integers
    last_ms: Integers
    found_ms: Integers
    peak: Floats
    level: Floats

    SHAPES: ClassVar = {
        "likely": ((), np.int64, 0),
        "unlikely": ((), np.int64, 0),
        "since_ms": ((), np.int64, _NEVER),
        "last_ms": ((), np.int64, _NEVER),
        "found_ms": ((), np.int64, _NEVER),
        "peak": ((), np.float64, -1.0),
        "level": ((), np.float64, p.OPEN),
    }


class Course:
    """The open findings of servers that are named by their place."""

    def __init__(self) -> None:
        self._state = _Course.fresh(0)
        self.open: dict[str, Anomaly] = {}
        """The open findings by server."""

    def update(
        self,
        foresight: Foresight,
        found: Iterable[int],
        contributions_of: Callable[[int], tuple[Contribution, ...]],
    ) -> list[Anomaly]:
        """Takes one minute; returns the findings that opened, grew or closed.

        Args:
            foresight: of all servers.
            found: the servers of which another detector's finding is open.
            contributions_of: what to name with one.
        """
        state, end_ms, probability = self._state, foresight.end_ms, foresight.probability
        state.found_ms[list(found)] = end_ms
        likely, is_open = probability >= state.level, state.peak >= 0
        np.copyto(state.since_ms, end_ms - MINUTE_MS, where=likely & (state.likely == 0))
        np.copyto(state.last_ms, end_ms, where=probability >= p.CLOSE)
        state.likely = np.where(likely, state.likely + 1, 0)
        state.unlikely = np.where(is_open & (probability < p.CLOSE), state.unlikely + 1, 0)
        is_new = end_ms - state.found_ms > HORIZON_MS
        is_coming = (foresight.saturation >= state.level) & (foresight.saturation < 1.0)
        opens = ~is_open & (state.likely >= p.HOLD_MINUTES) & (is_new | is_coming)
        grows = is_open & (probability > state.peak)
        closes = is_open & (state.unlikely >= p.QUIET_MINUTES)
        np.copyto(state.peak, probability, where=opens | grows)
        state.peak[closes] = -1.0
        return [
            self._closed(server, foresight)
            if closes[server]
            else self._peaking(server, foresight, contributions_of(server))
            for server in np.flatnonzero(opens | grows | closes).tolist()
        ]

    def _closed(self, server: int, foresight: Foresight) -> Anomaly:
        opened = self.open.pop(foresight.layout.server_ids[server])
        return opened.changed(end_ms=int(self._state.last_ms[server]))

    def _peaking(self, server: int, foresight: Foresight, contributions: tuple[Contribution, ...]) -> Anomaly:
        """The finding as it is in this minute, which is its most likely one so far."""
        server_id = foresight.layout.server_ids[server]
        before = self.open.get(server_id)
        start_ms = int(self._state.since_ms[server]) if before is None else before.start_ms
        first = contributions[0] if contributions else _NOTHING
        self.open[server_id] = finding = Anomaly(
            id=finding_id(server_id, DETECTOR, start_ms),
            server_id=server_id,
            metric=first.metric,
            start_ms=start_ms,
            end_ms=None,
            peak_ms=foresight.end_ms - MINUTE_MS,
            score=float(foresight.probability[server]),
            value=first.value,
            expected_low=first.expected_low,
            expected_high=first.expected_high,
            detector=DETECTOR,
            contributions=contributions,
            revision=1 if before is None else before.revision + 1,
        )
        return finding

    def judge(self, server: int, *, is_real: bool) -> None:
        """Takes what people said of a finding: after a false one a server must be likelier to fail, half of the way to
        certainty, and a real one gives half of that back."""
        level = self._state.level
        level[server] = (p.OPEN + level[server]) / 2 if is_real else min((1.0 + level[server]) / 2, p.MOST_OPEN)

    @property
    def is_cautious(self) -> Flags:
        """Of which servers people's verdicts have raised the level."""
        cautious: Flags = self._state.level > p.OPEN
        return cautious

    def forget(self, going: Iterable[tuple[int, str]]) -> list[Anomaly]:
        """Ends what is open of servers that go, by place and id: when it was likely last, however long ago."""
        return [
            self.open.pop(server_id).changed(end_ms=int(self._state.last_ms[server]))
            for server, server_id in going
            if server_id in self.open
        ]

    def rearrange(self, source: Integers) -> None:
        """For each server the place that it had, -1 for a new one."""
        self._state = self._state.rearranged(source)

    def arrays(self) -> State:
        """All that is known but the open findings; copies."""
        return self._state.arrays("course.")

    def restore(self, arrays: State, count: int) -> None:
        """Takes over what `arrays` gave; ValueError, and nothing changed, when it does not fit."""
        self._state = _Course.of_arrays(arrays, "course.", count)
