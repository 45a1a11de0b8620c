"""The command `backfill`: it goes on where it was ended, beside a running service, and refuses what makes no sense."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.timeseries import arguments
from services.timeseries.engine import Engine
from tests.harness import eventually
from tests.harness.influxdb import TOKEN, InfluxServer
from tests.timeseries.engine.model import rows
from tests.timeseries.engine.test_matrix import MIDNIGHT
from tests.timeseries.stores import ROOT
from tests.timeseries.test_backfill import CLOCK, DAY_MS, SET, said


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
@pytest.mark.full
async def test_the_command_goes_on_after_its_end_beside_a_service(
    influx: InfluxServer, bucket: str, tmp_path: Path, end: signal.Signals
) -> None:
    def command(*more: str) -> subprocess.Popen[str]:
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "DATA_DIR": str(tmp_path)}
        environment |= {"INFLUXDB_URL": influx.url, "INFLUXDB_TOKEN": TOKEN, "INFLUXDB_BUCKET": bucket}
        words = ["backfill", "--to", "influxdb", "--from", "2023-12-01", "--until", "2023-12-20", *more]
        return subprocess.Popen(
            [sys.executable, "-m", "services.timeseries", *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    state_file = tmp_path / "backfill-influxdb" / "state.json"

    def points() -> int:
        return int(json.loads(state_file.read_text())["points"]) if state_file.exists() else 0

    async with Engine.open(tmp_path / "timeseries", clock=CLOCK) as engine:
        for server in ("a", "b"):
            batch = rows(SET, [(server, MIDNIGHT + at * 1_000, [float(at), 1.0]) for at in range(-5_000, 5_000)])
            await engine.append(batch, metric_sets=(SET,), servers=[said(server, "staging")])
        first = await asyncio.to_thread(command, "--rate", "5000")  # two seconds for each of four parts
        await eventually(lambda: points() > 0, within_s=30)
        first.send_signal(end)
        out, err = await asyncio.to_thread(first.communicate)
        before = points()
        assert 0 < before < 40_000 and first.returncode == (1 if end == signal.SIGINT else -end)
        assert ("call it again, without --restart, to go on" in err) == (end == signal.SIGINT), err
        second = await asyncio.to_thread(command, "--verify")
        out, err = await asyncio.to_thread(second.communicate)
        assert second.returncode == 0, err
        assert f"goes on with what was interrupted, after {before:,} points" in out
        assert "verified: each server has as many points there" in out and f"openmanager/{bucket}" in out
    assert await influx.points(bucket) == {(server, "staging", "web"): 20_000 for server in "ab"}
    assert points() < 40_000 + 15_000, "and not from the beginning"
    assert TOKEN not in out + err and not (tmp_path / "backfill-influxdb" / "copy").exists()


def test_the_words_of_the_command() -> None:
    now_ms = CLOCK.now_ms()
    options = arguments.parse(["backfill", "--to", "influxdb", "--from", "-30d", "--server", "a", "b", "--server", "c"])
    assert abs(options.start - (now_ms - 30 * DAY_MS)) < 60_000 and options.until is None
    assert options.servers == ["a", "b", "c"] and options.rate == 200_000
    plain = options.words
    for more in (["--rate", "5"], ["--rate=5"], ["--verify"], ["--restart"]):
        words = ["backfill", *more, "--to", "influxdb", "--from", "-30d", "--server", "a", "b", "--server", "c"]
        assert arguments.parse(words).words == plain, "how fast is no part of what"
    assert arguments.parse(["backfill", "--to", "influxdb", "--from", "-31d"]).words != plain
    for wrong in (
        ["--from", "-30d"],
        ["--to", "influxdb"],
        ["--to", "nowhere", "--from", "-30d"],
        ["--to", "influxdb", "--from", "-30d", "--until", "-31d"],
        ["--to", "influxdb", "--from", "-30d", "--rate", "0"],
        ["--to", "influxdb", "--from", "tomorrow"],
    ):
        with pytest.raises(SystemExit) as ended:
            arguments.parse(["backfill", *wrong])
        assert ended.value.code == 2
