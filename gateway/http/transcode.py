"""Path, query and body of an HTTP request to the request message of a method, as google.api.http defines it.

What must stay true: every part of a request is used or refused, so a mistyped parameter is a 400 that names it and
not a filter silently ignored; what the path says cannot be contradicted by the body.
"""

from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import unquote_plus

import orjson
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from gateway.http.decode import decoder_of
from gateway.http.encode import message_type
from gateway.http.routes import Route, field_at
from gateway.http.values import BadValue, Parse, parser_of, shown
from runtime.errors import InvalidArgument

MAX_QUERY_PARAMETERS: Final = 1_000
MAX_QUERY_DEPTH: Final = 4  # `a.b.c.d`; request messages of ours go two deep
_UPDATE_MASK: Final = "update_mask"
_NOTHING: Final = frozenset({b"", b"{}", b"null"})
"""Bodies that say nothing, which clients send of themselves."""


class Parameter:
    """A field that the query or the path can set, with the way to it."""

    __slots__ = ("_parse", "_steps", "field", "path")

    def __init__(self, fields: tuple[FieldDescriptor, ...], parse: Parse) -> None:
        self.path = ".".join(field.name for field in fields)
        self.field = fields[-1]
        self._steps = tuple(field.name for field in fields[:-1])
        self._parse = parse

    def put(self, message: Any, text: str, now_ms: int) -> None:
        """Sets the field, or appends to it, from its text."""
        try:
            value = self._parse(text, now_ms)
        except BadValue as fault:
            raise InvalidArgument(fault.message, field=self.path) from None
        for step in self._steps:
            message = getattr(message, step)
        if self.field.is_repeated:
            getattr(message, self.field.name).append(value)
        elif self.field.message_type is not None:
            getattr(message, self.field.name).CopyFrom(value)
        else:
            setattr(message, self.field.name, value)

    def get(self, message: Any) -> Any:
        """The field's value."""
        for step in self._steps:
            message = getattr(message, step)
        return getattr(message, self.field.name)


class RequestReader:
    """Makes the request messages of one route. Built at the start, so that a request does look-ups only."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._class: type[Message] = GetMessageClass(route.method.input_type)
        self._path = tuple(_parameter(field_at(route.method.input_type, name)) for name in route.variables)
        self._query = query_parameters(route)
        body_type = route.method.input_type
        if route.body not in {"", "*"}:
            body_type = message_type(body_type.fields_by_name[route.body])
        self._body_decoder = decoder_of(body_type)
        mask = route.method.input_type.fields_by_name.get(_UPDATE_MASK)
        self._masks = route.verb == "PATCH" and route.body not in {"", "*"} and mask is not None

    def read(self, values: tuple[str, ...], query: bytes, body: bytes, now_ms: int) -> Message:
        """The request; InvalidArgument names the parameter or field at fault."""
        message = self._class()
        if self._route.body:
            self._read_body(message, body, now_ms)
        elif body.strip() not in _NOTHING:
            raise InvalidArgument("this method takes its fields as query parameters, not in a body", field="body")
        for parameter, text in zip(self._path, self._route.decoded(values), strict=True):
            self._put_variable(message, parameter, text, now_ms)
        if query:
            self._read_query(message, query, now_ms)
        return message

    def _put_variable(self, message: Message, parameter: Parameter, text: str, now_ms: int) -> None:
        before = parameter.get(message)
        parameter.put(message, text, now_ms)
        if self._route.body and before and before != parameter.get(message):
            raise InvalidArgument(f"the body says {shown(before)}, the path {shown(text)}", field=parameter.path)

    def _read_body(self, message: Any, body: bytes, now_ms: int) -> None:
        try:
            value = orjson.loads(body) if body.strip() else {}
        except orjson.JSONDecodeError as error:
            raise InvalidArgument(
                f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}", field="body"
            ) from None
        whole = self._route.body == "*"
        target = message if whole else getattr(message, self._route.body)
        try:
            if not isinstance(value, dict):
                raise BadValue("not a JSON object")
            if not whole:
                target.SetInParent()
            self._body_decoder.into(target, value, now_ms)
        except BadValue as fault:
            if not whole:
                fault.inside(self._route.body)
            raise InvalidArgument(fault.message, field=fault.field or "body") from None
        if self._masks:
            bound = {name.removeprefix(f"{self._route.body}.") for name in self._route.variables}
            message.update_mask.paths.extend(name for name in self._body_decoder.names(value) if name not in bound)

    def _read_query(self, message: Any, query: bytes, now_ms: int) -> None:
        given: set[str] = set()
        for name, text in _pairs(query):
            parameter = self._query.get(name)
            if parameter is None:
                raise InvalidArgument(self._unknown(name), reason="PARAMETER_UNKNOWN", field=name or "query")
            if parameter.path not in given:
                given.add(parameter.path)
                if parameter.path == _UPDATE_MASK and text:
                    message.ClearField(_UPDATE_MASK)
            elif not parameter.field.is_repeated:
                raise InvalidArgument("given more than once", field=parameter.path)
            if text or parameter.field.type == FieldDescriptor.TYPE_STRING:
                parameter.put(message, text, now_ms)

    def _unknown(self, name: str) -> str:
        if self._route.body == "*":
            return "this method takes its fields in the body, not as query parameters"
        known = ", ".join(sorted({parameter.path for parameter in self._query.values()}))
        return f"no such query parameter {shown(name)}; there are: {known or 'none'}"


def query_parameters(route: Route) -> dict[str, Parameter]:
    """Every name that the query of a route may use, in snake_case and camelCase -> its field."""
    if route.body == "*":
        return {}
    taken = {*route.variables, route.body}
    found: dict[str, Parameter] = {}
    for fields in _leaves(route.method.input_type, (), taken):
        parameter = _parameter(fields)
        found[parameter.path] = parameter
        found[".".join(field.json_name for field in fields)] = parameter
    return found


def _leaves(
    message: Descriptor, outer: tuple[FieldDescriptor, ...], taken: set[str]
) -> Iterator[tuple[FieldDescriptor, ...]]:
    for field in message.fields:
        fields = (*outer, field)
        if ".".join(step.name for step in fields) in taken:
            continue
        if parser_of(field) is not None:
            yield fields
        elif not field.is_repeated and len(fields) < MAX_QUERY_DEPTH:
            yield from _leaves(message_type(field), fields, taken)


def _parameter(fields: tuple[FieldDescriptor, ...]) -> Parameter:
    parse = parser_of(fields[-1])
    assert parse is not None
    return Parameter(fields, parse)


def _pairs(query: bytes) -> Iterator[tuple[str, str]]:
    """Name and value of each parameter. Not parse_qsl, which says nothing of bad UTF-8."""
    parts = query.split(b"&")
    if len(parts) > MAX_QUERY_PARAMETERS:
        raise InvalidArgument(f"more than MAX_QUERY_PARAMETERS ({MAX_QUERY_PARAMETERS}) parameters", field="query")
    for part in parts:
        if not part:
            continue
        name, _, value = part.partition(b"=")
        try:
            yield (
                unquote_plus(name.decode("ascii"), errors="strict"),
                unquote_plus(value.decode("ascii"), errors="strict"),
            )
        except UnicodeDecodeError:
            raise InvalidArgument("the query is not percent-encoded UTF-8", field="query") from None
