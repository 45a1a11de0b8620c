"""Refuses who may not come in before his message is read.

gRPC hands a unary call over when its message is there. Until then it keeps what has come of it: up to the largest
message on each of a connection's thousand streams (measured: 1.3 GB by one connection), for as long as the sender
likes. Who has no token shall not have that.

What must stay true: it refuses nobody whom the authenticator of the interception would admit, and what the refused are
told comes from there; a caller without a token does not learn which methods there are; names that he invents are kept
nowhere, neither as methods nor in metrics.
"""

import hmac
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Sequence
from typing import Any, Final

import grpc

from runtime import tracing
from runtime.errors import Unauthenticated
from runtime.handlers import Bound, intercepted
from runtime.interception import HEALTH_SERVICE, Interception

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


class Doorman(grpc.GenericRpcHandler):
    """Has all handlers of a server: theirs for whom it knows, and one that refuses for the others.

    One for all services, since gRPC asks one after the other, at each call.
    """

    def __init__(self, served: Iterable[Bound], interception: Interception, knows: Knows | None) -> None:
        """Takes the services behind it, their interception and the rule; None: it lets everybody in."""
        self._knows = knows
        self._handlers: dict[str, Any] = {}
        self._refusing = intercepted(Bound(service="unknown", handlers={"unknown": _UNREAD}), interception)
        for bound in served:
            self._handlers |= intercepted(bound, interception)
            twin = Bound(service=bound.service, handlers=dict.fromkeys(bound.handlers, _UNREAD))
            self._refusing |= intercepted(twin, interception)

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call; None: there is no such method for a caller who is known."""
        method, metadata = handler_call_details.method, handler_call_details.invocation_metadata
        if tracing.recorder() is not None:
            tracing.at_the_door.set(metadata)
        if self._knows is None or self._knows(method, metadata):
            return self._handlers.get(method)
        return self._refusing.get(method) or self._refusing[ANY_METHOD]


async def _refuse(_requests: object, _context: object) -> AsyncGenerator[bytes, None]:
    """Is reached only if the authenticator admits the caller all the same."""
    for response in _NO_RESPONSES:
        yield response
    raise Unauthenticated("this caller is not known", reason="TOKEN_REQUIRED")


_UNREAD: Final[Any] = grpc.stream_stream_rpc_method_handler(_refuse)  # a stream's first message is read when asked for
