"""AI interactions over HTTP and gRPC: what hostile text comes back as, and which field a refusal names."""

import urllib.parse
from typing import Any
from uuid import uuid4

import grpc
import pytest

from openmanager.gateway.v1 import ai_pb2, ai_pb2_grpc
from tests.harness.launched import Launched
from tests.system.test_bad_input import field_of

PATH = "/v1/ai/interactions"
NOT_THERE = "6b0f6d0a-3f0e-4a0c-9a35-0d6a8f0b7c11"
HOSTILE = [
    "'; DROP TABLE ai_interactions; --",
    "' OR '1'='1",
    "$1; SELECT pg_sleep(10)",
    '"}],"role":"admin","x":[{"',
    "\\u0000 is a text, and so is \\' and \\",
    "{{7*7}} ${jndi:ldap://x} <script>alert(1)</script>",
    "\u202e\ufeff\U0001f600 é\r\n\t\u2028",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_kept_as_it_is_and_finds_itself_only(product: Launched, text: str) -> None:
    own = str(uuid4())
    sent = {
        "id": own,
        "sessionId": text,
        "query": text,
        "response": text,
        "model": text,
        "promptHash": text,
        "serverIds": [text],
        "anomalyIds": [text],
        "tags": [text[:64]],
        "correction": text,
        "userRating": 3,
        "ratingComment": text,
    }
    made = product.post(PATH, sent)
    assert made.status == 200, made.body
    for name, value in sent.items():
        assert made.json[name] == value, name
    assert product.get(f"{PATH}/{own}").json == made.json
    for name, value in (("session_id", text), ("model", text), ("tag", text[:64]), ("server_id", text)):
        found = product.get(f"{PATH}?{urllib.parse.urlencode({name: value})}").json
        assert [one["id"] for one in found["interactions"]] == [own], name
    rated = product.post(f"{PATH}/{own}:rate", {"rating": 4, "comment": text})
    assert (rated.json["userRating"], rated.json["ratingComment"]) == (4, text)
    corrected = product.post(f"{PATH}/{own}:correct", {"correction": text + text})
    assert corrected.json["correction"] == text + text
    assert product.get(PATH).status == 200


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (PATH, {"userRating": 6}, "interaction.user_rating"),
        (PATH, {"userRating": 2.5}, "interaction.user_rating"),
        (PATH, {"confidence": 2}, "interaction.confidence"),
        (PATH, {"confidence": "NaN"}, "interaction.confidence"),
        (PATH, {"query": "a\0b"}, "interaction.query"),
        (PATH, {"query": "x" * (1 << 20) + "x"}, "interaction.query"),
        (PATH, {"response": "\ud800"}, "body"),  # no JSON at all
        (PATH, {"sessionId": "s" * 256}, "interaction.session_id"),
        (PATH, {"latency": "-1s"}, "interaction.latency"),
        (PATH, {"tags": ["a", "a"]}, "interaction.tags[1]"),
        (PATH, {"promptTokens": 1 << 40}, "interaction.prompt_tokens"),
        (PATH, {"id": "1"}, "interaction.id"),
        (f"{PATH}/{NOT_THERE}:rate", {"rating": 6}, "rating"),
        (f"{PATH}/{NOT_THERE}:rate", {}, "rating"),
        (f"{PATH}/no-uuid:rate", {"rating": 3}, "id"),
        (f"{PATH}/{NOT_THERE}:rate", {"rating": 3, "comment": "\0"}, "comment"),
        (f"{PATH}/{NOT_THERE}:correct", {}, "correction"),
        (f"{PATH}?min_rating=6", None, "min_rating"),
        (f"{PATH}?max_confidence=2", None, "max_confidence"),
        (f"{PATH}?tag=%00", None, "tag"),
        (f"{PATH}?start_time=now&end_time=-1h", None, "end_time"),
    ],
)
def test_what_cannot_be_is_400_and_named(product: Launched, path: str, body: Any, field: str) -> None:
    answer = product.get(path) if body is None else product.post(path, body)
    assert answer.status == 400, answer.body
    assert answer.json["code"] == 3
    assert field_of(answer.json) == field


def test_the_largest_texts_pass_and_no_wrong_bytes(product: Launched) -> None:
    made = product.post(PATH, {"query": "q" * (1 << 20), "response": "é" * (1 << 19)})
    assert (made.status, len(made.json["query"]), len(made.json["response"])) == (200, 1 << 20, 1 << 19)
    with grpc.insecure_channel(product.addresses["gateway"]) as channel:
        raw = channel.unary_unary("/openmanager.gateway.v1.AiInteractionService/RecordInteraction")
        for bad in (b"\x0a\x05\x1a\x03a\xff\xfe", b"\x0a\x02\x1a\xff", b"\xff" * 20):
            with pytest.raises(grpc.RpcError) as refused:
                raw(bad, timeout=10)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("path", [f"{PATH}/{NOT_THERE}:rate", f"{PATH}/{NOT_THERE}:correct", f"{PATH}/{NOT_THERE}"])
def test_what_is_not_there_is_404_and_named(product: Launched, path: str) -> None:
    body = {"rating": 3} if path.endswith("rate") else {"correction": "so"}
    answer = product.post(path, body) if ":" in path else product.get(path)
    assert (answer.status, field_of(answer.json)) == (404, "id")


def test_a_time_that_only_protobuf_can_say_is_refused(product: Launched) -> None:
    request: Any = ai_pb2.ListInteractionsRequest()
    request.start_time.seconds = 1 << 60
    with grpc.insecure_channel(product.addresses["gateway"]) as channel, pytest.raises(grpc.RpcError) as caught:
        ai_pb2_grpc.AiInteractionServiceStub(channel).ListInteractions(request, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "start_time" in caught.value.details()


def test_the_last_hour_is_listed_page_by_page(product: Launched) -> None:
    session = str(uuid4())
    made = [product.post(PATH, {"sessionId": session, "query": f"disk {n}"}).json["id"] for n in range(5)]
    for path in (f"{PATH}?session_id={session}", f"{PATH}:search?query=disk&session_id={session}"):
        asked, seen, token = f"{path}&start_time=-1h&end_time=now&page_size=2", [], ""
        while True:
            answer = product.get(f"{asked}&page_token={token}")
            assert answer.status == 200, answer.body
            seen += [one["id"] for one in answer.json["interactions"]]
            if not (token := answer.json["nextPageToken"]):
                break
        assert seen == made[::-1]
