"""Users in the record: that somebody can always administrate them, and what may be said of one."""

import pytest

from fleet.access import ADMIN, OPERATOR, VIEWER
from runtime.clock import ManualClock
from runtime.errors import FailedPrecondition, InvalidArgument
from services.metadata.access.model import Scope, Token, User
from services.metadata.access.sessions import MAX_SESSIONS, Identity, Sessions
from services.metadata.access.store import AccessStore
from services.metadata.store_connection import Database

STAGING = Scope(environments=("staging",))


async def test_an_administrator_with_a_scope_is_not_the_one_who_must_remain(database: Database) -> None:
    store, sessions = AccessStore(database), Sessions(database, ManualClock(), lifetime_s=60.0)
    await store.create_user(User(name="Ada", role=ADMIN), "")
    await store.create_user(User(name="Grace", role=ADMIN, scope=STAGING), "")
    for change in (
        lambda: store.update_user(User(name="Ada", role=ADMIN, scope=STAGING), ["scope"]),
        lambda: store.update_user(User(name="Ada", role=VIEWER), ["role"]),
        lambda: store.delete_user("Ada"),
    ):
        with pytest.raises(FailedPrecondition) as refused:
            await change()
        assert refused.value.reason == "LAST_ADMINISTRATOR"
    for name, said, role in (("Ada", VIEWER, ADMIN), ("Grace", OPERATOR, OPERATOR)):
        for _ in range(2):  # the first time he is bound to what he is there
            identity = Identity(issuer="https://id.example", subject=name, name=name, role=said)
            _, credential = await sessions.by_identity(identity)
        assert credential.role == role
    await store.update_user(User(name="Grace", role=ADMIN), ["role", "scope"])
    await store.update_user(User(name="Ada", role=ADMIN, scope=STAGING), ["scope"])


async def test_a_scope_that_restricts_nothing_is_none(database: Database) -> None:
    store = AccessStore(database)
    await store.create_user(User(name="Ada", role=ADMIN), "")
    _, ada = await store.update_user(User(name="Ada", role=ADMIN, scope=Scope()), ["scope"])
    token, _ = await store.create_token(Token(name="t", role=ADMIN, scope=Scope(), user="Ada"))
    assert (ada.scope, token.scope) == (None, None)
    async with database.connection() as connection:  # as versions before kept it
        nothing = '{"environments": [], "server_roles": [], "server_ids": []}'
        await connection.execute("UPDATE access_users SET scope = $1::jsonb", nothing)
        await connection.execute("UPDATE access_tokens SET scope = $1::jsonb", nothing)
    assert [one.scope for one in (await store.known()).credentials] == [None]
    with pytest.raises(FailedPrecondition):
        await store.delete_user("Ada")


async def test_a_role_that_is_none_is_told_also_where_it_is_not_what_changes(database: Database) -> None:
    store = AccessStore(database)
    await store.create_user(User(name="Ada", role=ADMIN), "")
    for role in (17, -1, 1 << 20):
        with pytest.raises(InvalidArgument) as refused:
            await store.update_user(User(name="Ada", role=role), ["disabled"])
        assert refused.value.field == "user.role"


async def test_a_log_in_after_the_clock_was_set_back_ends_the_oldest_session_and_not_itself(
    database: Database,
) -> None:
    store, sessions = AccessStore(database), Sessions(database, ManualClock(), lifetime_s=3_600.0)
    ada = Identity(issuer="https://id.example", subject="1", name="Ada", role=ADMIN)
    opened = [(await sessions.by_identity(ada))[1].id for _ in range(MAX_SESSIONS)]
    async with database.connection() as connection:
        await connection.execute("UPDATE access_tokens SET created_at = created_at + interval '30 minutes'")
    _, new = await sessions.by_identity(ada)
    assert {one.id for one in (await store.known()).credentials} == {*opened[1:], new.id}
