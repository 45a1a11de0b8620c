"""Who is let in over HTTP: each rule of the local administrator refuses by itself, and the token opens everything."""

from typing import Any

import pytest

from gateway.access.callers import Callers
from gateway.access.table import AccessTable
from gateway.http.app import Health
from gateway.http.guard import Guard
from runtime.channel import Channel
from runtime.clock import ManualClock
from runtime.errors import OpenManagerError
from tests.gateway.http.serving import serving

TOKEN = "a-token-of-some-length"


def scope(
    verb: str = "GET", client: Any = ("127.0.0.1", "4711"), path: str = "/v1/servers", **headers: str
) -> dict[str, Any]:
    """A request that is let in, but for what is given. An empty header is left out."""
    given = {"host": "localhost:8080"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return {
        "method": verb,
        "path": path,
        "scheme": "http",
        "client": client,
        "headers": [(name.encode(), value.encode()) for name, value in given.items() if value],
    }


def refusal(guard: Guard, asked: dict[str, Any]) -> str:
    """The reason of the refusal, "" when the request is let in."""
    try:
        guard.admit(asked)
    except OpenManagerError as error:
        return error.reason
    return ""


@pytest.mark.parametrize(
    "asked",
    [
        scope(),
        scope(host="127.0.0.1:8080"),
        scope(host="[::1]:8080"),
        scope(host="LOCALHOST"),
        scope(client=("::1", "1")),
        scope(client=("127.8.9.1", "1")),
        scope(client=("::ffff:127.0.0.1", "1")),
        scope(origin="http://localhost:8080"),
        scope("POST", content_type="application/json"),
        scope("PATCH", content_type='application/json; charset="UTF-8"'),
        scope("DELETE"),
    ],
)
def test_the_local_administrator_is_let_in(asked: dict[str, Any]) -> None:
    assert refusal(Guard(Callers(None, None)), asked) == ""


async def test_an_old_cookie_does_not_shut_the_local_administrator_out_while_metadata_is_away() -> None:
    asked = scope(cookie="openmanager-session=of-an-earlier-time")
    async with Channel("127.0.0.1:1") as away:
        table = AccessTable(away, ManualClock())
        assert refusal(Guard(Callers(None, table)), asked) == ""
        assert refusal(Guard(Callers(None, table, accounts=True)), asked) == "ACCESS_UNKNOWN"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (scope(client=("10.0.0.1", "1")), "PEER_NOT_LOCAL"),
        (scope(client=("::ffff:10.0.0.1", "1")), "PEER_NOT_LOCAL"),
        (scope(client=None), "PEER_NOT_LOCAL"),
        (scope(client=("somewhere", "1")), "PEER_NOT_LOCAL"),
        (scope(host="evil.example"), "HOST_NOT_LOCAL"),
        (scope(host="localhost.evil.example"), "HOST_NOT_LOCAL"),
        (scope(host="localhost:8080@evil.example"), "HOST_NOT_LOCAL"),
        (scope(host="127.0.0.2"), "HOST_NOT_LOCAL"),
        (scope(host=""), "HOST_NOT_LOCAL"),
        (scope(origin="http://evil.example"), "ORIGIN_FOREIGN"),
        (scope(origin="null"), "ORIGIN_FOREIGN"),
        (scope(origin="https://localhost:8080"), "ORIGIN_FOREIGN"),
        (scope(origin="http://localhost:3000"), "ORIGIN_FOREIGN"),
        (scope(forwarded="for=1.2.3.4"), "PROXIED"),
        (scope(x_forwarded_for="1.2.3.4"), "PROXIED"),
        (scope(x_forwarded_host="localhost"), "PROXIED"),
        (scope("POST"), "CONTENT_TYPE_NOT_JSON"),
        (scope("POST", content_type="text/plain"), "CONTENT_TYPE_NOT_JSON"),
        (scope("PUT", content_type="application/jsonx"), "CONTENT_TYPE_NOT_JSON"),
        (scope("PATCH", content_type="application/json; charset=latin1"), "CONTENT_TYPE_NOT_JSON"),
        (scope("DELETE", content_type="text/plain"), "CONTENT_TYPE_NOT_JSON"),
    ],
)
def test_each_rule_refuses_by_itself(asked: dict[str, Any], reason: str) -> None:
    assert refusal(Guard(Callers(None, None)), asked) == reason


def test_two_hosts_are_refused() -> None:
    asked = scope()
    asked["headers"].append((b"host", b"localhost:8080"))
    assert refusal(Guard(Callers(None, None)), asked) == "HOST_NOT_LOCAL"


@pytest.mark.parametrize(
    ("authorization", "reason"),
    [
        (f"Bearer {TOKEN}", ""),
        (f"bearer {TOKEN}", ""),
        ("", "TOKEN_REQUIRED"),
        ("Bearer", "TOKEN_INVALID"),
        ("Bearer wrong", "TOKEN_INVALID"),
        (f"Basic {TOKEN}", "TOKEN_INVALID"),
        (f"Bearer {TOKEN}x", "TOKEN_INVALID"),
        ("Bearer ümlaut", "TOKEN_INVALID"),
    ],
)
def test_with_a_token_only_the_token_counts(authorization: str, reason: str) -> None:
    asked = scope(
        client=("10.0.0.1", "1"), host="gateway.example", authorization=authorization, x_forwarded_for="1.2.3.4"
    )
    assert refusal(Guard(Callers(TOKEN, None)), asked) == reason
    assert refusal(Guard(Callers(TOKEN, None)), scope(authorization=authorization)) == reason


async def test_refusals_are_a_status_and_reach_no_method() -> None:
    async with serving() as served:
        foreign = await served.get("/v1/servers", origin="http://evil.example")
        proxied = await served.get("/metrics", forwarded="for=1.2.3.4")
        assert served.servicer.requests == []
    assert (foreign.status, foreign.json()["code"], foreign.reason()) == (403, 7, "ORIGIN_FOREIGN")
    assert (proxied.status, proxied.reason()) == (403, "PROXIED")


async def test_a_token_is_asked_for_everywhere_but_health() -> None:
    async with serving(token=TOKEN, health=Health(ready=False, reasons=("cache is away",))) as served:
        for path in ("/v1/servers", "/metrics", "/openapi.json", "/docs", "/nothing"):
            without = await served.get(path)
            assert (without.status, without.headers["www-authenticate"]) == (401, 'Bearer realm="openmanager"')
            assert (await served.get(path, authorization=f"Bearer {TOKEN}")).status == (
                404 if path == "/nothing" else 200
            )
        assert served.servicer.contexts[-1].caller.name == "token-holder"
        assert (await served.get("/healthz", host="gateway.example")).json() == {"status": "ok"}
        assert (await served.get("/readyz")).json() == {"ready": False}
        told = await served.get("/readyz", authorization=f"Bearer {TOKEN}")
        assert told.json()["reasons"] == ["cache is away"]
        assert (await served.call("POST", "/v1/servers", {}, {"authorization": "Bearer x"})).status == 401


async def test_a_request_without_a_host_is_refused() -> None:
    async with serving() as served:
        reader, writer = await served.open()
        writer.write(b"GET /v1/servers HTTP/1.0\r\n\r\n")
        assert b" 403 " in await reader.readline()
        writer.close()
