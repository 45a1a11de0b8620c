"""The two pages by which a browser logs in with an OpenID provider: it is sent there, and it comes back.

    HEAD /auth/openid/login       204: there is a provider (the page asks, to know whether to offer it)
    GET /auth/openid/login        302 to the provider
    GET /auth/openid/callback     303 to /, with a session; or to /?login_error=REASON

What must stay true: a browser is sent to the provider or to our own first page and nowhere else, whatever it brings;
what failed is told by its reason alone; the state cookie is gone after it was used, and only who is sent to the
provider gets one: another tab that asks whether there is one must not take away that of a log-in under way.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Final, Protocol
from urllib.parse import quote

import orjson
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.access.openid import OpenId
from gateway.access.openid_state import MAX_AGE_S
from gateway.http.replies import http_status, status_value
from gateway.settings import OPENID_CALLBACK_PATH, OPENID_LOGIN_PATH
from openmanager.access.v1 import access_pb2
from runtime.caller import Caller
from runtime.errors import OpenManagerError

BUSY: Final = "OPENID_BUSY"
_NAME: Final = "openmanager-openid"

_log = logging.getLogger(__name__)

Opened = Callable[[Caller, access_pb2.OpenSessionResponse], Awaitable[None]]
"""Told of a log-in before the browser is; what it raises, the browser gets instead of the session."""
Refused = Callable[[Caller, OpenManagerError], None]
"""Told of one that has failed; the caller has a name where the provider has said it."""


class Sessions(Protocol):
    """Begins sessions, as gateway.access.sessions does."""

    async def open(self, request: access_pb2.OpenSessionRequest, who: Caller) -> access_pb2.OpenSessionResponse:
        """A session, known at this gateway; raises what metadata says."""

    def kept(self, opened: access_pb2.OpenSessionResponse) -> str:
        """What has a browser keep it."""


class StateCookie:
    """What carries a log-in from one page to the other. Over TLS its name demands what makes it safe."""

    def __init__(self, *, secure: bool) -> None:
        # __Host-: a neighbouring host cannot plant one, and so not have somebody end a log-in that it began.
        self._name = f"__Host-{_NAME}" if secure else _NAME
        self._attributes = "Path=/; HttpOnly; SameSite=Lax" + ("; Secure" if secure else "")

    def set(self, carried: str) -> str:
        """What has a browser keep it."""
        return f"{self._name}={carried}; Max-Age={MAX_AGE_S}; {self._attributes}"

    def clear(self) -> str:
        """What has a browser forget it."""
        return f"{self._name}=; Max-Age=0; {self._attributes}"

    def carried_by(self, request: Request) -> str:
        """What it carries; empty: there is none, or more than one, of which somebody else may have set one."""
        pairs = [each.strip().partition("=") for line in request.headers.getlist("cookie") for each in line.split(";")]
        found = [value for name, _, value in pairs if name == self._name]
        return found[0] if len(found) == 1 else ""


class OpenIdPages:
    """The pages; `secure`: browsers come by TLS, to us or to the proxy in front of us."""

    def __init__(
        self,
        openid: OpenId,
        sessions: Sessions,
        *,
        secure: bool,
        opened: Opened | None = None,
        refused: Refused | None = None,
    ) -> None:
        self._openid = openid
        self._sessions = sessions
        self._cookie = StateCookie(secure=secure)
        self._opened = opened
        self._refused = refused

    def routes(self) -> list[BaseRoute]:
        """For gateway.http.app (`extra`)."""
        return [Route(OPENID_LOGIN_PATH, self._login), Route(OPENID_CALLBACK_PATH, self._callback)]

    async def _login(self, request: Request) -> Response:
        if request.method == "HEAD":
            return Response(status_code=204, headers={"cache-control": "no-store"})
        try:
            url, carried = await self._openid.begin()
        except OpenManagerError as error:
            return self._failed(error)
        return _sent_to(url, 302, self._cookie.set(carried))

    async def _callback(self, request: Request) -> Response:
        who = Caller(address=request.client.host if request.client is not None else "")
        try:
            identity = await self._openid.finish(request.query_params, self._cookie.carried_by(request))
            who = Caller(name=identity.name, address=who.address, authentication="session")
            opened = await self._sessions.open(access_pb2.OpenSessionRequest(identity=identity), who)
            if self._opened is not None:
                await self._opened(who, opened)
        except OpenManagerError as error:
            if self._refused is not None:
                self._refused(who, error)
            return self._failed(error)
        return _sent_to("/", 303, self._sessions.kept(opened), self._cookie.clear())

    def _failed(self, error: OpenManagerError) -> Response:
        """Back to the first page, which says it in words."""
        _log.info("a log-in has failed: %s", error, extra={"reason": error.reason})
        if error.reason == BUSY:  # nothing is lost: the same page asked for again may work
            headers = {"retry-after": "1", "cache-control": "no-store"}
            body = orjson.dumps(status_value(error))
            return Response(body, http_status(error), headers, media_type="application/json")
        return _sent_to(f"/?login_error={quote(error.reason, safe='')}", 303, self._cookie.clear())


def _sent_to(url: str, status: int, *cookies: str) -> Response:
    response = RedirectResponse(url, status, {"cache-control": "no-store"})
    for cookie in cookies:
        response.headers.append("set-cookie", cookie)
    return response
