"""Row 1: points a second from another process until everything sent is acknowledged.

The sender is a process of its own with the encoded ticks in memory, so that the server is measured and not how fast
Python writes text. Rounds are interleaved; while one server has its turn the others are paused, so that each pays for
its own background work. A round is 720 ticks, after which our heads become blocks: that cost is in every round.
"""

import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import grpc.aio
import uvloop

from bench import peers
from bench.load import Mix
from bench.peers import INFLUX, OURS, VICTORIA, WRITE_PATHS, BenchError, Http
from openmanager.timeseries.v1 import timeseries_pb2

APPEND: Final = "/openmanager.timeseries.v1.TimeSeriesService/Append"
IN_FLIGHT: Final = 4
"""Requests that wait for an acknowledgement at once, the same for every server: twice the cores."""

Say = Callable[[str], None]


class Sender:
    """What lives in the sender's process; one a process, kept between the calls."""

    _mix: Mix | None = None
    _requests: list[bytes]
    _lines: list[bytes]

    @classmethod
    def prepare(cls, servers: int, tick: int, ticks: int, kinds: tuple[str, ...]) -> tuple[int, int]:
        """Encodes ticks both ways. Returns the bytes of the requests and of the lines."""
        if cls._mix is None or len(cls._mix.servers) != servers:
            cls._mix = Mix(servers)
        cls._requests, cls._lines = [], []
        for number in range(tick, tick + ticks):
            values = cls._mix.values(number)
            if OURS in kinds:
                cls._requests.append(cls._mix.request(number, values))
            if set(kinds) - {OURS}:
                cls._lines.append(cls._mix.lines(number, values))
        return sum(map(len, cls._requests)), sum(map(len, cls._lines))

    @classmethod
    def append(cls, address: str, secret: str) -> float:
        """Sends the requests to our process; returns the seconds until the last acknowledgement."""
        assert cls._mix is not None
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_append(address, secret, cls._mix.register(), cls._requests, cls._mix.tick_points))

    @classmethod
    def write(cls, address: str, headers: dict[str, str], path: str) -> float:
        """Sends the lines to a peer; returns the seconds until the last acknowledgement."""
        waiting = iter(cls._lines)
        connections = [Http(address, headers) for _ in range(IN_FLIGHT)]

        def work(connection: Http) -> None:
            for body in waiting:  # next() of a list's iterator is one step of the interpreter
                connection.ask("POST", path, body)

        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            started = time.perf_counter()
            for done in [pool.submit(work, connection) for connection in connections]:
                done.result()
            passed = time.perf_counter() - started
        for connection in connections:
            connection.close()
        return passed


async def _append(address: str, secret: str, register: bytes, requests: list[bytes], points: int) -> float:
    metadata = (("authorization", f"Bearer {secret}"),)
    waiting = iter(requests)
    async with grpc.aio.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        call: Any = channel.unary_unary(APPEND, None, timeseries_pb2.AppendResponse.FromString)
        await call(register, metadata=metadata, timeout=60)

        async def work() -> None:
            for request in waiting:
                response = await call(request, metadata=metadata, timeout=60)
                if response.accepted_points != points:
                    raise BenchError(f"{response.accepted_points} of {points} points were accepted")

        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT):
                group.create_task(work())
        return time.perf_counter() - started


@contextmanager
def sender() -> Iterator[ProcessPoolExecutor]:
    """A process to send from."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def send(pool: ProcessPoolExecutor, server: peers.Server) -> float:
    """Sends what was prepared; the seconds it took."""
    if server.name == OURS:
        return pool.submit(Sender.append, server.address, server.secret).result()
    return pool.submit(Sender.write, server.address, server.headers, WRITE_PATHS[server.name]).result()


def start(stack: ExitStack, folder: Path) -> list[peers.Server]:
    """Our process and the peers that are there."""
    servers = [stack.enter_context(peers.ours(folder / OURS))]
    missing = peers.missing()
    if VICTORIA not in missing:
        servers.append(stack.enter_context(peers.victoria(folder / VICTORIA)))
    if INFLUX not in missing:
        servers.append(stack.enter_context(peers.influx(folder / INFLUX)))
    return servers


def measure(folder: Path, *, servers: int, ticks: int, rounds: int, say: Say) -> dict[str, Any]:
    """Returns what was measured, rates in points a second."""
    rates: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    points = Mix(servers).tick_points * ticks
    with ExitStack() as stack, sender() as pool:
        running = start(stack, folder)
        kinds = tuple(server.name for server in running)
        request_bytes = line_bytes = 0
        for number in range(rounds):
            prepared = pool.submit(Sender.prepare, servers, number * ticks, ticks, kinds).result()
            request_bytes, line_bytes = prepared
            for server in running:
                with peers.only(server, running):
                    used = server.cpu_s()
                    rate = points / send(pool, server)
                    cpu.setdefault(server.name, []).append((server.cpu_s() - used) * 1e9 / points)
                rates.setdefault(server.name, []).append(rate)
                say(f"ingest round {number + 1}/{rounds}: {server.name} {rate / 1e6:.2f} M points/s")
    return {
        "points_a_round": points,
        "request_bytes_a_point": request_bytes / points,
        "line_bytes_a_point": line_bytes / points,
        "in_flight": IN_FLIGHT,
        "rates": rates,
        "median": {name: statistics.median(found) for name, found in rates.items()},
        "server_cpu_ns_a_point": {name: statistics.median(found) for name, found in cpu.items()},
    }
