"""The product under measurement: its own processes with their defaults, on free ports, in a folder of its own.

Tracing is off, as shipped without OTEL_EXPORTER_OTLP_ENDPOINT; the token is set, so that it is checked; the level of
the logs is the default one. What must stay true: the inner services serve several gateways one after the other, each in
a data folder of its own; nothing of the environment gets in but what a process needs to start.
"""

import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import grpc
import numpy as np
import psutil

from bench.load import SERVERS, Mix
from bench.peers import ROOT, START_BOUND_S, BenchError, Server, free_port, running, serves, wait
from fleet.codec import descriptor_to_pb, metric_to_pb, rows_to_pb, timestamp_from_ms
from fleet.model import Rows
from openmanager.gateway.v1 import fleet_pb2, fleet_pb2_grpc, ingest_pb2, ingest_pb2_grpc

INNER: Final = {"metadata": "METADATA", "timeseries": "TIMESERIES", "cache": "CACHE"}
"""The services that a gateway is started with; nobody calls the simulator or analytics here."""
TOKEN: Final = "the-token-of-the-bench"
CALL_BOUND_S: Final = 20.0
START_GATEWAY_BOUND_S: Final = 2 * START_BOUND_S
CHANNEL_OPTIONS: Final = (("grpc.enable_http_proxy", 0),)
BEARER: Final = (("authorization", f"Bearer {TOKEN}"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """The running services behind the gateway, by name, and the secret they want."""

    folder: Path
    environ: Mapping[str, str]
    services: Mapping[str, Server]
    secret: str


@dataclass(slots=True, kw_only=True)
class Gateway:
    """A running gateway; `mix` is the fleet that it is told of."""

    server: Server
    http_address: str
    inner: Inner
    mix: Mix = field(default_factory=lambda: Mix(SERVERS))

    @property
    def address(self) -> str:
        """Where it serves gRPC."""
        return self.server.address

    @property
    def processes(self) -> list[Server]:
        """It and what is behind it."""
        return [self.server, *self.inner.services.values()]


@contextmanager
def inner_services(folder: Path) -> Iterator[Inner]:
    """cache, timeseries and metadata (with its embedded PostgreSQL)."""
    secret = secrets.token_hex(16)
    addresses = {name: f"127.0.0.1:{free_port()}" for name in INNER}
    environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "gen")))
    environ["SERVICE_SECRET"] = secret
    for name, prefix in INNER.items():
        environ |= {f"{prefix}_ADDRESS": addresses[name], f"{prefix}_TARGET": addresses[name]}
    for prefix in ("SIMULATOR", "ANALYTICS"):
        environ[f"{prefix}_TARGET"] = f"127.0.0.1:{free_port()}"
    own = environ | {"DATA_DIR": str(folder / "data")}
    with ExitStack() as stack:
        services = {
            name: stack.enter_context(_python(name, addresses[name], folder, f"services.{name}", own)) for name in INNER
        }
        for service in services.values():
            wait(service, lambda service=service: serves(service.address), START_GATEWAY_BOUND_S)  # type: ignore[misc]
        yield Inner(folder=folder, environ=environ, services=services, secret=secret)


@contextmanager
def gateway(
    inner: Inner, name: str, *, module: str = "gateway", settings: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Gateway]:
    """`python -m gateway` in front of the services; it knows the fleet once `tell` has been called.

    Args:
        inner: the services.
        name: of its data folder and its log; each used once.
        module: what is run instead.
        settings: variables that are not the default.
    """
    address, http_address = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    environ = dict(inner.environ) | {
        "DATA_DIR": str(inner.folder / name),
        "GATEWAY_GRPC_ADDRESS": address,
        "GATEWAY_HTTP_ADDRESS": http_address,
        "GATEWAY_TOKEN": TOKEN,
        **settings,
    }
    with _python(name, address, inner.folder, module, environ) as server:
        wait(server, lambda: serves(address), START_GATEWAY_BOUND_S)
        yield Gateway(server=server, http_address=http_address, inner=inner)


@contextmanager
def _python(
    name: str, address: str, folder: Path, module: str, environ: Mapping[str, str], *arguments: str
) -> Iterator[Server]:
    command = [sys.executable, "-m", module, *arguments]
    with running(name, address, folder, command, dict(environ)) as server:
        yield server


@contextmanager
def beside(inner: Inner, name: str, address: str, module: str, *arguments: str) -> Iterator[Server]:
    """Another Python process, such as a yardstick, with the same environment; the caller waits until it serves."""
    with _python(name, address, inner.folder, module, inner.environ, *arguments) as server:
        yield server


@contextmanager
def paused(servers: Sequence[Server]) -> Iterator[None]:
    """While the block runs, these stand still, so that their background work is charged to their own turns."""
    for server in servers:
        server.pause()
    try:
        yield
    finally:
        for server in servers:
            server.resume()


def tick_request(mix: Mix, tick: int, time_ms: int, *, first: bool) -> ingest_pb2.WriteMetricsRequest:
    """One tick of the fleet, measured at `time_ms`, as an agent writes it; the first of a stream tells the columns."""
    ids = mix.server_ids
    times = np.full(len(ids), time_ms, np.int64)
    rows = Rows(metric_set_id=mix.metric_set.id, server_ids=ids, times_ms=times, values=mix.values(tick))
    # WriteMetricsRequest begins with the fields of MetricBatch under the same numbers
    request = ingest_pb2.WriteMetricsRequest.FromString(rows_to_pb(rows).SerializeToString())
    if first:
        request.metrics.extend(metric_to_pb(metric) for metric in mix.metric_set.metrics)
        request.servers.extend(descriptor_to_pb(server) for server in mix.servers)
    return request


def tell(running_gateway: Gateway, tick: int, time_ms: int) -> float:
    """Writes one tick through the gateway, and returns once all of it shows in what the gateway answers.

    Returns when it was acknowledged, by time.monotonic().
    """
    mix = running_gateway.mix
    with grpc.insecure_channel(running_gateway.address, CHANNEL_OPTIONS) as channel:
        ingest: Any = ingest_pb2_grpc.IngestServiceStub(channel)
        fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)
        request = tick_request(mix, tick, time_ms, first=True)
        [answer] = ingest.WriteMetrics(iter([request]), metadata=BEARER, timeout=CALL_BOUND_S)
        acknowledged_s = time.monotonic()
        if answer.accepted_points != mix.tick_points:
            raise BenchError(f"{answer.accepted_points} of {mix.tick_points} points were accepted: {answer.errors[:1]}")
        observed = timestamp_from_ms(time_ms)

        def shows() -> bool:
            listed = fleet.ListServers(fleet_pb2.ListServersRequest(), metadata=BEARER, timeout=CALL_BOUND_S)
            return [server.observed_time for server in listed.servers].count(observed) == len(mix.servers)

        wait(running_gateway.server, shows, CALL_BOUND_S)
    return acknowledged_s


def tree_cpu_s(servers: Sequence[Server]) -> float:
    """Seconds of processor time that processes and their children have used."""
    used = 0.0
    for server in servers:
        root = psutil.Process(server.process.pid)
        for process in (root, *root.children(recursive=True)):
            times = process.cpu_times()
            used += times.user + times.system
    return used
