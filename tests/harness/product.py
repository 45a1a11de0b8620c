"""The real product for tests: its own processes, on free ports, in a folder of its own."""

import asyncio
import json
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime.channel import Channel
from tests.harness import eventually, free_port
from tests.harness.cluster import begin_with_cluster

ROOT = Path(__file__).resolve().parents[2]
START_WITHIN_S = 60.0
ADDRESSES = {
    "metadata": "METADATA_ADDRESS",
    "timeseries": "TIMESERIES_ADDRESS",
    "cache": "CACHE_ADDRESS",
    "simulator": "SIMULATOR_ADDRESS",
    "analytics": "ANALYTICS_ADDRESS",
    "gateway": "GATEWAY_GRPC_ADDRESS",
}
TARGETS = {
    "metadata": "METADATA_TARGET",
    "timeseries": "TIMESERIES_TARGET",
    "cache": "CACHE_TARGET",
    "simulator": "SIMULATOR_TARGET",
    "analytics": "ANALYTICS_TARGET",
}
KEPT_VARIABLES = ("PYTHONPATH", "PATH", "HOME", "LANG", "CI")


@dataclass(slots=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Product:
    """Processes of the product; ``start`` those that a test needs, ``kill`` what it wants to see die."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.addresses = {name: f"127.0.0.1:{free_port()}" for name in ADDRESSES}
        self.http_address = f"127.0.0.1:{free_port()}"
        self.environ = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        self.environ |= {"DATA_DIR": str(folder / "data"), "GATEWAY_HTTP_ADDRESS": self.http_address}
        self.environ |= {variable: self.addresses[name] for name, variable in ADDRESSES.items()}
        self.environ |= {variable: self.addresses[name] for name, variable in TARGETS.items()}
        self.environ |= settings
        self.running: dict[str, asyncio.subprocess.Process] = {}

    async def start(self, *names: str, prefix: Iterable[str] = ()) -> None:
        """Starts processes and waits until they serve.

        Args:
            names: of ADDRESSES.
            prefix: put before the command, for example strace and its flags.
        """
        if "metadata" in names and "DATABASE_URL" not in self.environ:
            await asyncio.to_thread(begin_with_cluster, Path(self.environ["DATA_DIR"]))
        for name in names:
            module = "gateway" if name == "gateway" else f"services.{name}"
            with self.log(name).open("ab") as log:
                self.running[name] = await asyncio.create_subprocess_exec(
                    *prefix, sys.executable, "-m", module, cwd=ROOT, env=self.environ, stdout=log, stderr=log
                )
        for name in names:
            await eventually(lambda name=name: self.serves(name), within_s=START_WITHIN_S)

    async def serves(self, name: str) -> bool:
        """Whether a process answers its health check; fails when it has ended instead."""
        process = self.running[name]
        assert process.returncode is None, (
            f"{name} ended with {process.returncode}:\n{self.log(name).read_text()[-4000:]}"
        )
        async with grpc.aio.insecure_channel(self.addresses[name]) as channel:
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
            except grpc.aio.AioRpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def kill(self, *names: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to processes, all before waiting for any."""
        processes = [self.running.pop(name) for name in names]
        for process in processes:
            process.send_signal(how)
        for process in processes:
            await process.wait()

    def log(self, name: str) -> Path:
        """Where a process writes what it prints."""
        return self.folder / f"{name}.log"

    @property
    def secret(self) -> str:
        """The secret of the inner services."""
        set_one = self.environ.get("SERVICE_SECRET")
        return set_one or (self.folder / "data" / "service-secret").read_text().strip()

    def channel(self, name: str) -> Channel:
        """Calls to a process, with the service secret."""
        return Channel(self.addresses[name], secret=None if name == "gateway" else self.secret)

    async def http(
        self, path: str, *, body: Any = None, method: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Asks the gateway over HTTP; an error status is an answer too."""
        return await asyncio.to_thread(http, f"http://{self.http_address}{path}", body, method, dict(headers or {}))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        writers = [name for name in ("simulator", "gateway", "analytics") if name in self.running]
        await self.kill(*writers, how=signal.SIGTERM)
        await self.kill(*list(self.running), how=signal.SIGTERM)


def http(url: str, body: Any = None, method: str | None = None, headers: Mapping[str, str] | None = None) -> Answer:
    """One HTTP request; a body that is no bytes is sent as JSON."""
    sent = {"content-type": "application/json"} if body is not None else {}
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method, headers=sent | dict(headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return Answer(response.status, response.read(), dict(response.headers))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.read(), dict(error.headers))
