"""The rows that play a fleet or fill a year, in their smallest form; and that they notice what they are there for."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import orjson
import pytest

from bench import cost, report, scale, year
from bench.__main__ import Progress, run_scale
from bench.ingest import APPEND
from bench.peers import BenchError
from bench.player import Play, Report, player, start_before
from openmanager.timeseries.v1 import timeseries_pb2
from tests.bench.test_bench import check_shape, measured


@pytest.mark.full
async def test_the_year_and_the_cost_of_a_point_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = await measured(tmp_path / "data", "year", "cost")
    check_shape(found, {"year", "cost"})
    asked = found["results"]["year"]
    assert asked["questions"] == {"AVG": 5, "MAX": 5, "RATE": 5}
    assert asked["points"] > 2 * 8_640 * 20
    assert set(asked["sizes"]) >= {"blocks", "journal"}
    for servers, one in found["results"]["cost"]["fleets"].items():
        assert one["points"] == one["of_ticks"] * int(servers) * 511
        assert one["rested"]
        assert one["status"]["head_points"] == 0, "every point is paid for up to its block"
        assert one["counts"]["blocks/blocks"] > 0
        assert min(one[key] for key in report.COSTS.values()) > 0
    works = {row["work"] for row in found["table"]}
    costs = {*(f"{cost} a point" for cost in report.COSTS), "peak memory a series"}
    assert works == {"1 metric, 2 days by 1 h, p95", *(f"{cost}, 2 to 4 servers" for cost in costs)}


@pytest.mark.full
async def test_a_fleet_is_played_killed_started_again_and_counted(tmp_path: Path) -> None:
    found = await asyncio.to_thread(run_scale, scale.QUICK, tmp_path, Progress())
    found = orjson.loads(orjson.dumps(found))
    check_shape(found, {"scale"})
    one = found["results"]["scale"]
    (costs,) = cost.of_scale(one).values()
    assert min(costs[key] for key in (*report.COSTS.values(), "peak_bytes_a_series")) > 0
    assert one["points"] == one["wanted_points"] == 6 * 200 * 511
    assert one["rows_acknowledged"] == 6 * 200
    assert set(one["rows_counted"].values()) == {6 * 200}
    assert len(one["samples"]) > 5
    assert {"head_bytes", "journal_bytes", "waiting_bytes", "late_points", "memory_bytes"} <= set(one["samples"][-1])
    rows = {row["work"].partition(", ")[2]: row for row in found["table"]}
    assert rows["acknowledged rows that are gone"]["met"]
    assert rows["kill -9 to the first answer"]["met"]
    assert rows["peak memory"]["met"]


def test_lost_rows_and_backlog_are_misses() -> None:
    samples = [
        {
            "seconds": second,
            "late_points": 10**9 * (second > 50),
            "waiting_bytes": 10**9,
            "disk_backlog": 10**9 + second,
        }
        for second in range(61)
    ]
    found = scale.backlog(samples, 60.0)
    assert found["late_points"] == {"third": 0.0, "end": 1e9}
    result: dict[str, Any] = {
        "servers": 20, "minutes": 1.0, "points_a_second": 90.0, "wanted_points_a_second": 100.0, "backlog": found,
        "peak_bytes": 7 << 30, "restart_answer_s": 61.0, "rows_missing": 1,
    }  # fmt: skip
    rows = {row.work.partition(", ")[2]: row for row in report.rows({"scale": result})}
    missed = {work for work, row in rows.items() if not row.met}
    assert missed == {
        "acknowledged", "late_points at the end, limit of one third", "peak memory", "kill -9 to the first answer",
        "acknowledged rows that are gone",
    }  # fmt: skip
    assert rows["peak memory"].note == "misses: 7.00 instead of 6.00"


@asynccontextmanager
async def serving(append: Any) -> AsyncIterator[str]:
    """The address of a server whose Append is this."""
    handler = grpc.unary_unary_rpc_method_handler(
        append, timeseries_pb2.AppendRequest.FromString, timeseries_pb2.AppendResponse.SerializeToString
    )
    service, method = APPEND.strip("/").split("/")
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def played(address: str, servers: int) -> Report:
    """Two ticks as fast as they are taken."""
    play = Play(servers=servers, start_ms=start_before(int(time.time() * 1_000), 1.0), ticks=2, seconds=30.0)
    with player(play, address, "secret") as playing:
        return playing.wait()


async def test_what_is_refused_is_sent_again_and_counted_once() -> None:
    calls: list[int] = []

    async def append(request: timeseries_pb2.AppendRequest, context: Any) -> timeseries_pb2.AppendResponse:
        if request.metric_sets:
            return timeseries_pb2.AppendResponse()
        calls.append(len(request.batch.rows))
        if len(calls) % 3 == 1:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "HEADS_FULL")
        return timeseries_pb2.AppendResponse(accepted_points=len(request.batch.values))

    async with serving(append) as address:
        found = await asyncio.to_thread(played, address, 600)
    assert found.points == 2 * 600 * 511
    assert found.rows == [2 * 500, 2 * 100]
    assert found.ticks == 2
    assert found.sent_again == {"RESOURCE_EXHAUSTED": len(calls) - 4}
    assert found.sent_again["RESOURCE_EXHAUSTED"] >= 2


async def test_a_play_that_cannot_go_on_says_why() -> None:
    async def append(request: timeseries_pb2.AppendRequest, context: Any) -> timeseries_pb2.AppendResponse:
        if request.metric_sets:
            return timeseries_pb2.AppendResponse()
        if len(request.batch.rows) == 3:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "nothing of that")
        return timeseries_pb2.AppendResponse(accepted_points=1)

    async with serving(append) as address:
        with pytest.raises(BenchError, match="nothing of that"):
            await asyncio.to_thread(played, address, 3)
        with pytest.raises(BenchError, match="1 of 1022 points were accepted"):
            await asyncio.to_thread(played, address, 2)


def test_a_year_whose_answers_differ_from_what_was_generated_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = year.Year.rows

    def altered(self: year.Year) -> Any:
        yield from generated(self)
        self.hours["AVG"][:] *= 1 + 1e-7

    monkeypatch.setattr(year.Year, "rows", altered)
    with pytest.raises(BenchError, match=r"hour 0 is .* instead of"):
        year.measure(tmp_path, days=2, window_days=1, count=1, say=Progress())
