"""The ASGI application: every request passes the guard, then goes to the bridge or to an operator's page.

API paths do not go through Starlette, whose routing costs 20-40 us a request; it serves the pages, and whatever routes
the gateway adds (`extra`: ingest adapters, the web page).

What must stay true: nothing but the open paths is answered before the guard has admitted the caller; an exception that
got this far is logged once and its text stays here; while the server stops, streams end and running calls may finish.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.routing import Route as Page

from fleet.access import Caller
from gateway.access.origin import Origin
from gateway.access.policy import Policy
from gateway.admission import Admission
from gateway.http import docs_page, openapi
from gateway.http.bridge import Bridge, sent_path
from gateway.http.guard import Guard
from gateway.http.replies import (
    API_POLICY,
    SECURITY_HEADERS,
    Event,
    Receive,
    Scope,
    Send,
    UnknownRoute,
    WrongMethod,
    http_status,
    send_error,
    status_value,
    trace_headers,
)
from gateway.http.routes import Match
from gateway.http.shortcut import Shortcut
from runtime import tracing
from runtime.clock import Clock, SystemClock
from runtime.errors import OpenManagerError, ResourceExhausted
from runtime.handlers import Bound
from runtime.interception import Interception, masked
from runtime.limits import MAX_CONCURRENT_CALLS, MAX_OPEN_CALLS, MAX_OPEN_CALLS_OF_ADDRESS, STREAM_GRACE_S
from runtime.redaction import redact

_LOGGED: Final = "openmanager.logged"  # in the scope: the exception has been answered and logged
OPEN_PAGES: Final = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})
"""They say nothing of the fleet: whoever is let in may read them; of the first two also who is not."""
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_UNTRACED: Final = frozenset({"/healthz", "/readyz", "/metrics"})
_VERBS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether the process can do its work, and why not."""

    ready: bool
    reasons: tuple[str, ...] = ()


Refused = Callable[[str, Scope, Caller | None, OpenManagerError], None]
"""Told of a request that is not let in: the method ("" for a page), who it is, where that is known, and why."""


class HttpApp:
    """What the ASGI server calls. `begin_drain` and `cut_off` are for gateway.http.server."""

    def __init__(
        self,
        bridge: Bridge,
        guard: Guard,
        admission: Admission,
        interception: Interception,
        policy: Policy,
        pages: Callable[..., Any],
        refused: Refused | None = None,
    ) -> None:
        self.bridge = bridge
        self._guard = guard
        self._policy = policy
        self._admission = admission
        self._interception = interception
        self._pages = pages
        self._refused = refused
        self._shortcut = Shortcut(bridge, guard, admission, policy)
        self._running: set[asyncio.Task[Any]] = set()
        self._open: Counter[str] = Counter()  # requests of what is open to all, by address
        self._loop: asyncio.AbstractEventLoop | None = None  # kept, since asking for it is a system call (getpid)

    def at_once(self, scope: Scope) -> tuple[Event, Event] | None:
        """The two ASGI events of an answer from memory; None: the application is to be called."""
        return self._shortcut.answer(scope)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served, not {scope['type']}")
        if self._guard.origin.has_proxies:
            _told_by_proxy(self._guard.origin, scope)
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        task = asyncio.current_task(self._loop)
        assert task is not None
        call = tracing.begin(_verb(scope), lambda: scope["headers"], quiet=scope["path"] in _UNTRACED)
        try:
            if call.is_recording():
                self._describe(call, scope)
            if len(self._running) >= MAX_CONCURRENT_CALLS:
                await send_error(send, _too_many(f"MAX_CONCURRENT_CALLS ({MAX_CONCURRENT_CALLS})"))
                return
            self._running.add(task)
            await self._admit_and_answer(scope, receive, send)
        finally:
            self._running.discard(task)
            call.leave()

    def _describe(self, call: tracing.Call, scope: Scope) -> None:
        """Names the span after the route, not the path. The query is left out: it may be anything."""
        verb = _verb(scope)
        call.set_attributes(
            {"http.request.method": verb, "url.scheme": scope["scheme"], "url.path": redact(scope["path"])}
            | ({"network.peer.address": scope["client"][0]} if scope.get("client") else {})
        )
        match = self.bridge.find(scope)
        if match is not None and match.route is not None:
            route = match.route
            call.update_name(f"{route.verb} {route.template}")
            call.set_attributes({"http.route": route.template, "rpc.method": route.rpc[1:]})

    async def _admit_and_answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        match = self.bridge.find(scope)
        rpc = "" if match is None or match.route is None else match.route.rpc
        open_to_all = self._policy.rule(rpc).open_to_all
        caller = None
        try:
            caller = await self._guard.let_in(scope, open_to_all=open_to_all)
            if match is None and scope["path"] not in OPEN_PAGES and scope["path"] not in self._guard.open_paths:
                self._policy.check_page(caller)
        except OpenManagerError as error:
            _log.info("refused %s %s: %s", scope["method"], scope["path"], error, extra={"reason": error.reason})
            if self._refused is not None:
                self._refused(rpc, scope, caller, error)
            await send_error(send, error, with_body=scope["method"] != "HEAD")
            return
        if match is None:
            await self._page(scope, receive, send)
            return
        try:
            self._admission.admit(scope["client"][0] if scope.get("client") else "")
        except OpenManagerError as error:
            if self._refused is not None:
                self._refused(rpc, scope, caller, error)
            await send_error(send, error, with_body=scope["method"] != "HEAD")
        else:
            if open_to_all:
                await self._answer_anybody(match, scope, receive, send, caller)
            else:
                await self.bridge.answer(match, scope, receive, send, caller)

    async def _answer_anybody(self, match: Match, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        """Leaves requests to who is known: a stranger's body may be as slow as he likes."""
        address = scope["client"][0] if scope.get("client") else ""
        if self._open.total() >= MAX_OPEN_CALLS or self._open[address] >= MAX_OPEN_CALLS_OF_ADDRESS:
            await send_error(send, _too_many("MAX_OPEN_CALLS"))
            return
        self._open[address] += 1
        try:
            await self.bridge.answer(match, scope, receive, send, caller)
        finally:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def guarded_send(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                given = {name for name, _ in message["headers"]}
                defaults = [header for header in (*SECURITY_HEADERS, API_POLICY) if header[0] not in given]
                message["headers"] = [*message["headers"], *defaults, *trace_headers(message["status"])]
            await send(message)

        try:
            await self._pages(scope, receive, guarded_send)
        except Exception as error:  # Starlette raises it again after _broken_page has answered
            if not scope.get(_LOGGED):
                internal = masked(error, scope["path"])
                if not started:
                    await send_error(send, internal)

    @property
    def in_flight(self) -> int:
        """Requests being answered."""
        return len(self._running)

    def begin_drain(self) -> None:
        """The server stops: streams end after STREAM_GRACE_S, saying so; other calls may finish."""
        self.bridge.draining = True
        asyncio.get_running_loop().call_later(STREAM_GRACE_S, self._interception.end_streams)

    def cut_off(self) -> None:
        """Cancels what still runs."""
        for task in tuple(self._running):
            task.cancel()


def create_app(
    bound: Sequence[Bound],
    *,
    interception: Interception,
    guard: Guard,
    policy: Policy,
    health: Callable[[], Health],
    metrics: Callable[[], bytes],
    extra: Sequence[BaseRoute] = (),
    clock: Clock | None = None,
    admission: Admission | None = None,
    refused: Refused | None = None,
) -> HttpApp:
    """The application for these services. RouteError when their annotations cannot be served.

    `interception` is to be one of its own, whose authenticator is `exchange_authenticator`: the guard has found who
    calls, and stopping ends the streams of this one only. Configure telemetry before, since tracing is decided here.
    """
    clock = clock or SystemClock()
    bridge = Bridge(bound, interception, clock)
    document = openapi.document(bridge.table.routes)
    document_json = orjson.dumps(document)
    page = docs_page.render(document).encode()

    async def healthz(_request: Request) -> Response:
        return _json({"status": "ok"})

    async def readyz(request: Request) -> Response:
        now = health()
        ready = now.ready and not bridge.draining
        reasons = (*now.reasons, *(("stopping",) if bridge.draining else ()))
        answer: dict[str, Any] = {"ready": ready}
        if reasons and guard.knows(request.scope):
            answer["reasons"] = reasons
        return _json(answer, 200 if ready else 503)

    async def show_metrics(_request: Request) -> Response:
        return Response(await asyncio.to_thread(metrics), headers={"content-type": METRICS_TYPE})

    async def show_document(_request: Request) -> Response:
        return Response(document_json, media_type="application/json")

    async def show_docs(_request: Request) -> Response:
        return Response(page, media_type="text/html", headers={"content-security-policy": docs_page.POLICY})

    pages = Starlette(
        routes=[
            Page("/healthz", healthz),
            Page("/readyz", readyz),
            Page("/metrics", show_metrics),
            Page("/openapi.json", show_document),
            Page("/docs", show_docs),
            *extra,
        ],
        exception_handlers={HTTPException: _page_error, Exception: _broken_page},
    )
    return HttpApp(bridge, guard, admission or Admission(clock), interception, policy, pages, refused)


def _too_many(limit: str) -> ResourceExhausted:
    return ResourceExhausted(f"over {limit}", reason="TOO_MANY_REQUESTS", retry_after_s=1.0)


def _told_by_proxy(origin: Origin, scope: Scope) -> None:
    """Has a request come from where the trusted proxy says."""
    client = scope.get("client")
    forwarded = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
    if client is not None and forwarded:
        scope["client"] = (origin.of(client[0], forwarded), client[1])


def _json(value: object, status: int = 200) -> Response:
    headers = {"cache-control": "no-store"}
    return Response(orjson.dumps(value), status, headers=headers, media_type="application/json")


def _page_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        ours: OpenManagerError = UnknownRoute(f"nothing is at {sent_path(request.scope)[:256]}")
    elif error.status_code == 405:
        ours = WrongMethod(request.method, (error.headers or {}).get("Allow", "").split(", "))
    else:
        return Response(status_code=error.status_code, headers=error.headers)
    headers = {"allow": ours.allow} if isinstance(ours, WrongMethod) else None
    return Response(orjson.dumps(status_value(ours)), http_status(ours), headers, media_type="application/json")


def _broken_page(request: Request, error: Exception) -> Response:
    request.scope[_LOGGED] = True
    ours = error if isinstance(error, OpenManagerError) else masked(error, request.url.path)
    return Response(orjson.dumps(status_value(ours)), http_status(ours), media_type="application/json")


def _verb(scope: Scope) -> str:
    method: str = scope["method"]
    return method if method in _VERBS else "HTTP"  # a caller may invent as many as it likes
