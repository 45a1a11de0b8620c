"""What gateways are told of who may come in, also when our own disk or PostgreSQL does not do its part."""

import asyncio
import itertools
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import pytest

from fleet import access
from fleet.access import ADMIN, AGENT, OPERATOR, VIEWER
from openmanager.access.v1 import access_pb2 as feed_pb2
from openmanager.gateway.v1 import access_pb2, options_pb2
from runtime.clock import ManualClock, SystemClock
from runtime.errors import NotFound, Unavailable
from runtime.interception import CallContext
from services.metadata.access import feed as module
from services.metadata.access.feed import AccessFeed
from services.metadata.access.model import Credential, Known, Scope, Token, User
from services.metadata.access.secrets import digest
from services.metadata.access.servicer import AccessServicer, SessionServicer
from services.metadata.access.sessions import Identity, Sessions
from services.metadata.access.store import AccessStore
from services.metadata.store_connection import Database
from tests.harness import eventually

PASSWORD = "correct horse battery"
ADA = Credential(hash=b"h" * 32, id="1", name="Ada", role=3, scope=None, expire_time=None)


class Record:
    """Stands for PostgreSQL."""

    def __init__(self) -> None:
        self.now = Known(revision=1, credentials=(ADA,))
        self.is_away = False
        self.identity = "one"

    async def revision(self) -> int:
        return (await self.known()).revision

    async def known(self) -> Known:
        if self.is_away:
            raise Unavailable("away")
        return self.now


async def test_who_is_let_in_no_more_is_told_also_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, write = Record(), module._write
    feed = AccessFeed(tmp_path, cast("AccessStore", record), SystemClock())
    following = asyncio.create_task(feed.follow())
    try:
        async with aclosing(feed.watch()) as told:
            assert (await anext(told)).credentials == (ADA,)
            await eventually((tmp_path / "access.json").exists)

            def full(*_: object) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(module, "_write", full)
            record.now = Known(revision=2, credentials=())
            feed.changed()
            assert (await asyncio.wait_for(anext(told), 10)).credentials == ()
            monkeypatch.setattr(module, "_write", write)
            await eventually(lambda: _on_disk(tmp_path) == (2, ()))
            record.is_away = True
            feed.changed()
            assert (await asyncio.wait_for(anext(told), 10)).stale_since is not None
    finally:
        following.cancel()
        await asyncio.wait({following})
    assert _on_disk(tmp_path) == (2, ())


async def test_another_database_with_as_many_changes_is_told_and_kept(tmp_path: Path) -> None:
    record = Record()
    feed = AccessFeed(tmp_path, cast("AccessStore", record), SystemClock())
    following = asyncio.create_task(feed.follow())
    try:
        async with aclosing(feed.watch()) as told:
            assert (await anext(told)).credentials == (ADA,)
            await eventually(lambda: (tmp_path / "access.json").exists() and _on_disk(tmp_path) == (1, (ADA,)))
            record.now, record.identity = Known(revision=1, credentials=()), "another"
            feed.changed()
            assert (await asyncio.wait_for(anext(told), 10)).credentials == ()
            await eventually(lambda: _on_disk(tmp_path) == (1, ()))
    finally:
        following.cancel()
        await asyncio.wait({following})


class Leaving(AccessStore):
    """PostgreSQL goes away as soon as it has made a change."""

    is_away = False

    async def revision(self) -> int:
        return (await self.known()).revision

    async def known(self) -> Known:
        if self.is_away:
            raise Unavailable("away")
        return await super().known()


async def test_a_change_right_before_the_database_went_away_holds_while_it_is_away(
    database: Database, tmp_path: Path
) -> None:
    store, sessions = Leaving(database), Sessions(database, SystemClock(), lifetime_s=3_600.0)
    await store.create_user(User(name="Ada", role=ADMIN), PASSWORD)
    await store.create_user(User(name="Grace", role=OPERATOR), PASSWORD)
    tokens = [(await store.create_token(Token(name=str(number), role=VIEWER)))[0].id for number in range(3)]
    await store.create_token(Token(name="of Grace", role=VIEWER, user="Grace"))
    secret, _ = await sessions.by_password("Ada", PASSWORD, "192.0.2.1")
    everybody = {one.hash for one in (await store.known()).credentials}
    feed = AccessFeed(tmp_path, store, SystemClock())
    store.told = sessions.told = feed.take
    servicer, log_outs = AccessServicer(store, feed, tmp_path), SessionServicer(sessions, feed)
    following = asyncio.create_task(feed.follow())
    try:
        await eventually((tmp_path / "access.json").exists)
        assert {one.hash for one in _on_disk(tmp_path)[1]} == everybody
        store.is_away = True
        await servicer.RevokeToken(access_pb2.RevokeTokenRequest(id=tokens[0]), Mock())
        await servicer.DeleteUser(access_pb2.DeleteUserRequest(name="Grace"), Mock())
        await log_outs.EndSession(feed_pb2.EndSessionRequest(hash=digest(secret)), cast("CallContext", None))
        wanted = access_pb2.Token(name="new", role=options_pb2.ROLE_VIEWER)
        tokens.append((await servicer.CreateToken(access_pb2.CreateTokenRequest(token=wanted), Mock())).token.id)
        assert {one.id for one in _on_disk(tmp_path)[1]} == set(tokens[1:])
        await eventually(lambda: feed.known is not None and feed.known.stale_since is not None)
        assert feed.known is not None
        assert {one.id for one in feed.known.credentials} == set(tokens[1:])
        store.is_away = False
        feed.changed()
        await eventually(lambda: feed.known is not None and feed.known.stale_since is None)
        assert {one.id for one in feed.known.credentials} == set(tokens[1:])
    finally:
        following.cancel()
        await asyncio.wait({following})


def _on_disk(folder: Path) -> tuple[int, tuple[Credential, ...]]:
    found = module._read(folder / "access.json")
    assert found is not None
    return found.revision, found.credentials


async def test_a_token_that_has_ended_gets_no_other_secret(database: Database) -> None:
    store = AccessStore(database)
    token, secret = await store.create_token(
        Token(name="t", role=VIEWER, expire_time=datetime.now(UTC) + timedelta(hours=1))
    )
    _, other = await store.rotate_token(token.id)
    assert other != secret and [one.hash for one in (await store.known()).credentials] == [digest(other)]
    async with database.connection() as connection:
        await connection.execute("UPDATE access_tokens SET expires_at = now()")
    with pytest.raises(NotFound, match=token.id):
        await store.rotate_token(token.id)
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT hash FROM access_tokens") == digest(other)
    revoked, _ = await store.create_token(Token(name="u", role=VIEWER))
    await store.revoke_token(revoked.id)
    with pytest.raises(NotFound, match=revoked.id):
        await store.rotate_token(revoked.id)


@pytest.mark.parametrize(
    ("token", "user"),
    [
        (Scope(environments=("staging",)), Scope(environments=("production",))),
        (Scope(server_roles=("web",)), Scope(server_roles=("db",), environments=("production",))),
        (Scope(server_ids=("web-01",)), Scope(server_ids=("db-01",))),
    ],
)
def test_scopes_that_share_nothing_let_nobody_see_what_has_no_environment(token: Scope, user: Scope) -> None:
    for left in (token.within(user), user.within(token)):
        seen = access.Scope.of(left.environments, left.server_roles, left.server_ids)
        for place in itertools.product(("", "staging", "production"), ("", "web", "db")):
            assert not seen.has("web-01", *place)


def test_of_two_scopes_what_both_have_is_left() -> None:
    one, other = (
        Scope(environments=("a", "b"), server_ids=("s",)),
        Scope(environments=("b", "c"), server_roles=("web",)),
    )
    assert one.within(other) == Scope(environments=("b",), server_roles=("web",), server_ids=("s",))
    assert one.within(None) == one.within(Scope()) == one


async def test_a_token_gains_nothing_by_what_becomes_of_its_user(database: Database) -> None:
    store = AccessStore(database)
    await store.create_user(User(name="Grace", role=ADMIN), "")
    for role in (VIEWER, AGENT, OPERATOR, ADMIN):
        await store.create_token(Token(name=str(role), role=role, user="Grace"))
    await store.create_user(User(name="Ada", role=ADMIN), "")  # somebody must remain one
    for role, left in (
        (ADMIN, {VIEWER: VIEWER, AGENT: AGENT, OPERATOR: OPERATOR, ADMIN: ADMIN}),
        (OPERATOR, {VIEWER: VIEWER, AGENT: AGENT, OPERATOR: OPERATOR, ADMIN: OPERATOR}),
        (VIEWER, {VIEWER: VIEWER, AGENT: 0, OPERATOR: VIEWER, ADMIN: VIEWER}),
        (AGENT, {VIEWER: 0, AGENT: AGENT, OPERATOR: AGENT, ADMIN: AGENT}),
    ):
        await store.update_user(User(name="Grace", role=role), ["role"])
        tokens = {token.id: token.role for token in (await store.list_tokens(10, "", show_ended=False)).items}
        assert {tokens[one.id]: one.role for one in (await store.known()).credentials} == left


async def test_a_name_may_have_any_letters(database: Database) -> None:
    store, sessions = AccessStore(database), Sessions(database, ManualClock(), lifetime_s=60.0)
    await store.create_user(User(name="Ada", role=ADMIN), PASSWORD)
    for name in ("\N{LATIN CAPITAL LETTER A WITH DIAERESIS}rger", "\N{CYRILLIC CAPITAL LETTER A}da"):
        await store.create_user(User(name=name, role=VIEWER), PASSWORD)
        _, credential = await sessions.by_password(name, PASSWORD, "192.0.2.1")
        assert credential.name == name
        await store.set_password(name, PASSWORD)
        await store.create_token(Token(name="t", role=VIEWER, user=name))
        _, changed = await store.update_user(User(name=name, role=OPERATOR), ["role"])
        assert (changed.name, changed.role) == (name, OPERATOR)
        assert (await store.delete_user(name)).name == name
    name = "\N{LATIN CAPITAL LETTER E WITH ACUTE}mile"
    await store.create_user(User(name=name, role=VIEWER), "")
    _, credential = await sessions.by_identity(Identity(issuer="https://id.example", subject="7", name=name))
    assert credential.name == name
