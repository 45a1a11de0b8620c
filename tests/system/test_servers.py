"""Servers as people keep them, through the whole product: labels, notes, etags, maintenance, deleted ones."""

import json
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from openmanager.gateway.v1 import fleet_pb2, fleet_pb2_grpc
from tests.harness.launched import Launched, within
from tests.harness.product import Answer


@contextmanager
def kept(product: Launched, **fields: Any) -> Iterator[str]:
    """A server of its own, deleted afterwards."""
    server_id = f"kept-{uuid.uuid4().hex[:8]}"
    answer = product.post("/v1/servers", {"id": server_id} | fields)
    assert answer.status == 200, answer.body
    try:
        yield server_id
    finally:
        product.post(f"/v1/servers/{server_id}", None, method="DELETE")


def patch(product: Launched, server_id: str, body: Any, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return product.post(f"/v1/servers/{server_id}", body, method="PATCH", headers=named)


def reason(answer: Answer) -> str:
    return str(answer.json["details"][0]["reason"])


def test_what_people_say_of_a_server_is_read_as_it_was_written(product: Launched) -> None:
    labels = {"team": "shop", "empty": "", "ünï": "日本"}
    notes = 'Ask Ann.\n<script>alert("1")</script>'
    with kept(product, labels=labels, notes=notes) as server_id:
        whole = product.get(f"/v1/servers/{server_id}").json
        assert (whole["labels"], whole["notes"]) == (labels, notes)
        again = product.get(f"/v1/servers/{server_id}")
        assert again.json == whole
        basic = product.get(f"/v1/servers/{server_id}?view=BASIC").json
        assert basic["labels"] == labels
        assert not {"notes", "etag"} & basic.keys()
        tag = {name.lower(): value for name, value in again.headers.items()}["etag"]
        assert product.get(f"/v1/servers/{server_id}", headers={"if-none-match": tag}).status == 304
        changed = patch(product, server_id, {"notes": "short"}).json
        assert changed["notes"] == "short"
        assert product.get(f"/v1/servers/{server_id}").json["notes"] == "short"
        patch(product, server_id, {"notes": ""})
        assert "notes" not in product.get(f"/v1/servers/{server_id}").json


def test_a_change_bound_to_an_etag_happens_to_what_was_seen_or_not_at_all(product: Launched) -> None:
    with kept(product) as server_id:
        seen = product.get(f"/v1/servers/{server_id}").json["etag"]
        first = patch(product, server_id, {"role": "db", "etag": seen})
        assert first.json["role"] == "db"
        assert product.get(f"/v1/servers/{server_id}").json["etag"] == first.json["etag"] != seen
        for late in (
            patch(product, server_id, {"role": "web", "etag": seen}),
            patch(product, server_id, {"role": "web"}, if_match=f'"{seen}"'),
            patch(product, server_id, {"role": "web"}, if_match='W/"' + first.json["etag"] + '"'),
            product.post(f"/v1/servers/{server_id}", None, method="DELETE", headers={"if-match": f'"{seen}"'}),
            product.post(f"/v1/servers/{server_id}?etag={seen}", None, method="DELETE"),
        ):
            assert (late.status, reason(late)) == (409, "ETAG_MISMATCH")
        assert product.get(f"/v1/servers/{server_id}").json["role"] == "db"
        current = first.json["etag"]
        assert patch(product, server_id, {"role": "web"}, if_match=f'"{current}"').status == 200
        assert patch(product, server_id, {"role": "x"}, if_match="*").status == 200
        current = product.get(f"/v1/servers/{server_id}").json["etag"]
        assert product.post(f"/v1/servers/{server_id}?etag={current}", None, method="DELETE").status == 200
        refused = product.post(f"/v1/servers/{server_id}:undelete", {"etag": current})
        assert (refused.status, reason(refused)) == (409, "ETAG_MISMATCH")


def test_nobody_but_the_caller_changes_a_record_that_no_sender_reports(product: Launched) -> None:
    with kept(product) as server_id:
        etag = product.get(f"/v1/servers/{server_id}").json["etag"]
        for number in range(30):
            changed = patch(product, server_id, {"role": f"role-{number}", "etag": etag})
            assert changed.status == 200, (number, changed.body)
            etag = changed.json["etag"]


def test_over_grpc_a_lost_race_is_aborted(product: Launched) -> None:
    with kept(product) as server_id, grpc.insecure_channel(product.addresses["gateway"]) as channel:
        stub: Any = fleet_pb2_grpc.FleetServiceStub(channel)
        server = stub.GetServer(fleet_pb2.GetServerRequest(id=server_id)).server
        server.role = "db"
        server.labels["team"] = "shop"
        answer = stub.UpdateServer(fleet_pb2.UpdateServerRequest(server=server))
        assert (answer.server.role, dict(answer.server.labels)) == ("db", {"team": "shop"})
        for call, request in (
            (stub.UpdateServer, fleet_pb2.UpdateServerRequest(server=server)),
            (stub.DeleteServer, fleet_pb2.DeleteServerRequest(id=server_id, etag=server.etag)),
        ):
            with pytest.raises(grpc.RpcError) as lost:
                call(request)
            assert lost.value.code() == grpc.StatusCode.ABORTED


def test_the_record_of_a_server_that_began_to_report_is_heard_of(product: Launched) -> None:
    for _ in range(2):  # the first may be found by what happens once at the start
        server_id = f"sent-{uuid.uuid4().hex[:8]}"
        row = {"serverId": server_id, "time": "now"}
        batch = {"metrics": [{"name": "pulse"}], "rows": [row], "values": [1]}
        assert product.post("/v1/metrics:write", batch).status == 200

        def etag(server_id: str = server_id) -> str:
            return str(product.get(f"/v1/servers/{server_id}").json.get("etag", ""))

        seen = within(20, etag)
        assert patch(product, server_id, {"role": "db", "etag": seen}).status == 200
        assert product.post(f"/v1/servers/{server_id}", None, method="DELETE").status == 200


def test_rows_of_a_deleted_server_change_nothing_of_its_record(product: Launched) -> None:
    with kept(product, hostname="real.example.net", environment="lab") as server_id:
        assert product.post(f"/v1/servers/{server_id}", None, method="DELETE").status == 200
        new = f"{server_id}-new"  # both are told to the record at once, so that this one says when that was
        rows = [{"serverId": one, "time": "now"} for one in (server_id, new)]
        batch = {"metrics": [{"name": "pulse"}], "rows": rows, "values": [1, 1]}
        assert product.post("/v1/metrics:write", batch).json["acceptedPoints"] == 2
        assert within(10, lambda: product.get(f"/v1/servers/{new}").json.get("etag"))
        assert product.get(f"/v1/servers/{new}").json["hostname"] == new
        restored = product.post(f"/v1/servers/{server_id}:undelete", {}).json
        assert (restored["hostname"], restored["environment"]) == ("real.example.net", "lab")
        product.post(f"/v1/servers/{new}", None, method="DELETE")


def test_servers_are_found_by_label_and_when_deleted(product: Launched) -> None:
    mark = uuid.uuid4().hex[:8]
    with (
        kept(product, labels={"mark": mark, "n": "1"}) as first,
        kept(product, labels={"mark": mark, "n": "2"}) as second,
        kept(product, labels={"mark": mark, "n": "3"}) as third,
    ):

        def found(query: str) -> set[str]:
            answer = product.get(f"/v1/servers?{query}").json
            ids = [server["id"] for server in answer["servers"]]
            assert len(ids) == len(set(ids)) == answer["totalSize"]
            return set(ids)

        assert found(f"label=mark:{mark}") == {first, second, third}
        assert found(f"label=mark:{mark}&label=n:2") == {second}
        assert found(f"label=mark:{mark}&label=n") == {first, second, third}
        assert found("label=mark:other") == set()
        for bad in ("label=", "label=:x", "&".join(f"label=k{number}" for number in range(17))):
            refused = product.get(f"/v1/servers?{bad}")
            assert (refused.status, refused.json["details"][1]["fieldViolations"][0]["field"]) == (400, "label")
        product.post(f"/v1/servers/{second}", None, method="DELETE")
        assert found(f"label=mark:{mark}") == {first, third}
        assert found(f"label=mark:{mark}&show_deleted=true") == {first, second, third}
        assert found(f"label=mark:{mark}&show_deleted=true&status=offline") == {first, third}
        listed, token = [], ""
        while True:
            path = f"/v1/servers?label=mark:{mark}&show_deleted=true&page_size=1&page_token={token}"
            page = product.get(path).json
            assert page["totalSize"] == 3
            listed += page["servers"]
            if not (token := page["nextPageToken"]):
                break
        assert [server["id"] for server in listed] == sorted([first, second, third])
        deleted = {server["id"]: server for server in listed}[second]
        assert deleted["deleteTime"]
        assert "deleteTime" not in listed[0] or listed[0]["id"] == second
        restored = product.post(f"/v1/servers/{second}:undelete", {"etag": deleted["etag"]})
        assert (restored.status, restored.json["labels"]) == (200, {"mark": mark, "n": "2"})
        assert found(f"label=mark:{mark}") == {first, second, third}


def test_in_maintenance_a_server_is_counted_apart_until_the_window_ends(product: Launched) -> None:
    with kept(product) as server_id:
        windows = f"/v1/servers/{server_id}/maintenance"

        def counts() -> dict[str, int]:
            summary: dict[str, int] = product.get("/v1/fleet/summary").json
            total = summary.pop("total")
            assert sum(summary.values()) == total
            return summary

        def says() -> tuple[bool, bool]:
            whole = product.get(f"/v1/servers/{server_id}").json
            basic = product.get(f"/v1/servers/{server_id}?view=BASIC").json
            return whole["inMaintenance"], basic["inMaintenance"]

        assert says() == (False, False)
        before = counts()["maintenance"]
        made = product.post(windows, {"endTime": time.time() + 600, "reason": "disk"}).json
        assert says() == (True, True)
        assert counts()["maintenance"] == before + 1
        told = re.compile(r'^openmanager_fleet_servers\w*{.*status="maintenance"} [1-9]', re.MULTILINE)
        within(30, lambda: told.search(product.get("/metrics").body.decode()))
        assert product.get(f"/v1/servers/{server_id}").json["status"] == "SERVER_STATUS_OFFLINE"
        soon = product.post(f"{windows}/{made['id']}", {"endTime": time.time() + 1.0}, method="PATCH")
        assert soon.status == 200
        within(20, lambda: says() == (False, False))  # by itself
        assert counts()["maintenance"] == before
        assert product.get(windows).json["windows"] == []
        assert [window["id"] for window in product.get(f"{windows}?show_ended=true").json["windows"]] == [made["id"]]
        opened = product.post(f"{windows}/{made['id']}", {"endTime": time.time() + 60}, method="PATCH")
        assert (opened.status, opened.json["reason"], says()) == (200, "disk", (True, True))
        assert product.post(f"{windows}/{made['id']}", None, method="DELETE").status == 200
        assert says() == (False, False)
        assert product.get(f"{windows}/{made['id']}").status == 404


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "window.end_time"),
        ({"endTime": "-1h"}, "window.end_time"),
        ({"endTime": "now", "startTime": "-1h"}, "window.end_time"),
        ({"endTime": time.time() + 3_600, "reason": "x" * 1_001}, "window.reason"),
        ({"endTime": time.time() + 3_600, "id": "x"}, "window.id"),
    ],
)
def test_a_window_that_cannot_be_is_refused_by_its_field(product: Launched, body: Any, field: str) -> None:
    with kept(product) as server_id:
        refused = product.post(f"/v1/servers/{server_id}/maintenance", body)
        assert refused.status == 400
        assert refused.json["details"][1]["fieldViolations"][0]["field"] == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"labels": {"a:b": "x"}}, "server.labels"),
        ({"labels": {f"k{number}": "" for number in range(65)}}, "server.labels"),
        ({"notes": "x" * ((64 << 10) + 1)}, "server.notes"),
        ({"notes": "a\0b"}, "server.notes"),
    ],
)
def test_labels_and_notes_that_cannot_be_are_refused_by_their_field(product: Launched, body: Any, field: str) -> None:
    with kept(product) as server_id:
        for refused in (
            product.post("/v1/servers", {"id": "never"} | body),
            patch(product, server_id, body),
        ):
            assert refused.status == 400
            assert refused.json["details"][1]["fieldViolations"][0]["field"] == field


def test_an_export_is_imported_again_and_changes_nothing(product: Launched) -> None:
    notes = 'two\nlines, "quoted"'
    with kept(product, labels={"team": "shop"}, notes=notes) as server_id:
        path = "/v1/servers:export?format=csv"
        within(30, lambda: len(product.get(path).body.splitlines()) > 21)  # the record comes after the live state
        exported = product.get(path)
        types = {name.lower(): value for name, value in exported.headers.items()}
        assert types["content-type"] == "text/csv; charset=utf-8"
        text = exported.body.decode()
        assert text.startswith("id,hostname,environment,role,location,labels,notes\r\n")
        answer = product.post("/v1/servers:import", {"text": text, "format": "csv"}).json
        assert (answer["applied"], answer["failed"], answer["created"], answer["updated"]) == (False, 0, 0, 0)
        assert answer["unchanged"] >= 21
        lines = product.get("/v1/servers:export?format=json_lines")
        assert dict(lines.headers)["content-type"] == "application/x-ndjson"
        objects = {one["id"]: one for one in map(json.loads, lines.body.decode().splitlines())}
        assert (objects[server_id]["labels"], objects[server_id]["notes"]) == ({"team": "shop"}, notes)


def test_an_imported_server_is_seen_soon_and_a_refused_file_changes_nothing(product: Launched) -> None:
    server_id = f"kept-{uuid.uuid4().hex[:8]}"
    rows = [{"id": server_id, "role": "db", "labels": {"n": "1"}}, {"id": "x", "role": "r" * 51}, {"colour": "red"}]
    body = {"text": "\n".join(map(json.dumps, rows)), "format": "json_lines"}
    refused = product.post("/v1/servers:import", body).json
    assert (refused["applied"], refused["failed"]) == (False, 2)
    assert [(row["row"], row["outcome"], row["field"]) for row in refused["rows"]] == [
        (1, "IMPORT_OUTCOME_CREATED", ""),
        (2, "IMPORT_OUTCOME_FAILED", "role"),
        (3, "IMPORT_OUTCOME_FAILED", "colour"),
    ]
    assert product.get(f"/v1/servers/{server_id}").status == 404
    taken = product.post("/v1/servers:import", body | {"partial": True}).json
    assert (taken["applied"], taken["created"]) == (True, 1)
    seen = within(20, lambda: (answer := product.get(f"/v1/servers/{server_id}")).status == 200 and answer.json)
    assert (seen["role"], seen["labels"]) == ("db", {"n": "1"})
    again = {"text": f"id,role\n{server_id},web\n", "format": "csv"}
    assert product.post("/v1/servers:import", again).json["updated"] == 1
    within(20, lambda: product.get(f"/v1/servers/{server_id}").json["role"] == "web")
    assert product.post(f"/v1/servers/{server_id}", None, method="DELETE").status == 200
    gone = product.post("/v1/servers:import", again).json
    assert (gone["applied"], gone["rows"][0]["field"]) == (False, "id")
    nonsense = product.post("/v1/servers:import", {"text": "colour\nred\n"})
    assert (nonsense.status, nonsense.json["details"][1]["fieldViolations"][0]["field"]) == (400, "text")
