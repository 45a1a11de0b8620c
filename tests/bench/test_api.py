"""`make bench-api` works from end to end with a tiny load, and what is wrong voids what was measured."""

import asyncio
import contextlib
import math
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from bench.__main__ import Progress
from bench.api import command, judged, loop_row, reported, tracing_row
from bench.api.checks import GET_SERVER, checking
from bench.api.generators import h2load, missing
from bench.api.http2 import header_block
from bench.api.open_loop import Load, offer
from bench.api.rows import ROWS
from bench.api.size import Size
from bench.peers import ROOT, BenchError, Server, free_port, running, wait
from tests.harness.prometheus import required

TINY = Size(seconds=1.0, rounds=1, clients=20, tick_s=0.5, subscribers=20)
OTHERS = "tracing"  # has a test of its own below
REPLY = b"x" * 1_000


@pytest.mark.timeout(400)
@pytest.mark.full
async def test_every_row_runs_and_its_replies_are_right(tmp_path: Path) -> None:
    for program in ("h2load", "wrk", "prometheus", "victoria-metrics"):
        required(program)
    only = [name for name in ROWS if name != OTHERS]
    found = await asyncio.to_thread(command.run, TINY, only, tmp_path, Progress())
    assert not reported.failed(found), reported.show(found)
    found = orjson.loads(orjson.dumps(found))
    assert set(found["results"]) == set(only)
    assert [row["row"] for row in found["table"]] == [
        "grpc", "http", "stores", "stores", "paced", "paced", "asking", "watch", "watch", "loop",
    ]  # fmt: skip
    for row in found["table"]:
        assert row["ratio"] is not None, row
        assert math.isfinite(row["ratio"]) and row["ratio"] > 0, row
        assert (row["note"] == "") == row["met"], row
    assert "| GetServer, 511 metrics, h2load, 50 in flight | bare grpc.aio |" in reported.show(found)


@contextlib.contextmanager
def bare(folder: Path) -> Iterator[Server]:
    """The bare gRPC server with a reply of its own."""
    (folder / "reply").write_bytes(REPLY)
    address = f"127.0.0.1:{free_port()}"
    command_line = [sys.executable, "-m", "bench.api.bare", "grpc", address, str(folder / "reply")]
    environ = dict(os.environ) | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "gen")))}
    with running("bare", address, folder, command_line, environ) as server:
        wait(server, lambda: bool(offered(address, clients=1, seconds=0.1)))
        yield server


def offered(address: str, *, path: str = GET_SERVER, clients: int = 5, seconds: float = 0.3, size: int = 1_000) -> Any:
    return offer(
        Load(
            address=address,
            path=path,
            metadata=(("authorization", "Bearer " + "x" * 300),),
            messages=(b"a", b"b"),
            clients=clients,
            seconds=seconds,
            interval_s=0.1,
            reply_bytes=size,
        )
    )


@pytest.mark.full
def test_h2load_alone_would_count_calls_that_fail(tmp_path: Path) -> None:
    required("h2load")

    def load(server: Server, path: str, size: int) -> Any:
        return h2load(server.address, path, b"", {}, in_flight=4, seconds=1.0, reply_bytes=size, scratch=tmp_path)

    with bare(tmp_path) as server:
        assert load(server, GET_SERVER, len(REPLY)).replies > 0
        with pytest.raises(BenchError, match="some were something else"):
            load(server, GET_SERVER, len(REPLY) + 1)
        with pytest.raises(BenchError, match="some were something else"):
            load(server, "/openmanager.gateway.v1.FleetService/NoSuchMethod", len(REPLY))


@pytest.mark.full
def test_a_call_that_fails_or_is_too_short_voids_an_open_loop(tmp_path: Path) -> None:
    with bare(tmp_path) as server:
        found = offered(server.address)
        assert found.made == 5 * 4
        assert len(found.latencies_ms) == 5 * 3
        assert (found.latencies_ms >= found.late_ms).all()
        with pytest.raises(BenchError, match="grpc-status 12"):
            offered(server.address, path="/openmanager.gateway.v1.FleetService/NoSuchMethod")
        with pytest.raises(BenchError, match="a reply of 1000 instead of 1001"):
            offered(server.address, size=1_001)


@pytest.mark.full
def test_calls_that_were_due_while_the_server_stood_still_count_as_slow(tmp_path: Path) -> None:
    """A generator that waits for answers before it asks again would find one slow call a client."""
    over = threading.Event()
    with bare(tmp_path) as server:

        def stall() -> None:  # for two thirds of the time
            while not over.wait(0.5):
                server.pause()
                over.wait(1.0)
                server.resume()

        thread = threading.Thread(target=stall)
        thread.start()
        try:
            found = offered(server.address, seconds=4.5)
        finally:
            over.set()
            thread.join()
    assert (found.latencies_ms > 300).mean() > 0.25  # due every 100 ms; one call a client and stall would be 0.15


async def test_a_wrong_reply_while_it_is_loaded_voids_the_row() -> None:
    count = 0

    def check() -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise BenchError("status 5")

    with pytest.raises(BenchError, match="while it was loaded: status 5"), checking(check):
        await asyncio.sleep(0)
        while count < 3:
            await asyncio.sleep(0.01)


def test_a_void_row_is_said_and_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_bench: Any) -> Any:
        raise BenchError("wrong bytes")

    @contextlib.contextmanager
    def nothing(_folder: Path) -> Iterator[None]:
        yield None

    monkeypatch.setattr(command, "inner_services", nothing)
    monkeypatch.setitem(ROWS, "watch", type(ROWS["watch"])(measure=measure, judged=ROWS["watch"].judged))
    found = command.run(TINY, ["watch"], tmp_path, Progress())
    assert reported.failed(found)
    assert found["table"][0]["note"] == "void: wrong bytes"
    assert found["table"][0]["met"] is None


def test_a_program_that_is_missing_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing("h2load") == "h2load not on the PATH (Debian: apt-get install nghttp2-client)"
    found = command.run(TINY, ["grpc", "http"], tmp_path, Progress())
    assert not reported.failed(found)
    assert [row["note"] for row in found["table"]] == [
        "not measured: h2load not on the PATH (Debian: apt-get install nghttp2-client)",
        "not measured: wrk not on the PATH (Debian: apt-get install wrk)",
    ]


TRACING = """
from types import SimpleNamespace
def measure(rounds, seconds):
    rates = {"off": 1_000.0, "all sampled": 700.0, "1 % sampled": 900.0, "another": 1.0}
    return {name: SimpleNamespace(rates=[rate] * rounds, cpu_s=[seconds / rate]) for name, rate in rates.items()}
"""


def test_the_row_of_tracing_is_measured_where_its_module_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    required("h2load")
    monkeypatch.setattr(tracing_row, "MODULE", "traced_for_a_test")
    assert tracing_row.lacking() == "there is no traced_for_a_test"
    (tmp_path / "traced_for_a_test.py").write_text(TRACING)
    monkeypatch.syspath_prepend(tmp_path)
    assert tracing_row.lacking() == ""
    bench: Any = SimpleNamespace(size=TINY, say=Progress())
    rows = ROWS["tracing"].judged(ROWS["tracing"].measure(bench))
    assert [(row.work, row.ratio, row.met) for row in rows] == [
        ("GetServer, all sampled", 0.7, True),
        ("GetServer, 1 % sampled", 0.9, False),
    ]


def test_what_is_missed_is_said() -> None:
    less = judged.judge("grpc", "reads", "bare", "calls/s", [600.0, 500.0, 10.0], [1_000.0, 500.0, 100.0], 0.85)
    assert (less.ratio, less.met, less.note) == (0.6, False, "misses: 0.60x instead of 0.85x (42 %)")
    more = judged.judge("paced", "p99", "bare", "ms", [3.0], [1.0], 2.0, at_most=True)
    assert (more.met, more.note, more.must) == (False, "misses: 3.00x instead of 2x (50 %)", "<= 2x")
    assert judged.within("watch", "memory", "bytes", 50_000.0, 100_000.0).met is True
    assert judged.judge("grpc", "reads", "bare", "calls/s", [0.0], [1.0], 0.85).met is None


def test_long_header_values_have_their_length_before_them() -> None:
    block = header_block("a", "/b", {"authorization": "x" * 300})
    assert block.endswith(b"\0\x0dauthorization\x7f\xad\x01" + b"x" * 300)


async def test_the_command_explains_itself() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench", "api", "--help", cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    text, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    assert b"examples:" in text
    assert b"--only" in text


@pytest.mark.parametrize(("long", "median"), [([7], 1.0), ([7, 25, 50, 61, 99], 3.0)])
def test_a_turn_that_is_long_again_and_again_misses_and_one_that_is_so_once_is_told(
    long: list[int], median: float
) -> None:
    slices = [(number, 3.0 if number in long else 1.0, "turn") for number in reversed(range(100))]
    found = {"rounds": 9} | loop_row._longest(slices, 5, lambda _line: None)
    (line,) = loop_row.judged(found)
    assert (line.ours, line.met) == (median, median < loop_row.LIMIT_MS)
    assert "the longest 3.00" in line.remark
