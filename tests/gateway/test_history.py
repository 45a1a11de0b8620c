"""A server's history in one answer, asked of a real timeseries service: its limits, and in whose words it refuses."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from fleet.model import Metric, MetricSet, Rows
from gateway.servicers import history
from gateway.servicers.history import HistoryServicer
from gateway.state import FleetState
from openmanager.gateway.v1 import history_pb2
from runtime.channel import Channel
from runtime.clock import SystemClock
from runtime.errors import InvalidArgument, NotFound, ResourceExhausted
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from services.timeseries import servicer
from services.timeseries.engine import Engine
from services.timeseries.servicer import TimeSeriesServicer

SET = MetricSet((Metric(name="level", unit="%"), Metric(name="depth")))
START_S = 1_700_000_000
TIMES_S = [START_S + 10 * row for row in range(300)]


@pytest.fixture
async def asked(tmp_path: Path) -> AsyncIterator[HistoryServicer]:
    """In front of a service that has 300 points of each of two metrics of "told"; "silent" is in the fleet only."""
    clock = SystemClock()
    async with Engine.open(tmp_path, clock=clock) as engine:
        rows = Rows(
            metric_set_id=SET.id,
            server_ids=("told",) * len(TIMES_S),
            times_ms=np.array(TIMES_S, np.int64) * 1000,
            values=np.arange(2.0 * len(TIMES_S)).reshape(-1, 2),
        )
        await engine.append(rows, metric_sets=[SET])
        service = bind("openmanager.timeseries.v1.TimeSeriesService", TimeSeriesServicer(engine, clock))
        server = GrpcServer([service], Interception())
        async with Channel(await server.start("127.0.0.1:0")) as channel:
            yield HistoryServicer([channel], cast("FleetState", {"told", "silent"}), clock)
        await server.stop(0)


async def answer(
    asked: HistoryServicer, server_id: str = "told", **fields: Any
) -> history_pb2.GetServerHistoryResponse:
    request = history_pb2.GetServerHistoryRequest(server_id=server_id, **{"metric": ["level", "depth"], **fields})
    request.start_time.seconds, request.end_time.seconds = START_S, START_S + 3_600
    return await asked.GetServerHistory(request, None)


async def test_a_series_that_comes_in_parts_is_put_together(
    asked: HistoryServicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.timeseries.wire.MAX_MESSAGE_POINTS", 70)
    found = await answer(asked)
    assert [(series.metric, list(series.times)) for series in found.series] == [
        ("depth", TIMES_S),
        ("level", TIMES_S),
    ]
    assert list(found.series[1].values) == [2.0 * row for row in range(300)]


async def test_over_its_limits_it_says_what_to_do(asked: HistoryServicer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_UNARY_POINTS", 600)
    await answer(asked)
    monkeypatch.setattr(history, "MAX_UNARY_POINTS", 599)
    with pytest.raises(ResourceExhausted, match="stream with QueryHistory"):
        await answer(asked)
    await answer(asked, step={"seconds": 60})
    monkeypatch.setattr(history, "MAX_UNARY_SERIES", 1)
    with pytest.raises(ResourceExhausted, match="name fewer metrics"):
        await answer(asked)


async def test_what_timeseries_does_not_send_at_once_is_refused_in_the_same_words(
    asked: HistoryServicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "MAX_ONCE_BYTES", 1_000)
    with pytest.raises(ResourceExhausted, match="stream with QueryHistory"):
        await answer(asked)


async def test_who_has_never_reported_has_no_series_and_who_is_unknown_is_not_found(asked: HistoryServicer) -> None:
    assert not (await answer(asked, "silent")).series
    with pytest.raises(NotFound) as refused:
        await answer(asked, "nobody")
    assert refused.value.field == "server_id"


@pytest.mark.parametrize("fields", [{}, {"across_servers": "SERVER_AGGREGATION_SUM", "step": {"seconds": 60}}])
async def test_who_has_never_reported_takes_nothing_from_the_others(
    asked: HistoryServicer, fields: dict[str, Any]
) -> None:
    async def found(*server_ids: str) -> list[Any]:
        request = history_pb2.QueryHistoryRequest(server_ids=server_ids, metrics=["level"], **fields)
        request.start_time.seconds, request.end_time.seconds = START_S, START_S + 3_600
        return [
            series for message in [one async for one in asked.QueryHistory(request, None)] for series in message.series
        ]

    assert await found("told", "silent") == await found("told") != []
    assert await found("silent") == []
    with pytest.raises(NotFound):
        await found("told", "nobody", "silent")


async def test_a_fault_names_the_field_of_the_public_request(asked: HistoryServicer) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await answer(asked, metric=["nope"])
    assert refused.value.field == "metric"
