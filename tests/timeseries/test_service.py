"""The timeseries service over real gRPC: what is checked before anything is kept, and how answers are cut."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.codec import metric_set_to_pb, rows_to_pb
from fleet.model import Metric, MetricKind, MetricSet, Rows
from openmanager.fleet.v1 import history_pb2, metric_pb2
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc
from runtime.channel import Channel, calling
from runtime.clock import SystemClock
from runtime.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from services.timeseries import servicer, wire
from services.timeseries.engine import Engine, TailBatch
from services.timeseries.servicer import TimeSeriesServicer, probe

SET = MetricSet((Metric(name="level", unit="%", kind=MetricKind.GAUGE), Metric(name="total", kind=MetricKind.COUNTER)))
START_S = 1_700_000_000


def rows(times_s: list[int], server_id: str = "s", value: float = 1.0) -> Rows:
    times_ms = np.array(times_s, np.int64) * 1000
    values = np.full((len(times_s), len(SET)), value)
    return Rows(metric_set_id=SET.id, server_ids=(server_id,) * len(times_s), times_ms=times_ms, values=values)


class Service:
    """A service on a folder, and the calls that tests make of it."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self.engine = engine
        self.stub: Any = timeseries_pb2_grpc.TimeSeriesServiceStub(channel.grpc)

    async def append(self, batch: metric_pb2.MetricBatch, **fields: Any) -> timeseries_pb2.AppendResponse:
        async with calling("timeseries"):
            response: timeseries_pb2.AppendResponse = await self.stub.Append(
                timeseries_pb2.AppendRequest(batch=batch, **fields)
            )
        return response

    async def query(self, **fields: Any) -> list[timeseries_pb2.QueryResponse]:
        query = history_pb2.HistoryQuery(**fields)
        if not query.HasField("start_time"):
            query.start_time.seconds = START_S
        if not query.HasField("end_time"):
            query.end_time.seconds = START_S + 10_000_000
        async with calling("timeseries"):
            return [message async for message in self.stub.Query(timeseries_pb2.QueryRequest(query=query))]

    async def once(self, **fields: Any) -> timeseries_pb2.QueryOnceResponse:
        query = history_pb2.HistoryQuery(**fields)
        query.start_time.seconds, query.end_time.seconds = START_S, START_S + 10_000_000
        async with calling("timeseries"):
            answer: timeseries_pb2.QueryOnceResponse = await self.stub.QueryOnce(
                timeseries_pb2.QueryOnceRequest(query=query)
            )
        return answer

    async def last(self, **fields: Any) -> list[timeseries_pb2.LastValuesResponse]:
        async with calling("timeseries"):
            return [message async for message in self.stub.LastValues(timeseries_pb2.LastValuesRequest(**fields))]


def unfolded(messages: list[timeseries_pb2.LastValuesResponse]) -> dict[tuple[str, str], tuple[float, float, str]]:
    """(time, value, unit) of each series, read as the proto says."""
    lists: list[timeseries_pb2.MetricColumns] = []
    found = {}
    for message in messages:
        lists.extend(message.columns)
        for server in message.servers:
            columns = lists[server.columns]
            assert len(columns.metrics) == len(columns.units) == len(server.values)
            times = list(server.times) * (len(server.values) if len(server.times) == 1 else 1)
            for cell in zip(columns.metrics, times, server.values, columns.units, strict=True):
                if not math.isnan(cell[2]):
                    found[server.server_id, cell[0]] = cell[1:]
    return found


@asynccontextmanager
async def service(folder: Path) -> AsyncIterator[Service]:
    clock = SystemClock()
    async with Engine.open(folder, clock=clock) as engine:
        server = GrpcServer(
            [bind("openmanager.timeseries.v1.TimeSeriesService", TimeSeriesServicer(engine, clock))], Interception()
        )
        address = await server.start("127.0.0.1:0")
        async with Channel(address) as channel:
            yield Service(engine, channel)
        await server.stop(0.5)


async def test_a_batch_is_acknowledged_and_read_back(tmp_path: Path) -> None:
    async with service(tmp_path) as ours:
        response = await ours.append(rows_to_pb(rows([START_S, START_S + 10])), metric_sets=[metric_set_to_pb(SET)])
        assert (response.sequence, response.accepted_points, response.rejected_points) == (1, 4, 0)
        found = (await ours.query(metrics=["level"]))[0].series[0]
        assert (found.server_id, found.metric, found.unit) == ("s", "level", "%")
        assert (list(found.times), list(found.values)) == ([START_S, START_S + 10], [1.0, 1.0])


async def test_an_acknowledgement_waits_for_all_followers_at_once(tmp_path: Path) -> None:
    """One after the other, two that are away would take longer than callers wait, and neither would be named."""
    asked = asyncio.Barrier(2)

    class Waited:
        async def shipped(self, sequence: int) -> None:
            assert sequence == 1
            await asked.wait()

    followers: Any = (Waited(), Waited())
    async with Engine.open(tmp_path, clock=SystemClock()) as engine:
        served = TimeSeriesServicer(engine, SystemClock(), followers=followers)
        request = timeseries_pb2.AppendRequest(batch=rows_to_pb(rows([START_S])), metric_sets=[metric_set_to_pb(SET)])
        async with asyncio.timeout(15):
            assert (await served.Append(request, None)).sequence == 1


async def test_structural_faults_keep_nothing(tmp_path: Path) -> None:
    async with service(tmp_path) as ours:
        with pytest.raises(FailedPrecondition) as unknown:
            await ours.append(rows_to_pb(rows([START_S])))
        assert unknown.value.reason == "METRIC_SET_UNKNOWN"
        bad = rows_to_pb(rows([START_S]))
        bad.values.append(1.0)
        with pytest.raises(InvalidArgument) as refused:
            await ours.append(bad, metric_sets=[metric_set_to_pb(SET)])
        assert refused.value.field == "values"
        twice = metric_pb2.MetricSet(metrics=[metric_pb2.Metric(name="x")] * 2)
        with pytest.raises(InvalidArgument) as refused:
            await ours.append(metric_pb2.MetricBatch(), metric_sets=[twice])
        assert refused.value.field == "metric_sets[0].metrics[1]"
        assert ours.engine.last_sequence == 0


async def test_row_faults_are_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    async with service(tmp_path) as ours:
        batch = rows_to_pb(rows([START_S, 4_000_000_000, START_S + 1]))
        response = await ours.append(batch, metric_sets=[metric_set_to_pb(SET)])
        assert (response.accepted_points, response.rejected_points) == (4, 2)
        assert [(error.row, error.reason) for error in response.errors] == [(1, "TIME_IN_FUTURE")]
        found = await ours.query(metrics=["level"])
        assert list(found[0].series[0].times) == [START_S, START_S + 1]


@pytest.mark.parametrize("count", [3, wire.THREAD_ROWS * 2])
async def test_a_row_without_a_time_is_refused_and_not_kept_as_one_of_1970(tmp_path: Path, count: int) -> None:
    async with service(tmp_path) as ours:
        batch = rows_to_pb(rows([START_S + second for second in range(count)]))
        batch.rows[1].ClearField("time")
        batch.rows[0].time.Clear()  # given: the epoch itself
        response = await ours.append(batch, metric_sets=[metric_set_to_pb(SET)])
        assert (response.accepted_points, response.rejected_points) == (2 * (count - 1), 2)
        (error,) = response.errors
        assert (error.row, error.field, error.reason) == (1, "rows[1].time", "TIME_MISSING")
        found = await ours.query(metrics=["level"], start_time={"seconds": 0})
        assert list(found[0].series[0].times) == [0, *range(START_S + 2, START_S + count)]


async def test_at_most_a_hundred_errors_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    async with service(tmp_path) as ours:
        batch = rows_to_pb(rows([4_000_000_000 + second for second in range(2_000)]))
        response = await ours.append(batch, metric_sets=[metric_set_to_pb(SET)])
        assert (response.accepted_points, response.rejected_points, len(response.errors)) == (0, 4_000, 100)


async def test_a_batch_large_enough_for_a_thread_is_the_same(tmp_path: Path) -> None:
    count = wire.THREAD_ROWS * 3
    async with service(tmp_path) as ours:
        batch = rows_to_pb(rows([START_S + second for second in range(count)]))
        response = await ours.append(batch, metric_sets=[metric_set_to_pb(SET)])
        assert response.accepted_points == 2 * count


async def test_a_long_series_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_MESSAGE_POINTS", 100)
    async with service(tmp_path) as ours:
        times = [START_S + second for second in range(250)]
        await ours.append(rows_to_pb(rows(times)), metric_sets=[metric_set_to_pb(SET)])
        messages = await ours.query(metrics=["level", "total"])
        assert all(sum(len(series.times) for series in message.series) <= 100 for message in messages)
        for metric in ("level", "total"):
            parts = [series for message in messages for series in message.series if series.metric == metric]
            assert [time for part in parts for time in part.times] == times


async def test_an_answer_in_one_message_is_what_the_stream_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_MESSAGE_POINTS", 100)
    async with service(tmp_path) as ours:
        for server_id in ("a", "b"):
            batch = rows_to_pb(rows([START_S + second for second in range(250)], server_id))
            await ours.append(batch, metric_sets=[metric_set_to_pb(SET)])
        for fields in ({}, {"step": {"seconds": 60}}, {"top": 1}, {"server_ids": ["b"]}):
            streamed = timeseries_pb2.QueryOnceResponse()
            for message in await ours.query(metrics=["level", "total"], **fields):
                streamed.series.extend(message.series)
            assert streamed.series
            assert await ours.once(metrics=["level", "total"], **fields) == streamed
        with pytest.raises(InvalidArgument) as refused:
            await ours.once(metrics=["nope"])
        assert refused.value.field == "metrics"


async def test_an_answer_that_is_too_large_for_one_message_says_how_else_to_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service(tmp_path) as ours:
        await ours.append(
            rows_to_pb(rows([START_S + second for second in range(250)])), metric_sets=[metric_set_to_pb(SET)]
        )
        size = (await ours.once(metrics=["level"])).ByteSize()
        monkeypatch.setattr(servicer, "MAX_ONCE_BYTES", size)
        await ours.once(metrics=["level"])
        monkeypatch.setattr(servicer, "MAX_ONCE_BYTES", size - 1)
        with pytest.raises(ResourceExhausted, match="stream it with Query") as refused:
            await ours.once(metrics=["level"])
        assert refused.value.reason == "ANSWER_TOO_LARGE"


async def test_series_of_equal_and_of_different_times_keep_their_own(tmp_path: Path) -> None:
    async with service(tmp_path) as ours:
        wanted = {
            "a": [START_S, START_S + 60],
            "b": [START_S, START_S + 60],
            "c": [START_S + 60],
            "d": [START_S, START_S + 61],
        }
        for server_id, times in wanted.items():
            await ours.append(rows_to_pb(rows(times, server_id)), metric_sets=[metric_set_to_pb(SET)])
        for fields in ({}, {"step": {"seconds": 1}}):
            (message,) = await ours.query(metrics=["level", "total"], **fields)
            found = {(series.server_id, series.metric): list(series.times) for series in message.series}
            assert found == {
                (server, metric): times for server, times in wanted.items() for metric in ("level", "total")
            }


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "metrics"),
        ({"metrics": [""]}, "metrics"),
        ({"metrics": ["nope"]}, "metrics"),
        ({"metrics": ["level"], "step": {"nanos": 1_000_000}}, "step"),
        ({"metrics": ["level"], "step": {"seconds": -5}}, "step"),
        ({"metrics": ["level"], "step": {"seconds": 5, "nanos": 1}}, "step"),
        ({"metrics": ["level"], "step": {"seconds": 2**62}}, "step"),
        ({"metrics": ["level"], "step": {"seconds": 5}, "aggregation": 99}, "aggregation"),
        ({"metrics": ["level"], "step": {"seconds": 5}, "aggregation": "AGGREGATION_RATE"}, "aggregation"),
        ({"metrics": ["level"], "end_time": {"seconds": START_S - 1}}, "start_time"),
        ({"metrics": ["level"], "across_servers": "SERVER_AGGREGATION_AVG"}, "step"),
        ({"metrics": ["level"], "across_servers": 99, "step": {"seconds": 5}}, "across_servers"),
        ({"metrics": ["level"], "top": -1}, "top"),
        ({"metrics": ["level"], "top": 1001}, "top"),
        ({"metrics": ["level"], "top": 1, "across_servers": 1, "step": {"seconds": 5}}, "top"),
        ({"metrics": ["level"], "percentile": 50.0}, "percentile"),
        ({"metrics": ["level"], "percentile": 101.0, "across_servers": 5, "step": {"seconds": 5}}, "percentile"),
        ({"metrics": ["level"], "percentile": float("nan"), "across_servers": 5, "step": {"seconds": 5}}, "percentile"),
    ],
)
async def test_bad_queries_name_the_field(tmp_path: Path, fields: dict[str, Any], field: str) -> None:
    async with service(tmp_path) as ours:
        await ours.append(rows_to_pb(rows([START_S])), metric_sets=[metric_set_to_pb(SET)])
        with pytest.raises(InvalidArgument) as refused:
            await ours.query(**fields)
        assert refused.value.field == field


async def test_servers_are_put_together_and_ranked(tmp_path: Path) -> None:
    async with service(tmp_path) as ours:
        for index in range(5):
            batch = rows_to_pb(rows([START_S, START_S + 10], server_id=f"s{index}", value=float(index)))
            await ours.append(batch, metric_sets=[metric_set_to_pb(SET)])
        total = await ours.query(metrics=["level"], across_servers="SERVER_AGGREGATION_SUM", step={"seconds": 10})
        assert [(one.server_id, list(one.values)) for one in total[0].series] == [("", [10.0, 10.0])]
        best = await ours.query(metrics=["level"], top=2)
        assert [one.server_id for one in best[0].series] == ["s4", "s3"]


async def test_an_unknown_server_is_not_found(tmp_path: Path) -> None:
    async with service(tmp_path) as ours:
        await ours.append(rows_to_pb(rows([START_S])), metric_sets=[metric_set_to_pb(SET)])
        with pytest.raises(NotFound) as refused:
            await ours.query(metrics=["level"], server_ids=["nope"])
        assert refused.value.reason == "SERVER_UNKNOWN"


@pytest.mark.parametrize("message_bytes", [1, wire.MAX_LAST_BYTES])
async def test_last_values_come_by_server_and_share_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message_bytes: int
) -> None:
    monkeypatch.setattr(wire, "MAX_LAST_BYTES", message_bytes)
    other = MetricSet((Metric(name="extra", unit="s"), Metric(name="total", kind=MetricKind.COUNTER)))
    async with service(tmp_path) as ours:
        assert await ours.last() == []
        batch = rows([START_S, START_S + 10], server_id="a", value=1.0)
        batch.values[1, 1] = math.nan
        await ours.append(rows_to_pb(batch), metric_sets=[metric_set_to_pb(SET)])
        await ours.append(rows_to_pb(rows([START_S], server_id="b", value=2.0)))
        await ours.append(rows_to_pb(rows([START_S + 1], server_id="d", value=4.0)))
        third = Rows(
            metric_set_id=other.id, server_ids=("c",), times_ms=np.array([START_S * 1000 + 5]), values=np.ones((1, 2))
        )
        await ours.append(rows_to_pb(third), metric_sets=[metric_set_to_pb(other)])
        messages = await ours.last()
        assert len(messages) == (4 if message_bytes == 1 else 1)
        assert [list(one.metrics) for message in messages for one in message.columns] == [
            ["level", "total"],
            ["extra", "total"],
        ]
        assert unfolded(messages) == {
            ("a", "level"): (START_S + 10, 1.0, "%"),
            ("a", "total"): (START_S, 1.0, ""),
            ("b", "level"): (START_S, 2.0, "%"),
            ("b", "total"): (START_S, 2.0, ""),
            ("c", "extra"): (START_S + 0.005, 1.0, "s"),
            ("c", "total"): (START_S + 0.005, 1.0, ""),
            ("d", "level"): (START_S + 1, 4.0, "%"),
            ("d", "total"): (START_S + 1, 4.0, ""),
        }
        assert unfolded(await ours.last(server_ids=["c", "a"], metrics=["total"])) == {
            ("a", "total"): (START_S, 1.0, ""),
            ("c", "total"): (START_S + 0.005, 1.0, ""),
        }
        assert unfolded(await ours.last(server_ids=["c"], metrics=["level"])) == {}


@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({"metrics": [""]}, InvalidArgument, "metrics"),
        ({"metrics": ["level", "nope"]}, InvalidArgument, "metrics"),
        ({"server_ids": [""]}, InvalidArgument, "server_ids"),
        ({"server_ids": ["s", "nope"]}, NotFound, "server_ids"),
    ],
)
async def test_bad_questions_for_last_values_name_the_field(
    tmp_path: Path, fields: dict[str, Any], error: type[InvalidArgument | NotFound], field: str
) -> None:
    async with service(tmp_path) as ours:
        await ours.append(rows_to_pb(rows([START_S])), metric_sets=[metric_set_to_pb(SET)])
        with pytest.raises(error) as refused:
            await ours.last(**fields)
        assert refused.value.field == field


async def test_the_tail_tells_sets_once_and_where_it_begins(tmp_path: Path) -> None:
    async with service(tmp_path) as ours:
        for second in range(3):
            await ours.append(rows_to_pb(rows([START_S + second])), metric_sets=[metric_set_to_pb(SET)])
        call = ours.stub.TailMetrics(timeseries_pb2.TailMetricsRequest(from_sequence=2))
        messages = []
        async for message in call:
            messages.append(message)
            if len(messages) == 2:
                await ours.append(rows_to_pb(rows([START_S + 9], server_id="late")))
            if len(messages) == 3:
                break
        call.cancel()
        assert [message.sequence for message in messages] == [2, 3, 4]
        assert [message.HasField("metric_set") for message in messages] == [True, False, False]
        assert [message.first_sequence for message in messages] == [1, 0, 0]
        assert messages[2].batch.rows[0].server_id == "late"


async def test_what_is_swept_while_a_tail_begins_is_not_told_as_gone(tmp_path: Path) -> None:
    """Its first batch was read before."""
    async with service(tmp_path) as ours:
        await ours.append(rows_to_pb(rows([START_S])), metric_sets=[metric_set_to_pb(SET)])
        servicer = TimeSeriesServicer(ours.engine, SystemClock())
        tail = servicer.TailMetrics(timeseries_pb2.TailMetricsRequest(from_sequence=1), None)
        read = ours.engine.tail

        async def swept_meanwhile(sequence: int) -> AsyncIterator[TailBatch]:
            async for batch in read(sequence):
                ours.engine._store.swept_through = batch.sequence
                yield batch

        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(ours.engine, "tail", swept_meanwhile)
            message = await anext(tail)
        assert (message.sequence, message.first_sequence) == (1, 1)


async def test_a_tail_of_another_journal_is_refused(tmp_path: Path) -> None:
    async with service(tmp_path) as ours:
        for sequence, error in ((7, FailedPrecondition), (-1, InvalidArgument)):
            with pytest.raises(error):
                async with calling("timeseries"):
                    async for _ in ours.stub.TailMetrics(timeseries_pb2.TailMetricsRequest(from_sequence=sequence)):
                        pass


async def test_the_status_is_truthful(tmp_path: Path) -> None:
    async with service(tmp_path) as ours:
        await ours.append(rows_to_pb(rows([START_S])), metric_sets=[metric_set_to_pb(SET)])
        found = await probe(ours.engine)
        assert (found.degraded, found.spool_bytes > 0, found.disk_free_bytes > 0) == ("", True, True)
