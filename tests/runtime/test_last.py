"""Streams that send their last message together with the status."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from runtime import errors, telemetry
from runtime.channel import calling
from runtime.handlers import Last, ends_with_last
from tests.harness import eventually
from tests.runtime.conftest import serving
from tests.runtime.echo import Echo, EchoServicer, EchoStub

FAILS, FORGETS, WAITS = -1, -2, -3


class Counting(EchoServicer):
    """`Watch` answers with as many messages as `size` says; some sizes mean something else."""

    ended = 0

    @ends_with_last
    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.watching += 1
        try:
            if request.size == WAITS:
                yield request
                await self.hold.wait()
            if request.size == FAILS:
                raise errors.NotFound("there is none", reason="NONE")
            for number in range(1, request.size):
                yield Echo(text=str(number)).SerializeToString()
            if request.size != FORGETS:
                yield Last(Echo(text="last").SerializeToString() if request.size else b"")
            self.ended += 1
        finally:
            self.watching -= 1


@pytest.mark.parametrize("traced", [False, True])
async def test_every_message_comes_in_order_and_the_stream_ends_well(
    traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "tracing_enabled", lambda: traced)
    async with serving(Counting()) as running, running.channel() as channel:
        stub = EchoStub(channel.grpc)
        for size, texts in ((0, [""]), (1, ["last"]), (3, ["1", "2", "last"])):
            call = stub.Watch(Echo(size=size))
            assert [answer.text async for answer in call] == texts
            assert await call.code() is grpc.StatusCode.OK
        assert running.servicer.ended == 3  # type: ignore[attr-defined]


async def test_a_failure_is_told_and_a_stream_that_lacks_its_last_message_is_ours() -> None:
    async with serving(Counting()) as running, running.channel() as channel:
        for size, expected in ((FAILS, errors.NotFound), (FORGETS, errors.Internal)):
            with pytest.raises(expected):
                async with calling("echo"):
                    async for _ in EchoStub(channel.grpc).Watch(Echo(size=size)):
                        pytest.fail("there is no message")


async def test_the_callers_leaving_ends_it() -> None:
    async with serving(Counting()) as running, running.channel() as channel:
        call = EchoStub(channel.grpc).Watch(Echo(size=WAITS))
        assert (await call.read()).size == WAITS  # what is not the last one is not kept back
        assert running.servicer.watching == 1
        call.cancel()
        await eventually(lambda: running.servicer.watching == 0)
