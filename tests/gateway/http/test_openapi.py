"""/openapi.json and /docs say what is served."""

import re
from typing import Any

from openapi_spec_validator import OpenAPIV31SpecValidator

from gateway.http import comments, openapi
from gateway.http.routes import Route, routes_for
from gateway.http.transcode import query_parameters
from tests.gateway.http.serving import serving
from tests.gateway.http.test_routes import public_services

ROUTES = routes_for(public_services())
DOCUMENT = openapi.document(ROUTES)
OPERATIONS = [operation for verbs in DOCUMENT["paths"].values() for operation in verbs.values()]


def operation_of(route: Route) -> Any:
    """The operation of a route, whatever the document calls the variables of its path."""
    shape = re.sub(r"\{[^}]+\}", "{}", route.template)
    (verbs,) = [verbs for path, verbs in DOCUMENT["paths"].items() if re.sub(r"\{[^}]+\}", "{}", path) == shape]
    return verbs[route.verb.lower()]


def nodes(value: Any) -> Any:
    """Every object inside a JSON value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(inner)


def resolved(value: Any) -> Any:
    """What a reference leads to; anything else as it is."""
    if "$ref" not in value:
        return value
    where: Any = DOCUMENT
    for step in value["$ref"].removeprefix("#/").split("/"):
        where = where[step]
    return where


def parameters(operation: Any) -> list[Any]:
    return [resolved(parameter) for parameter in operation["parameters"]]


def in_place(operation: Any, place: str) -> set[str]:
    """The names of the parameters in a path, query or header."""
    return {parameter["name"] for parameter in parameters(operation) if parameter["in"] == place}


def by_name() -> dict[str, Any]:
    return {operation["operationId"]: operation for operation in OPERATIONS}


def test_every_route_is_in_it_and_nothing_else() -> None:
    assert len(OPERATIONS) == len(ROUTES)
    for route in ROUTES:
        method = f"{route.method.containing_service.name}.{route.method.name}"
        assert operation_of(route)["operationId"].removesuffix("Also") == method


def test_paths_that_differ_in_names_only_are_one_path() -> None:
    """Else OpenAPI cannot tell them apart: PATCH /v1/servers/{server.id} is GET's /v1/servers/{id}."""
    assert set(DOCUMENT["paths"]["/v1/servers/{id}"]) == {"get", "patch", "delete"}
    shapes = [re.sub(r"\{[^}]+\}", "{}", path) for path in DOCUMENT["paths"]]
    assert len(set(shapes)) == len(shapes)
    assert all(re.fullmatch(r"\w+", name) for path in DOCUMENT["paths"] for name in re.findall(r"\{([^}]+)\}", path))


def test_an_event_stream_is_described_event_by_event() -> None:
    (media,) = DOCUMENT["paths"]["/v1/fleet/watch"]["get"]["responses"]["200"]["content"].values()
    data = {kind["properties"]["event"]["const"]: kind["properties"]["data"] for kind in media["schema"]["oneOf"]}
    assert set(data) == {"snapshot", "server", "removed", "anomaly", "error"}
    assert data["server"]["contentSchema"] == {"$ref": "#/components/schemas/openmanager.gateway.v1.Server"}
    assert data["error"]["contentSchema"] == {"$ref": "#/components/schemas/google.rpc.Status"}


def test_a_status_in_a_query_is_one_of_those_that_exist() -> None:
    (status,) = [each for each in by_name()["FleetService.ListServers"]["parameters"] if each.get("name") == "status"]
    assert {"healthy", "offline", "SERVER_STATUS_HEALTHY"} <= set(status["schema"]["enum"])


def test_a_body_is_not_optional() -> None:
    """A change without one is refused for its content type."""
    bodies = [operation["requestBody"] for operation in OPERATIONS if "requestBody" in operation]
    assert bodies and all(body["required"] for body in bodies)


def test_somebody_elses_validator_finds_it_valid() -> None:
    assert [fault.message for fault in OpenAPIV31SpecValidator(DOCUMENT).iter_errors()] == []


def test_the_validator_would_say_so() -> None:
    path = "/v1/servers/{id}"
    for planted in (
        {
            **DOCUMENT,
            "paths": {path: {"get": {"responses": {"200": {"description": "a variable that nothing names"}}}}},
        },
        {**DOCUMENT, "info": {"title": "without a version"}},
        {**DOCUMENT, "paths": {path: DOCUMENT["paths"][path], "/again": DOCUMENT["paths"][path]}},
    ):
        assert list(OpenAPIV31SpecValidator(planted).iter_errors())


def test_what_the_validator_does_not_look_at() -> None:
    assert re.fullmatch(r"3\.1\.\d+", DOCUMENT["openapi"])
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    for operation in OPERATIONS:
        assert set(operation["tags"]) <= tags
        assert operation["responses"]["200"]["description"]
        assert all(parameter["required"] == (parameter["in"] == "path") for parameter in parameters(operation))


def test_every_call_has_the_headers_of_every_call() -> None:
    for operation in OPERATIONS:
        assert {"Request-Timeout", "traceparent"} <= in_place(operation, "header")
        for status, answer in operation["responses"].items():
            assert resolved(resolved(answer)["headers"]["traceresponse"])["required"], status


def test_tags_and_resuming_are_where_the_options_say() -> None:
    tagged = {name for name, operation in by_name().items() if "304" in operation["responses"]}
    assert tagged == {"FleetService.GetServer", "FleetService.ListServers", "FleetService.GetFleetSummary"}
    for name, operation in by_name().items():
        assert ("If-None-Match" in in_place(operation, "header")) == (name in tagged)
        assert ("ETag" in operation["responses"]["200"]["headers"]) == (name in tagged)
    resuming = {name for name, operation in by_name().items() if "Last-Event-ID" in in_place(operation, "header")}
    assert resuming == {"FleetService.WatchFleet", "AnalyticsService.WatchAnomalies"}


async def test_headers_that_are_named_are_read_and_sent() -> None:
    known = {name.lower() for name in DOCUMENT["components"]["headers"]}
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    async with serving() as served:
        shared = await served.get("/v1/servers/shared", traceparent=trace)
        assert shared.headers["traceresponse"].split("-")[1] == trace.split("-")[1]
        kept = await served.get("/v1/servers/shared", if_none_match=shared.headers["etag"])
        late = await served.get("/v1/servers/slow", request_timeout="20ms")
        assert (kept.status, late.status) == (304, 504)
        busy = await served.get("/v1/servers/busy")
    seen = {name for answer in (shared, kept, late, busy) for name in answer.headers}
    assert known <= seen


def test_its_schemas_are_schemas_and_every_reference_leads_somewhere() -> None:
    components = DOCUMENT["components"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in components["schemas"])
    for node in nodes(DOCUMENT):
        if isinstance(node.get("$ref"), str):
            resolved(node)
        if isinstance(node.get("type"), str) and "properties" not in node and "in" not in node and "scheme" not in node:
            assert node["type"] in {"object", "array", "string", "integer", "number", "boolean"}
            assert (node["type"] == "array") == ("items" in node)


def test_every_query_parameter_is_in_it_in_snake_case() -> None:
    for route in ROUTES:
        assert in_place(operation_of(route), "query") == {
            parameter.path for parameter in query_parameters(route).values()
        }


def test_every_method_field_and_type_is_described_by_its_comment() -> None:
    assert all(operation["description"] and operation["summary"] for operation in OPERATIONS)
    server = DOCUMENT["components"]["schemas"]["openmanager.gateway.v1.Server"]
    assert server["description"] == "A server as it is now."
    assert all(field.get("description") for field in server["properties"].values())
    status = DOCUMENT["components"]["schemas"]["openmanager.fleet.v1.ServerStatus"]
    assert "SERVER_STATUS_OFFLINE: Nothing was received" in status["description"]


def test_without_comments_everything_else_is_there(monkeypatch: Any, caplog: Any) -> None:
    def missing(_package: str) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(comments, "files", missing)
    document = openapi.document(ROUTES)
    assert document["paths"].keys() == DOCUMENT["paths"].keys()
    assert "make gen" in caplog.text


async def test_both_are_served_and_the_page_lists_every_route_and_loads_nothing() -> None:
    async with serving() as served:
        document, page = await served.get("/openapi.json"), await served.get("/docs")
    assert document.json() == DOCUMENT
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    text = page.body.decode()
    assert all(f"<code>{path}</code>" in text for path in DOCUMENT["paths"])
    assert "Returns one server with all its metrics." in text
    assert text.count("Last-Event-ID") == 4, "of each stream once as a parameter, once in the comment of after_version"
    assert "<code>traceparent</code></td>" not in text, "what every call has stands at the top"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"<script|<link|<img|src=|url\(|https?://", text)
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(re.findall(r'id="([^"]+)"', text))
