"""From a service's descriptor and a plain object to gRPC handlers that go through interception.

A servicer's attributes are named as the methods: `async def Method(self, request, context) -> response`, and an async
generator for a streamed answer. A response may be `bytes`, an already serialized message, or `Prepared`, one that is
shared: they are sent as they are. A method the servicer lacks is UNIMPLEMENTED.

Beside a unary method there may be `def Method_at_once(self, request, who) -> Prepared | None`. It answers from memory
where it can (None: it cannot): a call that it answers needs no deadline and none of what belongs to waiting. `who` is
the caller, as authentication found him; nobody is the current one yet. Such a method leaves its requests as they are,
since they are remembered.

A call's place in a trace begins and ends here (runtime.tracing); health calls have none.

What must stay true: messages are decoded and encoded where a fault becomes a typed error, because gRPC answers an
exception of a (de)serializer with its text, and its own refusal of a large message cannot name MAX_MESSAGE_BYTES; each
method is wrapped once, so that a call costs no chain of interceptors.
"""

import contextlib
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Final
from urllib.parse import unquote

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813  a function, named as a class
from google.protobuf.message import DecodeError, Message

from runtime import tracing
from runtime.caller import Caller
from runtime.errors import (
    STATUS_DETAILS_KEY,
    InvalidArgument,
    OpenManagerError,
    ResourceExhausted,
    Unimplemented,
    status_code,
    to_status,
)
from runtime.interception import AtOnce, Interception, NotAnswered
from runtime.limits import MAX_MESSAGE_BYTES
from runtime.prepared import Prepared

REMEMBERED_REQUESTS: Final = 1_024
REMEMBERED_BYTES: Final = 256
"""Of methods that answer from memory so many requests of at most this size are kept decoded: 0.1 us instead of 0.5."""
_NO_RESPONSES: Final[tuple[bytes, ...]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A service and the servicer that answers it, ready to be registered."""

    service: str
    handlers: "dict[str, grpc.RpcMethodHandler[Any, Any]]"
    """Method name -> grpc.RpcMethodHandler."""
    at_once: "Mapping[str, AtOnce[Any, Prepared]]" = field(default_factory=dict)
    """Method name -> what answers it from memory, where the servicer has such."""
    missing: tuple[str, ...] = ()
    """Methods the servicer does not have."""


def bind(service: str | ServiceDescriptor, servicer: object) -> Bound:
    """Joins a service (full name, its generated module imported, or descriptor) with its servicer.

    TypeError when a method of the servicer is of the wrong kind (a stream that is no async generator, ...).
    """
    descriptor = default_pool().FindServiceByName(service) if isinstance(service, str) else service
    handlers, at_once, missing = {}, {}, []
    for method in descriptor.methods:
        behaviour = getattr(servicer, method.name, None)
        where = f"{type(servicer).__name__}.{method.name}"
        streams = method.server_streaming
        if behaviour is None or not (inspect.isasyncgenfunction(behaviour) or inspect.iscoroutinefunction(behaviour)):
            if behaviour is not None and _is_own(servicer, method.name):
                raise TypeError(f"{where} must be an async {'generator' if streams else 'function'}")
            missing.append(method.name)
            behaviour = _unimplemented_stream if streams else _unimplemented
        elif inspect.isasyncgenfunction(behaviour) != streams:
            raise TypeError(f"{where} must be an async {'generator' if streams else 'function without yield'}")
        ready = getattr(servicer, f"{method.name}_at_once", None)
        handlers[method.name] = _raw_handler(
            behaviour,
            message_factory.GetMessageClass(method.input_type),
            client_streaming=method.client_streaming,
            server_streaming=streams,
            kept=ready is not None,
        )
        if ready is not None:
            if streams or method.client_streaming or inspect.iscoroutinefunction(ready):
                raise TypeError(f"{where}_at_once must be a plain function beside a unary method")
            at_once[method.name] = ready
    return Bound(service=descriptor.full_name, handlers=handlers, at_once=at_once, missing=tuple(missing))


def _is_own(servicer: object, name: str) -> bool:
    """Whether a method is the servicer's and not the generated base class's placeholder."""
    owner = next((kind for kind in type(servicer).__mro__ if name in vars(kind)), type(servicer))
    return not owner.__module__.endswith("_pb2_grpc")


async def _unimplemented(_request: object, _context: object) -> bytes:
    raise Unimplemented("this method is not implemented here")


async def _unimplemented_stream(_request: object, _context: object) -> AsyncGenerator[bytes, None]:
    for response in _NO_RESPONSES:
        yield response
    raise Unimplemented("this method is not implemented here")


def _raw_handler(
    behaviour: Callable[..., Any],
    request_class: type[Message],
    *,
    client_streaming: bool,
    server_streaming: bool,
    kept: bool,
) -> Any:
    factory = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[client_streaming, server_streaming]
    decode = _stream_decoder(request_class) if client_streaming else _decoder(request_class, kept=kept)
    return factory(behaviour, request_deserializer=decode)  # responses are serialized inside interception: see _encode


def _decoder(request_class: type[Message], *, kept: bool = False) -> Callable[[bytes], Message | OpenManagerError]:
    """gRPC would answer an exception of a deserializer with its text, so a fault is handed on as a value.

    `kept`: small requests are remembered, as readers ask the same again and again.
    """
    name = request_class.DESCRIPTOR.full_name
    known = lru_cache(REMEMBERED_REQUESTS)(request_class.FromString) if kept else request_class.FromString

    def decode(raw: bytes) -> Message | OpenManagerError:
        if len(raw) > MAX_MESSAGE_BYTES:
            return _too_large("request", len(raw))
        try:
            return known(raw) if len(raw) <= REMEMBERED_BYTES else request_class.FromString(raw)
        except DecodeError:
            return InvalidArgument(f"the request is not a serialized {name}", reason="UNDECODABLE")

    return decode


def _stream_decoder(request_class: type[Message]) -> Callable[[bytes], Message]:
    """In a stream of requests the fault is raised, and comes out of the servicer's `async for`."""
    decode = _decoder(request_class)

    def decode_or_raise(raw: bytes) -> Message:
        message = decode(raw)
        if isinstance(message, OpenManagerError):
            raise message
        return message

    return decode_or_raise


def _encode(response: Message | bytes | Prepared) -> bytes:
    if isinstance(response, Prepared):
        raw = response.data
    else:
        raw = response if isinstance(response, bytes) else response.SerializeToString()
    return _sized(raw)


def _sized(raw: bytes) -> bytes:
    if len(raw) > MAX_MESSAGE_BYTES:
        raise _too_large("response", len(raw))
    return raw


def _too_large(what: str, size: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"a {what} message of {size} bytes is over MAX_MESSAGE_BYTES ({MAX_MESSAGE_BYTES})",
        reason="MESSAGE_TOO_LARGE",
        metadata={"limit": "MAX_MESSAGE_BYTES", "limit_bytes": str(MAX_MESSAGE_BYTES)},
    )


async def _abort(context: Any, error: OpenManagerError, call: tracing.Call) -> None:
    """Ends the call with the error's status.

    By `abort`: a status set with `set_code` goes out behind an empty message, which tells the caller's gRPC that there
    was an answer, so that it never retries. The exception stops here, for the span would record it as one of ours; gRPC
    remembers by itself that the call is over.
    """
    status = to_status(error)
    trailers = (
        (STATUS_DETAILS_KEY, status.SerializeToString()),
        (tracing.TRACERESPONSE, call.header()),
    )
    with contextlib.suppress(grpc.aio.AbortError):
        await context.abort(status_code(error), status.message, trailers)


def intercepted(bound: Bound, interception: Interception) -> dict[str, Any]:
    """Path ("/pkg.Service/Method") -> the handler as gRPC takes it, with interception around it.

    That is done here once: a gRPC interceptor would be asked at each call, for 3 to 4 % of the calls a second.
    """
    paths = {f"/{bound.service}/{name}": name for name in bound.handlers}
    return {
        path: _wrapped(path, bound.handlers[name], bound.at_once.get(name), interception)
        for path, name in paths.items()
    }


def _wrapped(method: str, raw: Any, at_once: AtOnce[Any, Prepared] | None, interception: Interception) -> Any:
    if raw.response_streaming:
        factory = (
            grpc.stream_stream_rpc_method_handler if raw.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        run = partial(interception.stream, waits=not raw.request_streaming)
        behaviour: Any = _streamed(run, method, raw.stream_stream or raw.unary_stream)
    elif raw.request_streaming:
        factory = grpc.stream_unary_rpc_method_handler
        behaviour = _answered(interception.unary_from_stream, method, raw.stream_unary)
    else:
        factory = grpc.unary_unary_rpc_method_handler
        behaviour = _answered(interception.unary, method, raw.unary_unary)
        if at_once is not None:
            behaviour = _answered_at_once(interception, method, _ready(at_once), raw.unary_unary)
    return factory(behaviour, request_deserializer=raw.request_deserializer)


def _ready(at_once: AtOnce[Any, Prepared]) -> AtOnce[Any, bytes]:
    def ready(request: Any, who: Caller | None) -> bytes | None:
        if isinstance(request, OpenManagerError):
            return None
        response = at_once(request, who)
        return None if response is None else _sized(response.data)

    return ready


def _answered_at_once(
    interception: Interception,
    method: str,
    ready: AtOnce[Any, bytes],
    behaviour: Callable[[Any, Any], Awaitable[Any]],
) -> Callable[[Any, Any], Awaitable[bytes]]:
    otherwise = _answered(partial(interception.unary, at_once=ready), method, behaviour)
    attributes = _attributes(method)

    async def handle(request: Any, context: Any) -> bytes:
        recorder, decision = tracing.recorder(), None
        if recorder is not None:
            decision = recorder.decide(_metadata(context))
            if decision[0]:
                return await otherwise(request, context, recorder.begin(method, decision, attributes))
        tried = interception.at_once(method, ready, request, context)
        if not isinstance(tried, NotAnswered):
            return tried
        call = None if recorder is None or decision is None else recorder.begin(method, decision, attributes)
        return await otherwise(request, context, call, tried=tried)

    return handle


def _answered(
    run: Callable[..., Awaitable[bytes]], method: str, behaviour: Callable[[Any, Any], Awaitable[Any]]
) -> Callable[..., Awaitable[bytes]]:
    async def answer(request: Any, context: Any) -> bytes:
        if isinstance(request, OpenManagerError):
            raise request
        return _encode(await behaviour(request, context))

    attributes = _attributes(method)

    async def handle(request: Any, context: Any, decided: tracing.Call | None = None, **begun: NotAnswered) -> bytes:
        call = _begin(method, context, attributes, decided)
        try:
            return await run(method, answer, request, context, **begun)
        except OpenManagerError as error:
            await _abort(context, error, call)
            return b""
        finally:
            call.leave()

    return handle


def _streamed(
    run: Callable[..., AsyncGenerator[Any, None]],
    method: str,
    behaviour: Callable[[Any, Any], AsyncGenerator[Any, None]],
) -> Callable[[Any, Any], AsyncIterator[bytes]]:
    async def answer(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        if isinstance(request, OpenManagerError):
            raise request
        async with aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                yield _encode(response)

    attributes = _attributes(method)

    async def handle(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        call = _begin(method, context, attributes)
        try:
            async with aclosing(run(method, answer, request, context)) as responses:
                async for response in responses:
                    yield response
        except OpenManagerError as error:
            await _abort(context, error, call)
        finally:
            call.leave()

    return handle


def _begin(method: str, context: Any, attributes: dict[str, str], decided: tracing.Call | None = None) -> tracing.Call:
    call = tracing.begin(method, partial(_metadata, context), attributes, decided=decided)
    if call.is_recording():
        call.set_attribute("network.peer.address", _address(context.peer()))
    return call


def _metadata(context: Any) -> tracing.Pairs | None:
    """The call's, as the doorman saw it where he noted that."""
    seen = tracing.at_the_door.get()
    found: tracing.Pairs | None = context.invocation_metadata() if seen is None else seen
    return found


def _address(peer: str) -> str:
    """The host in "ipv4:127.0.0.1:4711" and "ipv6:%5B::1%5D:4711"; what is neither, as it is."""
    kind, _, rest = peer.partition(":")
    return unquote(rest.rpartition(":")[0]).strip("[]") if kind in {"ipv4", "ipv6"} else peer


def _attributes(method: str) -> dict[str, str]:
    """What a method's spans have in common, by OpenTelemetry's semantic conventions."""
    return {"rpc.system.name": "grpc", "rpc.method": method[1:]}
