"""Every curl and grpcurl command of the pages works on a running product, and answers what its page says it answers."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.api import annotations_pb2
from google.protobuf import json_format
from google.protobuf.message_factory import GetMessageClass

from openmanager.gateway.v1 import options_pb2
from tests.docs.examples import ROOT, Call, call_of, console_blocks, examples, names, pages, run
from tests.harness.commands import require_command
from tests.harness.findings import DOCUMENTED, tell
from tests.harness.launched import Launched, within

# Pages whose examples another test runs: on a product with TLS and a token (tests/deploy/test_page.py).
ELSEWHERE = {ROOT / "docs" / "deployment.md"}
EXAMPLES = [
    (command, answer)
    for page in pages()
    if page not in ELSEWHERE
    for command, answer in examples(page)
    if command.startswith(("curl", "grpcurl"))
]
JSON = {"content-type": "application/json"}
EXPORTED = "0b9f4c1e-2d3a-4f5b-8c7d-9e0f1a2b3c4d"


@pytest.fixture
def prepared(product: Launched, command: str) -> Iterator[Call | None]:
    """The call of an example, with what it is about in the state that it needs; afterwards all is as it was before."""
    call = call_of(command)
    method = call.method.name if call is not None else ""
    server = f"/v1/servers/{call.subject}" if call is not None else ""
    if method in {"UpdateServer", "DeleteServer", "UndeleteServer"}:
        product.post("/v1/servers", {"id": server.rpartition("/")[2]})
        product.post(f"{server}:undelete", {})
    if method == "UndeleteServer":
        assert product.post(server, None, method="DELETE").status == 200
    if "MaintenanceWindow" in method:
        _in_maintenance(product, command, is_there=method.startswith(("Get", "Update", "Delete")))
    if method in {"GetInteraction", "RateInteraction", "CorrectInteraction"}:
        assert call is not None
        assert product.post("/v1/ai/interactions", {"id": call.subject, "query": "?", "response": "!"}).status == 200
    if method in {"GetAnomaly", "AcknowledgeAnomaly", "FeedbackAnomaly"}:
        assert call is not None and call.subject == DOCUMENTED.id
        tell(product, DOCUMENTED)
    if method in {"UpdateUser", "DeleteUser", "SetPassword"}:
        assert call is not None
        product.post("/v1/users", {"user": {"name": call.subject, "role": "ROLE_VIEWER"}})
    if method == "LogIn":
        user = {"name": "grace", "role": "ROLE_VIEWER"}
        assert product.post("/v1/users", {"user": user, "password": "something long"}).status == 200
    if method in {"RotateToken", "RevokeToken"}:
        assert call is not None
        product.post("/v1/tokens", {"id": call.subject, "name": "an example", "role": "ROLE_VIEWER"})
    if method == "ExportInteractions":
        learned = {"id": EXPORTED, "sessionId": "s-export", "userRating": 5, "confidence": 0.9}
        learned |= {"query": "who is logged in?", "response": "ann@example.com from 192.0.2.7"}
        assert product.post("/v1/ai/interactions", learned).status == 200
    if method == "ExportAuditLog":  # of an empty log there is nothing to export
        product.post("/v1/simulator:start", {})
        within(60, lambda: product.get("/v1/audit").json.get("events"))
    yield call
    if method in {"CreateUser", "UpdateUser", "SetPassword", "LogIn"}:
        assert call is not None
        assert product.post(f"/v1/users/{call.subject}", None, method="DELETE").status == 200
    if method in {"CreateServer", "UpdateServer", "UndeleteServer"}:
        assert product.post(server, None, method="DELETE").status == 200
    if "MaintenanceWindow" in method:
        (server_id,) = set(re.findall(r"example-\d", command))
        assert product.post(f"/v1/servers/{server_id}", None, method="DELETE").status == 200
    if method == "WriteMetrics":
        for written in re.findall(r'"serverId": "([^"]+)"', command):
            within(
                60, lambda written=written: product.post(f"/v1/servers/{written}", None, method="DELETE").status == 200
            )
    if method == "StopSimulator":
        assert product.post("/v1/simulator:start", {}).status == 200


def _in_maintenance(product: Launched, command: str, *, is_there: bool) -> None:
    """The server of an example, and the window that the example names."""
    (server_id,) = set(re.findall(r"example-\d", command))
    product.post("/v1/servers", {"id": server_id})
    product.post(f"/v1/servers/{server_id}:undelete", {})
    windows = f"/v1/servers/{server_id}/maintenance"
    for window in set(re.findall(r"[0-9a-f]{8}-[0-9a-f-]{27}", command)):
        product.post(f"{windows}/{window}", None, method="DELETE")
        if is_there:
            assert product.post(windows, {"id": window, "endTime": time.time() + 3_600}).status == 200


@pytest.mark.parametrize(("command", "answer"), EXAMPLES, ids=lambda text: text.split("\n")[0][:100])
def test_an_example_works(product: Launched, prepared: Call | None, command: str, answer: str) -> None:
    require_command(command.split(maxsplit=1)[0])
    said = run(product, command, prepared)
    assert names(answer) <= names(said), said
    if names(answer) and not re.search(r"\.\.\.|\[\]", answer):  # neither shortened, nor of what may be there or not
        assert names(answer) == names(said), said
    if answer and not names(answer):
        assert said.strip() == answer.strip()
    assert not said.startswith(('{"code":', '{"error":'))
    if prepared is None or "|" in command or "-w" in command:
        return
    if not prepared.is_endless and not (prepared.is_file and prepared.by == "curl"):
        assert as_message(prepared, said) is not None


def as_message(call: Call, said: str) -> Any:
    """The first message of an answer; fails when it is none of the call's type."""
    kind = call.method.output_type
    text = said
    if call.by == "grpcurl" and call.method.server_streaming:
        text = json.dumps(json.JSONDecoder().raw_decode(said)[0])
    if call.by == "curl":
        if call.method.GetOptions().Extensions[options_pb2.http_stream_format] == options_pb2.HTTP_STREAM_FORMAT_TEXT:
            return said
        if call.method.server_streaming:
            text = said.splitlines()[0]
        bare = call_field(call)
        if bare:
            text = f'{{"{bare}": {said}}}'
    return json_format.Parse(text, GetMessageClass(kind)())


def call_field(call: Call) -> str:
    """The field of the answer that HTTP shows bare."""
    return str(call.method.GetOptions().Extensions[annotations_pb2.http].response_body)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_an_example(page: Path) -> None:
    """In other blocks, or without `$`, it would be run by no test."""
    text = page.read_text()
    for block in console_blocks(text):
        text = text.replace(block, "")
    loose = re.findall(r"^\s*(?:\$ )?((?:curl|grpcurl) .*)", text, re.MULTILINE)
    assert [command for command in loose if not re.match(r"[a-z]+ (?:and|or|is|has|needs)\b", command)] == []


def test_there_are_examples_of_both_kinds() -> None:
    assert sum(command.startswith("curl") for command, _ in EXAMPLES) >= 25
    assert sum(command.startswith("grpcurl") for command, _ in EXAMPLES) >= 25
