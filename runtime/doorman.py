"""Refuses who may not come in before his message is read.

gRPC hands a unary call over when its message is there. Until then it keeps what has come of it: up to the largest
message on each of a connection's thousand streams (measured: 1.3 GB by one connection), for as long as the sender
likes. Who has no token shall not have that.

What is open to all, health for one, has to read a stranger's message: in turn (`InTurn`), and soon or not at all.

What must stay true: it refuses nobody whom the authenticator of the interception would admit, and what the refused are
told comes from there; a caller without a token does not learn which methods there are; names that he invents are kept
nowhere, neither as methods nor in metrics.
"""

import asyncio
import hmac
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc

from runtime import tracing
from runtime.caller import host
from runtime.errors import Unauthenticated
from runtime.handlers import Bound, intercepted
from runtime.interception import HEALTH_SERVICE, Interception
from runtime.limits import MAX_OPEN_CALLS, MAX_OPEN_CALLS_OF_ADDRESS, MAX_OPEN_MESSAGES, OPEN_MESSAGE_WITHIN_S

Metadata = Sequence[tuple[str, str | bytes]]
Knows = Callable[[str, Metadata], bool]
"""Given a method's path and a call's metadata, whether its caller may come in. Asked before each call, so quick."""

ANY_METHOD: Final = "/unknown/unknown"
"""Stands for methods that there are not."""
_NO_RESPONSES: Final[tuple[bytes, ...]] = ()


def bearer_of(token: str, *, open_services: Collection[str] = ()) -> Knows:
    """Knows who has a token; health and `open_services` are open to all."""
    expected = f"Bearer {token}".encode()
    open_paths = tuple(f"/{service}/" for service in (HEALTH_SERVICE, *open_services))

    def knows(method: str, metadata: Metadata) -> bool:
        for key, value in metadata:
            if key == "authorization":
                given = value.encode() if isinstance(value, str) else value
                if hmac.compare_digest(given, expected):
                    return True
                break
        return method.startswith(open_paths)

    return knows


class InTurn:
    """Takes calls of strangers to what is open to all: so many at once of all, and of each address; MAX_OPEN_MESSAGES
    of an address have their messages read and answered at once, and what is not read within OPEN_MESSAGE_WITHIN_S is
    given up. Until its turn gRPC takes no more of a message than a stream's first 64 KiB."""

    def __init__(self) -> None:
        self._calls = 0
        self._of: dict[str, tuple[asyncio.Semaphore, int]] = {}  # address -> its turns, how many calls it has

    def of(self, handler: Any) -> Any:
        """The same as a handler that takes one message. If it answers with a stream, by `context.write` as health does,
        that has no turn any more."""

        async def answer(requests: AsyncIterator[Any], context: Any) -> Any:
            async with self._call(context) as turns, _message(requests, turns, context) as request:
                return await handler.unary_unary(request, context)

        async def stream(requests: AsyncIterator[Any], context: Any) -> None:
            async with self._call(context) as turns:
                async with _message(requests, turns, context) as request:
                    pass
                await handler.unary_stream(request, context)

        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(stream, **codecs)
        return grpc.stream_unary_rpc_method_handler(answer, **codecs)

    @asynccontextmanager
    async def _call(self, context: Any) -> AsyncIterator[asyncio.Semaphore]:
        address = host(context.peer())
        turns, calls = self._of.get(address) or (asyncio.Semaphore(MAX_OPEN_MESSAGES), 0)
        if self._calls >= MAX_OPEN_CALLS or calls >= MAX_OPEN_CALLS_OF_ADDRESS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls without a token; try again later")
        self._calls, self._of[address] = self._calls + 1, (turns, calls + 1)
        try:
            yield turns
        finally:
            self._calls -= 1
            turns, calls = self._of.pop(address)
            if calls > 1:
                self._of[address] = turns, calls - 1


@asynccontextmanager
async def _message(requests: AsyncIterator[Any], turns: asyncio.Semaphore, context: Any) -> AsyncIterator[Any]:
    """A call's message, in its turn, which lasts as long as the block."""
    limit = asyncio.timeout(OPEN_MESSAGE_WITHIN_S)
    try:
        async with limit, turns:
            async for request in requests:
                limit.reschedule(None)
                yield request
                return
    except TimeoutError:
        if not limit.expired():
            raise
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no message within {OPEN_MESSAGE_WITHIN_S:g} s")
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")


class Doorman(grpc.GenericRpcHandler):
    """Has all handlers of a server: theirs for whom it knows, and one that refuses for the others.

    One for all services, since gRPC asks one after the other, at each call.
    """

    def __init__(
        self,
        served: Iterable[Bound],
        interception: Interception,
        knows: Knows | None,
        open_to_all: Collection[str],
        in_turn: InTurn,
    ) -> None:
        """Takes the services behind it, their interception and the rule (None: it lets everybody in), and the unary
        methods that strangers may call in turn."""
        self._knows = knows
        self._handlers: dict[str, Any] = {}
        self._refusing = intercepted(Bound(service="unknown", handlers={"unknown": _UNREAD}), interception)
        for bound in served:
            self._handlers |= intercepted(bound, interception)
            twin = Bound(service=bound.service, handlers=dict.fromkeys(bound.handlers, _UNREAD))
            self._refusing |= intercepted(twin, interception)
        self._open = {path: in_turn.of(self._handlers[path]) for path in open_to_all}

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call; None: there is no such method for a caller who is known."""
        method, metadata = handler_call_details.method, handler_call_details.invocation_metadata
        if tracing.recorder() is not None:
            tracing.at_the_door.set(metadata)
        if method in self._open:
            return self._open[method]
        if self._knows is None or self._knows(method, metadata):
            return self._handlers.get(method)
        return self._refusing.get(method) or self._refusing[ANY_METHOD]


async def _refuse(_requests: object, _context: object) -> AsyncGenerator[bytes, None]:
    """Is reached only if the authenticator admits the caller all the same."""
    for response in _NO_RESPONSES:
        yield response
    raise Unauthenticated("this caller is not known", reason="TOKEN_REQUIRED")


_UNREAD: Final[Any] = grpc.stream_stream_rpc_method_handler(_refuse)  # a stream's first message is read when asked for
