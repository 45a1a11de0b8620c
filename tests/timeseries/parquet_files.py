"""What the tests of export and import share: a store with everything strange in it, files, and commands.

Run as a program, this file is one command that gets a signal: `python parquet_files.py SIGNAL WHERE CALLS COMMAND ...`,
when what WHERE names in the package (`importing.Importer._send`) is called for that time.
"""

import asyncio
import importlib
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fleet.model import Metric, MetricKind, MetricSet, ServerDescriptor
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc
from runtime.channel import Channel, calling
from runtime.clock import ManualClock
from runtime.errors import Unavailable
from services.timeseries import commands
from services.timeseries.engine import Engine
from tests.harness import eventually, free_port
from tests.timeseries.engine.model import NAN, Answer, everything, rows
from tests.timeseries.stores import DAY_MS, NOON, OTHER_SET, QUIET, ROOT, SET

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: make parquet")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: make parquet")

from services.timeseries.parquet import exporting, importing, layout, matrices, reading  # noqa: E402, F401

LABELLED = MetricSet(
    (
        Metric(name="disk_used", unit="By", kind=MetricKind.GAUGE, labels=(("mount", "/"),)),
        Metric(name="disk_used", unit="By", kind=MetricKind.GAUGE, labels=(("mount", '/a "b", {ü}\\'), ("z", ""))),
        Metric(name="cpu_usage", unit="1", kind=MetricKind.GAUGE),
        Metric(name="reads_total", unit="1", kind=MetricKind.COUNTER),
    )
)
DESCRIPTOR = ServerDescriptor(
    server_id="a", hostname="a.example", environment="test", role="web", location="here", report_interval_ms=5_000
)
WILD = [float("inf"), float("-inf"), -0.0, 0.0, 5e-324, 1.7976931348623157e308, 0.1, NAN]


KEPT = {f"TIMESERIES_RETENTION_{tier}": "36500d" for tier in ("RAW", "5M", "1H")}
"""The points of the tests are years old."""


async def wild_store(store: Path) -> None:
    """Four days, some of it in heads; labels, gaps, late and doubled rows, sets that share a metric."""
    rng, clock = random.Random(5), ManualClock(NOON)
    async with Engine.open(store, clock=clock, settings=QUIET) as engine:

        async def put(of_set: MetricSet, lines: list[tuple[str, int, list[float]]], **more: Any) -> None:
            await engine.append(rows(of_set, lines), metric_sets=(of_set,), **more)

        await put(SET, [("a", NOON, [1.0, 2.0, 3.0])], servers=(DESCRIPTOR,))
        for day in range(3):
            for server in "ab":
                times = [NOON + day * DAY_MS + n * 1_000 for n in range(100)]
                await put(SET, [(server, at, [rng.choice(WILD), rng.random(), rng.choice(WILD)]) for at in times])
                await put(LABELLED, [(server, at + 500, [rng.random() for _ in LABELLED.metrics]) for at in times[::7]])
                await put(LABELLED, [(server, at, [NAN, 1.0, rng.random(), NAN]) for at in times[::9]])
        await engine.maintain(everything=True)
        await put(SET, [("b", NOON + n * 1_000 - 500, [rng.random(), NAN, -0.0]) for n in range(50)])
        await put(SET, [("b", NOON + 7_000, [70.0, 71.0, NAN]), ("b", NOON + 7_000, [72.0, NAN, NAN])])
        await put(OTHER_SET, [("c-ü", NOON - 3 * DAY_MS, [1.0])])
        await engine.append(servers=(ServerDescriptor(server_id="told", hostname="only"),))


async def contents(store: Path) -> tuple[Answer, dict[str, Metric], dict[str, ServerDescriptor | None]]:
    async with Engine.open(store, clock=ManualClock(NOON), settings=QUIET) as engine:
        metrics = {info.key: info.metric for info in await engine.list_metrics()}
        return await everything(engine), metrics, engine.servers()


async def command(*arguments: object, data: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEPT, "DATA_DIR": str(data)}.items():
            patch.setenv(name, os.environ.get(name, value) if name in KEPT else value)
        return await asyncio.to_thread(commands.main, [str(argument) for argument in arguments])


def bits(answer: Answer) -> dict[tuple[str, str], list[tuple[int, bytes]]]:
    return {name: [(at, struct.pack("<d", value)) for at, value in series] for name, series in answer.items()}


def parts(target: Path) -> list[Path]:
    return sorted(target.glob("points/*/*.parquet"))


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def millis(*times: int) -> Any:
    return pa.array(times, pa.timestamp("ms", "UTC"))


def run_to_signal(
    number: signal.Signals, where: str, calls: int, *arguments: object, data: Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, __file__, number.name, where, str(calls), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", **KEPT, "DATA_DIR": str(data)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@asynccontextmanager
async def running(data: Path) -> AsyncIterator[tuple[Any, str]]:
    """A service on a folder; its stub and its address."""
    address = f"127.0.0.1:{free_port()}"
    environment = {**KEPT, "DATA_DIR": str(data), "TIMESERIES_ADDRESS": address}
    service = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, "-m", "services.timeseries"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", **environment},
        stderr=subprocess.DEVNULL,
    )
    try:
        await eventually((data / "service-secret").exists, within_s=60)
        async with Channel(address, secret=(data / "service-secret").read_text().strip()) as channel:
            stub = timeseries_pb2_grpc.TimeSeriesServiceStub(channel.grpc)

            async def answers() -> bool:
                try:
                    async with calling("timeseries"):
                        await stub.ListMetrics(timeseries_pb2.ListMetricsRequest())
                except Unavailable as error:
                    raise AssertionError from error
                return True

            await eventually(answers, within_s=60)
            yield stub, address
        assert service.poll() is None
    finally:
        service.kill()
        await asyncio.to_thread(service.wait)


def _signal_at(number: signal.Signals, where: str, calls: int) -> None:
    module, *names = where.split(".")
    owner: Any = importlib.import_module(f"services.timeseries.parquet.{module}")
    for name in names[:-1]:
        owner = getattr(owner, name)
    original, left = getattr(owner, names[-1]), iter(range(calls - 1, -1, -1))

    def counted(*arguments: Any, **named: Any) -> Any:
        if next(left, 1) == 0:
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    setattr(owner, names[-1], counted)


if __name__ == "__main__":
    importing.REQUEST_VALUES = 5_000  # type: ignore[misc]
    _signal_at(signal.Signals[sys.argv[1]], sys.argv[2], int(sys.argv[3]))
    sys.exit(commands.main(sys.argv[4:]))
