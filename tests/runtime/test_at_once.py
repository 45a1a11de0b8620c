"""Methods that answer from memory, and how long calls took."""

import contextlib
import logging
from typing import Any

import grpc
import pytest

from runtime import caller, durations, telemetry
from runtime.caller import Caller
from runtime.errors import InvalidArgument, PermissionDenied
from runtime.handlers import REMEMBERED_BYTES
from runtime.interception import CallContext, Interception
from runtime.limits import MAX_MESSAGE_BYTES
from runtime.prepared import Prepared
from runtime.server import bind
from tests.runtime.conftest import serving
from tests.runtime.echo import SERVICE, Echo, EchoServicer, EchoStub


class Remembering(EchoServicer):
    """Knows the answer to "known"."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def Get_at_once(self, request: Any, _who: Caller | None) -> Prepared | None:
        self.asked.append(request.text)
        if request.text == "large":
            return Prepared(b"x" * (MAX_MESSAGE_BYTES + 1))
        if request.text == "bad":
            raise InvalidArgument("not this", field="text")
        return Prepared(Echo(text="from memory").SerializeToString()) if request.text == "known" else None


async def test_what_is_in_memory_is_answered_and_everything_else_by_the_method() -> None:
    async with serving(Remembering()) as running, running.channel() as channel:
        stub = EchoStub(channel.grpc)
        assert (await stub.Get(Echo(text="known"))).text == "from memory"
        assert (await stub.Get(Echo(text="other"))).text == "other"
        for text, code in (("large", grpc.StatusCode.RESOURCE_EXHAUSTED), ("bad", grpc.StatusCode.INVALID_ARGUMENT)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Get(Echo(text=text))
            assert caught.value.code() == code
        undecodable = channel.grpc.unary_unary(f"/{SERVICE}/Get")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await undecodable(b"\xff\xff")
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_small_requests_are_remembered_and_what_is_none_is_refused_each_time() -> None:
    decode = bind(SERVICE, Remembering()).handlers["Get"].request_deserializer
    small, large = Echo(text="known").SerializeToString(), Echo(text="x" * REMEMBERED_BYTES).SerializeToString()
    assert decode(small) is decode(bytes(bytearray(small))) and decode(small).text == "known"
    assert decode(large) is not decode(large) and decode(large) == decode(large)
    refused = [decode(b"\xff\xff") for _ in range(2)]
    assert all(isinstance(error, InvalidArgument) for error in refused) and refused[0] is not refused[1]
    other = bind(SERVICE, EchoServicer()).handlers["Get"].request_deserializer
    assert other(small) is not other(small)  # its method may do with it as it likes


async def test_who_is_not_let_in_is_not_answered_from_memory() -> None:
    def refuse(_method: str, _context: CallContext) -> None:
        raise PermissionDenied("nobody")

    servicer = Remembering()
    async with serving(servicer, Interception(refuse)) as running, running.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await EchoStub(channel.grpc).Get(Echo(text="known"))
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert servicer.asked == []


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
async def test_who_calls_is_asked_once_and_known_to_the_method(level: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(level, logger="access")  # at DEBUG each call is logged, and goes another way
    asked: list[str] = []
    current: list[Caller | None] = []

    class Telling(Remembering):
        def Get_at_once(self, request: Any, who: Caller | None) -> Prepared | None:
            current.append(who)
            return super().Get_at_once(request, who)

        async def Get(self, request: Any, context: Any) -> Any:
            current.append(caller.current.get())
            return await super().Get(request, context)

    who = Caller(name="ada")

    def let_in(method: str, _context: CallContext) -> Caller:
        asked.append(method)
        if refusing:
            raise PermissionDenied("nobody")
        return who

    refusing = False
    async with serving(Telling(), Interception(let_in)) as running, running.channel() as channel:
        stub = EchoStub(channel.grpc)
        for text, seen in (("known", [who]), ("other", [who, who]), ("bad", [who])):
            with contextlib.suppress(grpc.aio.AioRpcError):
                await stub.Get(Echo(text=text))
            assert (len(asked), current) == (1, seen), text
            asked.clear()
            current.clear()
        refusing = True
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Get(Echo(text="known"))
        assert (len(asked), current) == (1, [])


def test_only_a_plain_function_beside_a_unary_method_will_do() -> None:
    class Waits(EchoServicer):
        async def Get_at_once(self, _request: Any, _who: Caller | None) -> Prepared | None:
            return None

    class Streams(EchoServicer):
        def Watch_at_once(self, _request: Any, _who: Caller | None) -> Prepared | None:
            return None

    for wrong in (Waits(), Streams()):
        with pytest.raises(TypeError, match="_at_once must be a plain function beside a unary method"):
            bind(SERVICE, wrong)


async def test_every_call_is_counted_once_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "metrics_enabled", lambda: True)
    before = counts()
    async with serving(Remembering()) as running, running.channel() as channel:
        for text in ("known", "known", "other", "bad"):
            try:
                await EchoStub(channel.grpc).Get(Echo(text=text))
            except grpc.aio.AioRpcError as error:
                assert text == "bad", error
    grown = {code: count - before.get(code, 0) for code, count in counts().items()}
    assert {code: count for code, count in grown.items() if count} == {"OK": 3, "INVALID_ARGUMENT": 1}


def test_a_duration_is_in_the_bucket_whose_end_it_does_not_exceed() -> None:
    method = "/test/Buckets"
    for seconds in (0.0, 0.005, 0.0050001, 10.0, 11.0):
        durations.record(method, "OK", seconds, (1, 2) if seconds == 11.0 else None)
    ((attributes, series),) = [one for one in durations.found() if one[0]["rpc.method"] == method[1:]]
    assert attributes["rpc.response.status_code"] == "OK"
    assert series.counts == [2, 1, *[0] * 11, 1, 1]
    assert (series.min_s, series.max_s, series.sum_s) == (0.0, 11.0, pytest.approx(21.0100001))
    assert list(series.exemplars) == [14] and series.exemplars[14][:2] == (1, 2)


def counts() -> dict[str, int]:
    """Calls of Get by code."""
    return {
        attributes["rpc.response.status_code"]: sum(series.counts)
        for attributes, series in durations.found()
        if attributes["rpc.method"] == f"{SERVICE}/Get"
    }
