"""Public services that their owner answers itself, under the service secret: the gateway forwards them byte for byte.

    bind(service, forwarded(service, "metadata", metadata))

What must stay true: a call has what is left of its caller's time and ends when its caller leaves; who called goes
along in metadata (`runtime.caller`), made here and never taken from what the caller sent; what the owner says of a
fault comes back as the owner's own error.
"""

from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from runtime import audited, caller, deadline
from runtime.channel import Channel, calling


def forwarded(
    service: ServiceDescriptor,
    owner: str,
    channel: Channel,
    *,
    trailers: Collection[str] = (),
    own: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> object:
    """A servicer each of whose methods calls the same method of `owner`; for `bind`.

    Args:
        service: all its methods are unary or server-streaming.
        owner: the name that errors have for it.
        channel: to it.
        trailers: keys of what the owner may say beside an answer (over HTTP, headers) that are passed on; of unary
            methods only.
        own: methods that the gateway answers itself, by name.

    Raises:
        TypeError: a method takes a stream.
    """
    methods = {
        method.name: _forwarded(method, owner, channel, frozenset(trailers))
        for method in service.methods
        if method.name not in own
    }
    methods |= {name: staticmethod(method) for name, method in own.items()}
    return type(f"Forwarded{service.name}", (), methods)()


def _forwarded(method: MethodDescriptor, owner: str, channel: Channel, trailers: frozenset[str]) -> Any:
    path = f"/{method.containing_service.full_name}/{method.name}"
    if method.client_streaming:
        raise TypeError(f"{path} takes a stream, which is not forwarded")
    if method.server_streaming:
        return _stream(channel.grpc.unary_stream(path, request_serializer=_serialized), owner)
    return _unary(channel.grpc.unary_unary(path, request_serializer=_serialized), owner, trailers)


def _serialized(request: Message) -> bytes:
    return request.SerializeToString()


def _unary(call: Any, owner: str, trailers: frozenset[str]) -> Any:
    async def forward(_servicer: object, request: Message, context: Any) -> bytes:
        async with calling(owner):
            running = call(request, metadata=caller.metadata_of(caller.of(context)))
            response: bytes = await running
            if trailers or audited.current.get() is not None:
                told = await running.trailing_metadata()
                audited.take(told)
            if trailers:
                context.set_trailing_metadata(tuple((key, value) for key, value in told if key in trailers))
            return response

    return forward


def _stream(call: Any, owner: str) -> Any:
    async def forward(_servicer: object, request: Message, context: Any) -> AsyncGenerator[bytes, None]:
        async with calling(owner):
            running = call(request, timeout=deadline.remaining_s(), metadata=caller.metadata_of(caller.of(context)))
            try:
                async for response in running:
                    yield response
            finally:  # a caller who left, or a deadline, must not leave the owner at work
                running.cancel()

    return forward
