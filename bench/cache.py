"""What it costs the cache to keep Redis up to date: `python -m bench.cache --servers 2000`.

Starts a redis-server and cache processes of its own, tells the first one a tick of the whole fleet every 10 s, and
reads what the processes used and how old the documents in Redis were when they became visible. With `--replicas 2` a
second process hears it all through Redis; with `--no-redis` nothing is followed, for comparison.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from redis.asyncio import Redis

from bench.meter import usage
from bench.peers import free_port
from fleet.codec import metric_set_to_pb, rows_to_pb
from fleet.model import HEADLINE_METRICS, Metric, MetricKind, MetricSet, Rows
from openmanager.cache.v1 import cache_pb2, cache_pb2_grpc
from runtime.channel import Channel

INTERVAL_S: Final = 10.0
METRICS: Final = 511
ROWS_PER_REQUEST: Final = 250
SAMPLED_SERVERS: Final = 100
HEAD_BYTES: Final = 400
"""Of a document: identity and observed_time lie there."""
SECRET: Final = "a-secret-of-the-bench"
START_BOUND_S: Final = 30.0
_SET: Final = MetricSet(
    tuple(
        Metric(name=name, unit="%", kind=MetricKind.GAUGE)
        for name in (*HEADLINE_METRICS, *(f"metric_{index}" for index in range(METRICS - len(HEADLINE_METRICS))))
    )
)


@contextlib.contextmanager
def running(command: list[str], **environment: str) -> Iterator[int]:
    """A process for as long as the block runs; its id."""
    with subprocess.Popen(command, env={"PATH": os.environ["PATH"], **environment}) as process:
        try:
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


async def tell(stub: Any, servers: list[str], rng: np.random.Generator, time_ms: int, *, with_set: bool) -> None:
    """One tick of the whole fleet."""
    for start in range(0, len(servers), ROWS_PER_REQUEST):
        part = tuple(servers[start : start + ROWS_PER_REQUEST])
        values = rng.random((len(part), METRICS)).round(4) * 70
        times = np.full(len(part), time_ms, np.int64)
        rows = Rows(metric_set_id=_SET.id, server_ids=part, times_ms=times, values=values)
        sets = [metric_set_to_pb(_SET)] if with_set and not start else []
        await stub.UpdateServers(cache_pb2.UpdateServersRequest(metric_sets=sets, batches=[rows_to_pb(rows)]))


async def ages_s(redis: Redis, servers: list[str], stamp: bytes, told_s: float) -> list[float]:
    """How long after the tick was told each sampled server's document was there."""
    waiting = set(servers)
    found: list[float] = []
    while waiting and time.monotonic() < told_s + INTERVAL_S:
        pipeline = redis.pipeline(transaction=False)
        asked = sorted(waiting)
        for server_id in asked:
            pipeline.getrange(f"server:{server_id}", 0, HEAD_BYTES)
        heads = await pipeline.execute()
        now_s = time.monotonic()
        for server_id, head in zip(asked, heads, strict=True):
            if stamp in head:
                waiting.discard(server_id)
                found.append(now_s - told_s)
        await asyncio.sleep(0.05)
    return found + [INTERVAL_S] * len(waiting)


async def measure(arguments: argparse.Namespace, stub: Any, redis: Redis | None, pids: list[int]) -> dict[str, Any]:
    """Runs the ticks; figures of one tick, the first two left out."""
    servers = [f"server-{index:05d}" for index in range(arguments.servers)]
    sampled = servers[:: max(1, len(servers) // SAMPLED_SERVERS)]
    rng = np.random.default_rng(1)
    ages: list[float] = []
    told: list[float] = []
    before = {}
    next_s = time.monotonic()
    for tick in range(arguments.ticks + 2):
        if tick == 2:
            before = {pid: usage(pid).cpu_s for pid in pids}
            ages, told = [], []
        time_ms = time.time_ns() // 1_000_000 // 1_000 * 1_000 + tick % 1_000
        started_s = time.monotonic()
        await tell(stub, servers, rng, time_ms, with_set=tick == 0)
        told.append(time.monotonic() - started_s)
        if redis is not None:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time_ms // 1_000)) + f".{time_ms % 1_000:03d}Z"
            ages += await ages_s(redis, sampled, text.encode(), started_s)
        next_s += INTERVAL_S
        await asyncio.sleep(max(0.0, next_s - time.monotonic()))
    after = {pid: usage(pid) for pid in pids}
    used = [round((after[pid].cpu_s - before[pid]) / arguments.ticks, 3) for pid in pids]
    return {
        "servers": len(servers),
        "ticks": arguments.ticks,
        "cpu_s_per_tick": used,
        "memory_mib": [round(after[pid].memory_bytes / (1 << 20)) for pid in pids],
        "telling_s": round(float(np.median(told)), 3),
        "age_p50_s": round(float(np.median(ages)), 2) if ages else None,
        "age_max_s": round(max(ages), 2) if ages else None,
        "load": round(psutil.getloadavg()[0], 1),
    }


async def run(arguments: argparse.Namespace) -> None:
    """Starts everything, measures, prints one line of JSON."""
    redis_port, ports = free_port(), [free_port() for _ in range(arguments.replicas)]
    program = shutil.which("redis-server")
    assert program, "redis-server is not on the PATH (Debian: redis-server)"
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="openmanager-bench-"))
        pids, environment = [], {"SERVICE_SECRET": SECRET, "LOG_LEVEL": "WARNING"}
        environment |= {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        if not arguments.no_redis:
            options = ["--port", str(redis_port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
            redis_pid = stack.enter_context(running([program, *options, "--logfile", f"{folder}/redis.log"]))
            environment["REDIS_URL"] = f"redis://127.0.0.1:{redis_port}"
        for index, port in enumerate(ports):
            own = {"CACHE_ADDRESS": f"127.0.0.1:{port}", "DATA_DIR": str(Path(folder) / str(index))}
            command = [sys.executable, "-m", "services.cache"]
            pids.append(stack.enter_context(running(command, **environment, **own)))
        if not arguments.no_redis:
            pids.append(redis_pid)
        async with contextlib.AsyncExitStack() as clients:
            channel = await clients.enter_async_context(Channel(f"127.0.0.1:{ports[0]}", secret=SECRET))
            await asyncio.wait_for(channel.grpc.channel_ready(), START_BOUND_S)
            redis = None
            if not arguments.no_redis:
                redis = await clients.enter_async_context(Redis(port=redis_port, protocol=2))
            found = await measure(arguments, cache_pb2_grpc.CacheServiceStub(channel.grpc), redis, pids)
    sys.stdout.write(json.dumps(found) + "\n")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=2_000)
    parser.add_argument("--ticks", type=int, default=6)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--no-redis", action="store_true", help="nothing is followed")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
