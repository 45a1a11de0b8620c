"""A service for the tests of the runtime, made without a .proto file: every kind of method, one retried."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813

from runtime.settings import CommonSettings

SERVICE = "openmanager.test.v1.EchoService"
_IDEMPOTENT = descriptor_pb2.MethodOptions.NO_SIDE_EFFECTS
_UNKNOWN = descriptor_pb2.MethodOptions.IDEMPOTENCY_UNKNOWN
_METHODS = {  # name: (client streams, server streams, idempotency)
    "Get": (False, False, _IDEMPOTENT),
    "Create": (False, False, _UNKNOWN),
    "Watch": (False, True, _UNKNOWN),
    "Collect": (True, False, _UNKNOWN),
    "Chat": (True, True, _UNKNOWN),
    "Missing": (False, False, _UNKNOWN),
}


def _service() -> Any:
    try:
        return default_pool().FindServiceByName(SERVICE)
    except KeyError:
        pass
    file = descriptor_pb2.FileDescriptorProto(
        name="openmanager/test/v1/echo.proto", package="openmanager.test.v1", syntax="proto3"
    )
    message = file.message_type.add(name="Echo")
    message.field.add(name="text", number=1, type=descriptor_pb2.FieldDescriptorProto.TYPE_STRING, label=1)
    message.field.add(name="size", number=2, type=descriptor_pb2.FieldDescriptorProto.TYPE_INT64, label=1)
    service = file.service.add(name="EchoService")
    for name, (client_streams, server_streams, idempotency) in _METHODS.items():
        method = service.method.add(
            name=name,
            input_type=".openmanager.test.v1.Echo",
            output_type=".openmanager.test.v1.Echo",
            client_streaming=client_streams,
            server_streaming=server_streams,
        )
        method.options.idempotency_level = idempotency
    default_pool().AddSerializedFile(file.SerializeToString())
    return default_pool().FindServiceByName(SERVICE)


DESCRIPTOR = _service()
Echo: Any = message_factory.GetMessageClass(DESCRIPTOR.methods_by_name["Get"].input_type)


class EchoStub:
    """As generated code makes it."""

    def __init__(self, channel: Any) -> None:
        for name, (client_streams, server_streams, _) in _METHODS.items():
            make = getattr(
                channel, f"{'stream' if client_streams else 'unary'}_{'stream' if server_streams else 'unary'}"
            )
            method = make(
                f"/{SERVICE}/{name}",
                request_serializer=Echo.SerializeToString,
                response_deserializer=Echo.FromString,
                _registered_method=True,
            )
            setattr(self, name, method)

    Get: Any
    Create: Any
    Watch: Any
    Collect: Any
    Chat: Any
    Missing: Any


class EchoServicer:
    """Answers what it is asked, unless a test has set `get` to something else."""

    def __init__(self, get: Callable[[Any, Any], Any] | None = None) -> None:
        self._get = get
        self.calls = 0
        self.watching = 0
        self.hold = asyncio.Event()

    async def Get(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if self._get is None:
            return request
        answer = self._get(request, context)
        return await answer if asyncio.iscoroutine(answer) else answer

    async def Create(self, request: Any, context: Any) -> Any:
        return await self.Get(request, context)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.watching += 1
        try:
            yield request
            await self.hold.wait()
            yield await self.Get(request, context)
        finally:
            self.watching -= 1

    async def Collect(self, requests: AsyncIterator[Any], context: Any) -> Any:
        texts = [request.text async for request in requests]
        return await self.Get(Echo(text=" ".join(texts)), context)

    async def Chat(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            yield await self.Get(request, context)


class EchoSettings(CommonSettings):
    """Settings without anything of their own."""


async def unary(channel: grpc.aio.Channel, method: str = "Get", **kwargs: Any) -> Any:
    """One call with raw gRPC, as a foreign client makes it."""
    call = channel.unary_unary(f"/{SERVICE}/{method}", Echo.SerializeToString, Echo.FromString)
    return await call(kwargs.pop("request", Echo(text="hello")), **kwargs)
