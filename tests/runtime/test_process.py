"""The life of a process, with real processes: how it starts, refuses to, stops, and is not left behind."""

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime import folder
from runtime.channel import Channel
from runtime.folder import CannotStartError
from runtime.process import Process
from runtime.server import bind
from tests.harness import eventually
from tests.runtime.conftest import serving
from tests.runtime.echo import SERVICE, Echo, EchoServicer, EchoSettings, EchoStub

ROOT = Path(__file__).parents[2]


class Running:
    """One process of echo_process and what it has written."""

    def __init__(self, process: asyncio.subprocess.Process, data_dir: Path) -> None:
        self.process = process
        self.data_dir = data_dir
        self.text = ""
        self._reader = asyncio.create_task(self._read(), name="read-stderr")

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.text += line.decode()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines() if line.startswith("{")]

    async def address(self) -> str:
        def listening() -> str:
            said = [line["message"] for line in self.lines() if "listens on" in line["message"]]
            return said[0].split()[3] if said else ""

        return await eventually(listening, within_s=60)

    async def says(self, text: str) -> None:
        await eventually(lambda: text in self.text, within_s=60)

    def secret(self) -> str:
        return (self.data_dir / folder.SECRET_FILE_NAME).read_text().strip()

    async def exit_status(self, within_s: float = 60) -> int:
        status = await asyncio.wait_for(self.process.wait(), within_s)
        await self._reader
        return status


@contextlib.asynccontextmanager
async def started(data_dir: Path, **environ: str) -> AsyncIterator[Running]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.runtime.echo_process",
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "DATA_DIR": str(data_dir), **environ},
        stderr=subprocess.PIPE,
    )
    running = Running(process, data_dir)
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await running.exit_status()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_calls_finish_and_exits_with_0(tmp_path: Path, number: signal.Signals) -> None:
    async with started(tmp_path) as running:
        async with Channel(await running.address(), secret=running.secret()) as channel:
            call = asyncio.ensure_future(EchoStub(channel.grpc).Get(Echo(text="slow")))
            await running.says("a slow call has begun")
            running.process.send_signal(number)
            assert (await call).text == "slow"
        assert await running.exit_status() == 0
        assert "Traceback" not in running.text
        assert running.lines()[-1]["message"] == "echo stopped"
        assert all(line.startswith("{") for line in running.text.splitlines())
        assert running.secret() not in running.text
        assert "secret is ***" in running.text


async def test_a_failure_in_the_event_loop_is_logged(tmp_path: Path) -> None:
    async with started(tmp_path) as running:
        async with Channel(await running.address(), secret=running.secret()) as channel:
            await EchoStub(channel.grpc).Get(Echo(text="crash"))
        await eventually(lambda: "ZeroDivisionError" in running.text)
        line = next(line for line in running.lines() if "ZeroDivisionError" in line["message"])
        assert (line["level"], line["process"]) == ("ERROR", "echo")


async def test_an_address_in_use_is_one_line(tmp_path: Path) -> None:
    async with serving() as other, started(tmp_path, ECHO_ADDRESS=other.address) as running:
        assert await running.exit_status() == 1
        said = [line for line in running.text.splitlines() if not line.startswith("{")]
        assert said == [f"echo: address {other.address} is already in use (set ECHO_ADDRESS)"]


async def test_bad_settings_are_all_named(tmp_path: Path) -> None:
    async with started(tmp_path, ECHO_ADDRESS="abc", LOG_LEVEL="loud", SERVICE_SECRET="short") as running:
        assert await running.exit_status() == 2
        assert running.text.splitlines() == [
            "echo: cannot start, settings that make no sense:",
            "  LOG_LEVEL: 'loud' should be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'",
            "  ECHO_ADDRESS: 'abc' is not host:port",
            "  SERVICE_SECRET: shorter than 16 characters",
        ]


async def test_a_second_process_on_the_folder_is_refused(tmp_path: Path) -> None:
    async with started(tmp_path) as first:
        await first.address()
        async with started(tmp_path) as second:
            assert await second.exit_status() == 1
            assert second.text == (
                f"echo: folder {tmp_path}/echo is in use by another echo process (pid {first.process.pid}): "
                "stop that one, or set DATA_DIR to another folder\n"
            )
        first.process.kill()
        await first.exit_status()
    async with started(tmp_path) as third:  # nothing is left of a killed one
        await third.address()


async def test_a_bug_at_the_start_is_logged_with_its_traceback(tmp_path: Path) -> None:
    async with started(tmp_path, ECHO_FAIL="bug") as running:
        assert await running.exit_status() == 1
        assert running.lines()[-1]["level"] == "CRITICAL"
        assert "ZeroDivisionError" in running.lines()[-1]["exception"]


async def test_ending_without_being_told_is_a_failure(tmp_path: Path) -> None:
    async with started(tmp_path, ECHO_FAIL="return") as running:
        assert await running.exit_status() == 1
        assert running.lines()[-1]["message"] == "echo ended by itself"


async def test_what_does_not_stop_is_cut_off(tmp_path: Path) -> None:
    async with started(tmp_path, ECHO_FAIL="hang") as running:
        await running.says("will hang")
        running.process.terminate()
        assert await running.exit_status(within_s=30) == 1  # it hangs for a minute
        assert "did not stop within 0.2 s" in running.text


async def test_a_killed_launcher_leaves_no_process_behind_and_can_be_started_again_at_once(tmp_path: Path) -> None:
    launcher_code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'tests.runtime.echo_process'],"
        " env={**os.environ, 'OPENMANAGER_PARENT_PID': str(os.getpid())}, stderr=open(sys.argv[1], 'w'))\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    log = tmp_path / "log"
    launcher = await asyncio.create_subprocess_exec(
        sys.executable, "-c", launcher_code, str(log),
        cwd=ROOT, env={"PATH": os.environ["PATH"], "DATA_DIR": str(tmp_path)}, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert launcher.stdout is not None
    child = int(await launcher.stdout.readline())
    try:
        await eventually(lambda: log.exists() and "listens on" in log.read_text(), within_s=50)
        launcher.kill()
        await eventually(lambda: parent_of(child) != launcher.pid)  # wait() is for the child's stdout, too
        await asyncio.to_thread(lock_and_leave, tmp_path)
        await launcher.wait()
        assert "echo stopped" in log.read_text()
        await eventually(lambda: not alive(child))
    finally:
        if alive(child):
            os.kill(child, signal.SIGKILL)
    assert "is gone" in log.read_text()


def lock_and_leave(data_dir: Path) -> None:
    with folder.locked(data_dir, "echo"):
        pass


def alive(pid: int) -> bool:
    return status_of(pid)[0] not in {"Z", "gone"}


def parent_of(pid: int) -> int:
    return int(status_of(pid)[1])


def status_of(pid: int) -> list[str]:
    """From a process's state on, which its parent follows."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["gone", "0"]


async def test_processes_starting_at_once_agree_on_one_secret(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from runtime.folder import service_secret\n"
        "from runtime.settings import CommonSettings\n"
        "settings = CommonSettings(data_dir=Path(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
        "print(service_secret(settings))\n"
    )
    waits, goes = os.pipe()  # of all of them: its end is when they begin
    command = (sys.executable, "-c", code, str(tmp_path / "new" / "data"))
    processes = [
        await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=waits, stdout=subprocess.PIPE) for _ in range(6)
    ]
    for process in processes:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    os.close(goes)
    answers = [(await process.communicate())[0].decode().strip() for process in processes]
    os.close(waits)
    assert len(set(answers)) == 1
    assert len(answers[0]) >= 40
    file = tmp_path / "new" / "data" / "service-secret"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [entry.name for entry in file.parent.iterdir()] == ["service-secret"]


def test_the_first_secret_stays(tmp_path: Path) -> None:
    """The window between looking for the file and making it is too small to be hit by processes every time."""
    folder._create(tmp_path / "secret")
    first = (tmp_path / "secret").read_text()
    folder._create(tmp_path / "secret")
    assert (tmp_path / "secret").read_text() == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


def test_the_secret_comes_from_the_variable_first_and_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "service-secret").write_text("\n")
    with pytest.raises(CannotStartError, match="holds no secret"):
        folder.service_secret(EchoSettings(data_dir=tmp_path))
    given = EchoSettings.load({"DATA_DIR": str(tmp_path), "SERVICE_SECRET": "secret-of-this-test-alone"})
    assert folder.service_secret(given) == "secret-of-this-test-alone"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = r"cannot use folder .*file/echo: File exists \(set DATA_DIR\)"
    with pytest.raises(CannotStartError, match=said), folder.locked(tmp_path / "file", "echo"):
        pass


async def test_health_follows_readiness_and_channels_open_with_the_secret(settings: EchoSettings) -> None:
    process = Process("echo", settings)
    ready = False
    async with asyncio.TaskGroup() as group:
        group.create_task(
            process.serve_grpc("127.0.0.1:0", [bind(SERVICE, EchoServicer())], ready=lambda: ready or 1 // 0 > 0)
        )
        address = await eventually(lambda: process.bound_addresses.get("ECHO_ADDRESS"))
        assert address is not None
        async with process.open_channel(address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel.grpc)

            async def serves() -> bool:
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            assert not await serves()
            ready = True
            assert await eventually(serves)
            assert (await EchoStub(channel.grpc).Get(Echo(text="x"))).text == "x"
        process.stopping.set()
    assert process.bound_addresses == {}


@pytest.mark.parametrize(
    "module",
    ["gateway", *(f"services.{name}" for name in ("analytics", "cache", "metadata", "simulator", "timeseries"))],
)
def test_grpc_writes_no_lines_of_its_own_into_the_log(module: str) -> None:
    """Its core reads how much to say while it is loaded: what is set later changes nothing."""
    code = """
import importlib, importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "grpc":
            print(os.environ.get("GRPC_VERBOSITY"))
            sys.meta_path.remove(self)

sys.meta_path.insert(0, Watch())
importlib.import_module(sys.argv[1])
"""
    environ = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", code, f"{module}.__main__"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ERROR\n"
