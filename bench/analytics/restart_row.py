"""A detector that is restarted now and then beside one that is not, on the same rows: their scores must be the same.

A restart is what the service does: the checkpoint's bytes are written and read, and a new detector goes on from them,
wherever in a minute that is. Of each judged minute the servers' scores are compared, and all that both know after it.

What must stay true: servers are judged by then, one of them has an incident, or there is nothing to compare; restarts
are at drawn ticks; findings that differ void the row.
"""

import asyncio
import io
from collections.abc import Set
from itertools import zip_longest
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bench.analytics.limits import at_most
from bench.analytics.seeds import FIRST_SEED
from bench.analytics.simulated import (
    LEARN_MS,
    MINUTE_MS,
    ON_THE_WAY_MS,
    TICK_MS,
    Shown,
    SimulatedFleet,
    first_hour_ms,
    show,
)
from bench.analytics.size import Bench, Restarts
from bench.api.judged import Judged
from bench.peers import BenchError
from fleet.anomaly import Anomaly
from fleet.model import Rows
from services.analytics import checkpoint
from services.analytics.core import Snapshot
from services.analytics.detect import DetectorState
from services.analytics.fleet_detector import FleetDetector
from services.analytics.scores import Scored

ROW: Final = "restart"
TOLERANCE: Final = 1e-9
INCIDENT: Final = "packet-loss"
"""In the middle third."""


def measure(bench: Bench) -> dict[str, Any]:
    """The greatest differences."""
    found = asyncio.run(_compared(bench.size.restarts))
    bench.say(f"{ROW}: {found['restarts']} in {found['minutes']} minutes, scores differ by {found['scores']:g}")
    return found


async def _compared(size: Restarts) -> dict[str, Any]:
    learnt = SimulatedFleet(size.servers, seed=FIRST_SEED, tick_ms=size.learn_tick_ms)
    start_ms = first_hour_ms(FIRST_SEED) + LEARN_MS
    await learnt.play(first_hour_ms(FIRST_SEED), start_ms)
    fleet = SimulatedFleet(size.servers, seed=FIRST_SEED, detector=learnt.detector)
    third_ms = size.minutes * MINUTE_MS // 3
    end_ms = start_ms + 3 * third_ms
    ticks = np.random.default_rng(FIRST_SEED).choice((end_ms - start_ms) // TICK_MS, size.restarts, replace=False)
    beside = _Restarted(fleet.detector, set(ticks.tolist()))
    await fleet.play(start_ms, start_ms + third_ms, beside.see)
    fleet.source.inject(fleet.server_ids[0], INCIDENT, third_ms / 1_000, start_ms + third_ms)
    await fleet.play(start_ms + third_ms, end_ms, beside.see)
    told = {name: one.finding for name, one in fleet.told.items()}
    if not told or told != beside.told:
        raise BenchError(f"there are {len(told)} findings, after restarts {len(beside.told)}, or they differ")
    return {
        "servers": size.servers,
        "minutes": beside.minutes,
        "restarts": size.restarts,
        "highest": beside.highest,
        "scores": beside.scores,
        "state": beside.state,
        "findings": len(told),
    }


class _Restarted:
    """A detector that goes on from another and is restarted before some batches, and how far apart they came."""

    def __init__(self, other: FleetDetector, ticks: Set[int]) -> None:
        self.told: dict[str, Anomaly] = {}
        self.minutes = 0
        self.highest = self.scores = self.state = 0.0
        """The highest score, and the greatest differences of scores and of anything known."""
        self._other = other
        self._detector = _again(other)
        self._ticks = ticks
        self._tick = 0

    def see(self, rows: Rows, other: Shown) -> None:
        """Is shown what the other one has just been shown, and what came of that."""
        if self._tick in self._ticks:
            self._detector = _again(self._detector)
        self._tick += 1
        shown = show(self._detector, rows, int(rows.times_ms[0]) + ON_THE_WAY_MS)
        self.told |= {one.id: one for one in shown.findings}
        for mine, its in zip_longest(shown.scored, other.scored):
            self._compare(mine, its)
        if other.scored:
            self._compare_states(self._detector.state(), self._other.state())

    def _compare(self, mine: Scored | None, its: Scored | None) -> None:
        if mine is None or its is None or (mine.start_ms, mine.server_ids) != (its.start_ms, its.server_ids):
            raise BenchError("after a restart other minutes or servers are judged")
        self.minutes += 1
        self.scores = max(self.scores, _difference(mine.scores, its.scores))
        self.highest = max([self.highest, *its.scores.tolist()])

    def _compare_states(self, mine: DetectorState, its: DetectorState) -> None:
        if mine.arrays.keys() != its.arrays.keys() or mine.texts != its.texts:
            raise BenchError("after a restart other things are known")
        self.state = max([self.state, *(_difference(array, its.arrays[name]) for name, array in mine.arrays.items())])


def _again(detector: FleetDetector) -> FleetDetector:
    """A new detector that goes on from the checkpoint of one."""
    file = io.BytesIO()
    snapshot = Snapshot(next_sequence=1, verdicts_until=0, detector=detector.state(), waiting=())
    checkpoint.write(snapshot, file)
    again = FleetDetector()
    again.restore(checkpoint.decode(file.getvalue()).detector)
    return again


def _difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The greatest of two arrays' values; infinite where only one of them is a number, or their shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    apart = ~((one == other) | ((one != one) & (other != other)))  # NaN is as NaN
    if not apart.any():
        return 0.0
    difference = np.abs(one[apart].astype(np.float64) - other[apart].astype(np.float64))
    return float(np.nan_to_num(difference, nan=np.inf).max())


def judged(found: dict[str, Any]) -> list[Judged]:
    """How far scores are apart; beside it what else is, and what was compared."""
    work = f"scores after {found['restarts']} restarts in {found['minutes']} minutes, difference"
    remark = (
        f"highest score {found['highest']:.2f}, {found['findings']} findings the same, "
        f"all that is known differs by {found['state']:g}"
    )
    return [at_most(ROW, work, "score", found["scores"], TOLERANCE, remark=remark)]
