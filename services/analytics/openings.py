"""The course of a finding: a server's abnormal minutes become one stretch with a beginning, a peak and an end.

What must stay true: a server has at most one open finding; minutes in which a server was not judged neither end one nor
keep it open, until it has not been judged for long.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from fleet.anomaly import Anomaly, Contribution, finding_id
from services.analytics.open_windows import WINDOW_MS
from services.analytics.scoring.arrays import Columns, Flags, Floats, Integers

DETECTOR: Final = "departure"
QUIET_WINDOWS: Final = 10
"""So many minutes without a finding end it."""
REST_MS: Final = 1_200_000
"""A server has no new finding within this time after the last one ended; with the quiet minutes it is the half-hour
within which the alarm level counts openings as one."""
UNJUDGED_MS: Final = 900_000
"""A finding ends when its server has not been judged for so long."""

_NEVER: Final = -(1 << 60)


@dataclass(slots=True, eq=False)
class _Course(Columns):
    """Of each server: quiet minutes in a row, the last abnormal and the last judged minute, the score of the open
    finding's peak, -1 while none is open, and until when it has rest; milliseconds."""

    quiet: Integers
    abnormal_ms: Integers
    judged_ms: Integers
    peak: Floats
    rest_until_ms: Integers

    SHAPES: ClassVar = {
        "quiet": ((), np.int64, 0),
        "abnormal_ms": ((), np.int64, _NEVER),
        "judged_ms": ((), np.int64, _NEVER),
        "peak": ((), np.float64, -1.0),
        "rest_until_ms": ((), np.int64, _NEVER),
    }


class Openings:
    """Open findings of servers that are named by their place."""

    def __init__(self) -> None:
        self._state = _Course.fresh(0)
        self.open: dict[str, Anomaly] = {}
        """The open findings by server."""

    def update(
        self,
        start_ms: int,
        abnormal: Flags,
        judged: Flags,
        scores: Floats,
        server_ids: list[str],
        contributions_of: Callable[[int], tuple[Contribution, ...]],
    ) -> list[Anomaly]:
        """Takes one minute of all servers, shape (S,) each; returns the findings that opened, grew or closed."""
        state = self._state
        is_open = state.peak >= 0
        # before this minute: where nobody was heard there were no minutes either
        unjudged = is_open & (start_ms - state.judged_ms >= UNJUDGED_MS)
        np.copyto(state.judged_ms, start_ms, where=judged)
        np.copyto(state.abnormal_ms, start_ms, where=abnormal & ~unjudged)
        state.quiet = np.where(abnormal, 0, state.quiet + (is_open & judged))
        opens = abnormal & ~is_open & (start_ms >= state.rest_until_ms)
        grows = abnormal & is_open & (scores > state.peak)
        closes = unjudged | (is_open & (state.quiet >= QUIET_WINDOWS))
        np.copyto(state.peak, scores, where=opens | grows)
        np.copyto(state.quiet, 0, where=opens)
        state.peak[closes] = -1.0
        state.rest_until_ms[closes] = start_ms + REST_MS
        # what goes on after a pause is another finding, and has no rest of its own
        state.rest_until_ms[unjudged] = state.abnormal_ms[unjudged] + QUIET_WINDOWS * WINDOW_MS + REST_MS
        changed = []
        for server in np.flatnonzero(opens | grows | closes).tolist():
            server_id = server_ids[server]
            if closes[server]:
                changed.append(self.open.pop(server_id).changed(end_ms=int(state.abnormal_ms[server]) + WINDOW_MS))
                continue
            finding = _peaking(server_id, start_ms, float(scores[server]), contributions_of(server))
            if grows[server]:
                before = self.open[server_id]
                finding = replace(finding, id=before.id, start_ms=before.start_ms, revision=before.revision + 1)
            self.open[server_id] = finding
            changed.append(finding)
        return changed

    def forget(self, going: Iterable[tuple[int, str]]) -> list[Anomaly]:
        """Ends what is open of servers that go, by place and id: with their last abnormal minute, long ago."""
        return [
            self.open.pop(server_id).changed(end_ms=int(self._state.abnormal_ms[server]) + WINDOW_MS)
            for server, server_id in going
            if server_id in self.open
        ]

    def rearrange(self, source: Integers) -> None:
        """For each server the place that it had, -1 for a new one."""
        self._state = self._state.rearranged(source)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that is known but the open findings; copies."""
        return self._state.arrays("openings.")

    def restore(self, arrays: dict[str, NDArray[Any]], count: int) -> None:
        """Takes over what `arrays` gave; ValueError, and nothing changed, when it does not fit."""
        self._state = _Course.of_arrays(arrays, "openings.", count)


def _peaking(server_id: str, start_ms: int, score: float, contributions: tuple[Contribution, ...]) -> Anomaly:
    """A finding of one minute."""
    first = (
        contributions[0]
        if contributions
        else Contribution(metric="", value=0.0, expected_low=0.0, expected_high=0.0, score=0.0)
    )
    return Anomaly(
        id=finding_id(server_id, DETECTOR, start_ms),
        server_id=server_id,
        metric=first.metric,
        start_ms=start_ms,
        end_ms=None,
        peak_ms=start_ms,
        score=score,
        value=first.value,
        expected_low=first.expected_low,
        expected_high=first.expected_high,
        detector=DETECTOR,
        contributions=contributions,
    )
