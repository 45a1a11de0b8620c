"""The running gateway serves what the contract test (tests/gateway/test_contract.py) has walked."""

import time

import pytest

from gateway.http.headers import has_entity_tag
from tests.docs.examples import Call, call_of, examples
from tests.gateway.http.serving import SERVICES
from tests.gateway.http.test_openapi import DOCUMENT
from tests.gateway.test_contract import API
from tests.harness.findings import DOCUMENTED, tell
from tests.harness.launched import Launched

READS = {
    call.path: call
    for command, _ in examples(API)
    if (call := call_of(command)) is not None and call.verb == "GET" and not call.is_endless
}

NEEDED = {":search": "?query=disk"} | dict.fromkeys(
    ("/history", "/trend", "/capacity", "/forecast"), "?metric=cpu_usage"
)
"""What a call must be asked for; by the end of its path."""


def test_its_document_is_that_of_all_public_services(product: Launched) -> None:
    served = product.get("/openapi.json").json
    assert {**served, "tags": {}} == {**DOCUMENT, "tags": {}}
    assert sorted(tag["name"] for tag in served["tags"]) == sorted(SERVICES)


@pytest.mark.parametrize("call", READS.values(), ids=READS)
def test_an_answer_has_an_entity_tag_where_the_method_says_so(product: Launched, call: Call) -> None:
    path = call.path + next((needed for end, needed in NEEDED.items() if call.path.endswith(end)), "")
    if call.name.endswith("/GetInteraction"):
        product.post("/v1/ai/interactions", {"id": call.subject, "query": "?", "response": "!"})
    if call.name.endswith("/GetAnomaly"):
        tell(product, DOCUMENTED)
    if call.name.endswith("/GetMaintenanceWindow"):
        windows, _, window = path.rpartition("/")
        product.post("/v1/servers", {"id": windows.split("/")[3]})
        product.post(f"/v1/servers/{windows.split('/')[3]}:undelete", {})
        product.post(windows, {"id": window, "endTime": time.time() + 3_600})
    answer = product.get(path)
    assert (answer.status, "etag" in answer.headers) == (200, has_entity_tag(call.method))
    again = product.get(path, headers={"if-none-match": answer.headers.get("etag", 'W/"x"')})
    assert again.status in ({200, 304} if has_entity_tag(call.method) else {200})
