"""What a test of hostile clients watches: the memory of the gateway's process, and another client who is served.

Memory is what the kernel says of the process: how much it holds, and the most that it held since the watch began. A
bound is for both together with what the gateway does otherwise meanwhile, so it is generous; what it must not do is to
grow with the attack.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, Self

from openmanager.gateway.v1 import fleet_pb2, fleet_pb2_grpc
from runtime.channel import Channel
from tests.harness import eventually
from tests.harness.product import Product

SERVER: Final = "served"
METRICS: Final = 511
VALUE: Final = 42.0
CALL_WITHIN_S: Final = 20.0
"""One call of the other client. It is checked that it is answered, not how fast: the attack has the same processors."""


class Memory:
    """Of one process, in MiB."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")

    def _read(self, name: str) -> int:
        for line in (self._folder / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) >> 10
        raise AssertionError(f"the kernel says no {name}")

    @property
    def held(self) -> int:
        """Now."""
        return self._read("VmRSS")

    @property
    def peak(self) -> int:
        """The most since `forget_peak`."""
        return self._read("VmHWM")

    def forget_peak(self) -> None:
        """The peak counts from now on."""
        (self._folder / "clear_refs").write_text("5")


class OtherClient:
    """Asks for a server over gRPC and over HTTP, again and again, each over a connection that it keeps."""

    def __init__(self, product: Product) -> None:
        self._bearer = bearer(product)
        self._channel = Channel(product.addresses["gateway"])
        self._address = product.http_address
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._asking: list[asyncio.Task[None]] = []
        self.answers = {"gRPC": 0, "HTTP": 0}

    async def __aenter__(self) -> Self:
        self._asking = [asyncio.create_task(self._again("gRPC", self.ask_grpc))]
        self._asking.append(asyncio.create_task(self._again("HTTP", self.ask_http)))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._asking:
            task.cancel()
        await asyncio.wait(self._asking)
        await self._channel.close()
        if self._stream is not None:
            self._stream[1].close()

    async def _again(self, name: str, ask: Any) -> None:
        while True:
            async with asyncio.timeout(CALL_WITHIN_S):
                await ask()
            self.answers[name] += 1
            await asyncio.sleep(0.01)

    async def ask_grpc(self) -> None:
        """One call."""
        stub = fleet_pb2_grpc.FleetServiceStub(self._channel.grpc)
        metadata = tuple(self._bearer.items())
        answer = await stub.GetServer(fleet_pb2.GetServerRequest(id=SERVER), timeout=CALL_WITHIN_S, metadata=metadata)
        check(dict(answer.server.metrics))

    async def ask_http(self) -> None:
        """One request."""
        if self._stream is None:
            host, port = self._address.rsplit(":", 1)
            self._stream = await asyncio.open_connection(host, int(port))
        reader, writer = self._stream
        lines = "".join(f"{name}: {value}\r\n" for name, value in {"host": self._address, **self._bearer}.items())
        writer.write(f"GET /v1/servers/{SERVER} HTTP/1.1\r\n{lines}\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        assert head.startswith("http/1.1 200 "), head
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        check(json.loads(await reader.readexactly(length))["metrics"])

    async def is_served(self) -> None:
        """Waits until both kinds of call were answered again; raises what went wrong with one meanwhile."""
        before = dict(self.answers)

        def again() -> bool:
            for task in self._asking:
                if task.done():
                    task.result()
            return all(self.answers[name] > count for name, count in before.items())

        await eventually(again, within_s=2 * CALL_WITHIN_S)


def bearer(product: Product) -> dict[str, str]:
    """The header of the token, when the gateway has one."""
    token = product.environ.get("GATEWAY_TOKEN")
    return {} if token is None else {"authorization": f"Bearer {token}"}


def check(metrics: dict[str, float]) -> None:
    """Whether an answer is the whole server."""
    assert len(metrics) == METRICS and set(metrics.values()) == {VALUE}, metrics


class Attacked:
    """A gateway with what it needs behind it."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self.memory = Memory(product.running["gateway"].pid)
        self.http = product.http_address
        self.grpc = product.addresses["gateway"]

    async def write(self, value: float, servers: int = 1) -> None:
        """One row for each of so many servers; of the one that the other client asks for, always the same."""
        rows = [{"serverId": f"server-{number}", "time": time.time()} for number in range(servers - 1)]
        values = [VALUE] * METRICS + [value] * METRICS * (servers - 1)
        body = {
            "metrics": [{"name": f"metric_{number}"} for number in range(METRICS)],
            "rows": [{"serverId": SERVER, "time": time.time()}, *rows],
            "values": values,
        }
        answer = await self.product.http("/v1/metrics:write", body=body, headers=bearer(self.product))
        assert answer.status == 200 and answer.json["acceptedPoints"] == len(values), answer.body

    async def shows(self, value: float) -> bool:
        """Whether the rows of `write` are in the live state."""
        answer = await self.product.http("/v1/servers/server-0", headers=bearer(self.product))
        return answer.status == 200 and bool(answer.json["metrics"].get("metric_0") == value)

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the HTTP port."""
        host, port = self.http.rsplit(":", 1)
        return await asyncio.open_connection(host, int(port))

    @contextlib.asynccontextmanager
    async def endures(self, grows_by_mb: int, *, afterwards_mb: int | None = None) -> AsyncIterator[OtherClient]:
        """Inside is the attack: the other client is served before, meanwhile and afterwards, and memory is bounded.

        `grows_by_mb` bounds the most that the process holds meanwhile, `afterwards_mb` what is left of that some time
        after the attack, both above what it held before.
        """
        async with OtherClient(self.product) as other:
            await other.is_served()
            self.memory.forget_peak()
            before = self.memory.held
            yield other
            await other.is_served()
            assert self.memory.peak - before <= grows_by_mb, f"{self.memory.peak} MiB, {before} before"
            if afterwards_mb is not None:
                await eventually(lambda: self.memory.held - before <= afterwards_mb, within_s=20)


@contextlib.asynccontextmanager
async def attacked(folder: Path, **settings: str) -> AsyncIterator[Attacked]:
    """Runs one."""
    async with Product(folder, **settings) as product:
        await product.start("timeseries", "cache", "gateway")
        target = Attacked(product)
        await target.write(VALUE)
        await eventually(lambda: _has_all(product), within_s=20)
        yield target


async def _has_all(product: Product) -> bool:
    answer = await product.http(f"/v1/servers/{SERVER}", headers=bearer(product))
    return answer.status == 200 and len(answer.json["metrics"]) == METRICS
