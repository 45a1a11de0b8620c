"""Which of several timeseries replicas answers."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from gateway.readers import Readers
from openmanager.timeseries.v1 import timeseries_pb2
from runtime import deadline
from runtime.channel import Channel
from runtime.clock import ManualClock
from runtime.errors import DeadlineExceeded, InvalidArgument, OpenManagerError, Unavailable
from runtime.interception import Interception
from runtime.server import GrpcServer, bind


class Replica:
    def __init__(self, name: str) -> None:
        self.name = name
        self.fails: OpenManagerError | None = None
        self.breaks = False
        self.asked = 0

    async def Query(
        self, _request: timeseries_pb2.QueryRequest, _context: Any
    ) -> AsyncIterator[timeseries_pb2.QueryResponse]:
        self.asked += 1
        if self.fails is not None:
            raise self.fails
        yield timeseries_pb2.QueryResponse(incomplete=[self.name])
        if self.breaks:
            raise Unavailable("broke off")

    async def QueryOnce(
        self, _request: timeseries_pb2.QueryOnceRequest, _context: Any
    ) -> timeseries_pb2.QueryOnceResponse:
        await asyncio.sleep(60)  # longer than anybody waits
        return timeseries_pb2.QueryOnceResponse()


class Asked:
    def __init__(self, replicas: list[Replica], readers: Readers, clock: ManualClock) -> None:
        self.replicas = replicas
        self.readers = readers
        self.clock = clock

    async def answer(self) -> str:
        request = timeseries_pb2.QueryRequest()
        messages = [message async for message in self.readers.stream(lambda stub: stub.Query(request))]
        (name,) = [text for message in messages for text in message.incomplete]
        return str(name)


@pytest.fixture
async def asked() -> AsyncIterator[Asked]:
    replicas, clock = [Replica("first"), Replica("second")], ManualClock()
    async with AsyncExitStack() as stack:
        channels = []
        for replica in replicas:
            server = GrpcServer([bind("openmanager.timeseries.v1.TimeSeriesService", replica)], Interception(None))
            address = await server.start("127.0.0.1:0")
            stack.push_async_callback(server.stop, 0)
            channels.append(await stack.enter_async_context(Channel(address)))
        yield Asked(replicas, Readers(channels, clock), clock)


async def test_the_first_answers_until_it_is_away_and_again_when_it_is_back(asked: Asked) -> None:
    assert await asked.answer() == "first"
    asked.replicas[0].fails = Unavailable("away")
    assert await asked.answer() == "second"
    assert await asked.answer() == "second"
    before = asked.replicas[0].asked
    assert await asked.answer() == "second"
    assert asked.replicas[0].asked == before, "it is not asked each time"
    asked.replicas[0].fails = None
    asked.clock.advance(60)
    assert await asked.answer() == "first"


async def test_callers_in_a_hurry_take_no_replica_away_from_the_others(asked: Asked) -> None:
    async def hurried(asked: Asked) -> None:
        call = deadline.CallDeadline(time.monotonic() + 0.2)
        token = deadline.current.set(call)
        try:
            request = timeseries_pb2.QueryOnceRequest()
            with pytest.raises(DeadlineExceeded):
                await asked.readers.call(lambda stub: stub.QueryOnce(request))
        finally:
            deadline.current.reset(token)

    for _ in range(3):
        await hurried(asked)
    assert await asked.answer() == "first"


async def test_a_refusal_is_the_answer(asked: Asked) -> None:
    asked.replicas[0].fails = InvalidArgument("no such metric", field="metrics")
    with pytest.raises(InvalidArgument):
        await asked.answer()
    assert asked.replicas[1].asked == 0


async def test_an_answer_that_breaks_off_is_not_gone_on_with_by_another(asked: Asked) -> None:
    asked.replicas[0].breaks = True
    with pytest.raises(Unavailable):
        await asked.answer()
    assert asked.replicas[1].asked == 0


async def test_when_all_are_away_the_error_says_so(asked: Asked) -> None:
    for replica in asked.replicas:
        replica.fails = Unavailable("away")
    for _ in range(3):
        with pytest.raises(Unavailable):
            await asked.answer()
