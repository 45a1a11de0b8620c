"""What a history tells who sees some servers only of the metrics that others have: nothing."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from fleet.access import VIEWER, Caller, Scope
from fleet.model import Metric, MetricSet, Rows
from gateway.servicers.history import HistoryServicer
from gateway.state import FleetState
from openmanager.gateway.v1 import history_pb2
from runtime import caller
from runtime.channel import Channel
from runtime.clock import SystemClock
from runtime.errors import InvalidArgument
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from services.timeseries.engine import Engine
from services.timeseries.servicer import TimeSeriesServicer

START_S = 1_700_000_000
OF = {"seen": "level", "hidden": "secret"}


class Fleet(dict[str, Any]):
    """Both servers, in the live state."""

    def all(self) -> list[Any]:
        return list(self.values())


@pytest.fixture
async def asked(tmp_path: Path) -> AsyncIterator[HistoryServicer]:
    """In front of a service with a point of a metric of each server."""
    clock = SystemClock()
    async with Engine.open(tmp_path, clock=clock) as engine:
        for server_id, metric in OF.items():
            columns = MetricSet((Metric(name=metric),))
            times = np.array([START_S * 1000], np.int64)
            rows = Rows(metric_set_id=columns.id, server_ids=(server_id,), times_ms=times, values=np.ones((1, 1)))
            await engine.append(rows, metric_sets=[columns])
        service = bind("openmanager.timeseries.v1.TimeSeriesService", TimeSeriesServicer(engine, clock))
        server = GrpcServer([service], Interception())
        fleet = Fleet({name: SimpleNamespace(id=name, place=("", "")) for name in OF})
        async with Channel(await server.start("127.0.0.1:0")) as channel:
            yield HistoryServicer([channel], cast("FleetState", fleet), clock)
        await server.stop(0)


@contextmanager
def seeing(scope: Scope | None) -> Iterator[None]:
    token = caller.current.set(Caller.of("ada", VIEWER, "token", scope=scope))
    try:
        yield
    finally:
        caller.current.reset(token)


async def of_one(asked: HistoryServicer, metrics: list[str]) -> list[str]:
    request = history_pb2.GetServerHistoryRequest(server_id="seen", metric=metrics)
    request.start_time.seconds, request.end_time.seconds = START_S, START_S + 60
    return [series.metric for series in (await asked.GetServerHistory(request, None)).series]


async def of_all(asked: HistoryServicer, metrics: list[str]) -> list[str]:
    request = history_pb2.QueryHistoryRequest(metrics=metrics)
    request.start_time.seconds, request.end_time.seconds = START_S, START_S + 60
    return [series.metric async for message in asked.QueryHistory(request, None) for series in message.series]


@pytest.mark.parametrize("ask", [of_one, of_all])
async def test_a_metric_of_others_is_told_from_one_that_there_is_not_by_nothing(
    asked: HistoryServicer, ask: Any
) -> None:
    with seeing(Scope.of((), (), ("seen",))):
        for foreign in ("secret", "nobodys"):
            assert await ask(asked, [foreign]) == []
            assert await ask(asked, ["level", foreign]) == ["level"]
    with seeing(None), pytest.raises(InvalidArgument, match="no server has a metric 'nobodys'"):
        await ask(asked, ["level", "nobodys"])
