"""How many calls may wait at once, and what gRPC itself refuses."""

import asyncio
import time
from collections import Counter
from typing import Any

import grpc
import pytest

from runtime import limits
from runtime.errors import ResourceExhausted, carried_error
from runtime.interception import Interception
from runtime.prepared import Prepared
from runtime.waiting import REASON, Waiting
from tests.harness import eventually
from tests.runtime.conftest import serving
from tests.runtime.echo import SERVICE, Echo, EchoServicer, EchoStub

PLACES = 3


class Holding(EchoServicer):
    """Answers "known" from memory and everything else once it is let go."""

    def __init__(self) -> None:
        super().__init__(self._held)
        self.free = asyncio.Event()
        self.held = 0

    async def _held(self, request: Any, _context: Any) -> Any:
        self.held += 1
        await self.free.wait()
        return request

    def Get_at_once(self, request: Any, _who: Any) -> Prepared | None:
        return Prepared(Echo(text="memory").SerializeToString()) if request.text == "known" else None


def refusal(error: grpc.aio.AioRpcError) -> ResourceExhausted:
    carried = carried_error(error)
    assert isinstance(carried, ResourceExhausted), error
    return carried


async def test_more_than_may_wait_are_refused_and_told_when_to_come_again() -> None:
    waiting = Waiting(PLACES, setting="A_SETTING")
    async with serving(Holding(), Interception(waiting=waiting)) as running, running.channel() as channel:
        stub, servicer = EchoStub(channel.grpc), running.servicer
        calls = [asyncio.ensure_future(stub.Get(Echo(text=str(number)))) for number in range(PLACES)]
        await eventually(lambda: servicer.held == PLACES)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Create(Echo(text="one more"))
        error = refusal(caught.value)
        assert error.reason == REASON and "A_SETTING" in str(error) and error.retry_after_s == 1.0
        assert (await stub.Get(Echo(text="known"))).text == "memory"
        calls[0].cancel()
        await eventually(lambda: waiting._now[SERVICE] == PLACES - 1)
        servicer.free.set()
        assert (await stub.Create(Echo(text="now"))).text == "now"
        assert [(await call).text for call in calls[1:]] == ["1", "2"]
        assert waiting._now[SERVICE] == 0


async def test_a_stream_waits_until_its_answer_begins() -> None:
    waiting = Waiting(1, setting="A_SETTING")
    async with serving(None, Interception(waiting=waiting)) as running, running.channel() as channel:
        stub = EchoStub(channel.grpc)
        watchers = [stub.Watch(Echo(text="w")) for _ in range(3)]
        for watcher in watchers:
            assert (await watcher.read()).text == "w"
        chats = [stub.Chat() for _ in range(3)]  # whose callers have said nothing yet
        for chat in chats:
            await chat.wait_for_connection()
        assert (await stub.Get(Echo(text="a"))).text == "a"
        assert waiting._now[SERVICE] == 0
        for call in (*watchers, *chats):
            call.cancel()


def test_watchers_take_no_place() -> None:
    waiting = Waiting(1, setting="A_SETTING", watchers=["/pkg.One/Watch"])
    assert [waiting.enter("/pkg.One/Watch") for _ in range(3)] == ["", "", ""]
    assert waiting.enter("/pkg.One/Get") == "pkg.One"


async def test_services_do_not_share_their_places() -> None:
    waiting = Waiting(1, setting="A_SETTING")
    first = waiting.enter("/pkg.One/Get")
    assert waiting.enter("/pkg.Two/Get") == "pkg.Two"
    with pytest.raises(ResourceExhausted):
        waiting.enter("/pkg.One/List")
    waiting.leave(first)
    waiting.enter("/pkg.One/List")


@pytest.mark.full
async def test_grpc_refuses_what_the_loop_is_far_from_beginning() -> None:
    """Calls that wait in gRPC for a busy loop are bounded: more are refused untouched, so anybody may repeat them."""

    async def busy(request: Any, _context: Any) -> Any:
        time.sleep(0.001)  # a loop that falls behind is what this is about
        return request

    offered = 6 * limits.MAX_PENDING_CALLS
    async with serving(EchoServicer(busy)) as running, running.raw() as channel:
        get = channel.unary_unary(f"/{SERVICE}/Get")
        raw = Echo(text="x").SerializeToString()

        async def call() -> str:
            try:
                await get(raw)
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"
            return "OK"

        ends = Counter(await asyncio.gather(*(call() for _ in range(offered))))
        assert await call() == "OK"
    refused = offered - ends.pop("OK")
    assert offered - refused > limits.MAX_PENDING_CALLS and refused > 0
    refused_stream = "error code 7"  # of HTTP/2: "not processed", so gRPC repeats such a call by itself
    assert all(end.startswith("UNAVAILABLE") and refused_stream in end for end in ends)
