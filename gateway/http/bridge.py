"""One API request from its route to its answer: the same servicer methods and the same interception as under gRPC.

A method is called as gRPC would call it: (request, context), where context is the Exchange. A bidirectional method gets
a stream of the one message that the body is, and its first answer is the response. A response may be `bytes`, a
serialized message, as under gRPC, or `Prepared`, one that is shared: then its JSON is made once and kept with it, and
its entity tag is told and compared.

What must stay true: body reading, decoding, the method and encoding all run inside interception, so that every request
that reached a method has one access log line, one metric point and a deadline; decoding and encoding that may take over
10 ms happen in a thread; what is sent is either a whole answer, an error with its status, or a stream whose end or
last element says whether it is complete.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

import grpc
import orjson
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813  a function, named as a class
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from gateway.http.answer import Answer
from gateway.http.encode import encoder_of, reader_of
from gateway.http.exchange import DISCONNECT_WATCH_AFTER_S, Exchange
from gateway.http.replies import Receive, Scope, Send, WrongMethod, send_error
from gateway.http.routes import Match, Route, RouteTable, routes_for
from gateway.http.streams import Framer, StreamWriter, framer_of, last_id_field
from gateway.http.transcode import RequestReader
from runtime.clock import Clock
from runtime.errors import DeadlineExceeded, OpenManagerError, Unavailable
from runtime.handlers import Bound
from runtime.interception import SHUTTING_DOWN_REASON, Interception
from runtime.prepared import Prepared

DECODE_IN_THREAD_BYTES: Final = 64 << 10
"""Bodies over this size are decoded in a thread; up to it that takes at most about 5 ms."""
ENCODE_IN_THREAD_BYTES: Final = 256 << 10
"""Answers with lists that are larger than this in protobuf are encoded in a thread; up to it that takes about 5 ms."""


class Endpoint:
    """One route with everything that answering it needs, made at the start."""

    def __init__(self, route: Route, behaviour: Callable[..., Any]) -> None:
        output = route.method.output_type
        self.route = route
        self.behaviour = behaviour
        self.reader = RequestReader(route)
        self.response_class: type[Message] = GetMessageClass(output)
        self.framer: Framer | None = framer_of(route.method) if route.is_stream else None
        self._last_id = last_id_field(route.method) if self.framer is not None else ""
        self._has_lists = any(field.is_repeated for field in output.fields)
        if route.response_body:
            field = output.fields_by_name[route.response_body]
            self._field = field.name
            self._encode: Callable[[Any], Any] = reader_of(field) or _same
        else:
            self._field = ""
            self._encode = encoder_of(output)

    async def decode(self, exchange: Exchange, values: tuple[str, ...], now_ms: int) -> Message:
        """The request message; starts watching for the caller's leaving."""
        body = await exchange.body() if self.route.body else b""
        exchange.watch(after_s=DISCONNECT_WATCH_AFTER_S if self.framer is None else 0.0)
        query: bytes = exchange.scope["query_string"]
        if len(body) > DECODE_IN_THREAD_BYTES:
            return await asyncio.to_thread(self.reader.read, values, query, body, now_ms)
        message = self.reader.read(values, query, body, now_ms)
        if self._last_id and not getattr(message, self._last_id) and (seen := exchange.header(b"last-event-id")):
            setattr(message, self._last_id, seen)
        return message

    async def respond(self, request: Message, exchange: Exchange) -> Any:
        """Calls the method and returns its one response."""
        if not self.route.method.client_streaming:
            return await self.behaviour(request, exchange)
        if not self.route.method.server_streaming:
            return await self.behaviour(_only(request), exchange)
        async with aclosing(self.behaviour(_only(request), exchange)) as responses:
            async for response in responses:
                return response
        return self.response_class()

    async def encode(self, response: Message | bytes | Prepared) -> bytes:
        """The response, or one of a stream of them, as it goes out."""
        if isinstance(response, Prepared):
            body = response.forms.get(self)
            if body is None:
                body = response.forms[self] = await self.encode(response.data)
            return body
        message = self.response_class.FromString(response) if isinstance(response, bytes) else response
        write = self._to_json if self.framer is None else self.framer.message
        if self._has_lists and message.ByteSize() > ENCODE_IN_THREAD_BYTES:
            return await asyncio.to_thread(write, message)
        return write(message)

    def _to_json(self, message: Any) -> bytes:
        return orjson.dumps(self._encode(getattr(message, self._field) if self._field else message))


def _same(value: Any) -> Any:
    return value


async def _only(request: Message) -> AsyncIterator[Message]:
    yield request


class Bridge:
    """Answers the requests whose path is in the table of routes."""

    def __init__(self, bound: Sequence[Bound], interception: Interception, clock: Clock) -> None:
        self._interception = interception
        self._clock = clock
        self.draining = False
        handlers = {service.service: service.handlers for service in bound}
        services = [default_pool().FindServiceByName(name) for name in handlers]
        self.table = RouteTable(routes_for(services))
        self._endpoints: Mapping[int, Endpoint] = {
            id(route): Endpoint(route, _behaviour(handlers[route.method.containing_service.full_name], route))
            for route in self.table.routes
        }

    def find(self, scope: Scope) -> Match | None:
        """The match of the request's path; None: no API path."""
        return self.table.find(scope["method"], _sent_path(scope))

    def endpoint(self, service: str, method: str) -> Endpoint:
        """The first endpoint of a method, by short names; for tests that stand in for the method."""
        return next(
            endpoint for endpoint in self._endpoints.values() if endpoint.route.rpc.endswith(f".{service}/{method}")
        )

    async def answer(self, match: Match, scope: Scope, receive: Receive, send: Send, principal: str) -> None:
        """Answers one request; raises only CancelledError, and only when the server itself is being cut off."""
        with_body = scope["method"] != "HEAD"
        route = match.route
        if route is None or (route.is_stream and not with_body):
            allowed = match.allowed if route is None else (route.verb,)
            await send_error(send, WrongMethod(scope["method"], allowed), with_body=with_body)
            return
        endpoint = self._endpoints[id(route)]
        exchange = Exchange(scope, receive, principal)
        try:
            exchange.read_deadline()
            if endpoint.framer is not None:
                await self._stream(endpoint, endpoint.framer, match.values, exchange, send)
            else:
                answer = await self._unary(endpoint, match.values, exchange)
                await answer.send(send, exchange, with_body=with_body)
        except OpenManagerError as error:
            if not exchange.gone:
                await send_error(send, error, with_body=with_body)
        except asyncio.CancelledError:
            if not exchange.gone:
                raise
            _swallow_cancellation()
        finally:
            exchange.close()

    async def _unary(self, endpoint: Endpoint, values: tuple[str, ...], exchange: Exchange) -> Answer:
        now_ms = self._clock.now_ms()

        async def handle(_request: None, context: Exchange) -> Answer:
            request = await endpoint.decode(context, values, now_ms)
            response = await endpoint.respond(request, context)
            if not isinstance(response, Prepared):
                return Answer(await endpoint.encode(response))
            if response.etag and context.has(response.etag):
                return Answer(b"", response)
            return Answer(await endpoint.encode(response), response)

        return await self._interception.unary(endpoint.route.rpc, handle, None, exchange)

    async def _stream(
        self, endpoint: Endpoint, framer: Framer, values: tuple[str, ...], exchange: Exchange, send: Send
    ) -> None:
        """Sends the messages as they come. A fault before the first byte is raised, a later one is the last element."""
        writer = StreamWriter(send, framer, self._clock)
        writer.start_heartbeat()
        try:
            try:
                await self._pump(endpoint, values, exchange, writer)
            except OpenManagerError as error:
                if not writer.started:
                    raise
                if not exchange.gone:
                    await writer.write(framer.error(error))
            await writer.end()
        finally:
            writer.close()

    async def _pump(
        self, endpoint: Endpoint, values: tuple[str, ...], exchange: Exchange, writer: StreamWriter
    ) -> None:
        now_ms = self._clock.now_ms()

        async def handle(_request: None, context: Exchange) -> AsyncGenerator[bytes, None]:
            request = await endpoint.decode(context, values, now_ms)
            async with aclosing(endpoint.behaviour(request, context)) as responses:
                async for response in responses:
                    yield await endpoint.encode(response)

        limit = asyncio.timeout(exchange.time_remaining())
        try:
            async with limit, aclosing(self._interception.stream(endpoint.route.rpc, handle, None, exchange)) as chunks:
                async for chunk in chunks:
                    await writer.write(chunk)
        except TimeoutError:
            raise DeadlineExceeded("the stream did not end within Request-Timeout") from None
        except asyncio.CancelledError:
            if exchange.gone or not self.draining:
                raise
            _swallow_cancellation()  # end_streams() met the stream while it was sending
            raise Unavailable("the process is stopping", reason=SHUTTING_DOWN_REASON) from None


def _swallow_cancellation() -> None:
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()


def _behaviour(handlers: Mapping[str, "grpc.RpcMethodHandler[Any, Any]"], route: Route) -> Callable[..., Any]:
    handler: Any = handlers[route.method.name]
    found: Callable[..., Any] = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    return found


def _sent_path(scope: Scope) -> str:
    """The path as it was sent: ASGI's `path` is decoded, and then an encoded slash looks like a real one."""
    raw = scope.get("raw_path")
    return raw.decode("latin-1") if raw else str(scope["path"])
