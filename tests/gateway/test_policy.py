"""Every call x everybody who may try it, over gRPC and HTTP alike: who is let through and who is not, and why."""

import asyncio
import hashlib
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813

from fleet.access import ADMIN, AGENT, OPERATOR, VIEWER, Caller, Scope, includes
from gateway.access import table as module
from gateway.access.callers import ANYBODY, Callers, exchange_authenticator, grpc_authenticator
from gateway.access.policy import Policy, Rule
from gateway.access.sessions import Cookie, csrf_of
from gateway.access.table import SESSION, AccessTable
from gateway.admission import Admission
from gateway.http.app import Health, HttpApp, create_app
from gateway.http.guard import Guard
from gateway.http.routes import Route
from openmanager.gateway.v1 import options_pb2
from runtime.channel import Channel
from runtime.clock import SystemClock
from runtime.errors import FailedPrecondition, PermissionDenied, carried_error
from runtime.handlers import Bound, bind
from runtime.interception import Interception
from runtime.server import GrpcServer
from tests.gateway.http.serving import PACKAGE, SERVICES, FakeServicer, bound_services
from tests.harness import eventually

ROLES = {"viewer": VIEWER, "agent": AGENT, "operator": OPERATOR, "admin": ADMIN}
SOME = Scope.of((), (), ("web-01",))
CALLERS = {f"{name}{'' if scope is None else ' of some'}": Caller.of(name, role, "token", scope=scope)
           for name, role in ROLES.items() for scope in (None, SOME)}  # fmt: skip
OUTSIDERS = {
    "nobody": ("", "TOKEN_REQUIRED"),
    "unknown": ("om_unknown", "TOKEN_INVALID"),
    "expired": ("om_expired", "TOKEN_EXPIRED"),
    "a session's secret": ("om-session_admin", "TOKEN_INVALID"),
}
REACHED = "REACHED"
# What the issue of roles says, in one place, and not by the options: who may change what.
WRITERS = {"WriteMetrics": {"operator", "admin", "agent"}, "GetCaller": {"viewer", "operator", "admin", "agent"}}
READING = ("Get", "List", "Query", "Watch", "Search", "Export", "Verify", "Find", "Forecast")
ADMINISTRATION = {"FleetService", "AccessService", "AuditService"}


def methods() -> Iterator[Any]:
    for name in SERVICES:
        yield from default_pool().FindServiceByName(f"{PACKAGE}.{name}").methods


def hash_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def path_of(method: Any) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


@pytest_asyncio.fixture
async def table() -> AsyncIterator[AccessTable]:
    """Knows each of CALLERS by a secret that is its name, and one whose token is over."""
    channel = Channel("127.0.0.1:1")
    found = AccessTable(channel, SystemClock())
    found._callers = {hash_of(secret_of(name)): (caller, math.inf) for name, caller in CALLERS.items()}
    found._callers[hash_of("om_expired")] = (CALLERS["admin"], 1_000)
    found._callers |= {hash_of(session_of(name)): (as_session(caller), math.inf) for name, caller in CALLERS.items()}
    found._callers[hash_of("om-session_over")] = (as_session(CALLERS["admin"]), 1_000)
    yield found
    await channel.close()


def test_every_call_says_who_may() -> None:
    for method in methods():
        options = method.GetOptions().Extensions
        assert bool(options[options_pb2.required_role]) != options[options_pb2.open_to_all], method.full_name
        if method.name.startswith(READING) and method.containing_service.name not in {"AccessService", "AuditService"}:
            assert options[options_pb2.required_role] == options_pb2.ROLE_VIEWER, method.full_name
        elif not options[options_pb2.open_to_all] and method.name not in WRITERS:
            assert options[options_pb2.required_role] >= options_pb2.ROLE_OPERATOR, method.full_name
            if method.containing_service.name in ADMINISTRATION:
                assert options[options_pb2.required_role] == options_pb2.ROLE_ADMIN, method.full_name
        assert options[options_pb2.agents_may] == (method.name in {"WriteMetrics", "GetCaller"}), method.full_name


def test_a_call_that_says_nothing_is_for_nobody() -> None:
    policy = Policy([])
    assert policy.rule("/any/Thing") == Rule()
    for caller in (*CALLERS.values(), ANYBODY):
        with pytest.raises(PermissionDenied):
            policy.check("/any/Thing", caller)


def test_who_may_is_what_the_roles_mean() -> None:
    policy = Policy(bound_services(FakeServicer()))
    for method in methods():
        allowed = {name for name, caller in CALLERS.items() if _passes(policy, path_of(method), caller)}
        if method.name in WRITERS:
            assert {name for name in allowed if " " not in name} == WRITERS[method.name]
        elif not policy.rule(path_of(method)).open_to_all:
            assert "agent" not in allowed and "agent of some" not in allowed and "admin" in allowed


def _passes(policy: Policy, path: str, caller: Caller) -> bool:
    try:
        policy.check(path, caller)
    except PermissionDenied:
        return False
    return True


async def test_over_grpc_every_call_is_refused_to_who_may_not(table: AccessTable) -> None:
    services = reached_services()
    authenticator = grpc_authenticator(Callers(None, table, accounts=True), Policy(services), Admission(SystemClock()))
    server = GrpcServer(services, Interception(authenticator))
    address = await server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(address) as channel:

        async def ask(method: Any, secret: str) -> str:
            kind = (
                f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
            )
            metadata = (("authorization", f"Bearer {secret}"),) if secret else ()
            make = getattr(channel, kind)(path_of(method))
            call = make(iter([b""]) if method.client_streaming else b"", metadata=metadata, timeout=20)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call.read() if method.server_streaming else call)
            error = carried_error(caught.value)
            return "" if error is None else error.reason

        for method in methods():
            for name, wanted in expected(method).items():
                assert await ask(method, secret_of(name)) == wanted, (method.full_name, name)
    await server.stop(0)


async def test_over_http_every_call_is_refused_to_who_may_not(table: AccessTable) -> None:
    app = http_app(table)
    for route in app.bridge.table.routes:
        for name, wanted in expected(route.method).items():
            secret = secret_of(name)
            answer = await ask_route(app, route, {"authorization": f"Bearer {secret}"} if secret else {})
            assert f'"{wanted}"' in answer, (route.template, name, answer)


async def test_over_http_a_cookie_does_what_its_person_may_and_no_page_but_ours_can_use_it(table: AccessTable) -> None:
    app = http_app(table)
    for route in app.bridge.table.routes:
        if route.method.GetOptions().Extensions[options_pb2.open_to_all]:
            elsewhere = {"sec-fetch-site": "cross-site"}
            for headers, wanted in ((cookie_of("admin"), REACHED), (elsewhere, "ORIGIN_FOREIGN")):
                assert f'"{wanted}"' in await ask_route(app, route, headers), (route.template, headers)
            continue
        for name in CALLERS:
            wanted = expected(route.method)[name]
            answer = await ask_route(app, route, cookie_of(name) | csrf_token_of(name))
            assert f'"{wanted}"' in answer, (route.template, name, answer)
            for site in ("cross-site", "same-site"):
                answer = await ask_route(app, route, cookie_of(name) | csrf_token_of(name) | {"sec-fetch-site": site})
                assert '"ORIGIN_FOREIGN"' in answer, (route.template, name, answer)
            for shown in ({}, csrf_token_of("viewer" if name != "viewer" else "admin")):  # none, another person's
                answer = await ask_route(app, route, cookie_of(name) | shown)
                told = wanted if route.verb == "GET" else "CSRF_TOKEN_INVALID"
                assert f'"{told}"' in answer, (route.template, name, answer)
        outside = {
            "a token's secret": {"cookie": f"openmanager-session={secret_of('admin')}"},
            "over": {"cookie": "openmanager-session=om-session_over"},
            "unknown": {"cookie": "openmanager-session=om-session_unknown"},
        }
        for who, headers in outside.items():
            answer = await ask_route(app, route, headers | csrf_token_of("admin"))
            assert '"SESSION_ENDED"' in answer, (route.template, who, answer)
        twice = {"cookie": f"{cookie_of('admin')['cookie']}; {cookie_of('viewer')['cookie']}"}
        for nothing in ({"cookie": "theme=dark; openmanager-session2=x"}, twice):
            assert '"TOKEN_REQUIRED"' in await ask_route(app, route, nothing), (route.template, nothing)
        both = cookie_of("admin") | csrf_token_of("admin") | {"authorization": "Bearer om_unknown"}
        assert '"TOKEN_INVALID"' in await ask_route(app, route, both), route.template


async def test_over_tls_only_the_cookie_that_demands_it_counts(table: AccessTable) -> None:
    app = http_app(table, secure=True)
    (route,) = [each for each in app.bridge.table.routes if each.rpc.endswith("/GetCaller")]
    assert '"TOKEN_REQUIRED"' in await ask_route(app, route, cookie_of("admin"))
    assert f'"{REACHED}"' in await ask_route(
        app, route, {"cookie": f"__Host-openmanager-session={session_of('admin')}"}
    )
    assert Cookie(secure=True).set("s", 60) == (
        "__Host-openmanager-session=s; Max-Age=60; Path=/; HttpOnly; SameSite=Strict; Secure"
    )


def http_app(table: AccessTable, *, secure: bool = False) -> HttpApp:
    services = reached_services()
    callers, policy = Callers(None, table, accounts=True), Policy(services)
    return create_app(
        services,
        interception=Interception(exchange_authenticator(callers, policy)),
        guard=Guard(callers, cookie=Cookie(secure=secure)),
        policy=policy,
        health=lambda: Health(ready=True),
        metrics=lambda: b"",
    )


async def ask_route(app: HttpApp, route: Route, shown: dict[str, str]) -> str:
    given = {"host": "127.0.0.1", "content-type": "application/json"} | shown
    headers = [(name.encode(), value.encode()) for name, value in given.items()]
    path = re.sub(r"\{[^}]*\}", "a", route.template)
    return await ask_app(app, route.verb, path, headers, b"{}" if route.body else b"")


def session_of(name: str) -> str:
    return f"om-session_{secret_of(name)}"


def as_session(caller: Caller) -> Caller:
    return Caller.of(caller.name, caller.may, SESSION, scope=caller.scope)


def cookie_of(name: str) -> dict[str, str]:
    return {"cookie": f"theme=dark; openmanager-session={session_of(name)}"}


def csrf_token_of(name: str) -> dict[str, str]:
    return {"x-csrf-token": csrf_of(session_of(name))}


async def ask_app(app: HttpApp, verb: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> str:
    scope = {
        "type": "http", "method": verb, "path": path, "raw_path": path.encode(), "query_string": b"", "scheme": "http",
        "client": ("127.0.0.1", 4711), "headers": headers,
    }  # fmt: skip
    said: list[bytes] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(event: Any) -> None:
        said.append(event.get("body", b""))

    await app(scope, receive, send)
    return b"".join(said).decode()


def reached_services() -> list[Bound]:
    """Every public service; whoever gets to a method is told so."""
    bound = []
    for name in SERVICES:
        service = default_pool().FindServiceByName(f"{PACKAGE}.{name}")
        made = {method.name: _reached_stream if method.server_streaming else _reached for method in service.methods}
        bound.append(bind(service, type(name, (), made)()))
    return bound


async def _reached(_servicer: object, _request: object, _context: object) -> bytes:
    raise FailedPrecondition("here", reason=REACHED)


async def _reached_stream(_servicer: object, _request: object, _context: object) -> AsyncGenerator[bytes, None]:
    for nothing in ():
        yield nothing
    raise FailedPrecondition("here", reason=REACHED)


def expected(method: Any) -> dict[str, str]:
    """The reason that each caller is told."""
    options = method.GetOptions().Extensions
    if options[options_pb2.open_to_all]:
        return dict.fromkeys((*CALLERS, *OUTSIDERS), REACHED)
    told = {name: reason for name, (_, reason) in OUTSIDERS.items()}
    for name, caller in CALLERS.items():
        role = options[options_pb2.required_role]
        has_role = includes(caller.may, role) or (options[options_pb2.agents_may] and caller.may == AGENT)
        sees_it = caller.scope is None or options[options_pb2.honours_scope]
        told[name] = "ROLE_REQUIRED" if not has_role else REACHED if sees_it else "SCOPE_TOO_NARROW"
    return told


def secret_of(name: str) -> str:
    return OUTSIDERS[name][0] if name in OUTSIDERS else name.replace(" ", "-")


async def test_a_session_that_has_just_begun_at_another_worker_is_waited_for(
    table: AccessTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = http_app(table)
    route = next(route for route in app.bridge.table.routes if route.method.name == "GetFleetSummary")
    known = dict(table._callers or {})
    monkeypatch.setattr(module, "SOON_S", 60.0)
    early = asyncio.create_task(ask_route(app, route, {"cookie": "openmanager-session=om-session_new"}))
    await eventually(lambda: table._awaited == 1)
    table._take(known)  # somebody else's news
    table._take(known | {hash_of("om-session_new"): (as_session(CALLERS["viewer"]), math.inf)})
    assert f'"{REACHED}"' in await early
    monkeypatch.setattr(module, "SOON_S", 0.05)
    monkeypatch.setattr(module, "MAX_IN_VAIN", 2)
    for name in ("one", "two", "three"):
        answer = await ask_route(app, route, {"cookie": f"openmanager-session={name}"})
        assert '"SESSION_ENDED"' in answer
    assert list(table._in_vain) == [hash_of("two"), hash_of("three")]
    monkeypatch.setattr(module, "SOON_S", 60.0)
    async with asyncio.timeout(20):  # what was waited for in vain is not waited for again, nor are too many
        assert '"SESSION_ENDED"' in await ask_route(app, route, {"cookie": "openmanager-session=three"})
        monkeypatch.setattr(module, "MAX_AWAITED", 0)
        assert '"SESSION_ENDED"' in await ask_route(app, route, {"cookie": "openmanager-session=four"})
    assert table._awaited == 0
