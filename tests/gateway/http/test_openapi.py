"""/openapi.json and /docs say what is served."""

import re
from typing import Any

from gateway.http import comments, openapi
from gateway.http.routes import routes_for
from gateway.http.transcode import query_parameters
from tests.gateway.http.serving import serving
from tests.gateway.http.test_routes import public_services

ROUTES = routes_for(public_services())
DOCUMENT = openapi.document(ROUTES)
OPERATIONS = [operation for verbs in DOCUMENT["paths"].values() for operation in verbs.values()]


def nodes(value: Any) -> Any:
    """Every object inside a JSON value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(inner)


def test_every_route_is_in_it_and_nothing_else() -> None:
    listed = {(verb.upper(), path) for path, verbs in DOCUMENT["paths"].items() for verb in verbs}
    assert listed == {(route.verb, route.template) for route in ROUTES}
    methods = {f"{route.method.containing_service.name}.{route.method.name}" for route in ROUTES}
    assert {operation["operationId"].removesuffix("Also") for operation in OPERATIONS} == methods


def test_its_structure_is_that_of_openapi() -> None:
    assert re.fullmatch(r"3\.1\.\d+", DOCUMENT["openapi"])
    assert {"title", "version"} <= set(DOCUMENT["info"])
    identities = [operation["operationId"] for operation in OPERATIONS]
    assert len(set(identities)) == len(identities)
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    for operation in OPERATIONS:
        assert set(operation["tags"]) <= tags
        assert set(operation["responses"]) == {"200", "default"}
        assert operation["responses"]["200"]["description"]
        places = [(parameter["name"], parameter["in"]) for parameter in operation["parameters"]]
        assert len(set(places)) == len(places)
        for parameter in operation["parameters"]:
            assert set(parameter) <= {"name", "in", "required", "schema", "description"}
            assert parameter["in"] in {"path", "query"}
            assert parameter["required"] == (parameter["in"] == "path")
    for path, verbs in DOCUMENT["paths"].items():
        for operation in verbs.values():
            in_path = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
            assert in_path == set(re.findall(r"\{([^}]+)\}", path))


def test_its_schemas_are_schemas_and_every_reference_leads_somewhere() -> None:
    components = DOCUMENT["components"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in components["schemas"])
    for node in nodes(DOCUMENT):
        if isinstance(reference := node.get("$ref"), str):
            where: Any = DOCUMENT
            for step in reference.removeprefix("#/").split("/"):
                where = where[step]
        if isinstance(node.get("type"), str) and "properties" not in node and "in" not in node and "scheme" not in node:
            assert node["type"] in {"object", "array", "string", "integer", "number", "boolean"}
            assert (node["type"] == "array") == ("items" in node)


def test_every_query_parameter_is_in_it_in_snake_case() -> None:
    for route in ROUTES:
        operation = DOCUMENT["paths"][route.template][route.verb.lower()]
        listed = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "query"}
        assert listed == {parameter.path for parameter in query_parameters(route).values()}


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
    assert all(f"<code>{route.template}</code>" in text for route in ROUTES)
    assert "Returns one server with all its metrics." in text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"<script|<link|<img|src=|url\(|https?://", text)
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(re.findall(r'id="([^"]+)"', text))
