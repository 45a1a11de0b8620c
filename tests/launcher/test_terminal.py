"""The launcher's terminal is gone, full, stopped or none at all: nobody is stopped by that."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from runtime.notifications import NotifySocket
from tests.harness.launched import within
from tests.harness.product import ROOT
from tests.launcher.test_supervisor import TALKS

MAIN = """
import sys
from launcher import __main__ as launcher
from launcher.supervisor import ProcessSpec
launcher._PROCESSES = (ProcessSpec(name="talker", module="talker", stop_wave=0),)
sys.exit(launcher.main())
"""
SAYS = """
import sys
from launcher.terminal import Terminal
terminal = Terminal(sys.stdout)
terminal.say('at 20 \\u20ac, \\udcff')
terminal.close()
"""


@contextlib.contextmanager
def launched(folder: Path, output: int, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher with one process, and its terminal."""
    (folder / "talker.py").write_text(TALKS)
    environ = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "DATA_DIR": str(folder / "data")} | environ
    with subprocess.Popen([sys.executable, "-c", MAIN], cwd=ROOT, env=environ, stdout=output) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def stopped_terminal() -> Iterator[int]:
    """One that takes nothing, as after Ctrl-S."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    try:
        yield writing
    finally:
        os.close(reading)
        os.close(writing)


def talker_of(launcher: int) -> psutil.Process | None:
    return next(iter(psutil.Process(launcher).children()), None)


def test_under_a_terminal_that_is_stopped_what_dies_is_started_again_and_a_signal_ends_all(tmp_path: Path) -> None:
    with stopped_terminal() as terminal, launched(tmp_path, terminal) as launcher:
        first = within(20, lambda: talker_of(launcher.pid))
        log = tmp_path / "data" / "logs" / "talker.log"
        within(20, lambda: log.exists() and log.stat().st_size)
        first.kill()
        within(20, lambda: (now := talker_of(launcher.pid)) is not None and now.pid != first.pid)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(20) == 0


async def test_whoever_started_the_launcher_is_told_when_all_is_ready(tmp_path: Path) -> None:
    """systemd, where the unit has Type=notify: it took the start for failed after 90 s and ended it."""
    with NotifySocket() as told, launched(tmp_path, subprocess.DEVNULL, NOTIFY_SOCKET=told.address):
        assert await asyncio.wait_for(told.receive(), 20) == b"READY=1"


def test_a_terminal_that_is_gone_stops_nobody() -> None:
    with Path("/dev/full").open("wb") as full:
        said = subprocess.run([sys.executable, "-c", SAYS], check=True, cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert said.stderr == b""


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_terminal_that_lacks_a_character_stops_nobody(encoding: str) -> None:
    environ = os.environ | {"PYTHONIOENCODING": encoding}
    said = subprocess.run([sys.executable, "-c", SAYS], check=True, cwd=ROOT, env=environ, stdout=subprocess.PIPE)
    euro = "\u20ac" if encoding == "utf-8" else "\\u20ac"
    assert said.stdout.decode() == f"at 20 {euro}, \\udcff\n"


def test_no_terminal_at_all_stops_nobody() -> None:
    code = f"import sys\nsys.stdout = None\n{SAYS}"
    said = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stderr=subprocess.PIPE)
    assert said.stderr == b""
