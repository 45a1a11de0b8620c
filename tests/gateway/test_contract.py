"""Every public call has its HTTP route, its OpenAPI entry and its docs, and none of these has more than there is."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.descriptor import ServiceDescriptor

from tests.docs.examples import PACKAGE, ROOT, TABLE, Call, call_of, examples, pages
from tests.gateway.contract import faults
from tests.gateway.http.serving import SERVICES
from tests.gateway.http.test_openapi import DOCUMENT
from tests.gateway.http.test_routes import public_services, service_with

API = ROOT / "docs" / "api.md"
PAGE = API.read_text()
OPERATOR_PAGES = {"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/"}


def calls() -> list[Call]:
    """The API calls of the examples of docs/api.md."""
    return [call for command, _ in examples(API) if (call := call_of(command)) is not None]


def test_every_call_has_all_three() -> None:
    assert faults(public_services(), DOCUMENT, PAGE, calls()) == []


def without_operation(document: Any) -> None:
    del document["paths"]["/v1/servers/{id}"]["patch"]


def with_operation(document: Any) -> None:
    document["paths"]["/v1/nowhere"] = {"get": document["paths"]["/v1/servers"]["get"]}


def without_parameter(document: Any) -> None:
    parameters = document["paths"]["/v1/servers"]["get"]["parameters"]
    parameters[:] = [parameter for parameter in parameters if parameter.get("name") != "role"]


def with_parameter(document: Any) -> None:
    parameters = document["paths"]["/v1/servers"]["get"]["parameters"]
    parameters.append(parameters[0] | {"name": "colour"})


def with_another_answer(document: Any) -> None:
    answers = document["paths"]["/v1/servers"]["get"]["responses"]["200"]["content"]
    answers["application/json"]["schema"] = {"$ref": "#/components/schemas/openmanager.gateway.v1.Server"}


def without_body(document: Any) -> None:
    del document["paths"]["/v1/servers"]["post"]["requestBody"]


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (without_operation, "PATCH /v1/servers/{} is not in OpenAPI"),
        (with_operation, "GET /v1/nowhere is in OpenAPI and does not exist"),
        (without_parameter, "GET /v1/servers in OpenAPI: its query has"),
        (with_parameter, "GET /v1/servers in OpenAPI: its query has"),
        (with_another_answer, "GET /v1/servers in OpenAPI: its answer has another schema"),
        (without_body, "POST /v1/servers in OpenAPI: its body has another schema"),
    ],
)
def test_a_document_that_is_not_right_is_found(plant: Callable[[Any], None], said: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    plant(document)
    (fault,) = faults(public_services(), document, PAGE, calls())
    assert fault.startswith(said)


ROW = "| `ListMetrics` | `GET /v1/metrics` | the metrics that exist |\n"


@pytest.mark.parametrize(
    ("there", "instead", "said"),
    [
        (ROW, "", "HistoryService.ListMetrics is not on docs/api.md"),
        (
            "`GET /v1/metrics` |",
            "`GET /v1/metrics`, `GET /v1/all` |",
            "HistoryService.ListMetrics is not on docs/api.md",
        ),
        (ROW, ROW + "| `ListAll` | `GET /v1/all` | what is not there |\n", "HistoryService.ListAll is on docs/api.md"),
    ],
)
def test_a_page_that_is_not_right_is_found(there: str, instead: str, said: str) -> None:
    assert there in PAGE
    (fault,) = faults(public_services(), DOCUMENT, PAGE.replace(there, instead), calls())
    assert fault.startswith(said)


def test_a_missing_example_is_found() -> None:
    some = [call for call in calls() if (call.by, call.name) != ("grpcurl", "FleetService/GetServer")]
    (fault,) = faults(public_services(), DOCUMENT, PAGE, some)
    assert fault == "docs/api.md has no example of FleetService.GetServer by grpcurl"


def test_a_call_that_has_nothing_is_found() -> None:
    services: list[ServiceDescriptor] = [*public_services(), service_with({})]
    assert faults(services, DOCUMENT, PAGE, calls()) == [
        "Probe.Method0 has no HTTP route",
        "Probe.Method0 is not on docs/api.md with exactly its routes",
        "docs/api.md has no example of Probe.Method0 by curl",
        "docs/api.md has no example of Probe.Method0 by grpcurl",
    ]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_no_route_and_no_call_that_does_not_exist(page: Any) -> None:
    text = page.read_text()
    for verb, path in re.findall(r"\b(GET|POST|PUT|PATCH|DELETE) (/[\w/.:{}*-]*)", text):
        match = TABLE.find(verb, path)
        assert path in OPERATOR_PAGES or (match is not None and match.route is not None), f"{verb} {path}"
    methods = {f"{service.name}.{method.name}" for service in public_services() for method in service.methods}
    for service, method in re.findall(rf"\b(?:{re.escape(PACKAGE)}\.)?(\w+Service)[./]([A-Z]\w+)", text):
        assert service not in SERVICES or f"{service}.{method}" in methods, f"{service}.{method}"
    for service in re.findall(rf"\b{re.escape(PACKAGE)}\.(\w+Service)\b", text):
        assert service in SERVICES, service
    for command, _ in examples(page):
        if command.startswith(("curl", "grpcurl")) and "$token" not in command:
            call_of(command)


def test_a_command_that_calls_what_does_not_exist_is_found() -> None:
    for command in (
        "curl 127.0.0.1:8080/v1/nowhere",
        "curl -X DELETE 127.0.0.1:8080/v1/metrics",
        f"grpcurl -plaintext 127.0.0.1:50050 {PACKAGE}.FleetService/Nothing",
        f"grpcurl -plaintext 127.0.0.1:50050 {PACKAGE}.NoService/GetServer",
    ):
        with pytest.raises(LookupError):
            call_of(command)
