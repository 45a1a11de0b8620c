"""gRPC to users and tokens and back: decode, call, encode. Every rule is in the store and the model."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp

from openmanager.access.v1 import access_pb2 as feed_pb2
from openmanager.gateway.v1 import access_pb2 as pb
from openmanager.gateway.v1 import options_pb2
from runtime import audited, caller
from runtime.errors import InvalidArgument
from runtime.interception import CallContext
from services.metadata.access.feed import AccessFeed
from services.metadata.access.model import Credential, Scope, Token, User
from services.metadata.access.sessions import Identity, Sessions
from services.metadata.access.setup import withdraw_setup
from services.metadata.access.store import UPDATABLE, AccessStore

ACCESS: Final = "openmanager.gateway.v1.AccessService"
SESSIONS: Final = "openmanager.access.v1.SessionService"
FEED: Final = "openmanager.access.v1.AccessFeedService"
MAX_USES: Final = 10_000
PART_BYTES: Final = 8 << 20
"""A message of the feed ends before it is larger; it may hold 16 MiB, and a scope of 30,000 entries may take much of
that, in each token and session of its user."""


class AccessServicer:
    """``AccessService`` but for GetCaller, which the gateway knows by itself."""

    def __init__(self, store: AccessStore, feed: AccessFeed, folder: Path) -> None:
        """Takes the folder in which the set-up token is."""
        self._store = store
        self._feed = feed
        self._folder = folder

    async def SetUp(self, request: pb.SetUpRequest, _context: object) -> pb.SetUpResponse:
        user, secret = await self._store.set_up(request.setup_token, request.name, request.password)
        self._feed.changed()
        await asyncio.to_thread(withdraw_setup, self._folder)
        return pb.SetUpResponse(user=_user(user), token_secret=secret)

    async def CreateUser(self, request: pb.CreateUserRequest, _context: object) -> pb.CreateUserResponse:
        user = await self._store.create_user(_given_user(request.user), request.password)
        return pb.CreateUserResponse(user=_user(user))

    async def ListUsers(self, request: pb.ListUsersRequest, _context: object) -> pb.ListUsersResponse:
        page = await self._store.list_users(request.page_size, request.page_token)
        return pb.ListUsersResponse(
            users=map(_user, page.items), next_page_token=page.next_page_token, total_size=page.total_size
        )

    async def UpdateUser(self, request: pb.UpdateUserRequest, context: object) -> pb.UpdateUserResponse:
        given = request.user
        present = {"role": given.role, "scope": given.HasField("scope"), "disabled": given.disabled}
        fields = list(request.update_mask.paths) or [name for name in UPDATABLE if present[name]]
        before, user = await self._store.update_user(_given_user(given), fields)
        await self._feed.kept()
        audited.tell(context, before=MessageToDict(_user(before)))
        return pb.UpdateUserResponse(user=_user(user))

    async def DeleteUser(self, request: pb.DeleteUserRequest, context: object) -> pb.DeleteUserResponse:
        before = await self._store.delete_user(request.name)
        await self._feed.kept()
        audited.tell(context, before=MessageToDict(_user(before)))
        return pb.DeleteUserResponse()

    async def SetPassword(self, request: pb.SetPasswordRequest, _context: object) -> pb.SetPasswordResponse:
        await self._store.set_password(request.name, request.password)
        await self._feed.kept()
        return pb.SetPasswordResponse()

    async def CreateToken(self, request: pb.CreateTokenRequest, _context: object) -> pb.CreateTokenResponse:
        given = request.token
        wanted = Token(
            id=given.id,
            name=given.name,
            role=given.role,
            scope=_given_scope(given),
            user=given.user,
            expire_time=_instant(given.expire_time) if given.HasField("expire_time") else None,
        )
        token, secret = await self._store.create_token(wanted)
        await self._feed.kept()
        return pb.CreateTokenResponse(token=_token(token), secret=secret)

    async def ListTokens(self, request: pb.ListTokensRequest, _context: object) -> pb.ListTokensResponse:
        page = await self._store.list_tokens(request.page_size, request.page_token, show_ended=request.show_ended)
        return pb.ListTokensResponse(
            tokens=map(_token, page.items), next_page_token=page.next_page_token, total_size=page.total_size
        )

    async def RotateToken(self, request: pb.RotateTokenRequest, _context: object) -> pb.RotateTokenResponse:
        token, secret = await self._store.rotate_token(request.id)
        await self._feed.kept()
        return pb.RotateTokenResponse(token=_token(token), secret=secret)

    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: object) -> pb.RevokeTokenResponse:
        token = await self._store.revoke_token(request.id)
        await self._feed.kept()
        audited.tell(context, before=MessageToDict(_token(replace(token, revoke_time=None))))
        return pb.RevokeTokenResponse(token=_token(token))


class AccessFeedServicer:
    """``AccessFeedService``."""

    def __init__(self, store: AccessStore, feed: AccessFeed) -> None:
        self._store = store
        self._feed = feed

    async def WatchAccess(
        self, _request: feed_pb2.WatchAccessRequest, _context: object
    ) -> AsyncGenerator[feed_pb2.WatchAccessResponse, None]:
        async with aclosing(self._feed.watch()) as changes:
            async for known in changes:
                part, size = feed_pb2.WatchAccessResponse(stale_since=_time(known.stale_since)), 0
                for one in map(_credential, known.credentials):
                    size += one.ByteSize()
                    if part.credentials and size > PART_BYTES:
                        part.continues = True
                        yield part
                        part, size = feed_pb2.WatchAccessResponse(stale_since=part.stale_since), one.ByteSize()
                    part.credentials.append(one)
                yield part

    async def ReportTokenUse(
        self, request: feed_pb2.ReportTokenUseRequest, _context: object
    ) -> feed_pb2.ReportTokenUseResponse:
        if len(request.token_ids) > MAX_USES:
            raise InvalidArgument(f"more than {MAX_USES} tokens", field="token_ids")
        await self._store.note_use(request.token_ids)
        return feed_pb2.ReportTokenUseResponse()


class SessionServicer:
    """``SessionService``."""

    def __init__(self, sessions: Sessions, feed: AccessFeed) -> None:
        self._sessions = sessions
        self._feed = feed

    async def OpenSession(
        self, request: feed_pb2.OpenSessionRequest, context: CallContext
    ) -> feed_pb2.OpenSessionResponse:
        if request.WhichOneof("proof") == "identity":
            given = request.identity
            identity = Identity(issuer=given.issuer, subject=given.subject, name=given.name, role=given.role)
            secret, credential = await self._sessions.by_identity(identity)
        elif request.WhichOneof("proof") == "password":
            typed, address = request.password, caller.told(context).address
            secret, credential = await self._sessions.by_password(typed.name, typed.password, address)
        else:
            raise InvalidArgument("a password or an identity is needed", field="proof")
        self._feed.changed()
        return feed_pb2.OpenSessionResponse(secret=secret, credential=_credential(credential))

    async def EndSession(
        self, request: feed_pb2.EndSessionRequest, _context: CallContext
    ) -> feed_pb2.EndSessionResponse:
        name = await self._sessions.end(request.hash)
        await self._feed.kept()
        return feed_pb2.EndSessionResponse(name=name)


def _credential(one: Credential) -> feed_pb2.Credential:
    return feed_pb2.Credential(
        hash=one.hash,
        id=one.id,
        name=one.name,
        role=_role(one.role),
        scope=_scope(one.scope),
        expire_time=_time(one.expire_time),
        is_session=one.is_session,
    )


def _given_scope(of: Any) -> Scope | None:
    if not of.HasField("scope"):
        return None
    return Scope(
        environments=tuple(of.scope.environments),
        server_roles=tuple(of.scope.server_roles),
        server_ids=tuple(of.scope.server_ids),
    )


def _given_user(user: pb.User) -> User:
    return User(name=user.name, role=user.role, scope=_given_scope(user), disabled=user.disabled)


def _instant(time: Timestamp) -> datetime:
    try:
        return time.ToDatetime(tzinfo=UTC)
    except (OverflowError, ValueError):
        raise InvalidArgument("the time is outside of the years 1 to 9999", field="token.expire_time") from None


def _role(role: int) -> options_pb2.Role.ValueType:
    return options_pb2.Role.ValueType(role)


def _scope(scope: Scope | None) -> pb.Scope | None:
    return None if scope is None else pb.Scope(**scope.stored())


def _time(instant: datetime | None) -> Timestamp | None:
    if instant is None:
        return None
    message = Timestamp()
    message.FromDatetime(instant)
    return message


def _user(user: User) -> pb.User:
    return pb.User(
        name=user.name,
        role=_role(user.role),
        scope=_scope(user.scope),
        disabled=user.disabled,
        create_time=_time(user.create_time),
        update_time=_time(user.update_time),
    )


def _token(token: Token) -> pb.Token:
    return pb.Token(
        id=token.id,
        name=token.name,
        role=_role(token.role),
        scope=_scope(token.scope),
        user=token.user,
        expire_time=_time(token.expire_time),
        create_time=_time(token.create_time),
        last_use_time=_time(token.last_use_time),
        revoke_time=_time(token.revoke_time),
    )
