"""The writing stream against gateways that forget, break off, refuse and take their time."""

import asyncio
import contextlib
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest

from client import Metric, OpenManager, OpenManagerError, WriteMetricsRequest, batch, writing
from client.backoff import Backoff
from client.channel import open_channel
from openmanager.gateway.v1 import ingest_pb2
from runtime.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from tests.harness import eventually

Plan = Callable[[int, ingest_pb2.WriteMetricsRequest], Awaitable[None]]
"""Given how many requests came before, on all streams, and the request; raises what is to be answered."""


async def fine(_number: int, _request: ingest_pb2.WriteMetricsRequest) -> None:
    """All is well."""


@dataclass
class FakeIngest:
    """Takes batches, a point for each row, and remembers how each stream sent them."""

    plan: Plan = fine
    streams: list[list[ingest_pb2.WriteMetricsRequest]] = field(default_factory=list)
    taken: dict[tuple[str, int], float] = field(default_factory=dict)

    async def WriteMetrics(self, requests: AsyncIterator[Any], _context: object) -> AsyncIterator[Any]:
        stream: list[ingest_pb2.WriteMetricsRequest] = []
        self.streams.append(stream)
        async for request in requests:
            number = sum(map(len, self.streams))
            stream.append(request)
            await self.plan(number, request)
            for row, value in zip(request.rows, request.values, strict=True):
                self.taken[row.server_id, row.time.seconds] = value
            yield ingest_pb2.WriteMetricsResponse(accepted_points=len(request.rows), metric_set_id="x")


@contextlib.asynccontextmanager
async def gateway(servicer: FakeIngest) -> AsyncIterator[OpenManager]:
    server = GrpcServer([bind("openmanager.gateway.v1.IngestService", servicer)], Interception(None))
    address = await server.start("127.0.0.1:0")
    manager = OpenManager.connect(address)
    manager._backoff = Backoff(initial_s=0.01, max_s=0.02, rng=random.Random(1))
    try:
        async with manager:
            yield manager
    finally:
        await server.stop(0)


def one(second: int, name: str = "m") -> ingest_pb2.WriteMetricsRequest:
    return batch([Metric(name=name)], [("a", float(second))], [[float(second)]])


def fails_once(at: int, error: Exception) -> Plan:
    """Fails the request that comes as the `at`-th, and no other."""

    async def plan(number: int, _request: ingest_pb2.WriteMetricsRequest) -> None:
        if number == at:
            raise error

    return plan


def always(second: int, error: Exception) -> Plan:
    """Fails the batch of a second however often it comes."""

    async def plan(_number: int, request: ingest_pb2.WriteMetricsRequest) -> None:
        if request.rows[0].time.seconds == second:
            raise error

    return plan


async def test_a_set_is_sent_once_and_again_when_it_changes() -> None:
    servicer = FakeIngest()
    async with gateway(servicer) as manager:
        totals = await manager.write(*(one(n) for n in range(1, 30)), one(30, "other"), one(31, "other"), one(32))
    assert (totals.accepted_points, totals.rejected_points, totals.errors) == (32, 0, [])
    sent = [bool(request.metrics) for request in servicer.streams[0]]
    assert sent == [True] + [False] * 28 + [True, False, True]


async def test_a_gateway_that_forgot_the_set_gets_it_again() -> None:
    servicer = FakeIngest(fails_once(3, FailedPrecondition("not known", reason="METRIC_SET_UNKNOWN")))
    async with gateway(servicer) as manager:
        totals = await manager.write(*(one(n) for n in range(1, 9)))
    assert totals.accepted_points == 8
    assert servicer.taken == {("a", n): float(n) for n in range(1, 9)}
    assert len(servicer.streams) == 2 and servicer.streams[1][0].metrics


async def test_a_set_that_is_refused_with_its_metrics_is_an_error() -> None:
    servicer = FakeIngest(fails_once(0, FailedPrecondition("not known", reason="METRIC_SET_UNKNOWN")))
    async with gateway(servicer) as manager:
        with pytest.raises(OpenManagerError) as refused:
            await manager.write(one(1))
    assert (refused.value.reason, len(servicer.streams)) == ("METRIC_SET_UNKNOWN", 1)
    assert "with its metrics" in refused.value.hint


@pytest.mark.parametrize(
    "error", [Unavailable("not now", retry_after_s=0.03), ResourceExhausted("no room", reason="DISK_FULL")], ids=str
)
async def test_what_has_no_answer_is_sent_again(error: Exception) -> None:
    lost: list[tuple[OpenManagerError, float]] = []

    async def until_told(_number: int, request: ingest_pb2.WriteMetricsRequest) -> None:
        if request.rows[0].time.seconds == 13 and not lost:
            raise error

    servicer = FakeIngest(until_told)
    async with gateway(servicer) as manager:
        answers = [
            answer
            async for answer in manager.writing(
                [one(n) for n in range(1, 41)], on_lost=lambda error, delay_s: lost.append((error, delay_s))
            )
        ]
    assert len(answers) == 40 and sum(answer.accepted_points for answer in answers) == 40
    assert servicer.taken == {("a", n): float(n) for n in range(1, 41)}
    assert servicer.streams[-1][0].rows[0].time.seconds == 13, "not what has an answer"
    assert [type(told).__name__ for told, _ in lost] == ["OpenManagerError"]
    assert (lost[0][0].message, lost[0][0].from_gateway) == (str(error), True)
    assert lost[0][1] >= (lost[0][0].retry_after_s or 0)


async def test_it_gives_up_in_the_end() -> None:
    async def away(_number: int, _request: object) -> None:
        raise Unavailable("not now")

    for retry_for_s in (0.2, 2.0, 20.0):  # a busy machine may use the time up with one attempt
        servicer = FakeIngest(away)
        async with gateway(servicer) as manager:
            with pytest.raises(OpenManagerError, match="not now"):
                await manager.write(one(1), retry_for_s=retry_for_s)
        if len(servicer.streams) > 2:
            break
    assert len(servicer.streams) > 2


@pytest.mark.parametrize(
    "error", [InvalidArgument("bad", field="values"), ResourceExhausted("large", reason="MESSAGE_TOO_LARGE")], ids=str
)
async def test_a_refusal_is_raised_after_the_answers_before_it(error: Exception) -> None:
    servicer = FakeIngest(always(3, error))
    answers = 0
    async with gateway(servicer) as manager:
        with pytest.raises(OpenManagerError) as refused:
            async for _answer in manager.writing(one(n) for n in range(1, 9)):
                answers += 1
    assert (answers, refused.value.from_gateway) == (2, True)
    assert set(servicer.taken) == {("a", 1), ("a", 2)}


async def test_what_the_gateway_says_is_heard_though_batches_were_being_written() -> None:
    for _ in range(20):
        servicer = FakeIngest(always(2, InvalidArgument("bad", field="values")))
        async with gateway(servicer) as manager:
            with pytest.raises(OpenManagerError, match="bad") as refused:
                await manager.write(*(one(n) for n in range(1, 9)))
        assert refused.value.field == "values"


async def test_what_is_no_batch_is_raised_and_waits_for_nothing() -> None:
    wrong: Any = {"values": [1]}
    async with gateway(FakeIngest()) as manager:
        with pytest.raises(AttributeError):
            await manager.write(one(1), wrong)


async def test_a_batch_that_no_gateway_takes_is_refused() -> None:
    for values in (2_200_000, 9_000_000):
        large = batch([Metric(name="m")], [("a", 1.0)], np.zeros(values))
        async with gateway(FakeIngest()) as manager:
            with pytest.raises(OpenManagerError, match="MAX_MESSAGE_BYTES") as refused:
                await manager.write(one(1), large)
        assert refused.value.reason == "MESSAGE_TOO_LARGE"


async def test_at_most_so_many_batches_are_taken_ahead() -> None:
    hold = asyncio.Event()

    async def held(_number: int, _request: object) -> None:
        await hold.wait()

    taken = 0

    async def source() -> AsyncIterator[WriteMetricsRequest]:
        nonlocal taken
        for taken in range(1, 51):
            yield one(taken)

    servicer = FakeIngest(held)
    async with gateway(servicer) as manager:
        writing = asyncio.create_task(collect(manager.writing(source())))
        await eventually(lambda: taken == 8 and servicer.streams)
        hold.set()
        assert len(await writing) == 50


async def collect(answers: AsyncIterator[Any]) -> list[Any]:
    return [answer async for answer in answers]


async def test_an_answer_comes_before_the_next_batch_is_there() -> None:
    gate: asyncio.Queue[int] = asyncio.Queue()
    ended = False

    async def source() -> AsyncIterator[WriteMetricsRequest]:
        nonlocal ended
        try:
            while True:
                yield one(await gate.get())
        finally:
            ended = True

    # breaks off while the source has nothing: the source must outlive the stream that waited for it
    servicer = FakeIngest(fails_once(1, Unavailable("not now")))
    async with gateway(servicer) as manager, contextlib.aclosing(manager.writing(source())) as answers:
        gate.put_nowait(1)
        assert (await anext(answers)).accepted_points == 1
        gate.put_nowait(2)
        assert (await anext(answers)).accepted_points == 1
        gate.put_nowait(3)
        assert (await anext(answers)).accepted_points == 1
    assert len(servicer.streams) == 2 and ended
    assert set(servicer.taken) == {("a", 1), ("a", 2), ("a", 3)}


async def test_a_source_that_fails_has_its_earlier_batches_written() -> None:
    def source() -> Any:
        yield one(1)
        yield one(2)
        raise ValueError("line 3")

    servicer, answers = FakeIngest(), 0
    async with gateway(servicer) as manager:
        with pytest.raises(ValueError, match="line 3"):
            async for _answer in manager.writing(source()):
                answers += 1
    assert answers == 2


async def test_before_a_batch_that_is_too_large_the_earlier_ones_are_acknowledged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writing, "MAX_MESSAGE_BYTES", 1_000)
    free = asyncio.Event()

    async def slow(_number: int, _request: ingest_pb2.WriteMetricsRequest) -> None:
        await free.wait()

    def source() -> Any:
        yield one(1)
        yield one(2)
        asyncio.get_running_loop().call_soon(free.set)
        yield batch([Metric(name="m")], [("a", float(n)) for n in range(3, 103)], [[0.0]] * 100)

    servicer, answers = FakeIngest(slow), 0
    async with gateway(servicer) as manager:
        with pytest.raises(OpenManagerError, match="MAX_MESSAGE_BYTES"):
            async for _answer in manager.writing(source()):
                answers += 1
    assert answers == 2


async def test_a_batch_without_metrics_has_those_before_it_on_every_stream() -> None:
    servicer = FakeIngest(fails_once(1, Unavailable("not now")))
    bare = one(2)
    del bare.metrics[:]
    async with gateway(servicer) as manager:
        totals = await manager.write(one(1), bare)
    assert totals.accepted_points == 2
    assert servicer.streams[1][0].metrics[0].name == "m"
    assert not bare.metrics, "the caller's message is the caller's"


async def test_each_batch_has_the_columns_that_it_means_where_some_name_a_set_by_its_id() -> None:
    """Told by the rules of the wire: the metrics, else the id, else what the request before it has."""
    servicer = FakeIngest()
    named, bare = one(2), one(3)
    for request in (named, bare):
        del request.metrics[:]
    named.metric_set_id = "x"
    batches = [one(1, "m"), named, one(4, "m"), one(5, "m"), one(6, "other"), named, bare, one(7, "other"), bare]
    async with gateway(servicer) as manager:
        await manager.write(*batches)
    meant, columns = [], ""
    for request in servicer.streams[0]:
        columns = ",".join(metric.name for metric in request.metrics) or request.metric_set_id or columns
        meant.append(columns)
    assert meant == ["m", "x", "m", "m", "other", "x", "x", "other", "other"]


async def test_a_gateway_without_tls_where_tls_is_wanted() -> None:
    async with gateway(FakeIngest()) as manager:
        address = f"https://{manager.address}"
        async with OpenManager(open_channel(address), address, None, 5.0) as wrong:
            with pytest.raises(OpenManagerError) as failed:
                await wrong.summary()
    assert failed.value.code is grpc.StatusCode.UNAVAILABLE and "--ca-file" in failed.value.hint


def test_a_batch_of_parts() -> None:
    made = batch([Metric(name="a"), Metric(name="b")], [("s", 1.5), ("t", 2)], np.array([[1, 2], [3, math.nan]]))
    assert list(made.values[:3]) == [1, 2, 3] and math.isnan(made.values[3])
    assert [(row.server_id, row.time.ToMilliseconds()) for row in made.rows] == [("s", 1500), ("t", 2000)]
