"""The short way answers as the long way does, and leaves to it what it is not made for."""

import itertools
import re
from typing import Any

import pytest

from gateway.access.callers import Callers, exchange_authenticator
from gateway.access.policy import Policy
from gateway.admission import Admission
from gateway.http import shortcut
from gateway.http.app import Health, HttpApp, create_app
from gateway.http.guard import Guard
from openmanager.gateway.v1 import fleet_pb2
from runtime import durations, telemetry
from runtime.clock import SystemClock
from runtime.handlers import bind
from runtime.interception import Interception
from runtime.prepared import Prepared
from tests.gateway.http.serving import shared_server

TOKEN = "a-token"
RPC = "/openmanager.gateway.v1.FleetService/GetServer"
AUTHORIZATIONS = (b"Bearer a-token", b"bearer a-token", b"Bearer another", b"Basic a-token", None)
ENCODINGS = (None, b"gzip", b"br, gzip;q=0.5", b"gzip;q=0", b"identity")
OTHERS: tuple[tuple[bytes, bytes] | None, ...] = (
    None,
    (b"if-none-match", b'W/"e-1"'),
    (b"if-none-match", b'"other"'),
    (b"request-timeout", b"5s"),
    (b"request-timeout", b"soon"),
    (b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"),
    (b"content-length", b"0"),
    (b"x-forwarded-for", b"203.0.113.7"),
    (b"origin", b"https://evil.example"),
)
TARGETS = (
    ("GET", "/v1/servers/shared", b""),
    ("HEAD", "/v1/servers/shared", b""),
    ("POST", "/v1/servers/shared", b""),
    ("GET", "/v1/servers/shared", b"view=SERVER_VIEW_FULL"),
    ("GET", "/v1/servers/shared", b"nothing=1"),
    ("GET", "/v1/servers/sh%61red", b""),
    ("GET", "/v1/servers/unknown", b""),
    ("GET", "/v1/servers/%FF", b""),
    ("GET", "/v1/nothing", b""),
    ("GET", "/healthz", b""),
)
_IDS = re.compile(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-3]")


class Servicer:
    """Has one server; counts who asked in which way."""

    def __init__(self) -> None:
        self.held: Prepared | None = shared_server("e-1")
        self.at_once = self.waited = 0

    async def GetServer(self, request: fleet_pb2.GetServerRequest, _context: object) -> Prepared:
        self.waited += 1
        return shared_server("e-1") if request.id == "shared" else Prepared(b"")


class Quick(Servicer):
    """Has it in memory."""

    def GetServer_at_once(self, request: fleet_pb2.GetServerRequest, _who: Any) -> Prepared | None:
        self.at_once += 1
        return self.held if request.id == "shared" else None


def app_of(servicer: Servicer, *, token: str | None = TOKEN, rate: float = 0.0) -> HttpApp:
    clock = SystemClock()
    services = [bind(fleet_pb2.DESCRIPTOR.services_by_name["FleetService"], servicer)]
    callers, policy = Callers(token, None), Policy(services)
    return create_app(
        services,
        interception=Interception(exchange_authenticator(callers, policy)),
        guard=Guard(callers),
        policy=policy,
        health=lambda: Health(ready=True),
        metrics=lambda: b"",
        clock=clock,
        admission=Admission(clock, rate=rate),
    )


async def ask(app: HttpApp, target: tuple[str, str, bytes], headers: list[tuple[bytes, bytes]]) -> list[dict[str, Any]]:
    verb, path, query = target
    scope = {
        "type": "http",
        "method": verb,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "scheme": "http",
        "client": ("127.0.0.1", 4711),
        "headers": [(b"host", b"127.0.0.1:8080"), *headers],
    }
    events: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(event: Any) -> None:
        events.append(event)

    at_once = app.at_once(scope)  # as gateway.http.dispatch does
    if at_once is not None:
        return [*at_once]
    await app(scope, receive, send)
    return events


def comparable(events: list[dict[str, Any]]) -> list[Any]:
    start, *rest = events
    return [start["status"], sorted((name, _IDS.sub(b"ids", value)) for name, value in start["headers"]), *rest]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target[0]} {target[1]} {target[2].decode()}")
async def test_every_request_is_answered_as_on_the_long_way(target: tuple[str, str, bytes]) -> None:
    quick, slow = Quick(), Servicer()
    short, long = app_of(quick), app_of(slow)
    await ask(short, TARGETS[0], [(b"authorization", b"Bearer a-token")])  # whose JSON is made on the long way
    for authorization, encoding, other in itertools.product(AUTHORIZATIONS, ENCODINGS, OTHERS):
        given = [] if authorization is None else [(b"authorization", authorization)]
        given += [] if encoding is None else [(b"accept-encoding", encoding)]
        given += [] if other is None else [other]
        assert comparable(await ask(short, target, given)) == comparable(await ask(long, target, given)), given


async def test_the_short_way_is_taken_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "metrics_enabled", lambda: True)
    servicer = Quick()
    app = app_of(servicer)
    authorized = [(b"authorization", b"Bearer a-token")]
    await ask(app, TARGETS[0], authorized)
    taken: list[object] = []
    answer = shortcut.Shortcut.answer

    def watched(self: shortcut.Shortcut, scope: Any) -> Any:
        taken.append(found := answer(self, scope))
        return found

    monkeypatch.setattr(shortcut.Shortcut, "answer", watched)
    before = counted()
    await ask(app, TARGETS[0], authorized)
    assert taken[-1] is not None and counted() == before + 1
    for target, headers in ((TARGETS[0], []), (TARGETS[6], authorized), (TARGETS[0], [*authorized, OTHERS[1]])):
        await ask(app, target, headers)
        assert taken[-1] is None
    servicer.held = shared_server("e-2")  # the next version: its JSON is not made yet
    events = await ask(app, TARGETS[0], authorized)
    assert taken[-1] is None and (b"etag", b'W/"e-2"') in events[0]["headers"]
    servicer.held = None
    await ask(app, TARGETS[0], authorized)
    assert taken[-1] is None and servicer.waited == 2


async def test_a_rate_is_spent_once_a_request() -> None:
    app = app_of(Quick(), rate=1.0)
    headers = [(b"authorization", b"Bearer a-token")]
    statuses = [(await ask(app, TARGETS[0], headers))[0]["status"] for _ in range(4)]
    assert statuses == [200, 200, 429, 429]


async def test_without_a_token_the_rules_for_local_callers_hold() -> None:
    app = app_of(Quick(), token=None)
    assert (await ask(app, TARGETS[0], []))[0]["status"] == 200
    assert (await ask(app, TARGETS[0], []))[0]["status"] == 200
    for header in OTHERS[-2:]:
        assert header is not None
        assert (await ask(app, TARGETS[0], [header]))[0]["status"] == 403


def counted() -> int:
    return sum(sum(series.counts) for attributes, series in durations.found() if attributes["rpc.method"] == RPC[1:])
