"""One trace from an HTTP request to the store behind each service, and from a tick of the simulator to the journal."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest_asyncio
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import gateway.__main__ as gateway
import services.cache.__main__ as cache
import services.metadata.__main__ as metadata
import services.simulator.__main__ as simulator
import services.timeseries.__main__ as timeseries
from gateway.settings import GatewaySettings
from runtime import telemetry
from runtime.process import Process
from services.cache.settings import CacheSettings
from services.metadata.settings import MetadataSettings
from services.simulator.settings import SimulatorSettings
from services.timeseries.settings import TimeSeriesSettings
from tests.harness import eventually, free_port
from tests.harness.product import ADDRESSES, TARGETS, http
from tests.harness.redis import redis_server

PROCESSES: dict[str, tuple[Any, Any]] = {
    "metadata": (MetadataSettings, metadata.serve),
    "cache": (CacheSettings, cache.serve),
    "timeseries": (TimeSeriesSettings, timeseries.serve),
    "gateway": (GatewaySettings, gateway.serve),
    "simulator": (SimulatorSettings, simulator.serve),
}


class Traced:
    """All processes of the product in this one, their spans in memory."""

    def __init__(self, url: str, spans: InMemorySpanExporter) -> None:
        self.url = url
        self._spans = spans

    async def ask(self, path: str, body: Any = None) -> None:
        """One request of ours; it is the root of its trace."""
        self._spans.clear()
        answer = await asyncio.to_thread(http, self.url + path, body)
        assert answer.status == 200, answer.body

    async def path(self, root: str, *below: str) -> None:
        """Waits for a chain of spans: a root of this name, a descendant, a descendant of that, ..."""

        def there() -> bool:
            spans = self._spans.get_finished_spans()
            return any(chain(spans, span, below) for span in spans if span.name == root and span.parent is None)

        try:
            await eventually(there, within_s=20)
        except AssertionError:
            raise AssertionError(drawn(self._spans.get_finished_spans())) from None


def children(spans: Any, span: ReadableSpan) -> list[ReadableSpan]:
    assert span.context is not None
    return [other for other in spans if other.parent is not None and other.parent.span_id == span.context.span_id]


def chain(spans: Any, span: ReadableSpan, below: tuple[str, ...]) -> bool:
    """Whether the names are found one below the other, other spans between them allowed."""
    if not below:
        return True
    return any(
        chain(spans, child, below[1:]) if child.name == below[0] else chain(spans, child, below)
        for child in children(spans, span)
    )


def drawn(spans: Any) -> str:
    """The trees of all spans, to be read by people."""

    def lines(span: ReadableSpan, depth: int) -> list[str]:
        return ["  " * depth + span.name] + [
            line for child in children(spans, span) for line in lines(child, depth + 1)
        ]

    known = {span.context.span_id for span in spans if span.context}
    tops = [span for span in spans if span.parent is None or span.parent.span_id not in known]
    return "\n".join(line for span in tops for line in lines(span, 0))


@pytest_asyncio.fixture
async def product(tmp_path: Path) -> AsyncIterator[Traced]:
    spans = InMemorySpanExporter()
    addresses = {name: f"127.0.0.1:{free_port()}" for name in ADDRESSES}
    web = f"127.0.0.1:{free_port()}"
    environ = {"DATA_DIR": str(tmp_path / "data"), "GATEWAY_HTTP_ADDRESS": web, "SIMULATOR_INTERVAL": "1s"}
    environ |= {variable: addresses[name] for name, variable in ADDRESSES.items()}
    environ |= {variable: addresses[name] for name, variable in TARGETS.items()}
    async with redis_server() as redis:
        environ |= {"REDIS_URL": redis.url, "SIMULATOR_SERVERS": "3"}
        telemetry.configure("openmanager-test", exporter=spans)
        running: list[tuple[Process[Any], asyncio.Task[None]]] = []
        try:
            for name, (settings_class, serve) in PROCESSES.items():
                settings = settings_class.load(environ)
                process: Process[Any] = Process(name, settings)
                process.folder.mkdir(parents=True, exist_ok=True)
                running.append((process, asyncio.create_task(serve(settings, process), name=name)))
            await eventually(ready(f"http://{web}"), within_s=60)
            yield Traced(f"http://{web}", spans)
        finally:
            for process, task in reversed(running):
                process.stopping.set()
                await task
            telemetry.shutdown()


def ready(url: str) -> Callable[[], Any]:
    async def asked() -> bool:
        try:
            listed = await asyncio.to_thread(http, f"{url}/v1/servers")
            stores = await asyncio.to_thread(http, f"{url}/v1/storage/status")
        except OSError:
            return False
        if listed.status != 200 or stores.status != 200:
            return False
        states = [store["state"] for store in stores.json["stores"]]
        return listed.json["totalSize"] == 3 and states == ["STORE_STATE_UP"] * 3

    return asked


async def test_requests_and_ticks_are_traced_down_to_the_stores(product: Traced) -> None:
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    append = "/openmanager.timeseries.v1.TimeSeriesService/Append"
    update = "/openmanager.cache.v1.CacheService/UpdateServers"

    await product.path("simulator.tick", "fleet.write", append, append, "journal.commit")
    await product.path("simulator.tick", "fleet.write", update, update)

    await product.ask(
        "/v1/metrics:write",
        {"metrics": [{"name": "m"}], "rows": [{"serverId": "t-1", "time": moment}], "values": [1]},
    )
    await product.path("POST /v1/metrics:write", "fleet.write", append, append, "journal.commit")

    await product.ask("/v1/servers/t-1/history?metric=m&start_time=-5m")
    query = "/openmanager.timeseries.v1.TimeSeriesService/QueryOnce"
    await product.path("GET /v1/servers/{server_id}/history", query, query, "engine.query")

    await product.ask("/v1/servers", {"id": "t-2"})
    create = "/openmanager.metadata.v1.ServerRegistryService/CreateServerRecord"
    await product.path("POST /v1/servers", create, create, "INSERT")
    await product.path("POST /v1/servers", update, update)
