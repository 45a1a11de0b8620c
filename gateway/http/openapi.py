"""/openapi.json: OpenAPI 3.1 made from the same table of routes that requests are matched with.

What must stay true: every route is in it and nothing else is, so nothing here lists paths; neither does `headers`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from google.protobuf.descriptor import MethodDescriptor
from google.rpc import status_pb2

from gateway.access.sessions import SESSION_COOKIE
from gateway.http import comments as proto_comments
from gateway.http import headers
from gateway.http.encode import message_type
from gateway.http.exchange import MAX_BODY_BYTES
from gateway.http.routes import Route, field_at
from gateway.http.schemas import Schema, Schemas
from gateway.http.streams import EventFramer, TextFramer, framer_of
from gateway.http.transcode import query_parameters
from openmanager.gateway.v1 import options_pb2

FILE_TYPES: Final[Mapping[str, Any]] = {
    "text/csv": {"schema": {"type": "string"}},
    "application/x-ndjson": {"schema": {}},
}
"""What a file may be, as its request says."""
OPENAPI_VERSION: Final = "3.1.0"
_VARIABLE: Final = re.compile(r"\{[^{}]*\}")
_DESCRIPTION: Final = (
    "Servers, their history, and what is wrong with them. Every method is also a gRPC method of the same name. "
    "Fields are lowerCamelCase in JSON; query parameters may be written in either case. 64-bit integers are strings. "
    "Times in requests are RFC 3339, relative (`-1h`, `now`) or epoch seconds. "
    "A `Request-Timeout` header (`5s`) sets the deadline of a call, `traceparent` puts it into a trace of yours, and "
    "every answer names its trace in `traceresponse`. Errors are google.rpc.Status."
)


def document(routes: Iterable[Route], comments: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The OpenAPI document, ready for JSON. `comments` default to those of the installed protos."""
    known = proto_comments.load() if comments is None else comments
    schemas = Schemas(known)
    error = {
        "description": "The call did not work.",
        "headers": headers.of_answer(headers.RETRY_AFTER),
        "content": {"application/json": {"schema": schemas.message(status_pb2.Status.DESCRIPTOR)}},
    }
    paths: dict[str, dict[str, Any]] = {}
    names_of: dict[str, tuple[str, ...]] = {}
    services: dict[str, None] = {}
    used: set[str] = set()
    for route in routes:
        services.setdefault(route.method.containing_service.full_name)
        # Paths that differ in the names of their variables only are one path to OpenAPI, which the first one names.
        names = names_of.setdefault(_VARIABLE.sub("{}", route.template), _variable_names(route))
        operation = _operation(route, names, schemas, known)
        while operation["operationId"] in used:
            operation["operationId"] += "Also"
        used.add(operation["operationId"])
        paths.setdefault(_path(route, names), {})[route.verb.lower()] = operation
    return {
        "openapi": OPENAPI_VERSION,
        "info": {"title": "OpenManager", "version": "v1", "description": _DESCRIPTION},
        "tags": [{"name": _short(name), "description": known.get(name, "")} for name in services],
        "paths": paths,
        "components": {
            **headers.components(),
            "schemas": dict(sorted(schemas.components.items())),
            "responses": {"Error": error},
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "session": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": SESSION_COOKIE,
                    "description": f"Set by POST /v1/session; over TLS its name is __Host-{SESSION_COOKIE}.",
                },
            },
        },
        "security": [{}, {"token": []}, {"session": []}],
    }


def _short(service: str) -> str:
    return service.rpartition(".")[2]


def _variable_names(route: Route) -> tuple[str, ...]:
    """What the path's variables are called: `id` for `server.id`, since tools make identifiers of them."""
    last = tuple(name.rpartition(".")[2] for name in route.variables)
    return last if len(set(last)) == len(last) else tuple(name.replace(".", "_") for name in route.variables)


def _path(route: Route, names: tuple[str, ...]) -> str:
    left = iter(names)
    return _VARIABLE.sub(lambda _: f"{{{next(left)}}}", route.template)


def _operation(route: Route, names: tuple[str, ...], schemas: Schemas, comments: Mapping[str, str]) -> dict[str, Any]:
    method = route.method
    description = comments.get(method.full_name, "")
    operation: dict[str, Any] = {
        "operationId": f"{method.containing_service.name}.{method.name}",
        "summary": description.partition(". ")[0].rstrip("."),
        "description": description,
        "tags": [method.containing_service.name],
        "parameters": [
            *_path_parameters(route, names, schemas, comments),
            *_query_parameters(route, schemas, comments),
            *headers.parameters(route),
        ],
        "responses": _responses(route, schemas),
    }
    if route.body:
        kind = method.input_type
        if route.body != "*":
            kind = message_type(kind.fields_by_name[route.body])
        operation["requestBody"] = {
            "required": True,
            "description": f"At most {MAX_BODY_BYTES >> 20} MiB. A field that is not known is refused.",
            "content": {"application/json": {"schema": schemas.message(kind)}},
        }
    return operation


def _path_parameters(
    route: Route, names: tuple[str, ...], schemas: Schemas, comments: Mapping[str, str]
) -> list[Schema]:
    parameters = []
    for name, path in zip(names, route.variables, strict=True):
        field = field_at(route.method.input_type, path)[-1]
        parameter = {"name": name, "in": "path", "required": True, "schema": schemas.parameter(field)}
        parameters.append(parameter | _described(comments, field.full_name))
    return parameters


def _query_parameters(route: Route, schemas: Schemas, comments: Mapping[str, str]) -> list[Schema]:
    parameters = []
    for name, parameter in query_parameters(route).items():
        if name != parameter.path:  # the same once more in camelCase
            continue
        described = _described(comments, parameter.field.full_name)
        schema = schemas.parameter(parameter.field)
        parameters.append({"name": name, "in": "query", "required": False, "schema": schema} | described)
    return parameters


def _described(comments: Mapping[str, str], name: str) -> Schema:
    return {"description": comments[name]} if name in comments else {}


def _responses(route: Route, schemas: Schemas) -> dict[str, Schema]:
    error = {"$ref": "#/components/responses/Error"}
    if not headers.has_entity_tag(route.method):
        return {"200": _answer(route, schemas) | {"headers": headers.of_answer()}, "default": error}
    tagged = {"headers": headers.of_answer(headers.ETAG)}
    return {
        "200": _answer(route, schemas) | tagged,
        "304": {"description": "The caller has the answer: If-None-Match names its entity tag."} | tagged,
        "default": error,
    }


def _answer(route: Route, schemas: Schemas) -> dict[str, Any]:
    output = route.method.output_type
    schema = schemas.field(output.fields_by_name[route.response_body]) if route.response_body else None
    schema = schema or schemas.message(output)
    if not route.is_stream:
        return {"description": "OK", "content": {"application/json": {"schema": schema}}}
    if isinstance(framer_of(route.method), EventFramer):
        text = "Server-Sent Events; the schema is that of one event, whose `data` is JSON."
        return {"description": text, "content": {"text/event-stream": {"schema": _event(route.method, schemas)}}}
    if isinstance(framer_of(route.method), TextFramer):
        text = "A file. A last line that begins with `#error` means that it is not complete."
        return {"description": text, "content": FILE_TYPES}
    text = (
        'JSON lines; the schema is that of one line. A line {"error": google.rpc.Status} at the end means that the '
        "answer is not complete."
    )
    return {"description": text, "content": {"application/x-ndjson": {"schema": schema}}}


def _event(method: MethodDescriptor, schemas: Schemas) -> Schema:
    """One Server-Sent Event of a method: of one of the fields marked for it, or an error, which is the last."""
    marked: dict[str, Schema] = {}
    for field in method.output_type.fields:
        if name := field.GetOptions().Extensions[options_pb2.sse_event]:
            marked[name] = schemas.message(message_type(field)) if field.is_repeated else {"type": "object"}
    events = marked or {"": schemas.message(method.output_type)}
    return {
        "oneOf": [
            {
                "type": "object",
                "properties": {
                    **({"event": {"const": name}} if name else {}),
                    "id": {"type": "string"},
                    "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": content},
                },
                "required": [*(["event"] if name else []), "data"],
            }
            for name, content in {**events, "error": schemas.message(status_pb2.Status.DESCRIPTOR)}.items()
        ]
    }
