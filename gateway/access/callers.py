"""Who calls, by what he shows: the same rules for both transports, which find the header and the address themselves.

    a token            the one of GATEWAY_TOKEN is an administrator's; others are looked up
    a cookie           over HTTP: the session of a person
    nothing            refused where tokens are wanted; else a local administrator, if he is local beyond doubt

What must stay true: secrets are compared in constant time and never logged.
"""

import hmac
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Final

from pydantic import SecretStr

from fleet.access import ADMIN, Caller
from gateway.access.origin import Origin
from gateway.access.policy import Policy
from gateway.access.table import AccessTable, session_ended
from gateway.admission import Admission
from runtime.caller import host
from runtime.doorman import Knows, Metadata
from runtime.errors import OpenManagerError, PermissionDenied, Unauthenticated
from runtime.interception import (
    HEALTH_SERVICE,
    REFLECTION_SERVICES,
    Authenticator,
    CallContext,
    metadata_value,
    metadata_values,
    peer_is_loopback,
)

LOCAL_ADMINISTRATOR: Final = Caller.of("local-administrator", ADMIN, "loopback")
TOKEN_HOLDER: Final = Caller.of("token-holder", ADMIN, "token")
"""Who has the token of GATEWAY_TOKEN."""
NOBODY: Final = Caller()
ANYBODY: Final = Caller.of("anybody", 0, "")
"""Who calls a method that is open to all."""
_at_the_door: ContextVar[Caller | None] = ContextVar("openmanager_caller_at_the_door", default=None)
"""Who `known_to` found a gRPC call's caller to be, which may be long before his message is there. Each call has a task
of its own, so that nobody else sees it; asking for the metadata again takes 2 us."""
_HEALTH: Final = f"/{HEALTH_SERVICE}/"
_REFLECTION: Final = tuple(f"/{service}/" for service in REFLECTION_SERVICES)


class Callers:
    """Knows who shows what."""

    def __init__(
        self,
        token: SecretStr | str | None,
        table: AccessTable | None,
        *,
        accounts: bool = False,
        origin: Origin | None = None,
    ) -> None:
        """Takes what is known.

        Args:
            token: of GATEWAY_TOKEN; None: there is none.
            table: of the other tokens; None: there are none.
            accounts: a token is wanted although there is none of GATEWAY_TOKEN.
            origin: from where calls come; None: there is no proxy.
        """
        self.origin: Final = origin or Origin(None)
        secret = token.get_secret_value() if isinstance(token, SecretStr) else token
        self._token = secret.encode() if secret else None
        self._header = b"Bearer " + self._token if self._token is not None else None
        self._table = table
        self.wants_token: Final = self._token is not None or accounts

    def is_token_holder(self, authorization: bytes) -> bool:
        """Whether this header is the one of GATEWAY_TOKEN as most write it: the quick way of `by_header`."""
        return self._header is not None and hmac.compare_digest(authorization, self._header)

    def by_header(self, authorization: str | None) -> Caller | None:
        """Who shows this header; None: nobody shows any, and none is wanted.

        Raises:
            Unauthenticated: TOKEN_REQUIRED, TOKEN_INVALID, TOKEN_EXPIRED.
            Unavailable: ACCESS_UNKNOWN.
        """
        if authorization is None:
            if self.wants_token:
                raise Unauthenticated("a token is needed: authorization: Bearer <token>", reason="TOKEN_REQUIRED")
            return None
        scheme, _, shown = authorization.partition(" ")
        shown = shown.strip()
        if scheme.lower() != "bearer" or not shown:
            raise Unauthenticated("the token is not valid: authorization: Bearer <token>", reason="TOKEN_INVALID")
        if self._token is not None and hmac.compare_digest(shown.encode(), self._token):
            return TOKEN_HOLDER
        if self._table is None:
            raise Unauthenticated("the token is not valid", reason="TOKEN_INVALID")
        return self._table.caller(shown)

    def by_cookie(self, secret: str) -> Caller | None:
        """Whose session this is; None: nobody's, and no token is wanted.

        Raises:
            Unauthenticated: SESSION_ENDED.
            Unavailable: ACCESS_UNKNOWN.
        """
        table = self._table
        if table is not None and not table.known and not self.wants_token:
            table = None  # the cookie is of an earlier time, of accounts or of another port
        found = None if table is None else table.session(secret)
        if found is None and self.wants_token:
            raise session_ended()
        return found

    def over(self, caller: Caller) -> OpenManagerError | None:
        """Why somebody who was found before may not go on as he was; None: nothing has changed."""
        return None if self._table is None else self._table.over(caller)

    async def hears_of_session(self, secret: str) -> bool:
        """Whether a session that `by_cookie` did not know is known now; see AccessTable."""
        return self._table is not None and await self._table.hears_of_session(secret)

    def known(self, context: CallContext) -> Caller:
        """Who shows what a gRPC call has, for the audit log, and from where; without a name, nobody that is known."""
        try:
            found = self.by_header(metadata_value(context, "authorization"))
        except OpenManagerError:
            found = None
        return replace(found or NOBODY, address=self.address(context))

    def address(self, context: CallContext) -> str:
        """From where a gRPC call comes."""
        return self.origin.of(host(context.peer()), metadata_values(context, "x-forwarded-for"))


def grpc_authenticator(callers: Callers, policy: Policy, admission: Admission) -> Authenticator:
    """The check before every gRPC call: who it is, whether he may, and whether now."""

    counts, has_proxies = admission.counts, callers.origin.has_proxies  # asked here once: each is a call of Python
    quick = frozenset() if counts or has_proxies else policy.open_to(TOKEN_HOLDER)

    def authenticate(method: str, context: CallContext) -> Caller:
        if _at_the_door.get() is TOKEN_HOLDER and method in quick:  # as nearly always: what follows would say the same
            return TOKEN_HOLDER
        if policy.rule(method).open_to_all:
            caller = ANYBODY
        else:
            found = _at_the_door.get()
            if found is None or callers.over(found) is not None:  # his message comes as late as he likes
                found = callers.by_header(metadata_value(context, "authorization"))
            if found is None:
                _check_local(context)
            caller = found or LOCAL_ADMINISTRATOR
            if not method.startswith(_REFLECTION):
                policy.check(method, caller)
        if counts:
            admission.admit(callers.address(context))
        return replace(caller, address=callers.address(context)) if has_proxies else caller

    return authenticate


def _check_local(context: CallContext) -> None:
    """Refuses who is not on this machine beyond doubt, as gateway.http.guard does over HTTP."""
    if not peer_is_loopback(context.peer()):
        raise PermissionDenied("only callers on this machine are let in while no token is configured")
    for key, _ in context.invocation_metadata() or ():
        if key == "forwarded" or key.startswith("x-forwarded-"):
            raise PermissionDenied(
                "the call came through a proxy, so it is not known to be local; set GATEWAY_TOKEN", reason="PROXIED"
            )
        if key == "origin":  # of a page whose call somebody translates; none of ours is at this address
            raise PermissionDenied("pages of other origins are not let in", reason="ORIGIN_FOREIGN")


def known_to(callers: Callers, policy: Policy) -> Knows:
    """Whether a gRPC caller may come in, before his message is read; the authenticator has the last word."""

    def knows(method: str, metadata: Metadata) -> bool:
        given: str | bytes | None = None
        for key, value in metadata:  # a generator takes a microsecond more
            if key == "authorization":
                given = value
                break
        if given is not None and callers.is_token_holder(given if isinstance(given, bytes) else given.encode()):
            _at_the_door.set(TOKEN_HOLDER)
            return True
        _at_the_door.set(None)
        if method.startswith(_HEALTH) or policy.rule(method).open_to_all:
            return True
        try:
            found = callers.by_header(given if given is None or isinstance(given, str) else given.decode("latin-1"))
        except OpenManagerError:
            return False
        _at_the_door.set(found)
        return True

    return knows


def exchange_authenticator(callers: Callers, policy: Policy) -> Authenticator:
    """The same for HTTP, where the guard has found who calls before: at the head of a request, whose body comes when it
    likes. Then this is asked again."""

    def authenticate(method: str, exchange: Any) -> Caller:
        caller: Caller = exchange.caller
        over = callers.over(caller)
        if over is not None:
            raise over
        policy.check(method, caller)
        return caller

    return authenticate
