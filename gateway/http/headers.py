"""The headers of requests and answers, for /openapi.json: what each is called and means, and which methods have it.

What must stay true: a header is named where the bridge reads or sends it, and nowhere else. Which methods read one is
said by their options (protos/openmanager/gateway/v1/options.proto), never by a list of routes.
"""

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.descriptor import MethodDescriptor

from gateway.http.routes import Route
from gateway.http.streams import if_match_field, last_id_field
from openmanager.gateway.v1 import options_pb2
from runtime.tracing import TRACEPARENT, TRACERESPONSE

REQUEST_TIMEOUT: Final = "Request-Timeout"
IF_NONE_MATCH: Final = "If-None-Match"
IF_MATCH: Final = "If-Match"
LAST_EVENT_ID: Final = "Last-Event-ID"
CSRF: Final = "X-CSRF-Token"
ETAG: Final = "ETag"
RETRY_AFTER: Final = "Retry-After"

Object = dict[str, Any]

OF_EVERY_REQUEST: Final = (REQUEST_TIMEOUT, TRACEPARENT)
_TRACE_PATTERN: Final = "^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$"
_OF_REQUESTS: Final[Mapping[str, tuple[str, str]]] = {
    REQUEST_TIMEOUT: ("How long the answer may take: seconds, or a duration such as `250ms`, `5s`, `1m`.", "5s"),
    TRACEPARENT: (
        "The caller's place in a trace of its own (W3C Trace Context); one that is malformed is ignored.",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ),
    CSRF: (
        "For a session's cookie only: what `GET /v1/session` tells as `csrfToken`.",
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    ),
    IF_NONE_MATCH: ("Entity tags of answers that the caller has.", 'W/"6f1e2a-1042"'),
    IF_MATCH: ("The `etag` that the record must have, or `*`.", '"r17"'),
    LAST_EVENT_ID: ("Id of the last event that the reader has; only what changed since follows.", "6f1e2a-1042"),
}
_OF_ANSWERS: Final[Mapping[str, Object]] = {
    TRACERESPONSE: {
        "description": "The trace that the call belongs to, recorded or not; its log lines name it, too.",
        "required": True,
        "schema": {"type": "string", "pattern": _TRACE_PATTERN},
    },
    ETAG: {
        "description": "Entity tag, for If-None-Match; weak, since compressed the answer has other bytes.",
        "schema": {"type": "string", "pattern": '^W/".*"$'},
    },
    RETRY_AFTER: {
        "description": "Seconds after which the same call may work.",
        "schema": {"type": "integer", "minimum": 0},
    },
}


def components() -> dict[str, Object]:
    """The parts of an OpenAPI document's components that `parameters` and `of_answer` refer to."""
    parameters = {
        name: {
            "name": name,
            "in": "header",
            "required": False,
            "description": description,
            "schema": {"type": "string", "examples": [example]},
        }
        for name, (description, example) in _OF_REQUESTS.items()
    }
    return {"parameters": parameters, "headers": dict(_OF_ANSWERS)}


def parameters(route: Route) -> list[Object]:
    """The headers that are read of a route's requests."""
    names = [*OF_EVERY_REQUEST]
    if route.verb != "GET":
        names.append(CSRF)
    if has_entity_tag(route.method):
        names.append(IF_NONE_MATCH)
    if if_match_field(route.method):
        names.append(IF_MATCH)
    if route.is_stream and last_id_field(route.method):
        names.append(LAST_EVENT_ID)
    return [{"$ref": f"#/components/parameters/{name}"} for name in names]


def of_answer(*names: str) -> dict[str, Object]:
    """The headers of one kind of answer: the trace, which all have, and those named."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in (TRACERESPONSE, *names)}


def has_entity_tag(method: MethodDescriptor) -> bool:
    """Whether the method's answers may carry an entity tag."""
    return bool(method.GetOptions().Extensions[options_pb2.http_entity_tag])
