"""The metadata service as a real process, and a client of it."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from openmanager.fleet.v1 import metric_pb2, status_pb2, status_pb2_grpc
from openmanager.gateway.v1 import ai_pb2, ai_pb2_grpc
from openmanager.metadata.v1 import interaction_pb2
from openmanager.metadata.v1 import metadata_pb2 as pb
from openmanager.metadata.v1 import metadata_pb2_grpc as pb_grpc
from runtime.channel import Channel, calling
from runtime.errors import DeadlineExceeded, OpenManagerError, Unavailable
from tests.harness import eventually, free_port

ROOT = Path(__file__).resolve().parents[2]
SECRET = "a-secret-for-this-test"
UP, DOWN = status_pb2.STORE_STATE_UP, status_pb2.STORE_STATE_DOWN
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "PATH": os.environ["PATH"], "SERVICE_SECRET": SECRET}


class Service:
    """One process of `python -m services.metadata` and a client of it."""

    def __init__(self, data_dir: Path, **environment: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._environment = ENVIRONMENT | {"DATA_DIR": str(data_dir), "METADATA_ADDRESS": self.address} | environment
        self.log = data_dir / "service.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.metadata"], cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )
        self.channel = Channel(self.address, secret=SECRET, default_deadline_s=9.0)
        self.servers = pb_grpc.ServerRegistryServiceStub(self.channel.grpc)
        self.interactions = ai_pb2_grpc.AiInteractionServiceStub(self.channel.grpc)
        self.stores = status_pb2_grpc.StoreStatusServiceStub(self.channel.grpc)

    async def healthy(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-2_000:]
        async with grpc.aio.insecure_channel(self.address) as channel:
            with contextlib.suppress(grpc.RpcError):
                request = health_pb2.HealthCheckRequest(service="openmanager.metadata.v1.ServerRegistryService")
                answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=1.0)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        return False

    async def size(self) -> int:
        try:
            async with calling("metadata"):
                return int((await self.servers.ListServerRecords(pb.ListServerRecordsRequest())).total_size)
        except Unavailable:
            return -1

    async def status(self) -> status_pb2.StoreStatus:
        async with calling("metadata"):
            answer = await self.stores.ListStoreStatuses(status_pb2.ListStoreStatusesRequest())
        (store,) = answer.stores
        return store

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60.0)


@contextlib.asynccontextmanager
async def running(data_dir: Path, **environment: str) -> AsyncIterator[Service]:
    service = Service(data_dir, **environment)
    try:
        await eventually(service.healthy, 60.0)
        yield service
    except BaseException:
        sys.stderr.write(service.log.read_text()[-6_000:])
        raise
    finally:
        await service.channel.close()
        if service.process.poll() is None:
            service.process.kill()
            service.process.wait()


def postmasters(data_dir: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if str(data_dir.resolve() / "metadata" / "postgresql") in process.cmdline():
                found.append(process)
    return found


def server(server_id: str, **fields: str) -> metric_pb2.ServerDescriptor:
    return metric_pb2.ServerDescriptor(server_id=server_id, **fields)


class Recorder:
    """Records interactions without a pause and remembers which were acknowledged, and what went wrong."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.acknowledged: list[str] = []
        self.failures: list[str] = []
        self.longest_s = 0.0
        self._stopping = False

    async def record(self, **fields: Any) -> str:
        """One of them."""
        started = time.monotonic()
        request = ai_pb2.RecordInteractionRequest(interaction=interaction_pb2.Interaction(query="why?", **fields))
        async with calling("metadata"):
            stored = (await self.service.interactions.RecordInteraction(request)).interaction
        self.longest_s = max(self.longest_s, time.monotonic() - started)
        self.acknowledged.append(stored.id)
        return str(stored.id)

    async def run(self) -> None:
        """Goes on until the block of `going_on` ends; the last call has its answer."""
        while not self._stopping:
            try:
                await self.record()
            except OpenManagerError as error:
                self.failures.append(str(error))
            await asyncio.sleep(0.01)  # a sender's pace

    @contextlib.asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """Beside a block."""
        task = asyncio.create_task(self.run())
        try:
            yield
        finally:
            self._stopping = True
            await task


async def caught_up(service: Service, within_s: float = 30.0) -> status_pb2.StoreStatus:
    """Waits until the database has everything; returns that status."""

    async def up() -> status_pb2.StoreStatus | None:
        status = await service.status()
        return status if status.state == UP and status.lag_points == 0 else None

    return await eventually(up, within_s)


async def registers(service: Service, server_id: str) -> bool:
    """Whether a server can be written to the database now."""
    try:
        async with calling("metadata"):
            await service.servers.RegisterServers(pb.RegisterServersRequest(servers=[server(server_id)]))
    except (Unavailable, DeadlineExceeded):
        return False
    return True
