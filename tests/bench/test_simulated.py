"""The rows of `make bench-analytics` that play the simulated fleet: they run, and count what they say they count."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from bench.__main__ import Progress
from bench.analytics import command, quiet_row, scenario_row
from bench.analytics.scenario_row import HOURS, Played
from bench.analytics.seeds import FIRST_SEED, each_seed
from bench.analytics.simulated import HOUR_MS, MINUTE_MS, MONDAY_MS, Shown, Told
from bench.analytics.size import FULL, QUICK, Bench, Size
from bench.peers import BenchError
from fleet.anomaly import Anomaly, finding_id
from fleet.model import Rows
from services.analytics.fleet_detector import FleetDetector
from services.simulator.catalogue import METRIC_SET

START_MS = MONDAY_MS


async def measured(size: Size, folder: Path, *only: str) -> Any:
    """The report as it is written and read again."""
    found = await asyncio.to_thread(command.run, size, only, folder, Progress())
    return orjson.loads(orjson.dumps(found))


def told(server_id: str, told_ms: int, detector: str = "departure") -> Told:
    finding = Anomaly(
        id=finding_id(server_id, detector, told_ms),
        server_id=server_id,
        metric="cpu_usage",
        start_ms=told_ms - MINUTE_MS,
        end_ms=None,
        peak_ms=told_ms,
        score=0.7,
        value=90.0,
        expected_low=10.0,
        expected_high=20.0,
        detector=detector,
    )
    return Told(finding=finding, told_ms=told_ms)


async def test_a_quiet_fleet_is_measured(tmp_path: Path) -> None:
    found = await measured(QUICK, tmp_path, "quiet")
    assert [row["met"] for row in found["table"]] == [True] * 3, found["table"]
    (fleet,) = found["results"]["quiet"]["fleets"]
    assert fleet["seed"] == FIRST_SEED and fleet["learned"] == 1.0
    assert 0 < fleet["tick_ms"] <= fleet["judging_ms"] <= fleet["highest_ms"]


@pytest.mark.full
async def test_one_that_is_restarted_goes_on_as_if_it_was_not(tmp_path: Path) -> None:
    found = await measured(QUICK, tmp_path, "restart")
    assert [row["met"] for row in found["table"]] == [True], found["table"]
    restart = found["results"]["restart"]
    assert restart["minutes"] >= 29 and restart["findings"] == 1
    assert restart["highest"] > 0.5
    assert restart["state"] == 0.0


@pytest.mark.full
async def test_every_scenario_is_played_and_looked_for(tmp_path: Path) -> None:
    found = await measured(QUICK, tmp_path, "scenarios")
    (fleet,) = found["results"]["scenarios"]["fleets"]
    outcomes = {one["kind"]: one for one in fleet["scenarios"]}
    assert list(outcomes) == list(HOURS)
    assert len({one["server"] for one in fleet["scenarios"]}) == len(HOURS)
    assert {name: outcomes[name]["detector"] for name in ("cpu-spike", "outage", "packet-loss")} == {
        "cpu-spike": "departure",
        "outage": "silence",
        "packet-loss": "departure",
    }
    assert {kind for kind, one in outcomes.items() if one["limit_min"] is not None} == {"memory-leak", "disk-fill"}
    leak = outcomes["memory-leak"]
    assert 120 < leak["limit_min"] < 240
    assert leak["lead_min"] == pytest.approx(leak["limit_min"] - leak["after_min"])
    lines = found["table"]
    assert [line["work"].split(" found")[0] for line in lines[:-1]] == list(HOURS)
    assert "memory_usage is 95 % after" in lines[0]["remark"]
    right = sum(one["findings"] for one in fleet["scenarios"])
    assert lines[-1]["ours"] == pytest.approx(right / (right + len(fleet["false"])))


def test_a_finding_is_of_a_scenario_when_it_is_told_in_it_or_soon_after() -> None:
    one = Played(kind="outage", server_id="a", start_ms=START_MS, end_ms=START_MS + HOUR_MS)
    assert [one.owns(told("a", START_MS + minutes * MINUTE_MS)) for minutes in (-1, 0, 59, 60, 74, 75)] == [
        False,
        True,
        True,
        True,
        True,
        False,
    ]
    assert not one.owns(told("b", START_MS))


def test_a_resource_is_at_its_limit_when_its_server_first_says_so() -> None:
    limits = scenario_row._AtLimit({"a": ("memory_usage", 95.0), "b": ("disk_usage", 90.0)})
    column = METRIC_SET.keys.index("memory_usage")
    for tick, value in enumerate((94.0, np.nan, 95.0, 80.0, 97.0)):
        values = np.zeros((2, len(METRIC_SET)))
        values[1, column] = value
        limits.see(
            Rows(
                metric_set_id=METRIC_SET.id,
                server_ids=("b", "a"),
                times_ms=np.full(2, START_MS + tick),
                values=values,
            ),
            Shown(findings=[], scored=[], cost_ms=0.0),
        )
    assert limits.reached_ms == {"a": START_MS + 2}


def test_what_is_missed_and_what_is_false_misses() -> None:
    def outcome(kind: str, after_min: float | None) -> dict[str, Any]:
        is_found = after_min is not None
        return {
            "kind": kind,
            "found": is_found,
            "findings": int(is_found),
            "detector": "departure" if is_found else None,
            "after_min": after_min,
            "limit_min": 200.0 if kind in scenario_row.LIMITS else None,
            "lead_min": 200.0 - after_min if is_found and kind in scenario_row.LIMITS else None,
        }

    fleets = [
        {
            "days": 2.0,
            "scenarios": [outcome(kind, 180.0 + seed if (kind, seed) != ("outage", 1) else None) for kind in HOURS],
            "false": [{"after": "outage"}] * seed,
        }
        for seed in range(2)
    ]
    lines = scenario_row.judged({"servers": 20, "fleets": fleets})
    assert [line.work.split()[0] for line in lines if not line.met] == ["outage"]
    assert lines[3].ours == 0.5
    assert lines[0].remark.endswith("lead 20 min, at least 19: memory_usage is 95 % after 200 min")
    assert lines[-1].ours == 15 / 16
    fleets[0]["false"] = [{"after": None}]
    assert scenario_row.judged({"servers": 20, "fleets": fleets})[-1].met is False  # 15 of 17


def test_the_loudest_fleet_of_a_week_is_judged() -> None:
    def fleet(count: int) -> dict[str, Any]:
        costs = {"tick_ms": 0.2, "judging_ms": 3.0, "highest_ms": 9.0, "state_mb": 20.0}
        return {"findings": [{"detector": "departure"}] * count, **costs}

    for most, met in ((6, True), (7, False)):
        found = {"days": 7.0, "servers": 20, "fleets": [fleet(most), fleet(0)]}
        assert quiet_row.judged(found)[0].met is met


@pytest.mark.full
async def test_what_a_restart_forgets_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FleetDetector.restore

    def forgetful(detector: FleetDetector, state: Any) -> None:
        state.arrays["series.profile"][:] += 1e-3
        whole(detector, state)

    monkeypatch.setattr(FleetDetector, "restore", forgetful)
    found = await measured(QUICK, tmp_path, "restart")
    (line,) = found["table"]
    assert line["met"] is not True
    assert line["note"].startswith(("misses", "void"))


def test_seeds_come_back_in_order_from_any_number_of_processes() -> None:
    for processes in (1, 2):
        lines: list[str] = []
        found = each_seed(3, processes, divmod, 7, said=lambda seed, one: f"{seed}: {one}", say=lines.append)
        assert found == [divmod(FIRST_SEED + place, 7) for place in range(3)]
        assert len(lines) == 3 and lines[-1].endswith("(3 of 3)")


def ends(seed: int, _: int) -> dict[str, Any]:
    if seed == FIRST_SEED + 1:
        os._exit(9)
    return {}


def test_a_process_that_is_killed_voids_the_row() -> None:
    with pytest.raises(BenchError, match="ended before its time"):
        each_seed(3, 2, ends, 7, said=lambda seed, _: str(seed), say=Progress())


@pytest.mark.full
@pytest.mark.timeout(900)
async def test_two_fleets_as_they_are_measured(tmp_path: Path) -> None:
    size = replace(FULL, scenarios=replace(FULL.scenarios, seeds=2))
    bench = Bench(size=size, say=Progress(), data=None, folder=tmp_path)
    found = await asyncio.to_thread(scenario_row.measure, bench)
    for fleet in found["fleets"]:
        missed = {one["kind"] for one in fleet["scenarios"] if not one["found"]}
        assert missed == set(), fleet
    assert scenario_row.judged(found)[-1].met
