"""A quiet fleet of 20 servers of 511 metrics every ten seconds for a week: every finding is a false one.

Also what the detector costs there, a tick with all that the service does for it, and what its state weighs; both with
series that have learnt all there is to learn.

What must stay true: two days are learnt first and not counted; the loudest fleet is judged, not the average; seeds are
of this bench alone, nothing was tuned on them.
"""

import asyncio
import statistics
from typing import Any, Final

from bench.analytics.limits import at_most
from bench.analytics.seeds import each_seed
from bench.analytics.simulated import DAY_MS, LEARN_MS, SimulatedFleet, Told, first_hour_ms
from bench.analytics.size import Bench, Quiet
from bench.api.judged import Judged

ROW: Final = "quiet"
MOST_A_WEEK: Final = 6
"""Findings of the whole fleet: under one a day."""
TICK_LIMIT_MS, STATE_LIMIT_MB = 50.0, 150.0


def measure(bench: Bench) -> dict[str, Any]:
    """Findings and costs of each seed."""
    size = bench.size.quiet
    fleets = each_seed(size.seeds, size.processes, one_fleet, size, said=_said, say=bench.say)
    return {"days": size.days, "servers": size.servers, "fleets": fleets}


def _said(seed: int, found: dict[str, Any]) -> str:
    return f"{ROW}: seed {seed}, {len(found['findings'])} findings, {found['judging_ms']:.1f} ms a minute's last tick"


def one_fleet(seed: int, size: Quiet) -> dict[str, Any]:
    """Learns and plays one seed."""
    return asyncio.run(_played(seed, size))


async def _played(seed: int, size: Quiet) -> dict[str, Any]:
    fleet = SimulatedFleet(size.servers, seed=seed, tick_ms=size.tick_ms)
    start_ms = first_hour_ms(seed)
    judged_ms = start_ms + LEARN_MS
    learning, _ = await fleet.play(start_ms, judged_ms)
    _, shown = await fleet.play(judged_ms, judged_ms + round(size.days * DAY_MS))
    judging = [one.cost_ms for one in shown if one.scored]
    return {
        "seed": seed,
        "while_learning": len(learning),
        "findings": [_told(one, judged_ms) for one in fleet.told.values() if one.told_ms >= judged_ms],
        "learned": fleet.detector.learned,
        "tick_ms": statistics.fmean(one.cost_ms for one in shown),
        "judging_ms": statistics.fmean(judging),
        "highest_ms": max(judging),
        "state_mb": sum(array.nbytes for array in fleet.detector.state().arrays.values()) / 1e6,
    }


def _told(one: Told, judged_ms: int) -> dict[str, Any]:
    finding = one.finding
    return {
        "server": finding.server_id,
        "detector": finding.detector,
        "score": finding.score,
        "day": (one.told_ms - judged_ms) / DAY_MS,
        "minutes": ((finding.end_ms or finding.peak_ms) - finding.start_ms) / 60_000,
        "metrics": [part.metric for part in finding.contributions[:3]],
    }


def judged(found: dict[str, Any]) -> list[Judged]:
    """The loudest fleet, the dearest ticks, and the state."""
    fleets = found["fleets"]
    counts = sorted(len(one["findings"]) for one in fleets)
    series = f"{found['servers']} x 511 series"
    each = f"seeds: {', '.join(map(str, counts))}; detectors: {_detectors(fleets)}"
    work = f"false findings of {series} in {found['days']:g} quiet days, of {len(fleets)} fleets the most"
    costs = f"highest {max(one['highest_ms'] for one in fleets):.1f}; all ticks {_mean(fleets, 'tick_ms'):.2f}"
    judging = f"the detector's tick of {series} that ends a minute"
    return [
        at_most(ROW, work, "findings", counts[-1], MOST_A_WEEK * found["days"] / 7, remark=each),
        at_most(ROW, judging, "ms", _mean(fleets, "judging_ms"), TICK_LIMIT_MS, remark=costs),
        at_most(ROW, f"the detector's state of {series}", "MB", _mean(fleets, "state_mb"), STATE_LIMIT_MB),
    ]


def _mean(fleets: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(one[name] for one in fleets)


def _detectors(fleets: list[dict[str, Any]]) -> str:
    names = [finding["detector"] for one in fleets for finding in one["findings"]]
    return ", ".join(f"{name} {names.count(name)}" for name in sorted(set(names))) or "none"
