"""What goes back over HTTP: headers that every answer has, and errors as google.rpc.Status JSON.

What must stay true: the one table of runtime.errors decides the HTTP status, except for the four conditions that HTTP
has a status of its own for and gRPC has not (below); no answer allows another origin anything (there is no CORS).
"""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from math import ceil
from typing import Any, Final

import orjson
from google.protobuf import json_format
from opentelemetry.trace import StatusCode

from runtime import errors, tracing
from runtime.errors import InvalidArgument, NotFound, OpenManagerError, ResourceExhausted, Unimplemented

Event = dict[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON: Final = b"application/json"
NOT_MODIFIED: Final = 304
SECURITY_HEADERS: Final[tuple[Header, ...]] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
API_POLICY: Final[Header] = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
TRACERESPONSE: Final = tracing.TRACERESPONSE.encode("ascii")
API_HEADERS: Final[tuple[Header, ...]] = (*SECURITY_HEADERS, API_POLICY, (b"cache-control", b"no-cache"))


class UnknownRoute(NotFound):
    """No route has this path."""

    default_reason = "ROUTE_UNKNOWN"


class WrongMethod(Unimplemented):
    """The path is known, but not with this HTTP method."""

    default_reason = "METHOD_NOT_ALLOWED"

    def __init__(self, verb: str, allowed: Sequence[str]) -> None:
        self.allow = ", ".join(allowed)
        super().__init__(f"{verb} is not possible here, only {self.allow}", metadata={"allow": self.allow})


class BodyTooLarge(ResourceExhausted):
    """The body is over a named limit."""

    default_reason = "BODY_TOO_LARGE"

    def __init__(self, limit: str, limit_bytes: int) -> None:
        metadata = {"limit": limit, "limit_bytes": str(limit_bytes)}
        super().__init__(f"the body is over {limit} ({limit_bytes} bytes)", field="body", metadata=metadata)


class NotJson(InvalidArgument):
    """The content type of a change is not JSON."""

    default_reason = "CONTENT_TYPE_NOT_JSON"


_OWN_STATUS: Final[dict[type[OpenManagerError], int]] = {
    UnknownRoute: 404,
    WrongMethod: 405,
    BodyTooLarge: 413,
    NotJson: 415,
}


def http_status(error: OpenManagerError) -> int:
    """The HTTP status of an error."""
    return _OWN_STATUS.get(type(error)) or errors.http_status(error)


def status_value(error: OpenManagerError) -> dict[str, Any]:
    """The error as google.rpc.Status in JSON, ready for orjson."""
    value: dict[str, Any] = json_format.MessageToDict(errors.to_status(error))
    return value


def trace_headers(status: int) -> tuple[Header, ...]:
    """`traceresponse`: the request's trace id, which its log lines have too, recorded or not. To be called once an
    answer, with its status: the span learns it here."""
    call = tracing.current.get()
    if call is None:
        return ()
    if call.is_recording():
        call.set_attribute("http.response.status_code", status)
        if status >= 500:
            call.set_status(StatusCode.ERROR)
    return ((TRACERESPONSE, call.header().encode("ascii")),)


def content_length(body: bytes) -> Header:
    """How long it is."""
    return (b"content-length", b"%d" % len(body))


async def send_bytes(
    send: Send, status: int, body: bytes, headers: Iterable[Header], *, with_body: bool = True
) -> None:
    """One complete answer. `with_body` False: for HEAD, the headers that GET would have had."""
    start = [*headers, *trace_headers(status)]
    if status != NOT_MODIFIED:
        start.append(content_length(body))
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body if with_body else b""})


async def send_error(send: Send, error: OpenManagerError, *, with_body: bool = True) -> None:
    """One complete error answer."""
    status = http_status(error)
    call = tracing.current.get()
    if call is not None:
        call.set_attribute("error.type", error.reason)
    headers: list[Header] = [(b"content-type", JSON), *API_HEADERS]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(ceil(error.retry_after_s)).encode("ascii")))
    if status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="openmanager"'))
    if isinstance(error, WrongMethod):
        headers.append((b"allow", error.allow.encode("ascii")))
    await send_bytes(send, status, orjson.dumps(status_value(error)), headers, with_body=with_body)
