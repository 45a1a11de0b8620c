# ruff: noqa: S105, S608  every statement is put together at import, from constants of this file; tokens are a table
"""Users and tokens in PostgreSQL, as SQL.

What must stay true: every value is a bound parameter; there is always an administrator who may come in, once there was
one; what changes bumps the revision that watchers look at (triggers of the schema), and what changes more than one row,
or one that others lean on, does so in `changing`.
"""

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import asyncpg
import orjson

from fleet.access import ADMIN, includes
from runtime import paging
from runtime.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unauthenticated
from services.metadata import checks
from services.metadata.access import secrets
from services.metadata.access.model import (
    Credential,
    Known,
    Scope,
    Token,
    User,
    check_name,
    check_password,
    check_role,
)
from services.metadata.store import Page
from services.metadata.store_connection import Database

LOWER: Final = """lower($1::text COLLATE "C")"""
"""The first argument as the column compares names, whose collation is "C": A to Z are a to z, other letters stay what
they are. The database's own makes ä of Ä, too, and by that nobody was found whose name has an Ä."""
OF_NAME: Final = f"lower(name) = {LOWER}"
_USER: Final = "name, role, scope, disabled, created_at, updated_at"
_TOKEN: Final = """t.id, t.name, t.role, t.scope, coalesce(u.name, '') AS user_name, t.expires_at, t.created_at,
    t.last_used_at, t.revoked_at"""
TOKENS: Final = "access_tokens AS t LEFT JOIN access_users AS u ON u.id = t.user_id"
LIVE: Final = "t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > now())"
_SET_UP: Final = "setup_hash = $1 AND NOT EXISTS (SELECT FROM access_users)"
_CREATE_USER: Final = f"""INSERT INTO access_users (name, role, scope, disabled, password_hash)
    VALUES ($1, $2, $3::jsonb, $4, $5) ON CONFLICT (lower(name)) DO NOTHING RETURNING {_USER}"""
_GET_USER: Final = f"SELECT {_USER} FROM access_users WHERE {OF_NAME}"
_UPDATE_USER: Final = f"""UPDATE access_users SET
    role = CASE WHEN 'role' = ANY ($5::text[]) THEN $2 ELSE role END,
    scope = CASE WHEN 'scope' = ANY ($5) THEN $3::jsonb ELSE scope END,
    disabled = CASE WHEN 'disabled' = ANY ($5) THEN $4 ELSE disabled END,
    updated_at = now() WHERE {OF_NAME} RETURNING {_USER}"""
_EVERYTHING: Final = """'{"environments": [], "server_roles": [], "server_ids": []}'::jsonb"""
ADMINISTRATES: Final = f"role = {ADMIN} AND NOT disabled AND coalesce(scope, {_EVERYTHING}) = {_EVERYTHING}"
"""Who may do something about users: that is about all servers, so nobody with a scope."""
ADMINISTRATORS: Final = f"SELECT count(*) FROM access_users WHERE {ADMINISTRATES}"
_CREATE_TOKEN: Final = """INSERT INTO access_tokens (name, role, scope, hash, user_id, expires_at, id)
    VALUES ($1, $2, $3::jsonb, $4, $5, $6, coalesce($7, gen_random_uuid())) ON CONFLICT (id) DO NOTHING RETURNING id"""
_GET_TOKEN: Final = f"SELECT {_TOKEN} FROM {TOKENS} WHERE t.id = $1"
_LIST_TOKENS: Final = f"""SELECT {_TOKEN} FROM {TOKENS} WHERE NOT t.is_session AND ($1 OR {LIVE})
    AND ($2::timestamptz IS NULL OR (t.created_at, t.id) < ($2, $3::uuid))
    ORDER BY t.created_at DESC, t.id DESC LIMIT $4"""
_COUNT_TOKENS: Final = f"SELECT count(*) FROM {TOKENS} WHERE NOT t.is_session AND ($1 OR {LIVE})"
CREDENTIAL: Final = """t.hash, t.id, coalesce(u.name, t.name) AS name, t.role, t.scope, t.expires_at,
    t.is_session, u.role AS user_role, u.scope AS user_scope"""
_CREDENTIALS: Final = f"""SELECT {CREDENTIAL} FROM {TOKENS}
    WHERE {LIVE} AND coalesce(NOT u.disabled, true) ORDER BY t.id"""
UPDATABLE: Final = ("role", "scope", "disabled")


@asynccontextmanager
async def changing(database: Database, told: Callable[[Known], None] | None = None) -> AsyncIterator[Any]:
    """A connection in a transaction that no other change of users and tokens runs beside.

    All of them bump the revision in the end. Who locked other rows before that, in whatever order, waited in a circle
    with somebody else: after a second PostgreSQL aborts one of them. `told` is given who may come in then: who asks for
    that afterwards may find the database away, for hours.
    """
    known: Known | None = None
    async with database.connection() as connection, connection.transaction():
        await connection.execute("SELECT FROM access_state FOR UPDATE")
        yield connection
        if told is not None:
            known = await _known(connection)
    if told is not None and known is not None:
        told(known)


class AccessStore:
    """Every method raises Unavailable while the database is away."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.told: Callable[[Known], None] | None = None
        """Is given who may come in, after each change of that."""

    async def new_setup_token(self) -> str:
        """A set-up token, in the place of the one before; empty: there is a user already."""
        secret = secrets.new_setup_token()
        async with self._database.connection() as connection:
            made = await connection.fetchval(
                "UPDATE access_state SET setup_hash = $1 WHERE NOT EXISTS (SELECT FROM access_users) RETURNING true",
                secrets.digest(secret),
            )
        return secret if made else ""

    async def set_up(self, setup_token: str, name: str, password: str) -> tuple[User, str]:
        """The first administrator, and a token of his.

        Raises:
            Unauthenticated: it is not the set-up token, or it was used.
        """
        check_name(name, "name")
        checks.check_text(name, "name")
        check_password(password)
        shown = secrets.digest(setup_token)
        async with self._database.connection() as connection:  # a stranger's password is not worth 60 ms of a core
            if not await connection.fetchval(f"SELECT true FROM access_state WHERE {_SET_UP}", shown):
                raise _no_setup_token()
        kept = await secrets.hashed(password)
        async with self._database.connection() as connection, connection.transaction():
            if not await connection.fetchval(
                f"UPDATE access_state SET setup_hash = NULL WHERE {_SET_UP} RETURNING true", shown
            ):
                raise _no_setup_token()
            user = _user(await connection.fetchrow(_CREATE_USER, name, ADMIN, None, False, kept))
            secret = secrets.new_token()
            own = await connection.fetchval(f"SELECT id FROM access_users WHERE {OF_NAME}", name)
            digest = secrets.digest(secret)
            await connection.fetchval(_CREATE_TOKEN, "made at set-up", ADMIN, None, digest, own, None, None)
        return user, secret

    async def create_user(self, user: User, password: str) -> User:
        """Adds a user; an empty password: he has none.

        Raises:
            AlreadyExists: the name is taken.
        """
        check_name(user.name, "user.name")
        check_role(user.role, "user.role")
        scope = _stored(user.scope, "user.scope")
        kept = await secrets.hashed(check_password(password)) if password else None
        async with self._database.connection() as connection:
            row = await connection.fetchrow(_CREATE_USER, user.name, user.role, scope, user.disabled, kept)
        if row is None:
            raise AlreadyExists(f"there is a user {user.name!r}", field="user.name")
        return _user(row)

    async def list_users(self, page_size: int, page_token: str) -> Page[User]:
        """Users in order of name."""
        limit = paging.page_size(page_size)
        last = paging.position("users", [], page_token, (str,))
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                f"SELECT {_USER} FROM access_users WHERE name > $1 ORDER BY name LIMIT $2",
                "" if last is None else last[0],
                limit + 1,
            )
            total = await connection.fetchval("SELECT count(*) FROM access_users")
        token = paging.page_token("users", [], [rows[limit - 1]["name"]]) if len(rows) > limit else ""
        return Page(items=tuple(map(_user, rows[:limit])), next_page_token=token, total_size=total)

    async def update_user(self, user: User, fields: Collection[str]) -> tuple[User, User]:
        """Sets the named ones of UPDATABLE; the user before and afterwards.

        Raises:
            NotFound: there is no such user.
            FailedPrecondition: LAST_ADMINISTRATOR.
        """
        for name in fields:
            if name not in UPDATABLE:
                raise InvalidArgument(f"{name} cannot be updated; {', '.join(UPDATABLE)} can", field="update_mask")
        if "role" in fields or user.role:
            check_role(user.role, "user.role")
        scope = _stored(user.scope, "user.scope")
        checks.check_text(user.name, "user.name")
        async with self._administrated() as connection:
            before = await connection.fetchrow(_GET_USER, user.name)
            row = await connection.fetchrow(
                _UPDATE_USER, user.name, user.role, scope, user.disabled, sorted(set(fields))
            )
            if row is None:
                raise _no_user(user.name, "user.name")
        return _user(before), _user(row)

    async def delete_user(self, name: str) -> User:
        """Removes a user with his tokens and returns him as he was; raises as `update_user`."""
        checks.check_text(name, "name")
        async with self._administrated() as connection:
            deleted = await connection.fetchrow(f"DELETE FROM access_users WHERE {OF_NAME} RETURNING {_USER}", name)
            if deleted is None:
                raise _no_user(name, "name")
        return _user(deleted)

    @asynccontextmanager
    async def _administrated(self) -> AsyncIterator[Any]:
        """A transaction that leaves an administrator, if there was one."""
        async with changing(self._database, self.told) as connection:  # two at once would each leave the other
            before = await connection.fetchval(ADMINISTRATORS)
            yield connection
            if before and not await connection.fetchval(ADMINISTRATORS):
                raise FailedPrecondition("somebody must remain an administrator", reason="LAST_ADMINISTRATOR")

    async def set_password(self, name: str, password: str) -> None:
        """Ends the user's sessions, too. Raises NotFound."""
        checks.check_text(name, "name")
        kept = await secrets.hashed(check_password(password))
        async with changing(self._database, self.told) as connection:
            changed = await connection.fetchval(
                f"UPDATE access_users SET password_hash = $2, updated_at = now() WHERE {OF_NAME} RETURNING id",
                name,
                kept,
            )
            if changed is None:
                raise _no_user(name, "name")
            await connection.execute("DELETE FROM access_tokens WHERE user_id = $1 AND is_session", changed)

    async def create_token(self, token: Token) -> tuple[Token, str]:
        """A token and its secret.

        Raises:
            NotFound: its user is not there.
            AlreadyExists: its id is taken.
            InvalidArgument: naming the field; also a role that is more than its user's.
        """
        check_name(token.name, "token.name")
        checks.check_text(token.user, "token.user")
        check_role(token.role, "token.role")
        scope = _stored(token.scope, "token.scope")
        if token.expire_time is not None and token.expire_time <= datetime.now(UTC):
            raise InvalidArgument("is over already", field="token.expire_time")
        secret, wanted = secrets.new_token(), _uuid(token.id, "token.id") if token.id else None
        async with changing(self._database, self.told) as connection:  # it leans on its user, who may be going just now
            user_id = None
            if token.user:
                found = await connection.fetchrow(f"SELECT id, role FROM access_users WHERE {OF_NAME}", token.user)
                if found is None:
                    raise _no_user(token.user, "token.user")
                if not includes(found["role"], token.role):
                    raise InvalidArgument("the token may do more than its user", field="token.role")
                user_id = found["id"]
            digest = secrets.digest(secret)
            made = await connection.fetchval(
                _CREATE_TOKEN, token.name, token.role, scope, digest, user_id, token.expire_time, wanted
            )
            if made is None:
                raise AlreadyExists(f"there is a token {token.id}", field="token.id")
            row = await connection.fetchrow(_GET_TOKEN, made)
        return _token(row), secret

    async def list_tokens(self, page_size: int, page_token: str, *, show_ended: bool) -> Page[Token]:
        """Tokens, newest first."""
        limit = paging.page_size(page_size)
        last = paging.position("tokens", [show_ended], page_token, (str, str))
        try:
            before = (None, None) if last is None else (datetime.fromisoformat(str(last[0])), UUID(str(last[1])))
        except ValueError:
            raise paging.bad_token() from None
        async with self._database.connection() as connection:
            rows = await connection.fetch(_LIST_TOKENS, show_ended, *before, limit + 1)
            total = await connection.fetchval(_COUNT_TOKENS, show_ended)
        token = ""
        if len(rows) > limit:
            end = rows[limit - 1]
            token = paging.page_token("tokens", [show_ended], [end["created_at"].isoformat(), str(end["id"])])
        return Page(items=tuple(map(_token, rows[:limit])), next_page_token=token, total_size=total)

    async def rotate_token(self, token_id: str) -> tuple[Token, str]:
        """The token with another secret; raises NotFound, also when it was revoked or is over."""
        wanted, secret = _uuid(token_id), secrets.new_token()
        async with changing(self._database, self.told) as connection:
            changed = await connection.fetchval(
                f"UPDATE access_tokens AS t SET hash = $2 WHERE t.id = $1 AND {LIVE} RETURNING true",
                wanted,
                secrets.digest(secret),
            )
            row = await connection.fetchrow(_GET_TOKEN, wanted) if changed else None
        return _found_token(row, token_id), secret

    async def revoke_token(self, token_id: str) -> Token:
        """The token, ended; once more is no fault. Raises NotFound."""
        wanted = _uuid(token_id)
        async with changing(self._database, self.told) as connection:
            await connection.execute(
                "UPDATE access_tokens SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL", wanted
            )
            row = await connection.fetchrow(_GET_TOKEN, wanted)
        return _found_token(row, token_id)

    async def note_use(self, token_ids: Collection[str]) -> None:
        """Tokens were used now."""
        wanted = [_uuid(token_id) for token_id in token_ids]
        async with self._database.connection() as connection:
            await connection.execute("UPDATE access_tokens SET last_used_at = now() WHERE id = ANY ($1)", wanted)

    @property
    def identity(self) -> str | None:
        """Of which database a revision is: another one may have the same with other content."""
        return self._database.identity

    async def revision(self) -> int:
        """Grows with every change."""
        async with self._database.connection() as connection:
            found: int = await connection.fetchval("SELECT revision FROM access_state")
        return found

    async def known(self) -> Known:
        """Everybody who may come in now."""
        async with (
            self._database.connection() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            return await _known(connection)


async def _known(connection: Any) -> Known:
    revision = await connection.fetchval("SELECT revision FROM access_state")
    rows = await connection.fetch(_CREDENTIALS)
    return Known(revision=revision, credentials=tuple(map(credential_of, rows)))


def _no_setup_token() -> Unauthenticated:
    return Unauthenticated(
        "this is not the set-up token, or it was used; while there is no user, a new one is made at each start of "
        "metadata, in DATA_DIR/metadata/setup-token",
        reason="SETUP_TOKEN_INVALID",
    )


def _no_user(name: str, field: str) -> NotFound:
    return NotFound(f"there is no user {name[:255]!r}", reason="USER_NOT_FOUND", field=field)


def _found_token(row: asyncpg.Record | None, token_id: str) -> Token:
    if row is None:
        raise NotFound(f"there is no token {token_id[:64]!r}", reason="TOKEN_NOT_FOUND", field="id")
    return _token(row)


def _uuid(text: str, field: str = "id") -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise InvalidArgument(f"{text[:64]!r} is not the id of a token", field=field) from None


def _stored(scope: Scope | None, field: str) -> str | None:
    if scope is None or Scope.of(scope.checked(field).stored()) is None:
        return None
    return orjson.dumps(scope.stored()).decode()


def _scope(text: str | None) -> Scope | None:
    return None if text is None else Scope.of(orjson.loads(text))


def _user(row: asyncpg.Record) -> User:
    return User(
        name=row["name"],
        role=row["role"],
        scope=_scope(row["scope"]),
        disabled=row["disabled"],
        create_time=row["created_at"],
        update_time=row["updated_at"],
    )


def _token(row: asyncpg.Record) -> Token:
    return Token(
        id=str(row["id"]),
        name=row["name"],
        role=row["role"],
        scope=_scope(row["scope"]),
        user=row["user_name"],
        expire_time=row["expires_at"],
        create_time=row["created_at"],
        last_use_time=row["last_used_at"],
        revoke_time=row["revoked_at"],
    )


def credential_of(row: asyncpg.Record) -> Credential:
    """A user's token can do no more than he, also when his rights shrank after it was made, nor more than it was made
    for; his session, all he can."""
    role, scope = row["role"], _scope(row["scope"])
    if row["user_role"] is not None:
        if row["is_session"] or includes(role, row["user_role"]):
            role = row["user_role"]
        elif not includes(row["user_role"], role):  # who reads and who writes rows only have nothing in common
            role = 0
        of_user = _scope(row["user_scope"])
        scope = of_user if scope is None else scope.within(of_user)
    return Credential(
        hash=row["hash"],
        id=str(row["id"]),
        name=row["name"],
        role=role,
        scope=scope,
        expire_time=row["expires_at"],
        is_session=row["is_session"],
    )
