"""A back-fill gives a Prometheus-compatible store what the follower would have given it, and the command counts it.

The stores are real. What interrupts it, and what is written meanwhile, is tested with InfluxDB (test_backfill).
"""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import urllib3

from runtime.clock import ManualClock
from services.timeseries.engine import Engine
from services.timeseries.followers.follower import Follower
from services.timeseries.followers.prometheus import PrometheusBackend
from tests.harness import eventually
from tests.harness.victoria import VictoriaServer, victoria_server
from tests.timeseries.engine.model import rows
from tests.timeseries.engine.test_matrix import MIDNIGHT
from tests.timeseries.stores import ROOT
from tests.timeseries.test_backfill import CLOCK, SET, SETTINGS, fill, newest, prepared, said, shipped_to

Sample = tuple[str, str, str, str, int]


@asynccontextmanager
async def shipping_to(server: VictoriaServer) -> AsyncIterator[PrometheusBackend]:
    backend = PrometheusBackend(write_urls=[server.write_url], clock=CLOCK)
    try:
        yield backend
    finally:
        await backend.close()


async def samples(server: VictoriaServer) -> dict[Sample, float]:
    """Every raw sample, tags and all."""
    await server.flush()

    def export() -> bytes:
        fields = {"match[]": '{server_id!=""}', "start": "0", "reduce_mem_usage": "0"}
        answer = urllib3.request("GET", f"{server.url}/api/v1/export", fields=fields, timeout=20.0)
        assert answer.status == 200, answer.data
        return answer.data

    found: dict[Sample, float] = {}
    for line in (await asyncio.to_thread(export)).splitlines():
        series = json.loads(line)
        labels = series["metric"]
        name = (labels["server_id"], labels.get("environment", ""), labels.get("role", ""), labels["__name__"])
        for time, value in zip(series["timestamps"], series["values"], strict=True):
            assert (*name, time) not in found
            found[*name, time] = value
    return found


def points(found: dict[Sample, float]) -> set[tuple[str, str, int]]:
    return {(server, metric, time) for server, _, _, metric, time in found}


async def test_the_samples_are_those_of_the_follower(tmp_path: Path, unsynced: None) -> None:
    """Values aside where a point was written anew: of equal times the store keeps the largest (docs/operations.md)."""
    clock = ManualClock(MIDNIGHT)
    async with (
        victoria_server() as live,
        victoria_server() as filled,
        Engine.open(tmp_path / "store", clock=clock, settings=SETTINGS) as engine,
    ):
        async with shipping_to(live) as backend, Follower(engine, backend, CLOCK, random.Random(1)):
            await eventually(lambda: shipped_to(engine))
            await fill(engine, clock)
        async with shipping_to(filled) as backend:
            filling = prepared(tmp_path, backend)
            await filling.run()
        followed, copied = await samples(live), await samples(filled)
        assert len({sample[:3] for sample in followed}) == 6, "the servers moved"
        assert copied.keys() <= followed.keys(), "under the same tags"
        assert points(copied) == points(followed)
        largest: dict[tuple[str, str, int], float] = {}
        for (server, _, _, metric, time), value in copied.items():
            largest[server, metric, time] = max(value, largest.get((server, metric, time), value))
        stored = await newest(engine)
        assert largest.keys() == {point[:3] for point in stored}
        assert [point for point in stored if largest[point[:3]] < point[3] - 1e-11 * abs(point[3])] == []
        assert filling.state.is_done and not (filling.state.refused or filling.state.likely)


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.full
async def test_the_command_copies_and_counts(tmp_path: Path) -> None:
    def backfill(server: VictoriaServer) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "DATA_DIR": str(tmp_path)}
        environment |= {"PROMETHEUS_WRITE_URL": server.write_url, "PROMETHEUS_QUERY_URL": server.url}
        words = ["backfill", "--to", "prometheus", "--from", "2023-12-01", "--until", "2023-12-20", "--verify"]
        command = [sys.executable, "-m", "services.timeseries", *words]
        return subprocess.run(
            command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )

    async with (
        victoria_server() as server,
        Engine.open(tmp_path / "timeseries", clock=CLOCK) as engine,
    ):
        for name in ("a", "b"):
            batch = rows(SET, [(name, MIDNIGHT + at * 1_000, [float(at), 1.0]) for at in range(-1_000, 1_000)])
            await engine.append(batch, metric_sets=(SET,), servers=[said(name, "staging")])
        done = await asyncio.to_thread(backfill, server)
        assert done.returncode == 0, done.stderr
        assert "verified: each server has as many points there" in done.stdout, done.stdout
        assert len(await samples(server)) == 2 * 2_000 * 2


async def test_the_command_says_what_to_set(tmp_path: Path) -> None:
    async with Engine.open(tmp_path / "timeseries", clock=CLOCK):
        pass
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "DATA_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "services.timeseries", "backfill", "--to", "prometheus", "--from", "-1d"]
    done = run(command, environment)
    assert done.returncode == 1 and "PROMETHEUS_WRITE_URL is not set" in done.stderr, done.stderr
