"""The commands of `python -m services.timeseries` as an operator calls them."""

import asyncio
import io
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from fleet.codec import metric_set_to_pb, rows_to_pb
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc
from runtime import folder
from runtime.channel import Channel
from services.timeseries import commands, progress
from services.timeseries.archive.verify import Verifier
from tests.harness import eventually, free_port
from tests.timeseries.engine.model import Model, rows
from tests.timeseries.stores import (
    ROOT,
    SET,
    fill,
    flip,
    goes_on,
    ignore,
)


def run(*arguments: str, data: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.timeseries", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "DATA_DIR": str(data)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_the_commands_beside_a_running_service(tmp_path: Path) -> None:
    port, data, target = free_port(), tmp_path / "data", tmp_path / "backup"
    secret = "a-secret-of-the-test-suite"
    environment = {"DATA_DIR": str(data), "TIMESERIES_ADDRESS": f"127.0.0.1:{port}", "SERVICE_SECRET": secret}
    service = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, "-m", "services.timeseries"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", **environment},
        stderr=subprocess.DEVNULL,
    )
    try:
        async with Channel(f"127.0.0.1:{port}", secret=secret) as channel:
            stub: Any = timeseries_pb2_grpc.TimeSeriesServiceStub(channel.grpc)
            now = int(time.time() * 1_000)
            batch = rows(SET, [("a", now, [1.0, 2.0, 3.0]), ("b", now, [4.0, 5.0, 6.0])])
            request = timeseries_pb2.AppendRequest(metric_sets=[metric_set_to_pb(SET)], batch=rows_to_pb(batch))

            async def appended() -> bool:
                try:
                    await stub.Append(request)
                except grpc.aio.AioRpcError as error:
                    raise AssertionError(error.details()) from error
                return True

            await eventually(appended, within_s=60)
        made = await asyncio.to_thread(run, "backup", str(target), data=data)
        assert made.returncode == 0 and re.fullmatch(r"journal\.db  [1-9][0-9.]* KiB\n", made.stderr), made
        assert f"backup {target}: 1 files" in made.stdout
        live = await asyncio.to_thread(run, "verify", data=data)
        assert live.returncode == 0 and "1 batches in the journal" in live.stdout, live
        refused = await asyncio.to_thread(run, "restore", str(target), data=data)
        assert refused.returncode == 1 and str(data / "timeseries") in refused.stderr, refused
        assert f"(pid {service.pid}): stop that one" in refused.stderr
        assert service.poll() is None
    finally:
        service.kill()
        service.wait()
    restored = await asyncio.to_thread(run, "restore", str(target), data=tmp_path / "new")
    assert restored.returncode == 0 and " 6 points, through sequence 1" in restored.stdout, restored
    model = Model()
    model.append(SET, batch)
    await goes_on(tmp_path / "new" / "timeseries", model)


def test_help_and_usage() -> None:
    shown = run("--help", data=Path("/nowhere"))
    assert shown.returncode == 0 and "Traceback" not in shown.stderr
    for word in ("backup", "restore", "verify", "export", "import", "examples:", "DATA_DIR", "Exit status"):
        assert word in shown.stdout
    with pytest.raises(SystemExit) as usage:
        commands.main(["backup"])
    assert usage.value.code == 2
    with pytest.raises(SystemExit) as usage:
        commands.main(["burn", "x"])
    assert usage.value.code == 2


@pytest.mark.parametrize("option", ["--servers", "--metrics"])
@pytest.mark.parametrize("text", ["", " , "])
def test_a_list_that_names_none_does_not_mean_all(option: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a variable of a script that came out empty."""
    with pytest.raises(SystemExit) as usage:
        commands.main(["export", "/nowhere", option, text])
    assert usage.value.code == 2
    assert f"argument {option}: {text!r} names none; without the option all are taken" in capsys.readouterr().err


async def test_exit_codes_and_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await fill(tmp_path / "timeseries")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))

    def called(*arguments: str) -> tuple[int, str, str]:
        status = commands.main(arguments)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    status, out, _ = called("verify")
    assert status == 0 and "1 batches in the journal" in out and "nothing damaged" in out
    assert [line.rsplit("/", 1)[1] for line in out.splitlines()[:3]] == [
        "blocks: 2 partitions, 6 blocks, 2,700 points in them",
        "rollup-5m: 1 partitions, 3 blocks, 18 buckets in them",
        "rollup-1h: 1 partitions, 3 blocks, 18 buckets in them",
    ]
    assert called("backup", str(tmp_path / "backup"))[0] == 0
    status, _, err = called("restore", str(tmp_path / "backup"))
    assert status == 1 and f"{tmp_path / 'timeseries'} is not empty" in err
    with folder.locked(tmp_path, "timeseries"):
        assert "is in use by another timeseries process" in called("restore", str(tmp_path / "backup"))[2]
    path = min((tmp_path / "timeseries" / "blocks").glob("*.db"))
    flip(path, "blocks", "cohort = 3", -30)
    status, out, err = called("verify")
    assert status == 1 and f"damaged: blocks/{path.name}: block " in out
    assert "(server c): column memory_usage" in out
    assert "1 damaged" in out and "restore a backup that verifies" in err
    assert called("verify", str(tmp_path / "backup"))[0] == 0
    path.write_bytes(b"no database" * 999)
    status, _, err = called("backup", str(tmp_path / "second"))
    assert status == 1 and f"left out, because they cannot be read or are gone: blocks/{path.name}" in err
    shutil.rmtree(tmp_path / "timeseries")
    status, out, err = called("restore", str(tmp_path / "second"))
    assert status == 1 and "restored" in out and "the backup was made without" in err
    monkeypatch.setenv("LOG_LEVEL", "LOUD")
    status, _, err = called("verify")
    assert status == 2 and "LOG_LEVEL" in err


async def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    await fill(tmp_path)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        with progress.Reporter(terminal) as reporter:
            Verifier(tmp_path, ignore, reporter.progress).run()
        shown = ""
        while not shown.endswith("\r\x1b[K"):
            shown += os.read(ours, 10_000).decode()
    os.close(ours)
    assert re.search(r"\r\x1b\[K\[[#.]{30}\] +\d+% journal.db", shown)


def test_points_are_shown_with_their_rate_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    out = io.StringIO()
    with progress.Reporter(out) as reporter:
        for name, points, share, seconds in (
            ("a", 0, 0.0, 20),
            ("a", 10_000_000, 0.125, 5),  # a line of its own: the file takes long
            ("a", 15_000_000, 0.2, 1),
            ("a", 20_000_000, 0.25, 1),
            ("b", 20_500_000, 0.5, 1),
        ):
            reporter.points(name, points, share)
            now += seconds
    assert out.getvalue().splitlines() == [
        "a  10,000,000 points  500.0 k/s  2:20 left",
        "a  20,000,000 points  769.2 k/s  1:18 left",
        "b  20,500,000 points  759.3 k/s  0:27 left",
    ]
    assert [progress.duration_text(seconds) for seconds in (7, 754, 3_780)] == ["0:07", "12:34", "1:03:00"]
    assert [progress.count_text(count) for count in (999, 1_500, 2.5e12)] == ["999", "1.5 k", "2500.0 G"]
