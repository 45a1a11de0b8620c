"""Forwarded services, over real gRPC on both hops: bytes, streams, faults, callers, deadlines and leaving."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from gateway.servicers.forward import forwarded
from runtime import caller, deadline
from runtime.caller import Caller
from runtime.channel import Channel, calling
from runtime.errors import DeadlineExceeded, NotFound, Unavailable
from runtime.interception import CallContext, Interception, service_secret_authenticator
from runtime.server import GrpcServer, bind
from tests.harness import eventually
from tests.runtime.echo import DESCRIPTOR, Echo, EchoServicer

SECRET = "between-the-two"
SERVICE = "openmanager.test.v1.ForwardedService"


def _service() -> Any:
    """The methods of the echo service that can be forwarded, as a service of their own."""
    with contextlib.suppress(KeyError):
        return descriptor_pool.Default().FindServiceByName(SERVICE)
    file = descriptor_pb2.FileDescriptorProto(
        name="openmanager/test/v1/forwarded.proto",
        package="openmanager.test.v1",
        syntax="proto3",
        dependency=[DESCRIPTOR.file.name],
    )
    service = file.service.add(name="ForwardedService")
    for name in ("Get", "Create", "Watch"):
        DESCRIPTOR.methods_by_name[name].CopyToProto(service.method.add())
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
    return descriptor_pool.Default().FindServiceByName(SERVICE)


@contextlib.asynccontextmanager
async def _serving(servicer: object, interception: Interception) -> AsyncIterator[str]:
    server = GrpcServer([bind(_service(), servicer)], interception)
    address = await server.start("127.0.0.1:0")
    try:
        yield address
    finally:
        await server.stop(0)


class Forwarding:
    """A caller's channel to a gateway, and the owner behind it."""

    def __init__(self, owner: EchoServicer, channel: Channel) -> None:
        self.owner = owner
        make: Any = channel.grpc
        coders = (Echo.SerializeToString, Echo.FromString)
        self.get = make.unary_unary(f"/{SERVICE}/Get", *coders)
        self.create = make.unary_unary(f"/{SERVICE}/Create", *coders)
        self.watch = make.unary_stream(f"/{SERVICE}/Watch", *coders)


@contextlib.asynccontextmanager
async def forwarding(get: Any = None, authenticator: Any = None, **options: Any) -> AsyncIterator[Forwarding]:
    owner = EchoServicer(get)
    async with (
        _serving(owner, Interception(service_secret_authenticator(SECRET))) as inner,
        Channel(inner, secret=SECRET) as between,
        _serving(forwarded(_service(), "owner", between, **options), Interception(authenticator)) as outer,
        Channel(outer) as channel,
    ):
        yield Forwarding(owner, channel)


async def test_unary_and_streaming_methods_are_answered_by_the_owner() -> None:
    async with forwarding() as made:
        unknown = b"\x7a\x03new"  # field 15: a caller that is newer than the gateway
        request = Echo.FromString(Echo(text="a", size=3).SerializeToString() + unknown)
        assert (await made.get(request)).SerializeToString() == request.SerializeToString()
        made.owner.hold.set()
        assert [answer.text async for answer in made.watch(Echo(text="b"))] == ["b", "b"]


async def test_the_owners_errors_come_back_as_they_were() -> None:
    def refuse(_request: Any, _context: Any) -> Any:
        raise NotFound("there is no such echo", field="text", reason="NO_ECHO")

    async with forwarding(refuse) as made:
        made.owner.hold.set()
        for ask in (lambda: made.get(Echo()), lambda: _all(made.watch(Echo()))):
            with pytest.raises(NotFound) as caught:
                async with calling("gateway"):
                    await ask()
            assert (caught.value.reason, caught.value.field) == ("NO_ECHO", "text")


async def test_an_owner_that_is_away_is_named() -> None:
    async with (
        Channel("127.0.0.1:1", secret=SECRET) as nobody,
        _serving(forwarded(_service(), "owner", nobody), Interception()) as outer,
        Channel(outer) as channel,
    ):
        create = channel.grpc.unary_unary(f"/{SERVICE}/Create", Echo.SerializeToString, Echo.FromString)
        with pytest.raises(Unavailable) as caught:
            async with calling("gateway"):
                await create(Echo())
        assert caught.value.metadata["peer"] == "owner"


async def test_the_owner_learns_who_called_from_the_gateway_and_never_from_the_caller() -> None:
    seen: list[Caller] = []

    def remember(request: Any, context: CallContext) -> Any:
        seen.append(caller.told(context))
        return request

    known = Caller(name="Ada Lövelace, 管", role="viewer", address="10.0.0.7", authentication="token")

    def authenticate(_method: str, _context: CallContext) -> Caller:
        return known

    forged = ((caller.NAME_KEY, "root"), (caller.ROLE_KEY, "admin"), (caller.ADDRESS_KEY, "::1"))
    async with forwarding(remember, authenticate) as made:
        made.owner.hold.set()
        await made.get(Echo(), metadata=forged)
        await _all(made.watch(Echo(), metadata=forged))
    assert seen == [known, known]
    seen.clear()
    async with forwarding(remember) as made:  # nobody said who it is: no more than the address is known
        await made.get(Echo(), metadata=forged)
    assert seen == [Caller(address="127.0.0.1")]


async def test_a_call_has_what_is_left_of_its_callers_time() -> None:
    left: list[float | None] = []

    def remember(request: Any, _context: Any) -> Any:
        left.append(deadline.remaining_s())
        return request

    async with forwarding(remember) as made:
        made.owner.hold.set()
        await made.get(Echo(), timeout=8.0)
        await _all(made.watch(Echo(), timeout=8.0))
        await _all(made.watch(Echo()))
    assert [value is not None and value < 9.0 for value in left] == [True, True, False]
    async with forwarding() as made:  # its stream waits for what does not come
        with pytest.raises(DeadlineExceeded):
            async with calling("gateway"):
                await _all(made.watch(Echo(), timeout=0.3))
        await eventually(lambda: made.owner.watching == 0, 10.0)


async def test_a_caller_who_leaves_ends_the_owners_work() -> None:
    async with forwarding() as made:
        call = made.watch(Echo(text="a"))
        assert (await call.read()).text == "a"
        assert made.owner.watching == 1
        call.cancel()
        await eventually(lambda: made.owner.watching == 0, 10.0)


async def test_only_named_trailers_are_passed_on() -> None:
    def say(request: Any, context: Any) -> Any:
        context.set_trailing_metadata((("age", "3"), ("inner", "secret")))
        return request

    async with forwarding(say, trailers=("age",)) as made:
        call = made.get(Echo())
        await call
        told = dict(await call.trailing_metadata())
        assert told.get("age") == "3"
        assert "inner" not in told


async def test_a_service_that_reads_streams_is_refused_at_once() -> None:
    async with Channel("127.0.0.1:1") as nobody:
        with pytest.raises(TypeError, match=r"EchoService/Collect takes a stream"):
            forwarded(DESCRIPTOR, "owner", nobody)


async def _all(call: Any) -> list[Any]:
    return [answer async for answer in call]
