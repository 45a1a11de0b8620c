"""Sessions of people in browsers: a cookie that no script can read, and what changes have to show beside it.

A browser sends a cookie by itself, also when a page of somebody else had it ask. So three things stand in between:
SameSite=Strict; Sec-Fetch-Site, where a browser sends it; and for whatever changes something a header with a digest of
the cookie's secret, which only a page of ours is ever told.

What must stay true: a session's secret is good in a cookie only, and a token's never in one; two cookies of our name
are none, for who may set one for a neighbouring host must not choose which of them counts.
"""

import hashlib
import hmac
from typing import Final

from fleet.codec import ms_from_timestamp
from gateway.access.table import AccessTable
from openmanager.access.v1 import access_pb2, access_pb2_grpc
from runtime import caller
from runtime.caller import Caller
from runtime.channel import Channel, calling
from runtime.clock import Clock
from runtime.errors import PermissionDenied

CSRF_HEADER: Final = b"x-csrf-token"
KNOWN_WITHIN_S: Final = 5.0
"""How long a log-in waits for the session to be known here; it takes some milliseconds."""
SESSION_COOKIE: Final = "openmanager-session"
_OWN_SITES: Final = frozenset({b"same-origin", b"none"})
Headers = list[tuple[bytes, bytes]]


class Cookie:
    """The cookie, as browsers have it. Over TLS its name demands what makes it safe."""

    def __init__(self, *, secure: bool) -> None:
        self.secure: Final = secure
        """Whether browsers come by TLS, to us or to the proxy in front of us."""
        self._name: Final = f"__Host-{SESSION_COOKIE}" if secure else SESSION_COOKIE
        self._prefix: Final = f"{self._name}=".encode()

    def secret_in(self, headers: Headers) -> str | None:
        """The secret that a request carries; None: none, or more than one."""
        found = [
            each[len(self._prefix) :]
            for name, value in headers
            if name == b"cookie"
            for each in map(bytes.strip, value.split(b";"))
            if each.startswith(self._prefix)
        ]
        return found[0].decode("latin-1") if len(found) == 1 else None

    def set(self, secret: str, max_age_s: int) -> str:
        """What has a browser keep it."""
        return f"{self._name}={secret}; Max-Age={max_age_s}; {self._attributes}"

    def clear(self) -> str:
        """What has a browser forget it."""
        return f"{self._name}=; Max-Age=0; {self._attributes}"

    @property
    def _attributes(self) -> str:
        return "Path=/; HttpOnly; SameSite=Strict" + ("; Secure" if self.secure else "")


def csrf_of(secret: str) -> str:
    """What changes show beside the cookie; it tells nothing of the secret."""
    return hashlib.sha256(b"openmanager-csrf " + secret.encode()).hexdigest()


def check_site(headers: Headers) -> None:
    """Refuses what a browser says was asked for by a page that is not ours."""
    for name, value in headers:
        if name == b"sec-fetch-site" and value not in _OWN_SITES:
            raise PermissionDenied("pages of other origins are not let in", reason="ORIGIN_FOREIGN")


def check_csrf(headers: Headers, secret: str) -> None:
    """Refuses a change that does not show what a page of ours was told."""
    shown = next((value for name, value in headers if name == CSRF_HEADER), b"")
    if not hmac.compare_digest(shown, csrf_of(secret).encode()):
        raise PermissionDenied(
            "a change with a session's cookie needs the header x-csrf-token, which GET /v1/session tells",
            reason="CSRF_TOKEN_INVALID",
            field="x-csrf-token",
        )


class Sessions:
    """Begins and ends them, which metadata does."""

    def __init__(self, metadata: Channel, table: AccessTable, clock: Clock, cookie: Cookie) -> None:
        self._stub = access_pb2_grpc.SessionServiceStub(metadata.grpc)
        self._table = table
        self._clock = clock
        self.cookie: Final = cookie

    async def open(self, request: access_pb2.OpenSessionRequest, who: Caller) -> access_pb2.OpenSessionResponse:
        """A session, known at this gateway; raises what metadata says.

        `who` asks: his address counts against wrong tries.
        """
        async with calling("metadata"):
            opened: access_pb2.OpenSessionResponse = await self._stub.OpenSession(
                request, metadata=caller.metadata_of(who)
            )
        await self._table.hears_of(opened.credential.hash, KNOWN_WITHIN_S)
        return opened

    def kept(self, opened: access_pb2.OpenSessionResponse) -> str:
        """What has a browser keep a session."""
        left_s = (ms_from_timestamp(opened.credential.expire_time) - self._clock.now_ms()) // 1_000
        return self.cookie.set(opened.secret, max(0, left_s))

    async def end(self, secret: str) -> str:
        """Ends one; whose it was, empty: there is none."""
        request = access_pb2.EndSessionRequest(hash=hashlib.sha256(secret.encode()).digest())
        async with calling("metadata"):
            name: str = (await self._stub.EndSession(request)).name
        self._table.forget(request.hash)
        return name
