"""Inner services answer only who has the service secret; the HTTP bridge goes through the same layer."""

import asyncio
import secrets
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from runtime import deadline, errors
from runtime.caller import Caller
from runtime.channel import calling
from runtime.interception import (
    CallContext,
    Interception,
    metadata_value,
    peer_is_loopback,
    service_secret_authenticator,
)
from tests.runtime.conftest import serving
from tests.runtime.echo import SERVICE, Echo, EchoServicer, EchoStub, unary

SECRET = secrets.token_urlsafe(32)


def locked() -> Interception:
    return Interception(service_secret_authenticator(SECRET))


async def test_the_secret_opens_and_nothing_else_does() -> None:
    async with serving(interception=locked()) as running, running.raw() as channel:
        assert (await unary(channel, metadata=(("authorization", f"Bearer {SECRET}"),))).text == "hello"
        for wrong in ((), (("authorization", SECRET),), (("authorization", f"Bearer {SECRET}x"),)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await unary(channel, metadata=wrong)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            said = caught.value.details() or ""
            for words in ("`authorization: Bearer SECRET`", "DATA_DIR/service-secret", "call the gateway"):
                assert words in said
            assert SECRET not in repr(caught.value)
        assert running.servicer.calls == 1


@pytest.mark.parametrize("method", ["Watch", "Collect", "Chat"])
async def test_streams_are_locked_too(method: str) -> None:
    async with serving(interception=locked()) as running, running.raw() as channel:
        # Nothing is sent on a stream: grpc.aio says INTERNAL where its message meets the refusal on the way.
        call = getattr(EchoStub(channel), method)(*([Echo()] if method == "Watch" else []))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            if method == "Collect":
                await call
            elif method == "Chat":
                await call.read()
            else:
                _ = [answer async for answer in call]
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert running.servicer.calls == running.servicer.watching == 0


async def test_channels_carry_the_secret_beside_the_callers_own_metadata() -> None:
    seen: list[str | None] = []

    def get(request: Any, context: CallContext) -> Any:
        seen.append(metadata_value(context, "x-request-id"))
        return request

    async with serving(EchoServicer(get), locked()) as running, running.channel(secret=SECRET) as channel:
        await EchoStub(channel.grpc).Get(Echo(), metadata=(("x-request-id", "7"),))
    assert seen == ["7"]


async def test_a_refused_process_is_a_fault_of_the_install_and_not_of_its_caller() -> None:
    async with serving(interception=locked()) as running, running.channel(secret="another" * 5) as channel:
        with pytest.raises(errors.Unavailable, match="echo refused this process") as caught:
            async with calling("echo"):
                await EchoStub(channel.grpc).Get(Echo())
    assert caught.value.reason == "SERVICE_SECRET_REFUSED"


async def test_health_and_local_reflection_need_no_secret() -> None:
    async with serving(interception=locked()) as running, running.raw() as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        await health.Check(health_pb2.HealthCheckRequest())
        call = channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        assert [answer async for answer in call(iter([request]))]


async def test_reflection_from_another_machine_needs_it() -> None:
    class Remote:
        def peer(self) -> str:
            return "ipv4:192.0.2.7:4711"

        def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
            return ()

        def time_remaining(self) -> None:
            return None

    authenticate = service_secret_authenticator(SECRET)
    with pytest.raises(errors.Unauthenticated):
        await authenticate("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Remote())


@pytest.mark.parametrize(
    ("peer", "loopback"),
    [
        ("ipv4:127.0.0.1:4711", True),
        ("ipv6:%5B::1%5D:4711", True),
        ("ipv6:[::1]:4711", True),
        ("unix:", True),
        ("ipv4:10.0.0.1:4711", False),
        ("ipv4:127.evil", True),  # gRPC writes addresses here, never names
        ("ipv6:%5B2001:db8::1%5D:4711", False),
        ("", False),
    ],
)
def test_loopback_peers(peer: str, loopback: bool) -> None:
    assert peer_is_loopback(peer) is loopback


class InProcess:
    """A call without gRPC, as the HTTP bridge makes it."""

    def __init__(self, left_s: float | None = None, **metadata: str) -> None:
        self._left_s = left_s
        self._metadata = tuple(metadata.items())

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def time_remaining(self) -> float | None:
        return self._left_s


async def test_the_bridge_gets_typed_errors_deadline_and_authentication() -> None:
    interception = locked()
    servicer = EchoServicer()
    with pytest.raises(errors.Unauthenticated):
        await interception.unary(f"/{SERVICE}/Get", servicer.Get, Echo(), InProcess())
    caller = InProcess(authorization=f"Bearer {SECRET}")
    assert (await interception.unary(f"/{SERVICE}/Get", servicer.Get, Echo(text="x"), caller)).text == "x"

    async def hang(request: Any, context: Any) -> Any:
        await asyncio.Event().wait()

    with pytest.raises(errors.DeadlineExceeded):
        hasty = InProcess(0.01, authorization=f"Bearer {SECRET}")
        await interception.unary(f"/{SERVICE}/Get", hang, Echo(), hasty)
    assert deadline.remaining_s() is None


async def test_the_bridge_streams_and_its_leaving_closes_the_handler() -> None:
    servicer = EchoServicer()
    stream = Interception().stream(f"/{SERVICE}/Watch", servicer.Watch, Echo(text="one"), InProcess())
    assert (await anext(stream)).text == "one"
    assert servicer.watching == 1
    await stream.aclose()
    assert servicer.watching == 0


async def test_a_stream_of_who_may_not_go_on_is_ended_and_no_other() -> None:
    def let_in(_method: str, context: CallContext) -> Caller:
        return Caller(name=metadata_value(context, "name") or "")

    def over(who: Caller) -> errors.OpenManagerError | None:
        return errors.Unauthenticated("over", reason="OVER") if who.name == "gone" else None

    interception = Interception(let_in)
    async with serving(interception=interception) as running, running.channel() as channel:
        stub = EchoStub(channel.grpc)
        silent, writing, other = (
            stub.Watch(Echo(text="one"), metadata=(("name", "gone"),)),
            stub.Chat(metadata=(("name", "gone"),)),
            stub.Watch(Echo(text="two"), metadata=(("name", "stays"),)),
        )
        assert (await silent.read()).text == "one" and (await other.read()).text == "two"
        await writing.write(Echo(text="three"))
        assert (await writing.read()).text == "three"
        await interception.end_streams_of(lambda _who: None)
        await interception.end_streams_of(over)
        await interception.end_streams_of(over)  # what ends already is not ended once more
        for ended in (silent, writing):
            with pytest.raises(errors.Unauthenticated) as caught:
                async with calling("echo"):
                    await ended.read()
            assert caught.value.reason == "OVER"
        assert (running.servicer.watching, running.servicer.calls) == (1, 1)
        running.servicer.hold.set()
        assert (await other.read()).text == "two"


async def test_a_stream_that_is_sending_ends_behind_what_it_sends() -> None:
    interception = Interception(lambda _method, _context: Caller(name="gone"))
    stream = interception.stream(f"/{SERVICE}/Watch", EchoServicer().Watch, Echo(text="one"), InProcess())
    assert (await anext(stream)).text == "one"
    await interception.end_streams_of(lambda _who: errors.Unauthenticated("over", reason="OVER"))
    await asyncio.sleep(0)  # it would be cancelled here, which whoever sends takes for its own end
    with pytest.raises(errors.Unauthenticated):
        await anext(stream)
