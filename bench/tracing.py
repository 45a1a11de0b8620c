"""What tracing costs: calls a second of one unary method with tracing off, everything sampled, and little of it.

    python -m bench.tracing [--rounds N] [--seconds S] [--output FILE]

One server process a mode, as a service ships it (uvloop, token check, access log, deadline), answers `GetServer` with
the same ready bytes: a server with 511 metrics, 18 KB. h2load asks, 50 calls in flight, each mode for some seconds in
turn, round after round; the ratio of a round is to that round's "off". The server's processor time a call is told
beside it, since a busy machine disturbs that less. Spans go by OTLP to a sink here that counts.

What must stay true: h2load takes any HTTP 200 for a success, so before and after the rounds a gRPC client reads the
whole answer of every server; a mode counts only if the sink got the spans that it must have got, and no others.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from bench.meter import usage
from bench.peers import ROOT, BenchError
from openmanager.gateway.v1 import fleet_pb2
from runtime import telemetry
from runtime.interception import Interception, service_secret_authenticator
from runtime.prepared import Prepared
from runtime.server import GrpcServer, bind
from runtime.tracing import TRACEPARENT

CONNECTIONS: Final = 10
STREAMS: Final = 5
METRICS: Final = 511
SERVICE: Final = "openmanager.gateway.v1.FleetService"
METHOD: Final = f"/{SERVICE}/GetServer"
SECRET: Final = "the-token-of-the-bench"
OFF: Final = "off"
FLUSH_BOUND_S: Final = 20.0

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One way to run the server. `share`: of the calls, how many become spans; `headers`: what each call sends."""

    name: str
    share: float
    environ: Mapping[str, str] = field(default_factory=dict)
    headers: Headers = ()


MODES: Final = (
    Mode(name=OFF, share=0.0),
    Mode(name="all sampled", share=1.0),
    Mode(
        name="1 % sampled",
        share=0.01,
        environ={"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"},
    ),
    Mode(
        name="caller does not sample",
        share=0.0,
        headers=((TRACEPARENT, "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"),),
    ),
)


@dataclass(slots=True, kw_only=True)
class Found:
    """Of one mode: calls a second and processor seconds a call, by round; calls in all, and their spans in the sink."""

    rates: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    calls: int = 0
    spans: int = 0


def ready_answer() -> bytes:
    """A server with 511 metrics, as the live state keeps it."""
    server = fleet_pb2.Server(id="server-01", hostname="server-01.example")
    for index in range(METRICS):
        server.metrics[f"metric_{index:03}_usage_percent"] = index * 1.37
    return fleet_pb2.GetServerResponse(server=server).SerializeToString()


class _Servicer:
    def __init__(self) -> None:
        self._answer = Prepared(ready_answer())

    def GetServer_at_once(self, _request: Any, _who: Any) -> Prepared:
        return self._answer

    async def GetServer(self, request: Any, _context: Any) -> Prepared:
        return self.GetServer_at_once(request, None)


async def serve(endpoint: str | None) -> None:
    """Serves until standard input ends; prints the address."""
    telemetry.configure("bench", prometheus=True)  # as the gateway; first, so that metrics cost the same in each mode
    telemetry.configure("bench", endpoint)
    server = GrpcServer([bind(SERVICE, _Servicer())], Interception(service_secret_authenticator(SECRET)))
    print(await server.start("127.0.0.1:0"), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)
    telemetry.shutdown()


class Sink:
    """An OTLP collector that counts spans by the process that sent them."""

    def __init__(self) -> None:
        self.spans: dict[str, int] = {}
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        kind = trace_service_pb2.ExportTraceServiceRequest
        handler = grpc.unary_unary_rpc_method_handler(
            self._export, kind.FromString, trace_service_pb2.ExportTraceServiceResponse.SerializeToString
        )
        service = "opentelemetry.proto.collector.trace.v1.TraceService"
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": handler}),))
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _export(self, request: Any, _context: Any) -> Any:
        for resource in request.resource_spans:
            (mode,) = (one.value.string_value for one in resource.resource.attributes if one.key == "bench.mode")
            count = sum(len(scope.spans) for scope in resource.scope_spans)
            self.spans[mode] = self.spans.get(mode, 0) + count
        return trace_service_pb2.ExportTraceServiceResponse()

    def close(self) -> None:
        self._server.stop(0).wait()


@contextlib.contextmanager
def _running(mode: Mode, endpoint: str) -> Iterator[tuple[str, int]]:
    """A server process of a mode; gives its address and process id, and at the end lets it send what it has."""
    command = [sys.executable, "-m", "bench.tracing", "serve"]
    command += [] if mode.name == OFF else [endpoint]
    environ = os.environ | {"OTEL_RESOURCE_ATTRIBUTES": f"bench.mode={mode.name}"} | dict(mode.environ)
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise BenchError(f"the server of {mode.name!r} did not start")
        yield address, process.pid
    finally:
        process.stdin.close()
        try:
            process.wait(FLUSH_BOUND_S)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def check(address: str, headers: Headers = ()) -> None:
    """A gRPC client gets the whole answer; BenchError when it does not."""
    metadata = (*headers, ("authorization", f"Bearer {SECRET}"))
    with grpc.insecure_channel(address) as channel:
        call: Any = channel.unary_unary(METHOD, response_deserializer=fleet_pb2.GetServerResponse.FromString)
        try:
            answer = call(b"", metadata=metadata, timeout=10)
        except grpc.RpcError as error:
            raise BenchError(f"{address} answers {error}") from None
    if len(answer.server.metrics) != METRICS:
        raise BenchError(f"{address} answers {len(answer.server.metrics)} metrics instead of {METRICS}")


def load(address: str, seconds: float, headers: Headers, body: Path) -> tuple[float, int]:
    """Calls a second, and calls in all, of a closed loop with CONNECTIONS x STREAMS in flight."""
    if shutil.which("h2load") is None:
        raise BenchError("h2load is not on the PATH (Debian: nghttp2-client)")
    command = ["h2load", "-c", str(CONNECTIONS), "-m", str(STREAMS)]
    command += ["-D", f"{round(seconds * 1_000)}ms", "--warm-up-time", "200ms"]
    for name, value in (
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("authorization", f"Bearer {SECRET}"),
        *headers,
    ):
        command += ["-H", f"{name}: {value}"]
    command += ["-d", str(body), f"http://{address}{METHOD}"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 60).stdout
    rate = re.search(r"finished in .*?, ([\d.]+) req/s", told)
    counts = re.search(r"requests: (\d+) total.* (\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored", told)
    if rate is None or counts is None or int(counts[4]) or int(counts[5]) or not int(counts[3]):
        raise BenchError(f"h2load had failures:\n{told}")
    return float(rate[1]), int(counts[3])


def measure(rounds: int, seconds: float) -> dict[str, Found]:
    """All modes, interleaved; BenchError when an answer or a count of spans is not what it must be."""
    found = {mode.name: Found() for mode in MODES}
    sink = Sink()
    try:
        with contextlib.ExitStack() as stack:
            body = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "body"
            body.write_bytes(b"\0\0\0\0\0")  # one gRPC message of no bytes
            servers = {mode.name: stack.enter_context(_running(mode, sink.endpoint)) for mode in MODES}
            for mode in MODES:
                load(servers[mode.name][0], 1, mode.headers, body)
                check(servers[mode.name][0], mode.headers)
            before = dict(sink.spans)
            for turn in range(rounds):
                for mode in (*MODES[turn % len(MODES) :], *MODES[: turn % len(MODES)]):
                    address, pid = servers[mode.name]
                    one, used_s = found[mode.name], usage(pid).cpu_s
                    rate, calls = load(address, seconds, mode.headers, body)
                    one.rates.append(rate)
                    one.cpu_s.append((usage(pid).cpu_s - used_s) / calls)
                    one.calls += calls
            for mode in MODES:
                check(servers[mode.name][0], mode.headers)
        for mode in MODES:  # the servers have sent what they had
            found[mode.name].spans = sink.spans.get(mode.name, 0) - before.get(mode.name, 0)
            _check_spans(mode, found[mode.name])
    finally:
        sink.close()
    return found


def _check_spans(mode: Mode, found: Found) -> None:
    """Spans may be lost (the queue is bounded) and come late (of the warming up), but not by much."""
    least, most = 0.5 * mode.share * found.calls, 2.0 * mode.share * found.calls
    if not least <= found.spans <= most:
        raise BenchError(f"{mode.name}: {found.spans} spans of {found.calls} calls")


def ratios(found: Mapping[str, Found]) -> dict[str, list[float]]:
    """Of each mode but "off": its calls a second against those of "off" in the same round."""
    off = found[OFF].rates
    return {
        name: [rate / base for rate, base in zip(one.rates, off, strict=True)]
        for name, one in found.items()
        if name != OFF
    }


def table(found: Mapping[str, Found]) -> str:
    """For people."""
    head = f"{'mode':24}{'calls/s':>9}{'of off':>9}{'lowest':>9}{'highest':>9}{'us of CPU':>11}{'more':>8}{'spans':>9}"
    lines = [head]
    to_off = ratios(found)
    for name, one in found.items():
        line = f"{name:24}{statistics.median(one.rates):9,.0f}"
        shares = to_off.get(name, [1.0])
        more = statistics.median(cpu_s - off_s for cpu_s, off_s in zip(one.cpu_s, found[OFF].cpu_s, strict=True))
        line += f"{statistics.median(shares):9.3f}{min(shares):9.3f}{max(shares):9.3f}"
        line += f"{1e6 * statistics.median(one.cpu_s):11.1f}{1e6 * more:+8.1f}{one.spans / one.calls:9.2%}"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    if arguments[:1] == ["serve"]:
        import uvloop  # noqa: PLC0415

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(arguments[1] if len(arguments) > 1 else None))
        return
    parser = argparse.ArgumentParser(
        prog="python -m bench.tracing",
        description="Measures what tracing costs, as ratios to tracing off in the same round.",
        epilog="example: python -m bench.tracing --rounds 7 --seconds 4 --output tracing.json",
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each mode has its turn (default 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long a turn is (default 3)")
    parser.add_argument("--output", type=Path, help="writes what was found as JSON, too")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds must be at least 1, --seconds over 0")
    try:
        found = measure(options.rounds, options.seconds)
    except BenchError as error:
        raise SystemExit(f"bench.tracing: {error}") from None
    print(table(found))
    if options.output is not None:
        whole = {name: asdict(one) for name, one in found.items()}
        options.output.write_text(json.dumps({"modes": whole, "ratios": ratios(found)}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
