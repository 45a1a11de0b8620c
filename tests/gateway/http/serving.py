"""A real HTTP server with fake servicers behind it, and a client that shows the bytes of an answer."""

import asyncio
import contextlib
import importlib
import math
import pkgutil
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import orjson
from starlette.routing import BaseRoute

from gateway.access.callers import Callers, exchange_authenticator
from gateway.access.origin import Origin
from gateway.access.policy import Policy
from gateway.admission import Admission
from gateway.http.app import Health, HttpApp, Refused, create_app
from gateway.http.guard import Guard
from gateway.http.server import serve_http
from openmanager.fleet.v1 import history_pb2, status_pb2
from openmanager.gateway import v1 as public
from openmanager.gateway.v1 import fleet_pb2, ingest_pb2, storage_pb2
from openmanager.gateway.v1 import history_pb2 as gateway_history_pb2
from runtime.clock import Clock
from runtime.errors import Internal, NotFound, Unavailable
from runtime.handlers import Bound, bind
from runtime.interception import Interception
from runtime.prepared import Prepared

PACKAGE = "openmanager.gateway.v1"


def _public() -> list[str]:
    """Every service of the package, whoever serves it."""
    names = [each.name for each in pkgutil.iter_modules(public.__path__) if each.name.endswith("_pb2")]
    files = [importlib.import_module(f"{PACKAGE}.{name}").DESCRIPTOR for name in names]
    return [service.name for file in files for service in file.services_by_name.values()]


SERVICES = tuple(_public())
METRICS = 511


def full_server(name: str = "server-1") -> fleet_pb2.Server:
    server = fleet_pb2.Server(id=name, hostname=f"{name}.example", status=status_pb2.SERVER_STATUS_HEALTHY)
    for index in range(METRICS):
        server.metrics[f"metric_{index}"] = index * 1.5
    server.observed_time.FromJsonString("2026-01-31T12:00:00Z")
    return server


def shared_server(etag: str) -> Prepared:
    return Prepared(fleet_pb2.GetServerResponse(server=full_server("shared")).SerializeToString(), etag=etag)


@dataclass
class FakeServicer:
    """Answers every public method in a way that a test can tell; remembers what it was asked."""

    requests: list[Any] = field(default_factory=list)
    contexts: list[Any] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)
    shared: Prepared = field(default_factory=lambda: shared_server("e-1"))
    ticks: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)

    def _saw(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.contexts.append(context)

    async def GetServer(self, request: Any, context: Any) -> Any:
        self._saw(request, context)
        if request.id == "missing":
            raise NotFound("no server missing", field="id")
        if request.id == "bug":
            raise ZeroDivisionError("a secret text")
        if request.id == "ready":
            return fleet_pb2.GetServerResponse(server=full_server()).SerializeToString()
        if request.id == "shared":
            context.set_trailing_metadata((("age", "3"),))
            return self.shared
        if request.id == "slow":
            self.running += 1
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.running -= 1
        if request.id == "busy":
            raise Unavailable("later", retry_after_s=1.5)
        return fleet_pb2.GetServerResponse(server=full_server(request.id))

    async def ListServers(self, request: Any, context: Any) -> Any:
        self._saw(request, context)
        return fleet_pb2.ListServersResponse()

    async def GetFleetSummary(self, request: Any, context: Any) -> Any:
        self._saw(request, context)
        return fleet_pb2.GetFleetSummaryResponse(summary=fleet_pb2.FleetSummary(total=2))

    async def WatchFleet(self, request: Any, context: Any) -> Any:
        self._saw(request, context)
        self.running += 1
        try:
            while True:
                message = await self.ticks.get()
                if isinstance(message, Exception):
                    raise message
                if message is None:
                    return
                yield message
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def CreateServer(self, request: Any, context: Any) -> Any:
        self._saw(request, context)
        return fleet_pb2.CreateServerResponse(server=request.server)

    async def UpdateServer(self, request: Any, context: Any) -> Any:
        self._saw(request, context)
        return fleet_pb2.UpdateServerResponse(server=request.server)

    async def DeleteServer(self, request: Any, context: Any) -> Any:
        self._saw(request, context)
        return fleet_pb2.DeleteServerResponse()

    async def UndeleteServer(self, request: Any, context: Any) -> Any:
        self._saw(request, context)
        return fleet_pb2.UndeleteServerResponse(server=fleet_pb2.Server(id=request.id))

    async def GetServerHistory(self, request: Any, context: Any) -> Any:
        self._saw(request, context)
        series = history_pb2.Series(server_id=request.server_id, metric="cpu_usage", times=[1.0], values=[math.nan])
        return gateway_history_pb2.GetServerHistoryResponse(series=[series])

    async def QueryHistory(self, request: Any, context: Any) -> Any:
        self._saw(request, context)
        if "refused" in request.metrics:
            raise NotFound("no such metric", field="metrics")
        for index in range(3):
            if index == 2 and "broken" in request.metrics:
                raise Internal("half-way", reason="BROKEN")
            yield gateway_history_pb2.QueryHistoryResponse(series=[history_pb2.Series(server_id=f"server-{index}")])
            if "endless" in request.metrics:
                await self.release.wait()

    async def WriteMetrics(self, requests: Any, context: Any) -> Any:
        async for request in requests:
            self._saw(request, context)
            yield ingest_pb2.WriteMetricsResponse(accepted_points=len(request.values), metric_set_id="set")

    async def GetStorageStatus(self, request: Any, context: Any) -> Any:
        self._saw(request, context)
        return storage_pb2.GetStorageStatusResponse(stores=[status_pb2.StoreStatus(name="engine")])


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return orjson.loads(self.body)

    def field(self) -> str:
        """The field at fault, and a check that the body is a google.rpc.Status."""
        details = {detail["@type"].rpartition("/")[2]: detail for detail in self.json()["details"]}
        violations = details["google.rpc.BadRequest"]["fieldViolations"]
        return str(violations[0]["field"])

    def reason(self) -> str:
        return str(self.json()["details"][0]["reason"])


@dataclass
class Served:
    """A running server."""

    app: HttpApp
    servicer: FakeServicer
    stopping: asyncio.Event
    task: "asyncio.Task[None]"
    address: str = ""

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)

    async def send(
        self, verb: str, target: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Sends one request on a connection of its own."""
        lines = {"host": f"127.0.0.1:{self.port}"} | ({} if body is None else {"content-type": "application/json"})
        lines |= {"content-length": str(len(body))} if body is not None else {}
        lines |= headers or {}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
        reader, writer = await self.open()
        writer.write(f"{verb} {target} HTTP/1.1\r\n{head}\r\n".encode() + (body or b""))
        await writer.drain()
        return reader, writer

    async def call(self, verb: str, target: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """One whole request and its answer."""
        raw = body if body is None or isinstance(body, bytes) else orjson.dumps(body)
        reader, writer = await self.send(verb, target, raw, {"connection": "close"} | (headers or {}))
        try:
            return await read_answer(reader, with_body=verb != "HEAD")
        finally:
            writer.close()

    async def get(self, target: str, **headers: str) -> Answer:
        return await self.call("GET", target, headers={name.replace("_", "-"): text for name, text in headers.items()})


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.split(": ", 1) for line in head[1:] if line)
    return int(head[0].split()[1]), {name.lower(): value for name, value in pairs}


async def read_chunk(reader: asyncio.StreamReader) -> bytes:
    """One chunk of a chunked body; b"" at its end."""
    size = int((await reader.readuntil(b"\r\n")).strip(), 16)
    return (await reader.readexactly(size + 2))[:-2]


async def read_answer(reader: asyncio.StreamReader, *, with_body: bool = True) -> Answer:
    status, headers = await read_head(reader)
    body = b""
    if with_body and headers.get("transfer-encoding") == "chunked":
        while chunk := await read_chunk(reader):
            body += chunk
    elif with_body and status != 304:
        body = await reader.readexactly(int(headers["content-length"]))
    return Answer(status, headers, body)


def bound_services(servicer: object, others: Mapping[str, object] | None = None) -> list[Bound]:
    """All public services on one servicer, but for those that have another."""
    return [bind(f"{PACKAGE}.{name}", (others or {}).get(name, servicer)) for name in SERVICES]


@contextlib.asynccontextmanager
async def serving(
    *,
    token: str | None = None,
    health: Health | None = None,
    clock: Clock | None = None,
    extra: Sequence[BaseRoute] = (),
    interception: Interception | None = None,
    admission: Admission | None = None,
    servicers: Mapping[str, object] | None = None,
    origin: Origin | None = None,
    refused: Refused | None = None,
    callers: Callers | None = None,
    **options: Any,
) -> AsyncIterator[Served]:
    """Serves every public service on a free port until the block ends; `servicers`: real ones, by service."""
    servicer = FakeServicer()
    callers = callers or Callers(token, None, origin=origin)
    services = bound_services(servicer, servicers)
    policy = Policy(services)
    app = create_app(
        services,
        interception=interception or Interception(exchange_authenticator(callers, policy)),
        guard=Guard(callers),
        policy=policy,
        health=lambda: health or Health(ready=True),
        metrics=lambda: b"up 1\n",
        clock=clock,
        extra=extra,
        admission=admission,
        refused=refused,
    )
    stopping = asyncio.Event()
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    chosen: dict[str, Any] = {"address": "127.0.0.1:0", "grace_s": 2.0} | options
    task = asyncio.create_task(serve_http(app, stopping=stopping, bound=listening.set_result, **chosen))
    served = Served(app=app, servicer=servicer, stopping=stopping, task=task)
    try:
        await asyncio.wait([task, cast("asyncio.Future[Any]", listening)], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        served.address = listening.result()
        yield served
    finally:
        stopping.set()
        servicer.release.set()
        await asyncio.wait({task}, timeout=10)
        await task
