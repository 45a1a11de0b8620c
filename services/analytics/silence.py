"""The fast path for outages: a server that was heard at a steady interval, and is not any more.

A server's interval is the second longest of its last 16 distances, of 8 at least, so that one missing row is nothing
and a server with several sets is as steady as the slowest; it is steady while the longest is at most 2.5 times that.
One that falls silent again and again makes one finding, not many: it is not steady, or silence of that length is what
is usual of it. A server is silent after 3 intervals, a quarter of one for what is late on the way, and the least time.

What must stay true: silence is measured by the tail's time, and only while others go on: after a hole in the tail that
is longer than the servers before it explain, everybody's silence is measured from its end; a row that comes again is
not heard (an older one is, where the newest one's time lies ahead, for that clock is wrong); nothing is judged twice
within a second.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from fleet.anomaly import Anomaly, finding_id
from services.analytics.scoring.arrays import Columns, Flags, Floats, Integers

DETECTOR: Final = "silence"
SILENT_INTERVALS: Final = 3
LATE: Final = 0.25
"""Part of an interval that a row may be late."""
STEADY_RATIO: Final = 2.5
REST_MS: Final = 1_800_000
"""A server has no new finding of silence within this time after the last one ended."""

AHEAD_MS: Final = 10_000
"""A row's time that is further ahead of the tail's is of a clock that is wrong."""
PATIENT: Final = 1.1
MAX_PATIENCE: Final = 20.0

_GAPS: Final = 16
_ENOUGH_GAPS: Final = 8
_HOLE_MS: Final = 15_000
_SET_BACK_MS: Final = 15_000
"""By less the tail's clock only stands still for a moment."""
_HOLE_INTERVALS: Final = 1.5
_NEVER: Final = -(1 << 60)
_NO_INTERVAL: Final = float("inf")


@dataclass(slots=True, eq=False)
class _Heard(Columns):
    """Of each server: when it was heard last, since when silence is measured, its newest row's time, its distances,
    how many they were, its interval (infinite: not steady), until when it has rest (all in milliseconds), and by how
    much longer than usual it may be silent."""

    heard_ms: Integers
    since_ms: Integers
    row_ms: Integers
    gaps: Integers
    count: Integers
    interval_ms: Floats
    rest_until_ms: Integers
    patience: Floats

    SHAPES: ClassVar = {
        "heard_ms": ((), np.int64, _NEVER),
        "since_ms": ((), np.int64, _NEVER),
        "row_ms": ((), np.int64, _NEVER),
        "gaps": ((_GAPS,), np.int64, 0),
        "count": ((), np.int64, 0),
        "interval_ms": ((), np.float64, _NO_INTERVAL),
        "rest_until_ms": ((), np.int64, _NEVER),
        "patience": ((), np.float64, 1.0),
    }


class SilenceWatch:
    """Who is silent, of servers that are named by their place."""

    def __init__(self, least_ms: int) -> None:
        """`least_ms`: shorter silence is none."""
        self._least_ms = least_ms
        self._state = _Heard.fresh(64)
        self._judged_ms = _NEVER
        self._last_ms = _NEVER
        self.open: dict[str, Anomaly] = {}
        """The open findings by server."""

    def found_since(self, time_ms: int, count: int) -> Flags:
        """Of which of the first `count` servers a finding was open at a time or later."""
        found: Flags = self._state.rest_until_ms[:count] - REST_MS >= time_ms
        return found

    def is_patient(self, count: int) -> Flags:
        """Which of the first `count` servers may be silent for longer than usual."""
        patient: Flags = self._state.patience[:count] > 1.0
        return patient

    def heard_at(self, server: int) -> int:
        """When a server was heard last, in milliseconds; long before all time for one that never was."""
        return int(self._state.heard_ms[server]) if server < len(self._state.heard_ms) else _NEVER

    def heard_since(self, time_ms: int, count: int) -> Flags:
        """Which of the first `count` servers were heard at a time or later."""
        self._make_room(count)
        heard: Flags = self._state.heard_ms[:count] >= time_ms
        return heard

    def _make_room(self, count: int) -> None:
        own = len(self._state.count)
        if count > own:
            self._state = self._state.sized(max(count, 2 * own))

    @property
    def now_ms(self) -> int:
        """The tail's time; unlike the detector's, it goes back with the tail's clock."""
        return self._last_ms

    def go_on(self, now_ms: int) -> None:
        """Says that a batch came; before its rows."""
        if now_ms < self._last_ms - _SET_BACK_MS:
            self._set_back(self._last_ms - now_ms)
        state, last_ms = self._state, self._last_ms
        now_ms = self._last_ms = max(now_ms, last_ms)
        hole_ms = now_ms - last_ms
        if hole_ms <= _HOLE_MS or last_ms == _NEVER:
            return
        living = last_ms - state.heard_ms <= self._limits()
        usual_ms = float(state.interval_ms.min(initial=_NO_INTERVAL, where=living & np.isfinite(state.interval_ms)))
        if hole_ms > _HOLE_INTERVALS * usual_ms or usual_ms == _NO_INTERVAL:
            np.maximum(state.since_ms, now_ms, out=state.since_ms, where=state.heard_ms != _NEVER)

    def _set_back(self, by_ms: int) -> None:
        """Whoever was silent for so long still is when the tail's clock is set right, or nobody would be found until
        that comes to where it was."""
        self._last_ms -= by_ms
        self._judged_ms = _NEVER
        state = self._state
        for times_ms in (state.heard_ms, state.since_ms, state.rest_until_ms):
            np.subtract(times_ms, by_ms, out=times_ms, where=times_ms != _NEVER)

    def hear(self, servers: Integers, times_ms: Integers, now_ms: int, server_ids: list[str]) -> list[Anomaly]:
        """Takes rows of servers, each at most once; returns the findings that end with them."""
        now_ms = max(now_ms, self._last_ms)
        self._make_room(int(servers.max(initial=-1)) + 1)
        state = self._state
        newest_ms = state.row_ms[servers]
        # who is set right after it was ahead would else be silent until it comes to where it was
        was_ahead = (newest_ms > now_ms + AHEAD_MS) & (times_ms != newest_ms)
        is_new = (times_ms > newest_ms) | was_ahead
        if not is_new.all():
            servers, times_ms = servers[is_new], times_ms[is_new]
        before_ms, row_ms = state.heard_ms[servers], state.row_ms[servers]
        state.heard_ms[servers] = state.since_ms[servers] = now_ms
        state.row_ms[servers] = times_ms
        later = now_ms > before_ms  # not with the same batch
        if not later.all():
            servers, times_ms, before_ms, row_ms = (array[later] for array in (servers, times_ms, before_ms, row_ms))
        known = before_ms != _NEVER
        if not known.all():
            servers, times_ms, before_ms, row_ms = (array[known] for array in (servers, times_ms, before_ms, row_ms))
        if len(servers):
            # rows that were held up and come all at once are as far apart as their times
            self._learn(servers, np.maximum(now_ms - before_ms, times_ms - row_ms))
        if not self.open:
            return []
        return [
            self._ended(server, server_ids[server], now_ms)
            for server in servers.tolist()
            if server_ids[server] in self.open
        ]

    def _learn(self, servers: Integers, gaps: Integers) -> None:
        state = self._state
        count = state.count[servers]
        state.gaps[count % _GAPS, servers] = gaps
        state.count[servers] = count + 1
        ordered = np.sort(state.gaps[:, servers], axis=0)
        steady = (count + 1 >= _ENOUGH_GAPS) & (ordered[-1] <= STEADY_RATIO * ordered[-2])
        state.interval_ms[servers] = np.where(steady, ordered[-2], _NO_INTERVAL)

    def _limits(self) -> Floats:
        shortest = np.maximum((SILENT_INTERVALS + LATE) * self._state.interval_ms, self._least_ms)
        limits: Floats = shortest * self._state.patience
        return limits

    def _ended(self, server: int, server_id: str, now_ms: int) -> Anomaly:
        opened = self.open.pop(server_id)
        self._state.rest_until_ms[server] = now_ms + REST_MS
        now_ms = max(now_ms, opened.peak_ms)  # it may have begun before the clock was set back
        silent_ms = now_ms - opened.start_ms + opened.expected_high * 1000.0 / SILENT_INTERVALS
        score = _score(silent_ms, opened)
        return opened.changed(end_ms=now_ms, peak_ms=now_ms, value=silent_ms / 1000.0, score=score)

    def judge(self, now_ms: int, server_ids: list[str]) -> list[Anomaly]:
        """The findings that begin; after the rows of a batch."""
        now_ms = max(now_ms, self._last_ms)
        if now_ms // 1000 == self._judged_ms // 1000:
            return []
        self._judged_ms = now_ms
        state = self._state
        silent = (now_ms - state.since_ms > self._limits()) & (now_ms >= state.rest_until_ms)
        return [
            self._begun(server, server_ids[server], now_ms)
            for server in np.flatnonzero(silent[: len(server_ids)]).tolist()
            if server_ids[server] not in self.open
        ]

    def _begun(self, server: int, server_id: str, now_ms: int) -> Anomaly:
        state = self._state
        interval_ms, heard_ms = float(state.interval_ms[server]), int(state.heard_ms[server])
        start_ms = heard_ms + round(interval_ms)
        begun = Anomaly(
            id=finding_id(server_id, DETECTOR, start_ms),
            server_id=server_id,
            metric="",
            start_ms=start_ms,
            end_ms=None,
            peak_ms=now_ms,
            score=0.0,
            value=(now_ms - heard_ms) / 1000.0,
            expected_low=0.0,
            expected_high=SILENT_INTERVALS * interval_ms / 1000.0,
            detector=DETECTOR,
        )
        self.open[server_id] = begun = replace(begun, score=_score(now_ms - heard_ms, begun))
        return begun

    def judge_finding(self, server: int, silent_s: float, *, is_real: bool) -> None:
        """Takes what people said of a finding: after a false one a server may be silent for as long, and a real one
        gives half of that back."""
        patience = self._state.patience
        if is_real:
            patience[server] = (1.0 + patience[server]) / 2
            return
        limit_ms = float(self._limits()[server])
        needed = patience[server] * PATIENT * silent_s * 1000.0 / limit_ms if np.isfinite(limit_ms) else 0.0
        patience[server] = np.clip(max(needed, patience[server] * PATIENT), 1.0, MAX_PATIENCE)

    def forget(self, server_ids: list[str], now_ms: int) -> list[Anomaly]:
        """Ends what is open of servers that go."""
        return [self.open.pop(one).changed(end_ms=now_ms) for one in server_ids if one in self.open]

    def rearrange(self, source: Integers) -> None:
        """For each server the place that it had."""
        self._make_room(int(source.max(initial=-1)) + 1)
        self._state = self._state.rearranged(source).sized(max(len(source), 64))

    def arrays(self, count: int) -> dict[str, NDArray[Any]]:
        """All that is known of the first `count` servers but the open findings; copies."""
        clock = np.array([self._judged_ms, self._last_ms], np.int64)
        return self._state.sized(count).arrays("silence.") | {"silence_clock": clock}

    def restored(self, arrays: dict[str, NDArray[Any]], count: int) -> "SilenceWatch":
        """A watch that goes on from what `arrays` gave; ValueError when it does not fit."""
        clock = arrays.get("silence_clock")
        if clock is None or clock.shape != (2,) or clock.dtype != np.int64:
            raise ValueError("the array silence_clock is not 2 values of int64")
        watch = SilenceWatch(self._least_ms)
        watch._state = _Heard.of_arrays(arrays, "silence.", count).sized(max(count, 64))
        watch._judged_ms, watch._last_ms = int(clock[0]), int(clock[1])
        return watch


def _score(silent_ms: float, finding: Anomaly) -> float:
    """.75 at 3 intervals of silence."""
    interval_ms = finding.expected_high * 1000.0 / SILENT_INTERVALS
    return silent_ms / (silent_ms + interval_ms) if silent_ms > 0 else 0.0
