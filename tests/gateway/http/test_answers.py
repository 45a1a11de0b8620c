"""Whole answers: entity tags, what the caller has already, gzip, and what is made once for all."""

import gzip
from typing import Any

import orjson
import pytest

from gateway.http import answer as module
from gateway.http.compression import accepts_gzip
from runtime.prepared import Prepared
from tests.gateway.http.serving import METRICS, serving, shared_server

SHARED = "/v1/servers/shared"


async def test_a_shared_answer_has_a_tag_and_is_not_sent_to_who_has_it() -> None:
    async with serving() as served:
        first = await served.get(SHARED)
        assert first.headers["etag"] == 'W/"e-1"' and first.headers["age"] == "3"
        assert len(first.json()["metrics"]) == METRICS
        for known in ('W/"e-1"', '"e-1"', '"other", W/"e-1"', "*"):
            again = await served.get(SHARED, if_none_match=known)
            assert (again.status, again.body, again.headers["etag"]) == (304, b"", 'W/"e-1"'), known
            assert "content-length" not in again.headers
        for other in ('"e-2"', "e", 'W/"e-11"', ""):
            assert (await served.get(SHARED, if_none_match=other)).status == 200
        served.servicer.shared = shared_server("e-2")
        assert (await served.get(SHARED, if_none_match='W/"e-1"')).headers["etag"] == 'W/"e-2"'
        plain = await served.get("/v1/servers/other", if_none_match="*")
        assert plain.status == 200 and "etag" not in plain.headers


async def test_json_and_gzip_of_a_shared_answer_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[bytes] = []
    compress = module.compress

    def counted(body: bytes) -> bytes:
        packed.append(body)
        return compress(body)

    monkeypatch.setattr(module, "compress", counted)
    async with serving() as served:
        plain = await served.get(SHARED)
        shared: Prepared = served.servicer.shared
        (json,) = shared.forms.values()
        for _ in range(3):
            answer = await served.get(SHARED, accept_encoding="gzip, br")
            assert answer.headers["content-encoding"] == "gzip" and answer.headers["etag"] == plain.headers["etag"]
            assert len(answer.body) == int(answer.headers["content-length"]) < len(plain.body) / 2
            assert gzip.decompress(answer.body) == plain.body == json
        assert len(packed) == 1 and len(shared.forms) == 2


async def test_only_what_is_large_is_packed_and_only_for_who_can_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as served:
        small = await served.get("/v1/fleet/summary", accept_encoding="gzip")
        assert "content-encoding" not in small.headers and small.headers["vary"] == "accept-encoding"
        large = await served.get("/v1/servers/other", accept_encoding="identity")
        assert "content-encoding" not in large.headers
        monkeypatch.setattr(module, "IN_THREAD_BYTES", 1_000)
        in_thread = await served.get("/v1/servers/other", accept_encoding="gzip")
        assert orjson.loads(gzip.decompress(in_thread.body)) == large.json()
        head = await served.call("HEAD", SHARED, headers={"accept-encoding": "gzip"})
        body = await served.get(SHARED, accept_encoding="gzip")
        assert head.headers["content-length"] == body.headers["content-length"]


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        (None, False),
        ("", False),
        ("gzip", True),
        ("GZip;q=0.5", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("br, *", True),
        ("*;q=0", False),
        ("gzip;q=0, *", False),
        ("identity, deflate", False),
        ("gzip;q=1.0,br", True),
    ],
)
def test_who_wants_gzip(header: Any, accepted: bool) -> None:
    assert accepts_gzip(header) == accepted
