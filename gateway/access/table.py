"""The tokens that are known: mirrored from metadata, so that knowing a caller is a look-up.

What must stay true: what is looked up is a hash, so that the time it takes tells nothing of any secret; a whole table
takes the place of the one before at once; while metadata is away the last one holds, so that nobody is locked out; at a
start without metadata nobody's token is known, and that is told as such; who may not come in any more does not go on
with what he began, either.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final

from fleet.access import Caller, Scope
from fleet.codec import ms_from_timestamp
from openmanager.access.v1 import access_pb2, access_pb2_grpc
from runtime import caller as runtime_caller
from runtime.channel import Channel, calling
from runtime.clock import Clock
from runtime.errors import OpenManagerError, Unauthenticated, Unavailable
from runtime.streams import Over

REPORT_INTERVAL_S: Final = 30.0
"""How often metadata is told which tokens were used."""
MAX_REPORTED: Final = 10_000
SOON_S: Final = 1.0
"""A session that began at another worker or gateway is known here within this time: all hear of it at once, but not in
the same moment (measured: 3 of 240 requests that followed a log-in at once were too early, on a busy machine)."""
MAX_AWAITED: Final = 20
"""Requests that wait for that; who invents cookies keeps no more waiting."""
MAX_IN_VAIN: Final = 1_000
"""Cookies that are not waited for again."""
EXPIRY_INTERVAL_S: Final = 1.0
"""How often it is looked whose streams are to end because his time is over; other changes end them at once."""
SESSION_ENDED: Final = "SESSION_ENDED"
SESSION: Final = "session"
"""How somebody with a cookie proves who he is."""

_log = logging.getLogger(__name__)


class AccessTable:
    """Everybody who may come in with a token."""

    def __init__(self, metadata: Channel, clock: Clock) -> None:
        self._stub = access_pb2_grpc.AccessFeedServiceStub(metadata.grpc)
        self._clock = clock
        self._callers: dict[bytes, tuple[Caller, float]] | None = None
        self._news = asyncio.Event()
        self._awaited = 0
        self._in_vain: dict[bytes, None] = {}
        self._used: set[str] = set()
        self._enders: list[Callable[[Over], Awaitable[None]]] = []

    @property
    def known(self) -> bool:
        """Whether it was ever received."""
        return self._callers is not None

    def caller(self, secret: str) -> Caller:
        """Who shows this.

        Raises:
            Unauthenticated: TOKEN_INVALID, TOKEN_EXPIRED.
            Unavailable: ACCESS_UNKNOWN: nothing was received from metadata yet.
        """
        found = self._found(secret)
        if found is None or found[0].authentication == SESSION:
            raise _invalid()
        caller, ends_ms = found
        if self._clock.now_ms() >= ends_ms:
            raise _expired()
        return self._noted(caller)

    def session(self, secret: str) -> Caller | None:
        """Whose session has this secret; None: nobody's. Raises Unavailable, ACCESS_UNKNOWN."""
        found = self._found(secret)
        if found is None or found[0].authentication != SESSION or self._clock.now_ms() >= found[1]:
            return None
        return self._noted(found[0])

    def over(self, caller: runtime_caller.Caller) -> OpenManagerError | None:
        """Why somebody who has come in may not go on; None: he may, as far as it is for this table to say."""
        if not isinstance(caller, Caller) or not caller.digest:
            return None
        found = (self._callers or {}).get(caller.digest)
        if found is None or self._clock.now_ms() >= found[1]:
            if caller.authentication == SESSION:
                return session_ended()
            return _invalid() if found is None else _expired()
        if (found[0].may, found[0].scope) != (caller.may, caller.scope):
            return Unavailable("the caller may do other things than when this began", reason="ACCESS_CHANGED")
        return None

    def ends(self, end_streams_of: Callable[[Over], Awaitable[None]]) -> None:
        """Has `end_streams` end these, too."""
        self._enders.append(end_streams_of)

    async def end_streams(self) -> None:
        """Ends the streams of who may not go on, again and again."""
        looked_at, next_ms = None, math.inf
        while True:
            news, known, now_ms = self._news, self._callers, self._clock.now_ms()
            if known is not looked_at or now_ms >= next_ms:
                looked_at = known
                next_ms = min((ends_ms for _, ends_ms in (known or {}).values() if ends_ms > now_ms), default=math.inf)
                for end in self._enders:
                    await end(self.over)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXPIRY_INTERVAL_S):
                    await news.wait()

    def _found(self, secret: str) -> tuple[Caller, float] | None:
        if self._callers is None:
            raise Unavailable(
                "who may come in is not known yet: metadata has not been reached",
                reason="ACCESS_UNKNOWN",
                retry_after_s=1.0,
            )
        return self._callers.get(hashlib.sha256(secret.encode()).digest())

    def _noted(self, caller: Caller) -> Caller:
        if len(self._used) < MAX_REPORTED:
            self._used.add(caller.token_id)
        return caller

    async def hears_of(self, digest: bytes, within_s: float) -> bool:
        """Whether the secret of this hash is known within that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while digest not in (self._callers or {}):
                    await self._news.wait()
        return digest in (self._callers or {})

    async def hears_of_session(self, secret: str) -> bool:
        """Whether a session that is not known is one that has just begun elsewhere; it is waited for once."""
        digest = hashlib.sha256(secret.encode()).digest()
        if digest in self._in_vain or self._awaited >= MAX_AWAITED:
            return False
        self._awaited += 1
        try:
            found = await self.hears_of(digest, SOON_S)
        finally:
            self._awaited -= 1
        if not found:
            self._in_vain[digest] = None
            if len(self._in_vain) > MAX_IN_VAIN:
                del self._in_vain[next(iter(self._in_vain))]
        return found

    def forget(self, digest: bytes) -> None:
        """Lets in nobody with the secret of this hash, before metadata says so."""
        if self._callers is not None:
            self._callers.pop(digest, None)

    async def follow(self) -> None:
        """Mirrors metadata until the subscription breaks."""
        callers: dict[bytes, tuple[Caller, float]] = {}
        async with calling("metadata"):
            async for message in self._stub.WatchAccess(access_pb2.WatchAccessRequest()):
                for one in message.credentials:
                    ends_ms = ms_from_timestamp(one.expire_time) if one.HasField("expire_time") else math.inf
                    callers[one.hash] = (_caller(one), ends_ms)
                if message.continues:
                    continue
                if message.HasField("stale_since"):
                    _log.warning("who may come in is as it was known before the metadata database went away")
                self._take(callers)
                callers = {}

    def _take(self, callers: dict[bytes, tuple[Caller, float]]) -> None:
        self._callers = callers
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def report(self) -> None:
        """Tells metadata again and again which tokens were used; what it does not hear is told the next time."""
        while True:
            await self._clock.sleep(REPORT_INTERVAL_S)
            used, self._used = self._used, set()
            if not used:
                continue
            try:
                async with calling("metadata"):
                    await self._stub.ReportTokenUse(access_pb2.ReportTokenUseRequest(token_ids=sorted(used)))
            except OpenManagerError as error:
                self._used |= used
                _log.info("which tokens were used is told later: %s", error)


def _caller(one: access_pb2.Credential) -> Caller:
    scope = None
    if one.HasField("scope"):
        scope = Scope.of(one.scope.environments, one.scope.server_roles, one.scope.server_ids)
    how = SESSION if one.is_session else "token"
    return Caller.of(one.name, one.role, how, scope=scope, token_id=one.id, digest=one.hash)


def session_ended() -> Unauthenticated:
    """The error for a session that is over."""
    return Unauthenticated("the session is over: log in again", reason=SESSION_ENDED)


def _invalid() -> Unauthenticated:
    return Unauthenticated("the token is not valid", reason="TOKEN_INVALID")


def _expired() -> Unauthenticated:
    return Unauthenticated("the token has expired", reason="TOKEN_EXPIRED")
