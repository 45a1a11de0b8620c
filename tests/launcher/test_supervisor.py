"""How the launcher keeps processes running, also where its logs have no room, and what it tells of them."""

import asyncio
import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import logfile
from launcher.logfile import LogFile
from launcher.supervisor import ProcessSpec, StartFailedError, Supervisor
from runtime.clock import SystemClock
from tests.harness import eventually
from tests.harness.product import ROOT

TALKS = """
import time
from runtime import notify
notify.notify(notify.READY)
while True:
    print('{"level": "INFO", "message": "talks"}', flush=True)
    time.sleep(0.01)
"""


@contextlib.asynccontextmanager
async def supervised(folder: Path, said: list[str], talks: str = TALKS) -> AsyncIterator[asyncio.Event]:
    """A process that talks all the time, under a supervisor; the event is set when it is ready."""
    (folder / "talker.py").write_text(talks)
    supervisor = Supervisor(
        [ProcessSpec(name="talker", module="talker", stop_wave=0)],
        environ={"PYTHONPATH": f"{folder}:{ROOT}"},
        logs=folder / "logs",
        clock=SystemClock(),
        say=said.append,
    )
    ready = asyncio.Event()
    run = asyncio.create_task(supervisor.run(ready.set))
    try:
        yield ready
    finally:
        supervisor.stop()
        await asyncio.wait_for(run, 20)


def child_named(module: str) -> psutil.Process:
    return next(child for child in psutil.Process().children() if child.cmdline()[-1:] == [module])


async def test_a_full_disk_under_the_logs_stops_nobody_and_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "talker.log").symlink_to("/dev/full")
    said: list[str] = []
    async with supervised(tmp_path, said) as ready:
        await asyncio.wait_for(ready.wait(), 20)
        await eventually(lambda: said)
        await asyncio.sleep(0.3)  # there are more lines that do not fit
    assert said == [f"talker: error: {tmp_path}/logs/talker.log lacks lines: No space left on device"]


async def test_what_a_process_warns_of_before_it_is_ready_is_told_if_it_is_of_the_set_up(tmp_path: Path) -> None:
    """Nobody saw it: not that a setting is misspelt, nor that others can read the service secret. That another process
    is not there yet is no news while all start."""
    warns = """
print('{"level": "WARNING", "message": "REDIS_ULR is no setting", "of_set_up": true}', flush=True)
print('{"level": "WARNING", "message": "metadata is not reachable"}', flush=True)
"""
    said: list[str] = []
    async with supervised(tmp_path, said, warns + warns + TALKS) as ready:
        await asyncio.wait_for(ready.wait(), 20)
        await eventually(lambda: said)
    assert said == ["talker: warning: REDIS_ULR is no setting"]


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGRTMIN + 3, "signal ")])
async def test_a_process_that_is_killed_is_started_again_whatever_the_signal(
    tmp_path: Path, number: int, name: str
) -> None:
    said: list[str] = []
    async with supervised(tmp_path, said) as ready:
        await asyncio.wait_for(ready.wait(), 20)
        child_named("talker").send_signal(number)
        await eventually(lambda: "talker is back" in said, within_s=20)
    assert said[0].startswith(f"talker was killed by {name}")


async def test_a_system_without_room_for_a_process_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    start = asyncio.create_subprocess_exec
    failures = [OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))]

    async def full(*command: str, **options: Any) -> asyncio.subprocess.Process:
        if failures:
            raise failures.pop(0)
        return await start(*command, **options)

    async with supervised(tmp_path, said) as ready:
        await asyncio.wait_for(ready.wait(), 20)
        monkeypatch.setattr(asyncio, "create_subprocess_exec", full)
        child_named("talker").kill()
        await eventually(lambda: "talker is back" in said, within_s=20)
    assert said[1].startswith("talker cannot be started: Cannot allocate memory; starting it again in 1 s")
    assert said[2].startswith("talker cannot be started: Resource temporarily unavailable; starting it again in 2 s")


async def test_a_first_start_that_the_system_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_command: str, **_options: Any) -> asyncio.subprocess.Process:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(asyncio, "create_subprocess_exec", full)
    specs = [ProcessSpec(name="talker", module="talker", stop_wave=0)]
    supervisor = Supervisor(specs, environ={}, logs=tmp_path / "logs", clock=SystemClock(), say=print)
    with pytest.raises(StartFailedError, match="talker cannot be started: Cannot allocate memory"):
        await supervisor.run(lambda: None)


async def test_a_log_that_somebody_took_away_is_begun_anew_when_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logfile, "MAX_FILE_BYTES", 100)
    said: list[str] = []
    path = tmp_path / "logs" / "talker.log"
    async with supervised(tmp_path, said) as ready:
        await asyncio.wait_for(ready.wait(), 20)
        path.unlink(missing_ok=True)
        await eventually(path.exists)
    assert said == []


def test_a_line_that_does_not_fit_leaves_no_part_of_it(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from launcher.logfile import LogFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (15, 100))
with LogFile(Path(sys.argv[1])) as log:
    log.write(b"first line\\n")
    try:
        log.write(b"second line\\n")
    except OSError:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        log.write(b"third line\\n")
"""
    path = tmp_path / "a.log"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=ROOT)
    assert path.read_bytes() == b"first line\nthird line\n"


def test_a_full_log_is_turned_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "MAX_FILE_BYTES", 8)
    with LogFile(tmp_path / "a.log") as log:
        for line in (b"first line\n", b"second line\n"):
            log.write(line)
    assert (tmp_path / "a.log.1").read_bytes() == b"first line\n"
    assert (tmp_path / "a.log").read_bytes() == b"second line\n"


async def test_what_the_launcher_makes_is_open_to_its_user_alone_and_what_is_there_stays(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir(mode=0o755)
    for data in (tmp_path / "new", there):
        supervisor = Supervisor([], environ={}, logs=data / "logs", clock=SystemClock(), say=print)
        await supervisor.run(supervisor.stop)
    assert [stat.S_IMODE((tmp_path / "new" / name).stat().st_mode) for name in (".", "logs")] == [0o700, 0o700]
    assert [stat.S_IMODE((there / name).stat().st_mode) for name in (".", "logs")] == [0o755, 0o700]


async def test_a_folder_that_cannot_be_used_is_named_with_the_variable(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("no folder")
    supervisor = Supervisor([], environ={}, logs=tmp_path / "logs", clock=SystemClock(), say=print)
    with pytest.raises(StartFailedError, match=r"logs: File exists \(set DATA_DIR\)"):
        await supervisor.run(lambda: None)
    supervisor = Supervisor([], environ={}, logs=tmp_path / "logs" / "logs", clock=SystemClock(), say=print)
    with pytest.raises(StartFailedError, match=f"cannot use {tmp_path}/logs: File exists"):
        await supervisor.run(lambda: None)
