"""One route with its method: from a request to the answer's JSON, at once from memory or by calling the method.

A method is called as gRPC would call it: (request, context), where context is the Exchange. A bidirectional method gets
a stream of the one message that the body is, and its first answer is the response. A response may be `bytes`, a
serialized message, as under gRPC, or `Prepared`, one that is shared: then its JSON is made once and kept with it, and
its entity tag is told and compared.

What must stay true: decoding and encoding that may take over 10 ms happen in a thread; from memory and by the method
the answers are the same.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import lru_cache
from typing import Any, Final

import orjson
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from gateway.http.answer import Answer
from gateway.http.encode import encoder_of, reader_of
from gateway.http.exchange import DISCONNECT_WATCH_AFTER_S, MAX_BODY_BYTES, MAX_OPEN_BODY_BYTES, Exchange
from gateway.http.routes import REMEMBERED_PATH_CHARS, REMEMBERED_PATHS, Route
from gateway.http.streams import Framer, framer_of, if_match_field, last_id_field
from gateway.http.transcode import RequestReader
from openmanager.gateway.v1 import options_pb2
from runtime.caller import Caller
from runtime.clock import Clock
from runtime.errors import InvalidArgument
from runtime.interception import AtOnce, Receive
from runtime.prepared import Prepared

DECODE_IN_THREAD_BYTES: Final = 16 << 10
"""Bodies over this size are decoded in a thread; up to it that takes at most 1.3 ms."""
ENCODE_IN_THREAD_BYTES: Final = 64 << 10
"""Answers with lists that are larger than this in protobuf are encoded in a thread; up to it that takes 1.3 ms."""


class Endpoint:
    """One route with everything that answering it needs, made at the start."""

    def __init__(
        self,
        route: Route,
        behaviour: Callable[..., Any],
        at_once: AtOnce[Any, Prepared] | None,
        clock: Clock,
    ) -> None:
        """Takes a route.

        Args:
            route: of a method.
            behaviour: the method.
            at_once: what answers it from memory, where the servicer has such.
            clock: relative times in requests count from its now.
        """
        output = route.method.output_type
        self.route = route
        self.rpc = route.rpc
        self.receive: Receive[Exchange] | None = self._received if route.body or route.changes else None
        self._most_bytes = MAX_OPEN_BODY_BYTES if _is_open(route) else MAX_BODY_BYTES
        self.behaviour = behaviour
        self.reader = RequestReader(route)
        self._at_once = None if route.body else at_once
        self._clock = clock
        self._of_path = lru_cache(REMEMBERED_PATHS)(self._without_query)
        self.response_class: type[Message] = GetMessageClass(output)
        self.framer: Framer | None = framer_of(route.method) if route.is_stream else None
        self._last_id = last_id_field(route.method) if self.framer is not None else ""
        self._if_match = if_match_field(route.method)
        self._has_lists = any(field.is_repeated for field in output.fields)
        if route.response_body:
            field = output.fields_by_name[route.response_body]
            self._field = field.name
            self._encode: Callable[[Any], Any] = reader_of(field) or _same
        else:
            self._field = ""
            self._encode = encoder_of(output)

    def ready(self, values: tuple[str, ...], who: Caller | None) -> Prepared | None:
        """What the method has in memory for a path, which is short since it is remembered, and no query, for who
        calls."""
        return None if self._at_once is None else self._at_once(self._of_path(values), who)

    def from_memory(self, exchange: Exchange, who: Caller | None) -> Answer | None:
        """The answer of a method that has it in memory; None: the method is to be called."""
        query: bytes = exchange.scope["query_string"]
        response = None
        if not query and sum(map(len, exchange.values)) <= REMEMBERED_PATH_CHARS:
            response = self.ready(exchange.values, who)
        elif self._at_once is not None:
            response = self._at_once(self._read(exchange, query, b""), who)
        if response is None:
            return None
        if response.etag and exchange.has(response.etag):
            return Answer(b"", response)
        body = response.forms.get(self)
        if body is None:
            if len(response.data) > ENCODE_IN_THREAD_BYTES:
                return None
            body = response.forms[self] = self._to_json(self.response_class.FromString(response.data))
        return Answer(body, response)

    async def answer(self, _request: Exchange, exchange: Exchange) -> Answer:
        """Calls the method; for unary answers."""
        response = await self.respond(await self._decode(exchange), exchange)
        if not isinstance(response, Prepared):
            return Answer(await self.encode(response))
        if response.etag and exchange.has(response.etag):
            return Answer(b"", response)
        return Answer(await self.encode(response), response)

    async def stream(self, _request: Exchange, exchange: Exchange) -> AsyncGenerator[bytes, None]:
        """Calls the method; for streams."""
        request = await self._decode(exchange)
        async with aclosing(self.behaviour(request, exchange)) as responses:
            async for response in responses:
                yield await self.encode(response)

    async def _received(self, exchange: Exchange) -> bytes:
        """The body, once it is here."""
        return await exchange.body(self._most_bytes)

    def _without_query(self, values: tuple[str, ...]) -> Message:
        """The request that a path makes, for methods that change nothing of it: it is kept."""
        return self.reader.read(values, b"", b"", 0)

    def _read(self, exchange: Exchange, query: bytes, body: bytes) -> Message:
        return self.reader.read(exchange.values, query, body, self._clock.now_ms())

    async def _decode(self, exchange: Exchange) -> Message:
        """The request message; starts watching for the caller's leaving."""
        body = b"" if self.receive is None else await self._received(exchange)
        exchange.watch(after_s=DISCONNECT_WATCH_AFTER_S if self.framer is None else 0.0)
        query: bytes = exchange.scope["query_string"]
        if len(body) > DECODE_IN_THREAD_BYTES:
            message = await asyncio.to_thread(self._read, exchange, query, body)
        else:
            message = self._read(exchange, query, body)
        if self._last_id and (seen := exchange.header(b"last-event-id")):
            setattr(message, self._last_id, seen)  # the query is older: who reconnects repeats his address
        if self._if_match and (wanted := exchange.wanted_etag()):
            if getattr(message, self._if_match) not in {"", wanted}:
                raise InvalidArgument("the header If-Match names another one", field=self._if_match)
            setattr(message, self._if_match, wanted)
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
        size = len(response) if isinstance(response, bytes) else response.ByteSize()
        if self._has_lists and size > ENCODE_IN_THREAD_BYTES:
            return await asyncio.to_thread(self._written, response)
        return self._written(response)

    def _written(self, response: Message | bytes) -> bytes:
        message = self.response_class.FromString(response) if isinstance(response, bytes) else response
        return self._to_json(message) if self.framer is None else self.framer.message(message)

    def _to_json(self, message: Any) -> bytes:
        return orjson.dumps(self._encode(getattr(message, self._field) if self._field else message))


def _is_open(route: Route) -> bool:
    return bool(route.method.GetOptions().Extensions[options_pb2.open_to_all])


def _same(value: Any) -> Any:
    return value


async def _only(request: Message) -> AsyncIterator[Message]:
    yield request
