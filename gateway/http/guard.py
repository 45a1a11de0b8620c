"""Who may come in over HTTP: whoever shows a token or has a session; a local administrator while none is wanted.

The local administrator is anyone on this machine, which includes every web page that a browser on this machine shows.
So without a token a request needs all of: a loopback peer, a Host that is this machine (a page that points its own name
at 127.0.0.1 sends that name), an Origin that is absent or ours, no sign of a proxy (everybody behind one would look
local), and a JSON content type on changes (a page cannot send one elsewhere without being asked first, and there is no
CORS to allow it).

What must stay true: each rule refuses by itself; a refusal says which rule and what to do; only `open_paths` are
answered to everyone, and they tell nothing.
"""

import ipaddress
import re
from collections.abc import Collection
from typing import Final

from fleet.access import Caller
from gateway.access.callers import ANYBODY, LOCAL_ADMINISTRATOR, TOKEN_HOLDER, Callers
from gateway.access.origin import Origin
from gateway.access.sessions import Cookie, check_csrf, check_site
from gateway.access.table import SESSION_ENDED
from gateway.http.replies import NotJson, Scope
from runtime.errors import OpenManagerError, PermissionDenied, Unauthenticated

OPEN_PATHS: Final = frozenset({"/healthz", "/readyz"})

_LOCAL_HOST: Final = re.compile(rb"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_CHANGING: Final = frozenset({"POST", "PUT", "PATCH"})
_PROXY_HEADER_PREFIX: Final = b"x-forwarded-"


class Guard:
    """Admits or refuses a request from its ASGI scope, before anything of its body is read."""

    def __init__(
        self, callers: Callers, *, cookie: Cookie | None = None, open_paths: Collection[str] = OPEN_PATHS
    ) -> None:
        self._callers = callers
        self._cookie = cookie or Cookie(secure=False)
        self.open_paths: Final = frozenset(open_paths)

    @property
    def origin(self) -> Origin:
        """From where requests come."""
        return self._callers.origin

    @property
    def wants_token(self) -> bool:
        """Whether authentication is configured."""
        return self._callers.wants_token

    def admit(self, scope: Scope, *, open_to_all: bool = False) -> Caller:
        """Who calls; Unauthenticated, PermissionDenied, Unavailable or NotJson says why he is not let in.

        `open_to_all`: for a method that asks for a secret of its own.
        """
        if scope["path"] in self.open_paths:
            return ANYBODY
        headers = scope["headers"]
        caller = None
        if not open_to_all:
            given = _header(headers, b"authorization")
            if given is None:
                caller = self._by_cookie(scope, headers)
            elif self._callers.is_token_holder(given):
                caller = TOKEN_HOLDER
            else:
                caller = self._callers.by_header(given.decode("latin-1"))
        else:
            check_site(headers)
        if caller is None and not self._callers.wants_token:
            _check_local(scope, headers)
            caller = LOCAL_ADMINISTRATOR
        _check_content_type(scope, headers)
        return ANYBODY if caller is None else caller

    async def let_in(self, scope: Scope, *, open_to_all: bool = False) -> Caller:
        """As `admit`, but that a session is waited for that has just begun at another worker."""
        try:
            return self.admit(scope, open_to_all=open_to_all)
        except Unauthenticated as error:
            secret = self._cookie.secret_in(scope["headers"]) if error.reason == SESSION_ENDED else None
            if secret is None or not await self._callers.hears_of_session(secret):
                raise
        return self.admit(scope, open_to_all=open_to_all)

    def _by_cookie(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> Caller | None:
        secret = self._cookie.secret_in(headers)
        caller = self._callers.by_header(None) if secret is None else self._callers.by_cookie(secret)
        if caller is not None and secret is not None:
            check_site(headers)
            if scope["method"] not in _READING:
                check_csrf(headers, secret)
        return caller

    def knows(self, scope: Scope) -> bool:
        """Whether the caller of an open path would be admitted elsewhere, and so may be told more."""
        try:
            self.admit({**scope, "path": ""})
        except OpenManagerError:
            return False
        return True


def _check_local(scope: Scope, headers: list[tuple[bytes, bytes]]) -> None:
    client = scope.get("client")
    if client is None or not _is_loopback(client[0]):
        raise PermissionDenied(
            "without a token only callers on this machine are let in; set GATEWAY_TOKEN", reason="PEER_NOT_LOCAL"
        )
    host = None
    for name, value in headers:
        if name == b"host":
            if host is not None or not _LOCAL_HOST.fullmatch(value):
                host = b""
                break
            host = value
        elif name == b"forwarded" or name.startswith(_PROXY_HEADER_PREFIX):
            raise PermissionDenied(
                "the request came through a proxy, so it is not known to be local; set GATEWAY_TOKEN",
                reason="PROXIED",
            )
    if not host:
        raise PermissionDenied(
            "without a token the Host must be localhost, 127.0.0.1 or [::1]", reason="HOST_NOT_LOCAL"
        )
    for name, value in headers:
        if name == b"origin" and value.lower() != scope["scheme"].encode() + b"://" + host.lower():
            raise PermissionDenied("pages of other origins are not let in", reason="ORIGIN_FOREIGN")


def _check_content_type(scope: Scope, headers: list[tuple[bytes, bytes]]) -> None:
    """POST, PUT and PATCH must say JSON even when empty. DELETE need not without a body: no page of another origin can
    send one unasked."""
    if scope["method"] == "GET":  # most are
        return
    given = _header(headers, b"content-type")
    if scope["method"] not in _CHANGING and not (scope["method"] == "DELETE" and given is not None):
        return
    media_type, _, parameters = (given or b"").partition(b";")
    charset = parameters.replace(b" ", b"").replace(b'"', b"").lower()
    if media_type.strip().lower() != b"application/json" or charset not in {b"", b"charset=utf-8"}:
        raise NotJson("a change needs the content type application/json (in UTF-8)", field="content-type")


def _header(headers: list[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    for key, value in headers:
        if key == name:
            return value
    return None


def _is_loopback(host: str) -> bool:
    if host in {"127.0.0.1", "::1"}:
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
