"""One API request from its route to its answer: the same servicer methods and the same interception as under gRPC.

What must stay true: body reading, decoding, the method and encoding all run inside interception, so that every request
that reached a method has one access log line, one metric point and a deadline; what is sent is either a whole answer,
an error with its status, or a stream whose end or last element says whether it is complete.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813  a function, named as a class

from fleet.access import Caller
from gateway.http.endpoint import Endpoint
from gateway.http.exchange import Exchange
from gateway.http.replies import Receive, Scope, Send, WrongMethod, send_error
from gateway.http.routes import Match, Route, RouteTable, routes_for
from gateway.http.streams import Framer, StreamWriter
from runtime.clock import Clock
from runtime.errors import DeadlineExceeded, OpenManagerError, Unavailable
from runtime.handlers import Bound
from runtime.interception import SHUTTING_DOWN_REASON, Interception


class Bridge:
    """Answers the requests whose path is in the table of routes."""

    def __init__(self, bound: Sequence[Bound], interception: Interception, clock: Clock) -> None:
        self._interception = interception
        self._clock = clock
        self.draining = False
        handlers = {service.service: service.handlers for service in bound}
        services = [default_pool().FindServiceByName(name) for name in handlers]
        self.table = RouteTable(routes_for(services))
        at_once = {f"/{service.service}/{name}": ready for service in bound for name, ready in service.at_once.items()}
        self._endpoints: Mapping[int, Endpoint] = {
            id(route): Endpoint(
                route,
                _behaviour(handlers[route.method.containing_service.full_name], route),
                at_once.get(route.rpc),
                clock,
            )
            for route in self.table.routes
        }

    def find(self, scope: Scope) -> Match | None:
        """The match of the request's path; None: no API path."""
        return self.table.find(scope["method"], sent_path(scope))

    def endpoint_of(self, route: Route) -> Endpoint:
        """Of a route of the table."""
        return self._endpoints[id(route)]

    def endpoint(self, service: str, method: str) -> Endpoint:
        """The first endpoint of a method, by short names; for tests that stand in for the method."""
        return next(endpoint for endpoint in self._endpoints.values() if endpoint.rpc.endswith(f".{service}/{method}"))

    async def answer(self, match: Match, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        """Answers one request; raises only CancelledError, and only when the server itself is being cut off."""
        with_body = scope["method"] != "HEAD"
        route = match.route
        if route is None or (route.is_stream and not with_body):
            allowed = match.allowed if route is None else (route.verb,)
            await send_error(send, WrongMethod(scope["method"], allowed), with_body=with_body)
            return
        endpoint = self.endpoint_of(route)
        exchange = Exchange(scope, receive, caller, match.values)
        try:
            exchange.read_deadline()
            if endpoint.framer is not None:
                await self._stream(endpoint, endpoint.framer, exchange, send)
            else:
                answer = await self._interception.unary(
                    endpoint.rpc, endpoint.answer, exchange, exchange, endpoint.from_memory, receive=endpoint.receive
                )
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

    async def _stream(self, endpoint: Endpoint, framer: Framer, exchange: Exchange, send: Send) -> None:
        """Sends the messages as they come. A fault before the first byte is raised, a later one is the last element."""
        writer = StreamWriter(send, framer, self._clock)
        writer.start_heartbeat()
        try:
            try:
                await self._pump(endpoint, exchange, writer)
            except OpenManagerError as error:
                if not writer.started:
                    raise
                if not exchange.gone:
                    await writer.write(framer.error(error))
            await writer.end()
        finally:
            writer.close()

    async def _pump(self, endpoint: Endpoint, exchange: Exchange, writer: StreamWriter) -> None:
        limit = asyncio.timeout(exchange.time_remaining())
        run = self._interception.stream
        running = run(endpoint.rpc, endpoint.stream, exchange, exchange, receive=endpoint.receive)
        try:
            async with limit, aclosing(running) as chunks:
                async for chunk in chunks:
                    try:
                        await writer.write(chunk)
                    except asyncio.CancelledError:
                        exchange.gone = exchange.gone or self._interception.is_over()  # and he does not read
                        raise
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


def sent_path(scope: Scope) -> str:
    """The path as it was sent: ASGI's `path` is decoded, and then an encoded slash looks like a real one."""
    raw = scope.get("raw_path")
    return raw.decode("latin-1") if raw else str(scope["path"])
