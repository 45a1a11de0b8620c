"""The table of routes: what the annotations say is what is served, and what cannot be served ends the start."""

from typing import Any

import pytest
from google.api import annotations_pb2
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813  a function, named as a class

from gateway.http.routes import RouteError, RouteTable, routes_for
from runtime.errors import InvalidArgument
from tests.gateway.http.serving import PACKAGE, SERVICES

EXPECTED = """
GET /v1/servers/{id} FleetService/GetServer
GET /v1/servers FleetService/ListServers
GET /v1/fleet/summary FleetService/GetFleetSummary
GET /v1/fleet/watch FleetService/WatchFleet
POST /v1/servers FleetService/CreateServer
PATCH /v1/servers/{server.id} FleetService/UpdateServer
DELETE /v1/servers/{id} FleetService/DeleteServer
POST /v1/servers/{id}:undelete FleetService/UndeleteServer
GET /v1/servers/{server_id}/history HistoryService/GetServerHistory
POST /v1/history:query HistoryService/QueryHistory
GET /v1/metrics HistoryService/ListMetrics
POST /v1/metrics:write IngestService/WriteMetrics
GET /v1/storage/status StorageService/GetStorageStatus
GET /api/database/status StorageService/GetStorageStatus
GET /v1/simulator SimulatorService/GetSimulator
POST /v1/simulator:start SimulatorService/StartSimulator
POST /v1/simulator:stop SimulatorService/StopSimulator
POST /v1/simulator/scenarios SimulatorService/InjectScenario
POST /v1/simulator/scenarios:clear SimulatorService/ClearScenarios
GET /v1/anomalies AnalyticsService/ListAnomalies
GET /v1/anomalies/{id} AnalyticsService/GetAnomaly
GET /v1/analytics/report AnalyticsService/GetModelReport
GET /v1/anomalies:watch AnalyticsService/WatchAnomalies
POST /v1/anomalies/{id}:acknowledge AnalyticsService/AcknowledgeAnomaly
POST /v1/anomalies/{id}:feedback AnalyticsService/FeedbackAnomaly
GET /v1/servers/{server_id}/trend AnalyticsService/GetTrend
GET /v1/servers/{server_id}/capacity AnalyticsService/ForecastCapacity
GET /v1/servers/{server_id}/forecast AnalyticsService/ForecastMetric
GET /v1/capacity AnalyticsService/ListCapacity
GET /v1/predictions AnalyticsService/ListPredictions
POST /v1/ai/interactions AiInteractionService/RecordInteraction
GET /v1/ai/interactions/{id} AiInteractionService/GetInteraction
GET /v1/ai/interactions AiInteractionService/ListInteractions
POST /v1/ai/interactions/{id}:rate AiInteractionService/RateInteraction
POST /v1/ai/interactions/{id}:correct AiInteractionService/CorrectInteraction
GET /v1/ai/interactions:export AiInteractionService/ExportInteractions
GET /v1/ai/interactions:search AiInteractionService/SearchInteractions
POST /v1/ai/interactions:similar AiInteractionService/FindSimilarInteractions
POST /v1/ai/sessions/{session_id}:erase AiInteractionService/EraseSession
GET /v1/ai/calibration AiInteractionService/GetCalibrationReport
"""


def public_services() -> list[ServiceDescriptor]:
    return [default_pool().FindServiceByName(f"{PACKAGE}.{name}") for name in SERVICES]


def test_the_contract_of_the_design_is_served() -> None:
    served = {f"{r.verb} {r.template} {r.rpc.removeprefix(f'/{PACKAGE}.')}" for r in routes_for(public_services())}
    assert set(EXPECTED.strip().splitlines()) <= served


def test_every_method_of_every_public_service_has_a_route() -> None:
    methods = {method.full_name for service in public_services() for method in service.methods}
    assert {route.method.full_name for route in routes_for(public_services())} == methods


@pytest.mark.parametrize(
    ("verb", "path", "method", "values"),
    [
        ("GET", "/v1/servers", "ListServers", ()),
        ("HEAD", "/v1/servers", "ListServers", ()),
        ("GET", "/v1/servers/db1:9100", "GetServer", ("db1:9100",)),
        ("GET", "/v1/servers/a:undelete", "GetServer", ("a:undelete",)),
        ("POST", "/v1/servers/db1:9100:undelete", "UndeleteServer", ("db1:9100",)),
        ("DELETE", "/v1/servers/a%3Aundelete", "DeleteServer", ("a:undelete",)),
        ("GET", "/v1/servers/a%2Fb%20c/history", "GetServerHistory", ("a/b c",)),
        ("PATCH", "/v1/servers/caf%C3%A9", "UpdateServer", ("café",)),
        ("POST", "/v1/history:query", "QueryHistory", ()),
    ],
)
def test_paths_find_their_method(verb: str, path: str, method: str, values: tuple[str, ...]) -> None:
    match = RouteTable(routes_for(public_services())).find(verb, path)
    assert match is not None
    assert match.route is not None
    assert match.route.method.name == method
    assert match.route.decoded(match.values) == values


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/servers/", "/v1/servers/a/b", "/v2/servers", "/v1/servers//history"])
def test_other_paths_find_nothing(path: str) -> None:
    assert RouteTable(routes_for(public_services())).find("GET", path) is None


def test_a_known_path_with_another_verb_says_which_are_allowed() -> None:
    match = RouteTable(routes_for(public_services())).find("PUT", "/v1/servers/a")
    assert match is not None
    assert match.route is None
    assert match.allowed == ("DELETE", "GET", "HEAD", "PATCH")


def test_a_variable_that_is_no_utf8_is_refused() -> None:
    match = RouteTable(routes_for(public_services())).find("GET", "/v1/servers/%ff")
    assert match is not None
    assert match.route is not None
    with pytest.raises(InvalidArgument, match="id: not UTF-8"):
        match.route.decoded(match.values)


def service_with(*rules: dict[str, Any]) -> ServiceDescriptor:
    """A service whose methods have these HTTP rules; the request has `id`, `many` and `inner.name`."""
    file = descriptor_pb2.FileDescriptorProto(name="probe.proto", package="probe", syntax="proto3")
    file.dependency.append("google/api/annotations.proto")
    inner = file.message_type.add(name="Inner")
    inner.field.add(name="name", number=1, type=9, label=1)
    message = file.message_type.add(name="Request")
    message.field.add(name="id", number=1, type=9, label=1)
    message.field.add(name="many", number=2, type=9, label=3)
    message.field.add(name="inner", number=3, type=11, label=1, type_name=".probe.Inner")
    service = file.service.add(name="Probe")
    for index, rule in enumerate(rules):
        method = service.method.add(name=f"Method{index}", input_type=".probe.Request", output_type=".probe.Request")
        http = method.options.Extensions[annotations_pb2.http]
        for name, value in rule.items():
            setattr(http, name, value)
    pool = descriptor_pool.DescriptorPool()
    for known in ("google/protobuf/descriptor.proto", "google/api/http.proto", "google/api/annotations.proto"):
        pool.AddSerializedFile(default_pool().FindFileByName(known).serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindServiceByName("probe.Probe")


@pytest.mark.parametrize(
    "rules",
    [
        ({"get": "/a/{id}"}, {"get": "/a/{inner.name}"}),
        ({"get": "/a"}, {"get": "/a"}),
        ({"get": "/a/{nothing}"},),
        ({"get": "/a/{inner}"},),
        ({"get": "/a/{many}"},),
        ({"get": "/a/{id=x/*}"},),
        ({"get": "/a/{id"},),
        ({"get": "a"},),
        ({"get": "/a/{id}/{id}"},),
        ({"get": "/a", "body": "*"},),
        ({"post": "/a", "body": "nothing"},),
        ({"post": "/a", "body": "id"},),
        ({"get": "/a", "response_body": "nothing"},),
        ({"body": "*"},),
    ],
)
def test_annotations_that_cannot_be_served_end_the_start(rules: tuple[dict[str, Any], ...]) -> None:
    with pytest.raises(RouteError, match="probe"):
        routes_for([service_with(*rules)])


def test_the_longest_literal_wins_and_a_wildcard_comes_last() -> None:
    rules = ({"post": "/a/{id}"}, {"post": "/a/{id}:go"}, {"get": "/b/{id=**}"}, {"get": "/b/{id}/c"})
    table = RouteTable(routes_for([service_with(*rules)]))
    found = {}
    for verb, path in (("POST", "/a/x"), ("POST", "/a/x:go"), ("GET", "/b/x/y"), ("GET", "/b/x/c")):
        match = table.find(verb, path)
        assert match is not None
        assert match.route is not None
        found[path] = match.route.method.name
    assert found == {"/a/x": "Method0", "/a/x:go": "Method1", "/b/x/y": "Method2", "/b/x/c": "Method3"}


def test_equal_paths_with_different_verbs_are_no_conflict() -> None:
    routes = routes_for([service_with({"get": "/a/{id}"}, {"delete": "/a/{inner.name}"}, {"get": "/b/{id=**}"})])
    assert [route.verb for route in routes] == ["GET", "DELETE", "GET"]
    match = RouteTable(routes).find("GET", "/b/x/y")
    assert match is not None
    assert match.values == ("x/y",)
