"""The table of HTTP routes, read from the google.api.http annotations of the services.

What must stay true: the annotations are the only list of routes; two routes that a request could not tell apart, a
path variable or body field that does not exist, and template syntax that is not understood end the start, not a
request. A path is matched as it was sent, and its variables are decoded afterwards, so that an encoded `:` or `/`
belongs to the value. An id may hold a colon (`db1:9100`), so the longest literal wins among the routes of a method.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final
from urllib.parse import unquote

from google.api import annotations_pb2, http_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor

from runtime.errors import InvalidArgument

_VARIABLE: Final = re.compile(r"\{([a-z_][a-z0-9_.]*)(?:=([^{}]*))?\}")
_CHANGING: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})
REMEMBERED_PATHS: Final = 4_096
"""What paths mean is kept for so many; trying the patterns takes 2 to 5 us."""
REMEMBERED_PATH_CHARS: Final = 256
"""Of what is longer, which may be 64 KiB, nothing is kept."""


class RouteError(ValueError):
    """An annotation that cannot be served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One binding of one method."""

    verb: str
    """GET, POST, ..."""
    template: str
    """As annotated: /v1/servers/{id}:undelete."""
    method: MethodDescriptor
    body: str = ""
    """"": no body; "*": the whole request; otherwise the field that the body is."""
    response_body: str = ""
    """The field that is returned bare; "": the whole response."""
    variables: tuple[str, ...] = ()
    """Dotted field paths, in the order of the template."""
    pattern: "re.Pattern[str]" = field(repr=False, compare=False)

    @property
    def rpc(self) -> str:
        """The method's path: /openmanager.gateway.v1.FleetService/GetServer."""
        return f"/{self.method.containing_service.full_name}/{self.method.name}"

    @property
    def changes(self) -> bool:
        """Whether the verb is one that browsers' rules treat as a change."""
        return self.verb in _CHANGING

    @property
    def is_stream(self) -> bool:
        """Whether the answer is a stream. A bidirectional method is one message in and one out over HTTP."""
        return bool(self.method.server_streaming) and not self.method.client_streaming

    @property
    def shape(self) -> str:
        """The template without the names of its variables: equal shapes match the same paths."""
        return _VARIABLE.sub(lambda match: "{**}" if match[2] == "**" else "{}", self.template)

    def decoded(self, values: tuple[str, ...]) -> tuple[str, ...]:
        """The values of the variables without percent-encoding."""
        return tuple(_decoded(name, value) for name, value in zip(self.variables, values, strict=True))


def _decoded(name: str, value: str) -> str:
    if "%" not in value:
        return value
    try:
        return unquote(value, errors="strict")
    except UnicodeDecodeError:
        raise InvalidArgument("not UTF-8", field=name) from None


def routes_for(services: Iterable[ServiceDescriptor]) -> list[Route]:
    """Every route of every annotated method, additional bindings included. RouteError where one cannot be served."""
    routes = [route for service in services for method in service.methods for route in _routes_of(method)]
    seen: dict[tuple[str, str], Route] = {}
    for route in routes:
        other = seen.setdefault((route.verb, route.shape), route)
        if other is not route:
            raise RouteError(f"{route.verb} {route.template} of {route.rpc} is also {other.template} of {other.rpc}")
    return routes


def _routes_of(method: MethodDescriptor) -> Iterator[Route]:
    options = method.GetOptions()
    if not options.HasExtension(annotations_pb2.http):
        return
    rule = options.Extensions[annotations_pb2.http]
    for binding in (rule, *rule.additional_bindings):
        yield _route(method, binding, binding.response_body or rule.response_body)


def _route(method: MethodDescriptor, rule: http_pb2.HttpRule, response_body: str) -> Route:
    where = method.full_name
    kind = rule.WhichOneof("pattern")
    if kind is None:
        raise RouteError(f"{where}: a google.api.http binding without a path")
    verb = rule.custom.kind if kind == "custom" else kind.upper()
    template = rule.custom.path if kind == "custom" else getattr(rule, kind)
    variables, pattern = _compiled(where, template)
    for name in variables:
        last = field_at(method.input_type, name)[-1]
        if last.is_repeated or last.message_type is not None:
            raise RouteError(f"{where}: {{{name}}} in {template} is no single scalar field")
    if rule.body and verb in {"GET", "HEAD", "DELETE"}:
        raise RouteError(f"{where}: {verb} {template} cannot have a body")
    if rule.body not in {"", "*"}:
        of_body = field_at(method.input_type, rule.body)[-1]
        if "." in rule.body or of_body.message_type is None or of_body.is_repeated:
            raise RouteError(f"{where}: the body {rule.body} is no single message field")
    if response_body:
        field_at(method.output_type, response_body)
    return Route(
        verb=verb,
        template=template,
        method=method,
        body=rule.body,
        response_body=response_body,
        variables=variables,
        pattern=pattern,
    )


def _compiled(where: str, template: str) -> tuple[tuple[str, ...], "re.Pattern[str]"]:
    variables: list[str] = []
    expression, position = "", 0
    for match in _VARIABLE.finditer(template):
        expression += re.escape(_literal(where, template, template[position : match.start()]))
        if match[2] not in {None, "*", "**"}:
            raise RouteError(f"{where}: only {{field}}, {{field=*}} and {{field=**}} are served, not {match[0]}")
        expression += "(.+)" if match[2] == "**" else "([^/]+)"
        variables.append(match[1])
        position = match.end()
    expression += re.escape(_literal(where, template, template[position:]))
    if not template.startswith("/") or len(set(variables)) != len(variables):
        raise RouteError(f"{where}: the path {template} does not begin with / or has a variable twice")
    return tuple(variables), re.compile(expression)


def _literal(where: str, template: str, text: str) -> str:
    if set(text) & set("{}*"):
        raise RouteError(f"{where}: {template} is not a path template that is served")
    return text


def field_at(message: Descriptor, path: str) -> tuple[FieldDescriptor, ...]:
    """The fields of a dotted path from the outermost in; RouteError when there is none such or one is repeated."""
    fields: list[FieldDescriptor] = []
    inner: Descriptor | None = message
    for name in path.split("."):
        found = inner.fields_by_name.get(name) if inner is not None else None
        if found is None or (found.is_repeated and "." in path):
            raise RouteError(f"{message.full_name} has no single field {path}")
        fields.append(found)
        inner = found.message_type
    return tuple(fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What a request's path means. `route` None: the path is known, but not with this verb; `allowed` says which."""

    route: Route | None
    values: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()


class RouteTable:
    """Finds the route of a request: a dictionary for paths without variables, ordered patterns for the others."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._exact: dict[str, dict[str, Match]] = {}
        patterns = []
        for route in self.routes:
            if route.variables:
                patterns.append(route)
            else:
                self._exact.setdefault(route.template, {})[route.verb] = Match(route=route)
        self._patterns = sorted(patterns, key=_specificity)
        self._remembered = lru_cache(REMEMBERED_PATHS)(self._find)

    def find(self, verb: str, path: str) -> Match | None:
        """The match of a path as it was sent, percent-encoded; None: no route has such a path. HEAD finds GET."""
        return (self._remembered if len(verb) + len(path) <= REMEMBERED_PATH_CHARS else self._find)(verb, path)

    def _find(self, verb: str, path: str) -> Match | None:
        wanted = "GET" if verb == "HEAD" else verb
        exact = self._exact.get(path)
        if exact is not None and wanted in exact:
            return exact[wanted]
        allowed = set(exact or ())
        for route in self._patterns:
            match = route.pattern.fullmatch(path)
            if match is None:
                continue
            if route.verb == wanted:
                return Match(route=route, values=match.groups())
            allowed.add(route.verb)
        if not allowed:
            return None
        return Match(route=None, allowed=tuple(sorted(allowed | ({"HEAD"} if "GET" in allowed else set()))))


def _specificity(route: Route) -> tuple[int, int]:
    """Order of trying: no `**` first, then the most literal text."""
    return "**" in route.template, -len(_VARIABLE.sub("", route.template))
