"""What every server of the product does: limits, deadlines, health, reflection, addresses, an orderly end."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from runtime import deadline, errors, limits
from runtime.channel import calling
from runtime.interception import Interception
from runtime.limits import MAX_MESSAGE_BYTES, TRANSPORT_FACTOR
from runtime.server import AddressInUse, AddressUnavailable, GrpcServer, bind
from tests.harness import eventually
from tests.runtime.conftest import serving
from tests.runtime.echo import SERVICE, Echo, EchoServicer, EchoStub, unary


async def test_bytes_are_sent_as_they_are() -> None:
    ready = Echo(text="ready-made").SerializeToString()
    servicer = EchoServicer(lambda request, context: ready)
    async with serving(servicer) as running, running.channel() as channel:
        stub = EchoStub(channel.grpc)
        assert (await stub.Get(Echo())).text == "ready-made"
        assert [answer.text async for answer in stub.Chat(iter([Echo()]))] == ["ready-made"]


async def test_all_four_kinds_of_method() -> None:
    async with serving() as running, running.channel() as channel:
        stub = EchoStub(channel.grpc)
        running.servicer.hold.set()
        assert (await stub.Get(Echo(text="a"))).text == "a"
        assert [answer.text async for answer in stub.Watch(Echo(text="b"))] == ["b", "b"]
        assert (await stub.Collect(iter([Echo(text="c"), Echo(text="d")]))).text == "c d"
        chat = stub.Chat()
        for text in ("e", "f"):
            await chat.write(Echo(text=text))
            assert (await chat.read()).text == text
        await chat.done_writing()
        assert await chat.read() is grpc.aio.EOF


async def test_a_missing_method_is_unimplemented_and_a_wrong_one_is_refused_at_once() -> None:
    class NoStream(EchoServicer):
        async def Watch(self, request: Any, context: Any) -> Any:  # type: ignore[override]
            return request

    class NoAsync(EchoServicer):
        def Get(self, request: Any, context: Any) -> Any:
            return request

    assert bind(SERVICE, EchoServicer()).missing == ("Missing",)
    with pytest.raises(TypeError, match=r"NoStream\.Watch must be an async generator"):
        bind(SERVICE, NoStream())
    with pytest.raises(TypeError, match=r"NoAsync\.Get must be an async function"):
        bind(SERVICE, NoAsync())
    async with serving() as running, running.channel() as channel:
        with pytest.raises(errors.Unimplemented):
            async with calling("echo"):
                await EchoStub(channel.grpc).Missing(Echo())


@pytest.mark.parametrize("method", ["Get", "Watch", "Collect", "Chat"])
async def test_a_request_over_the_limit_is_refused_with_the_limits_name(method: str) -> None:
    request = Echo(text="x" * (MAX_MESSAGE_BYTES + 1))
    async with serving() as running, running.channel() as channel:
        with pytest.raises(errors.ResourceExhausted, match=r"request message .* MAX_MESSAGE_BYTES") as caught:
            async with calling("echo"):
                stub_method = getattr(EchoStub(channel.grpc), method)
                if method in {"Get", "Collect"}:
                    await stub_method(request if method == "Get" else iter([request]))
                else:
                    _ = [r async for r in stub_method(request if method == "Watch" else iter([request]))]
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    assert caught.value.metadata["limit_bytes"] == str(16 << 20)


async def test_a_request_of_exactly_the_limit_is_taken() -> None:
    overhead = len(Echo(text="x" * MAX_MESSAGE_BYTES).SerializeToString()) - MAX_MESSAGE_BYTES
    request = Echo(text="x" * (MAX_MESSAGE_BYTES - overhead))
    servicer = EchoServicer(lambda request, context: Echo(text="taken"))
    async with serving(servicer) as running, running.channel() as channel:
        assert (await EchoStub(channel.grpc).Get(request)).text == "taken"


async def test_a_response_over_the_limit_is_refused_with_the_limits_name() -> None:
    servicer = EchoServicer(lambda request, context: b"x" * (MAX_MESSAGE_BYTES + 1))
    async with serving(servicer) as running, running.channel() as channel:
        with pytest.raises(errors.ResourceExhausted, match=r"response message .* MAX_MESSAGE_BYTES"):
            async with calling("echo"):
                await EchoStub(channel.grpc).Get(Echo())


async def test_beyond_the_transports_limit_grpc_refuses_by_itself() -> None:
    unlimited = {"max_send_message_length": -1, "max_receive_message_length": -1}
    async with serving() as running, running.raw(**unlimited) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(channel, request=Echo(text="x" * (TRANSPORT_FACTOR * MAX_MESSAGE_BYTES)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert errors.from_rpc_error(caught.value).reason == "MESSAGE_TOO_LARGE"
    assert "MAX_MESSAGE_BYTES" in str(errors.from_rpc_error(caught.value))


async def remaining(request: Any, context: Any) -> Any:
    return Echo(size=int((deadline.remaining_s() or -1) * 1_000))


async def test_a_call_without_deadline_gets_the_default_and_a_long_one_is_capped() -> None:
    async with serving(EchoServicer(remaining)) as running, running.raw() as channel:
        assert 2_000 < (await unary(channel)).size <= 10_000
        assert 52_000 < (await unary(channel, timeout=3_600)).size <= 60_000
        assert 22_000 < (await unary(channel, timeout=30)).size <= 30_100  # gRPC rounds up on the wire


async def test_the_default_deadline_ends_a_call_that_does_not() -> None:
    ended = asyncio.Event()

    async def hang(request: Any, context: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    interception = Interception(default_deadline_s=0.1)
    async with serving(EchoServicer(hang), interception) as running, running.raw() as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=r"not answered within 0\.1 s") as caught:
            async with asyncio.timeout(20):
                await unary(channel)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert ended.is_set()


async def test_a_timeout_of_the_handlers_own_is_not_the_callers_deadline() -> None:
    async def impatient(request: Any, context: Any) -> Any:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()

    async with serving(EchoServicer(impatient)) as running, running.raw() as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="internal error, id"):
            await unary(channel)


async def test_a_stream_has_no_default_deadline() -> None:
    interception = Interception(default_deadline_s=0.05)
    async with serving(EchoServicer(remaining), interception) as running, running.channel() as channel:
        call = EchoStub(channel.grpc).Watch(Echo())
        await call.read()
        await asyncio.sleep(0.1)  # longer than the deadline a unary call would have
        running.servicer.hold.set()
        assert (await call.read()).size == -1_000


async def test_the_callers_leaving_ends_the_handler() -> None:
    async with serving() as running, running.channel() as channel:
        call = EchoStub(channel.grpc).Watch(Echo())
        await call.read()
        assert running.servicer.watching == 1
        call.cancel()
        await eventually(lambda: running.servicer.watching == 0)


async def test_health_lists_nothing_and_logs_no_fault_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as running, running.raw() as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.List(health_pb2.HealthListRequest())
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert refused.value.details() == "services are not listed; ask for each by Check or Watch"
    assert "List" not in caplog.text


async def test_health_answers_for_the_server_and_each_service() -> None:
    kinds = health_pb2.HealthCheckResponse
    async with serving() as running, running.raw() as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=service)
            assert (await stub.Check(request)).status == kinds.NOT_SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == kinds.NOT_SERVING
        await running.server.set_serving(True)
        assert (await watch.read()).status == kinds.SERVING
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == kinds.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_answers_in_both_versions(version: str) -> None:
    service = f"grpc.reflection.{version}.ServerReflection"
    async with serving() as running, running.raw() as channel:
        call = channel.stream_stream(
            f"/{service}/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )

        async def ask() -> AsyncIterator[Any]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            for name in (SERVICE, "grpc.health.v1.Health", service, "openmanager.test.v1.Echo"):
                yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)

        listed, *described = [answer async for answer in call(ask())]
        assert {entry.name for entry in listed.list_services_response.service} == {
            SERVICE,
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        described_type = default_pool().FindServiceByName(service).methods[0].input_type.full_name
        assert described_type == f"grpc.reflection.{version}.ServerReflectionRequest"
        for answer in described:
            assert answer.file_descriptor_response.file_descriptor_proto, answer.error_response


async def test_an_address_in_use_is_refused() -> None:
    async with serving() as running:
        second = GrpcServer([bind(SERVICE, EchoServicer())], Interception())
        with pytest.raises(AddressInUse, match="already in use"):
            await second.start(running.address)
        await second.stop(0)


async def test_a_port_is_not_shared_even_when_taken_at_the_last_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.server._probe", lambda address: None)
    async with serving() as running:
        second = GrpcServer([bind(SERVICE, EchoServicer())], Interception())
        with pytest.raises(AddressUnavailable, match="cannot listen on"):
            await second.start(running.address)
        await second.stop(0)


async def test_an_address_of_nobody_is_refused_with_the_reason() -> None:
    refused = GrpcServer([], Interception())
    with pytest.raises(AddressUnavailable, match=r"cannot listen on 192\.0\.2\.1:1: Cannot assign"):
        await refused.start("192.0.2.1:1")
    await refused.stop(0)


async def test_stopping_lets_a_call_finish_and_refuses_new_ones() -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    async def slow(request: Any, context: Any) -> Any:
        entered.set()
        await release.wait()
        return request

    async with serving(EchoServicer(slow)) as running, running.channel() as channel:
        await running.server.set_serving(True)
        health: Any = health_pb2_grpc.HealthStub(channel.grpc)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        in_flight = asyncio.ensure_future(EchoStub(channel.grpc).Get(Echo(text="kept")))
        await entered.wait()
        stopping = asyncio.create_task(running.server.stop())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        async with running.raw() as late:

            async def refused() -> bool:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await unary(late, timeout=0.2)
                return caught.value.code() is grpc.StatusCode.UNAVAILABLE

            await eventually(refused)
        release.set()
        assert (await in_flight).text == "kept"
        await stopping


async def test_stopping_does_not_wait_for_a_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STREAM_GRACE_S", 0.05)
    async with serving() as running, running.channel() as channel:
        call = EchoStub(channel.grpc).Watch(Echo())
        await call.read()
        async with asyncio.timeout(20):
            stopping = asyncio.create_task(running.server.stop(60.0))
            with pytest.raises(errors.Unavailable) as caught:
                async with calling("echo"):
                    await call.read()
            assert caught.value.reason == "SHUTTING_DOWN"
            await stopping
