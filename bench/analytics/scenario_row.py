"""What the simulator can play, each on a server of its own in one fleet, all at once; the other servers stay quiet.

A scenario is found when a finding of its server is told while it is played, or within 15 min after it; those findings
are right, whatever detector they are of, and every other one of the fleet is false: of a server on which nothing is
played, or later, until two hours into the day after, when the hour of the incident has come again. Lead is the time
from the first right finding until the resource is at its limit, by the values that the server itself reports.

What must stay true: two days are learnt before; on which servers what is played, and at which hour, is drawn by the
seed; seeds are of this bench alone, nothing was tuned on them.
"""

import asyncio
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from bench.analytics.limits import at_least
from bench.analytics.seeds import each_seed
from bench.analytics.simulated import DAY_MS, HOUR_MS, LEARN_MS, MINUTE_MS, Shown, SimulatedFleet, Told, first_hour_ms
from bench.analytics.size import Bench, Scenarios
from bench.api.judged import Judged
from fleet.model import Rows
from services.simulator.catalogue import METRIC_SET

ROW: Final = "scenarios"
STILL_ITS_OWN_MS: Final = 15 * MINUTE_MS
PRECISION: Final = 0.9
HOURS: Final = {
    "memory-leak": 4.0,
    "disk-fill": 6.0,
    "cpu-spike": 0.5,
    "outage": 0.5,
    "flapping": 1.0,
    "packet-loss": 0.5,
    "network-saturation": 0.5,
    "thrashing": 0.5,
}
"""How long each is played."""
LIMITS: Final = {"memory-leak": ("memory_usage", 95.0), "disk-fill": ("disk_usage", 90.0)}
"""When the resource of a scenario is at its limit, percent; the others have none, or are there at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A scenario on a server, during `[start_ms, end_ms)`."""

    kind: str
    server_id: str
    start_ms: int
    end_ms: int

    def owns(self, one: Told) -> bool:
        """Whether a finding is of it."""
        in_time = self.start_ms <= one.told_ms < self.end_ms + STILL_ITS_OWN_MS
        return in_time and one.finding.server_id == self.server_id


def measure(bench: Bench) -> dict[str, Any]:
    """What was found of each scenario of each seed, and what else."""
    size = bench.size.scenarios
    fleets = each_seed(size.seeds, size.processes, one_fleet, size, said=_said, say=bench.say)
    return {"servers": size.servers, "fleets": fleets}


def _said(seed: int, found: dict[str, Any]) -> str:
    missed = [one["kind"] for one in found["scenarios"] if not one["found"]]
    count = len(found["scenarios"]) - len(missed)
    return f"{ROW}: seed {seed}, {count} found, missed {missed or 'none'}, {len(found['false'])} false"


def one_fleet(seed: int, size: Scenarios) -> dict[str, Any]:
    """Learns and plays one seed."""
    return asyncio.run(_played(seed, size))


async def _played(seed: int, size: Scenarios) -> dict[str, Any]:
    fleet = SimulatedFleet(size.servers, seed=seed, tick_ms=size.tick_ms)
    start_ms = first_hour_ms(seed) + LEARN_MS
    await fleet.play(first_hour_ms(seed), start_ms)
    servers = np.random.default_rng(seed).permutation(size.servers)[: len(HOURS)].tolist()
    played = [
        Played(
            kind=kind,
            server_id=fleet.server_ids[server],
            start_ms=start_ms,
            end_ms=start_ms + round(hours * HOUR_MS),
        )
        for server, (kind, hours) in zip(servers, HOURS.items(), strict=True)
    ]
    for one in played:
        fleet.source.inject(one.server_id, one.kind, (one.end_ms - one.start_ms) / 1_000, start_ms)
    limits = _AtLimit({one.server_id: LIMITS[one.kind] for one in played if one.kind in LIMITS})
    await fleet.play(start_ms, start_ms + round(size.hours * HOUR_MS), limits.see)
    told = [one for one in fleet.told.values() if one.told_ms >= start_ms]
    return {
        "seed": seed,
        "hour": start_ms % DAY_MS / HOUR_MS,
        "days": size.hours / 24,
        "scenarios": [_outcome(one, told, limits.reached_ms) for one in played],
        "false": [_false(one, played, start_ms) for one in told if not any(own.owns(one) for own in played)],
    }


class _AtLimit:
    """When each server's metric is at its limit first."""

    def __init__(self, watched: Mapping[str, tuple[str, float]]) -> None:
        names = [metric.key for metric in METRIC_SET.metrics]
        self._watched = {server: (names.index(name), limit) for server, (name, limit) in watched.items()}
        self.reached_ms: dict[str, int] = {}

    def see(self, rows: Rows, _: Shown) -> None:
        """Looks at a batch."""
        for server, (column, limit) in self._watched.items():
            if server not in self.reached_ms and server in rows.server_ids:
                row = rows.server_ids.index(server)
                if rows.values[row, column] >= limit:
                    self.reached_ms[server] = int(rows.times_ms[row])


def _outcome(one: Played, told: list[Told], reached_ms: Mapping[str, int]) -> dict[str, Any]:
    own = sorted((finding for finding in told if one.owns(finding)), key=lambda finding: finding.told_ms)
    limit_ms = reached_ms.get(one.server_id)
    return {
        "kind": one.kind,
        "server": one.server_id,
        "found": bool(own),
        "findings": len(own),
        "detector": own[0].finding.detector if own else None,
        "after_min": (own[0].told_ms - one.start_ms) / MINUTE_MS if own else None,
        "limit_min": None if limit_ms is None else (limit_ms - one.start_ms) / MINUTE_MS,
        "lead_min": (limit_ms - own[0].told_ms) / MINUTE_MS if own and limit_ms is not None else None,
        "metrics": [part.metric for part in own[0].finding.contributions[:5]] if own else [],
    }


def _false(one: Told, played: list[Played], start_ms: int) -> dict[str, Any]:
    finding = one.finding
    kinds = [own.kind for own in played if own.server_id == finding.server_id]
    return {
        "server": finding.server_id,
        "detector": finding.detector,
        "after": kinds[0] if kinds else None,
        "after_min": (one.told_ms - start_ms) / MINUTE_MS,
        "score": finding.score,
        "metrics": [part.metric for part in finding.contributions[:3]],
    }


def judged(found: dict[str, Any]) -> list[Judged]:
    """Each kind, and how many of all findings are right."""
    fleets = found["fleets"]
    lines = [_of_kind([one for fleet in fleets for one in fleet["scenarios"] if one["kind"] == kind]) for kind in HOURS]
    right = sum(one["findings"] for fleet in fleets for one in fleet["scenarios"])
    false = [one for fleet in fleets for one in fleet["false"]]
    echoes = sum(one["after"] is not None for one in false)
    days = sum(fleet["days"] for fleet in fleets)
    remark = (
        f"{right} right, {len(false)} false in {days:.0f} days of {found['servers']} servers, "
        f"{echoes} of them after a scenario of their server"
    )
    precision = right / (right + len(false)) if right else 0.0
    return [*lines, at_least(ROW, "findings that are right, of all", "share", precision, PRECISION, remark=remark)]


def _of_kind(outcomes: list[dict[str, Any]]) -> Judged:
    seen = [one for one in outcomes if one["found"]]
    parts = []
    if seen:
        detectors = [one["detector"] for one in seen]
        by = ", ".join(f"{name} {detectors.count(name)}" for name in sorted(set(detectors)))
        after = [one["after_min"] for one in seen]
        parts.append(f"by {by}; told after {statistics.median(after):.1f} min, at most {max(after):.1f}")
    kind = outcomes[0]["kind"]
    if kind in LIMITS:
        parts.append(_lead(kind, outcomes))
    work = f"{kind} found, {len(outcomes)} fleets"
    return at_least(ROW, work, "share", len(seen) / len(outcomes), 1.0, remark="; ".join(parts))


def _lead(kind: str, outcomes: list[dict[str, Any]]) -> str:
    metric, limit = LIMITS[kind]
    leads = [one["lead_min"] for one in outcomes if one["lead_min"] is not None]
    reached = [one["limit_min"] for one in outcomes if one["limit_min"] is not None]
    where = f"{metric} is {limit:g} % after {statistics.median(reached):.0f} min" if reached else "no limit was reached"
    if not leads:
        return where
    return f"lead {statistics.median(leads):.0f} min, at least {min(leads):.0f}: {where}"
