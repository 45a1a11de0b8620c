"""What every public call must have: an HTTP route, its place in OpenAPI, its place on docs/api.md; and nothing beyond.

The annotations are read here a second time, by nobody's code but this, so that a fault in reading them shows.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.api import annotations_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor

from openmanager.gateway.v1 import options_pb2
from tests.docs.examples import Call

VARIABLE = re.compile(r"\{([^}=]+)[^}]*\}")
ONE_VALUE = {"google.protobuf.Timestamp", "google.protobuf.Duration", "google.protobuf.FieldMask"}


@dataclass(frozen=True, slots=True)
class Binding:
    """One google.api.http binding."""

    method: MethodDescriptor
    verb: str
    template: str
    body: str
    response_body: str

    @property
    def name(self) -> str:
        """Service.Method."""
        return f"{self.method.containing_service.name}.{self.method.name}"

    @property
    def shape(self) -> str:
        """GET /v1/servers/{}: what is the same whatever the variables are called."""
        return shape_of(self.verb, self.template)


def shape_of(verb: str, template: str) -> str:
    return f"{verb.upper()} {VARIABLE.sub('{}', template)}"


JSON, JSON_LINES = "application/json", "application/x-ndjson"


def bindings(method: MethodDescriptor) -> Iterator[Binding]:
    """The routes of a method, as annotated."""
    if method.GetOptions().HasExtension(annotations_pb2.http):
        rule = method.GetOptions().Extensions[annotations_pb2.http]
        for each in (rule, *rule.additional_bindings):
            verb = each.WhichOneof("pattern")
            if verb is not None:
                path = getattr(each, verb)
                yield Binding(method, verb.upper(), path, each.body, each.response_body or rule.response_body)


def faults(
    services: Iterable[ServiceDescriptor], document: Mapping[str, Any], page: str, examples: Iterable[Call]
) -> list[str]:
    """What is missing or too much.

    Args:
        services: all public ones.
        document: /openapi.json.
        page: the text of docs/api.md.
        examples: the calls of its examples.
    """
    methods = [method for service in services for method in service.methods]
    annotated = {binding.shape: binding for method in methods for binding in bindings(method)}
    operations = {
        shape_of(verb, path): operation
        for path, verbs in document["paths"].items()
        for verb, operation in verbs.items()
    }
    written = dict(_rows(page))
    shown = {(call.by, call.name.replace("/", ".")) for call in examples}
    found = []
    for method in methods:
        name = f"{method.containing_service.name}.{method.name}"
        own = [binding for binding in annotated.values() if binding.method is method]
        if not own:
            found.append(f"{name} has no HTTP route")
        if written.pop(name, None) != {binding.shape for binding in own}:
            found.append(f"{name} is not on docs/api.md with exactly its routes")
        found += [
            f"docs/api.md has no example of {name} by {by}"
            for by in ("curl", "grpcurl")
            if (by, name) not in shown and not _works_once(method)
        ]
    for shape, binding in annotated.items():
        if shape in operations:
            found += [f"{shape} in OpenAPI: {what}" for what in _operation_faults(binding, operations.pop(shape))]
        else:
            found.append(f"{shape} is not in OpenAPI")
    found += [f"{shape} is in OpenAPI and does not exist" for shape in operations]
    return found + [f"{name} is on docs/api.md and does not exist" for name in written]


def _works_once(method: MethodDescriptor) -> bool:
    """A call that needs a secret which is made once and used up: no example of it can be run again."""
    return bool(method.GetOptions().Extensions[options_pb2.open_to_all])


def _rows(page: str) -> Iterator[tuple[str, set[str]]]:
    """Service.Method -> the shapes of its routes, of each row below a heading that is a service's name."""
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        service = section.split("\n", 1)[0]
        for method, routes in re.findall(r"^\| `(\w+)` \| (`[^|]+`) \|", section, re.MULTILINE):
            pairs = re.findall(r"`([A-Z]+) (/[^`]+)`", routes)
            yield f"{service}.{method}", {shape_of(verb, path) for verb, path in pairs}


def _operation_faults(binding: Binding, operation: Mapping[str, Any]) -> Iterator[str]:
    method = binding.method
    if operation["operationId"].removesuffix("Also") != binding.name:
        yield f"is {operation['operationId']}, not {binding.name}"
    named = [parameter for parameter in operation["parameters"] if "$ref" not in parameter]
    if any(not parameter.get("schema") for parameter in named):
        yield "a parameter has no schema"
    variables = VARIABLE.findall(binding.template)
    in_path = [parameter["required"] for parameter in named if parameter["in"] == "path"]
    if in_path != [True] * len(variables):
        yield f"its path has the parameters {variables}"
    taken = {*variables, binding.body}
    wanted = set() if binding.body == "*" else set(_leaves(method.input_type, "", taken))
    if {parameter["name"] for parameter in named if parameter["in"] == "query"} != wanted:
        yield f"its query has the parameters {sorted(wanted)}"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body != _body_schema(binding):
        yield "its body has another schema"
    content = operation["responses"]["200"]["content"]
    media = _media_types(method)
    if set(content) != media:
        yield f"it answers with {', '.join(sorted(media))}"
    elif media == {JSON} and _without_text(content[JSON]["schema"]) != _answer_schema(binding):
        yield "its answer has another schema"


def _leaves(message: Descriptor, outer: str, taken: set[str]) -> Iterator[str]:
    for field in message.fields:
        path = f"{outer}{field.name}"
        if path in taken:
            continue
        if field.message_type is None or field.message_type.full_name in ONE_VALUE:
            yield path
        elif not field.is_repeated:
            yield from _leaves(field.message_type, f"{path}.", taken)


def _body_schema(binding: Binding) -> dict[str, str] | None:
    kind = binding.method.input_type
    if binding.body not in {"", "*"}:
        return _reference(kind.fields_by_name[binding.body].message_type)
    return _reference(kind) if binding.body else None


def _answer_schema(binding: Binding) -> dict[str, Any]:
    kind = binding.method.output_type
    if not binding.response_body:
        return _reference(kind)
    field: FieldDescriptor = kind.fields_by_name[binding.response_body]
    one = _reference(field.message_type)
    return {"type": "array", "items": one} if field.is_repeated else one


def _without_text(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name != "description"}


def _reference(kind: Descriptor | None) -> dict[str, str]:
    assert kind is not None
    return {"$ref": f"#/components/schemas/{kind.full_name}"}


def _media_types(method: MethodDescriptor) -> set[str]:
    if not method.server_streaming or method.client_streaming:
        return {JSON}
    wanted = method.GetOptions().Extensions[options_pb2.http_stream_format]
    if wanted == options_pb2.HTTP_STREAM_FORMAT_TEXT:
        return {"text/csv", JSON_LINES}
    return {"text/event-stream" if wanted == options_pb2.HTTP_STREAM_FORMAT_SERVER_SENT_EVENTS else JSON_LINES}
