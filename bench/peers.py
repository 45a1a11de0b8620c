"""The servers under measurement: our timeseries process and the unmodified peers found on the PATH.

What must stay true: each runs with its defaults (flags below that are not, say why), in a folder of its own, on a free
port, and is ended with its block whatever happens.
"""

import contextlib
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import grpc
import orjson
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT: Final = Path(__file__).resolve().parents[1]
START_BOUND_S: Final = 30.0
STOP_BOUND_S: Final = 20.0
HTTP_TIMEOUT_S: Final = 120.0
ORG, BUCKET, TOKEN = "bench", "bench", "the-token-of-the-bench"

OURS: Final = "openmanager"
VICTORIA: Final = "victoriametrics"
INFLUX: Final = "influxdb"
PROGRAMS: Final = {VICTORIA: "victoria-metrics", INFLUX: "influxd"}
WRITE_PATHS: Final = {
    VICTORIA: "/api/v2/write?precision=ms",
    INFLUX: f"/api/v2/write?org={ORG}&bucket={BUCKET}&precision=ms",
}
FIRST_PORT, LAST_PORT = 20_000, 32_767
_PORTS: Final = list(range(FIRST_PORT, LAST_PORT + 1))


class BenchError(Exception):
    """Why a measurement cannot be made."""


@dataclass(slots=True)
class Server:
    """One running server. `address` is host:port; `secret` what callers of our process present."""

    name: str
    address: str
    folder: Path
    process: "subprocess.Popen[bytes]"
    secret: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    def pause(self) -> None:
        """Stops it until `resume`, so that its background work is charged to its own turns only."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it run again."""
        self.process.send_signal(signal.SIGCONT)

    def cpu_s(self) -> float:
        """Seconds of processor time that it has used."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def http(self) -> "Http":
        """A connection of its own."""
        return Http(self.address, self.headers)


class Http:
    """One kept-alive connection; every answer but 2xx is an error."""

    def __init__(self, address: str, headers: dict[str, str]) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=HTTP_TIMEOUT_S)
        self._headers = headers

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
        """Sends a request and reads the whole answer."""
        self._connection.request(method, path, body, self._headers | headers)
        response = self._connection.getresponse()
        answer = response.read()
        if response.status // 100 != 2:
            raise BenchError(f"{method} {path[:80]}: {response.status} {answer[:300]!r}")
        return answer

    def get(self, path: str, **parameters: str | int) -> bytes:
        """GET with parameters."""
        return self.ask("GET", f"{path}?{urllib.parse.urlencode(parameters)}")

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


def missing() -> list[str]:
    """The peers whose programs are not on the PATH."""
    return [name for name, program in PROGRAMS.items() if shutil.which(program) is None]


@contextlib.contextmanager
def ours(
    folder: Path,
    *,
    module: str = "services.timeseries",
    settings: Mapping[str, str] = MappingProxyType({}),
    start_bound_s: float = START_BOUND_S,
) -> Iterator[Server]:
    """`python -m services.timeseries` with its defaults but for `settings`; its data lies in `folder`/timeseries."""
    address = f"127.0.0.1:{free_port()}"
    environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    environ |= dict.fromkeys(("TIMESERIES_RETENTION_RAW", "TIMESERIES_RETENTION_5M"), "1826d")  # fixed times grow old
    environ |= {"DATA_DIR": str(folder), "TIMESERIES_ADDRESS": address, "LOG_LEVEL": "WARNING", **settings}
    environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "gen")))
    with running(OURS, address, folder, [sys.executable, "-m", module], environ) as server:
        wait(server, lambda: serves(address), start_bound_s)
        server.secret = (folder / "service-secret").read_text("ascii").strip()
        yield server


@contextlib.contextmanager
def victoria(folder: Path) -> Iterator[Server]:
    """VictoriaMetrics. A long retention, since recordings are old, and lines of 511 fields are long."""
    address = f"127.0.0.1:{free_port()}"
    flags = [f"-storageDataPath={folder / 'data'}", f"-httpListenAddr={address}"]
    flags += ["-retentionPeriod=100y", "-influx.maxLineSize=4MB"]
    with running(VICTORIA, address, folder, [_program(VICTORIA), *flags], dict(os.environ)) as server:
        wait(server, lambda: b"OK" in _once(server, "GET", "/health"))
        yield server


@contextlib.contextmanager
def influx(folder: Path) -> Iterator[Server]:
    """InfluxDB 2 with one organization and bucket."""
    address = f"127.0.0.1:{free_port()}"
    flags = ["--bolt-path", str(folder / "bolt"), "--engine-path", str(folder / "engine")]
    flags += ["--sqlite-path", str(folder / "sqlite"), "--http-bind-address", address]
    flags += ["--reporting-disabled", "--log-level", "error"]
    with running(INFLUX, address, folder, [_program(INFLUX), *flags], dict(os.environ)) as server:
        wait(server, lambda: b"ready" in _once(server, "GET", "/ready"))
        account = {"username": "bench", "password": "bench-bench", "org": ORG, "bucket": BUCKET, "token": TOKEN}
        _once(server, "POST", "/api/v2/setup", orjson.dumps(account))
        server.headers["Authorization"] = f"Token {TOKEN}"
        yield server


@contextlib.contextmanager
def only(server: Server, others: Sequence[Server]) -> Iterator[None]:
    """While the block runs, the others are paused."""
    paused = [other for other in others if other is not server]
    for other in paused:
        other.pause()
    try:
        yield
    finally:
        for other in paused:
            other.resume()


def settle(servers: Sequence[Server], bound_s: float = 10.0) -> None:
    """Waits until the servers' background work is done: under 5 % of a core together for a second."""
    ends = time.monotonic() + bound_s
    while time.monotonic() < ends:
        before = sum(server.cpu_s() for server in servers)
        time.sleep(1.0)
        if sum(server.cpu_s() for server in servers) - before < 0.05:
            return


def disk_bytes(folder: Path) -> int:
    """What `du` says: bytes allocated to all files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a merge may end meanwhile
            total += path.lstat().st_blocks * 512 if path.is_file() else 0
    return total


@contextlib.contextmanager
def running(name: str, address: str, folder: Path, command: list[str], environ: dict[str, str]) -> Iterator[Server]:
    """A process for as long as the block runs; what it prints is in `folder`. It serves once `wait` has returned."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
    try:
        yield Server(name, address, folder, process)
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(STOP_BOUND_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _program(name: str) -> str:
    found = shutil.which(PROGRAMS[name])
    if found is None:
        raise BenchError(f"{PROGRAMS[name]} is not on the PATH")
    return found


def _once(server: Server, method: str, path: str, body: bytes | None = None) -> bytes:
    with contextlib.closing(server.http()) as connection:
        return connection.ask(method, path, body)


def wait(server: Server, answers: Callable[[], bool], bound_s: float = START_BOUND_S) -> None:
    """Returns once `answers()` is true; BenchError, with what the server printed, when it ends or takes too long."""
    ends = time.monotonic() + bound_s
    while True:
        with contextlib.suppress(OSError, BenchError, http.client.HTTPException):
            if answers():
                return
        if server.process.poll() is not None or time.monotonic() > ends:
            log = (server.folder / f"{server.name}.log").read_text(errors="replace")
            raise BenchError(f"{server.name} did not start: {log[-2000:]}")
        time.sleep(0.05)


def serves(address: str) -> bool:
    """Whether a gRPC server's health check says SERVING."""
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def free_port() -> int:
    """A port that was free a moment ago; not one that was given before, nor one that the kernel gives to outgoing
    connections, thousands of which a bench has (a gateway once found its own taken)."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _PORTS.remove(port)
            return port
    raise BenchError(f"no port from {FIRST_PORT} to {LAST_PORT} is free")
