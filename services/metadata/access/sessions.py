# ruff: noqa: S608  every statement is put together at import, from constants of this file
"""Sessions of people who log in, in PostgreSQL: tokens that only a cookie may carry.

    by_password    who knows the password of a user
    by_identity    whom an OpenID provider has seen; a user is bound to what he is there for good, at his first log-in

What must stay true: there is always an administrator, once there was one, whatever a provider says; a wrong password,
an unknown name, a user without a password and one who may not come in are one error and take as long; a password that
was changed while it was compared opens nothing; a user with a password is never taken over by an identity that calls
itself the same.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import asyncpg

from runtime.clock import Clock
from runtime.errors import OpenManagerError, PermissionDenied, ResourceExhausted, Unauthenticated
from services.metadata import checks
from services.metadata.access import secrets
from services.metadata.access.attempts import Attempts
from services.metadata.access.model import (
    MAX_NAME_CHARACTERS,
    MAX_PASSWORD_BYTES,
    Credential,
    Known,
    check_name,
    check_role,
)
from services.metadata.access.store import (
    ADMINISTRATES,
    ADMINISTRATORS,
    CREDENTIAL,
    LIVE,
    LOWER,
    OF_NAME,
    TOKENS,
    changing,
    credential_of,
)
from services.metadata.store_connection import Database

MAX_SESSIONS: Final = 20
"""Of one user at once; one more ends his oldest."""
MAX_HASHING: Final = 2
"""Passwords that are compared at once: each takes a core for 60 ms and 64 MiB."""
MAX_WAITING: Final = 50

# Names are compared by the database, and tries are counted by it, too: Python's lower() knows other letters. What is
# one name to the column is one to the database's own lower(), to which more are one: these have their tries together.
_ACCOUNT: Final = f"""SELECT lower($1) AS name, u.id, u.password_hash FROM (SELECT) AS one
    LEFT JOIN access_users AS u ON lower(u.name) = {LOWER} AND NOT u.disabled"""
_NEW: Final = """INSERT INTO access_tokens (name, role, hash, user_id, expires_at, is_session)
    SELECT 'session', role, $2, id, now() + $3 * interval '1 second', true FROM access_users
    WHERE id = $1 AND NOT disabled AND ($4::text IS NULL OR password_hash = $4) RETURNING id"""
# But the new one, which is not the newest where the clock was ahead when the others began.
_MAKE_ROOM: Final = """DELETE FROM access_tokens WHERE is_session AND (expires_at <= now() OR id IN (
    SELECT id FROM access_tokens WHERE is_session AND user_id = $1 AND id <> $3
    ORDER BY created_at DESC, id OFFSET $2))"""
_CREDENTIAL: Final = f"SELECT {CREDENTIAL} FROM {TOKENS} WHERE t.id = $1 AND {LIVE}"
_END: Final = """DELETE FROM access_tokens AS t USING access_users AS u
    WHERE t.hash = $1 AND t.is_session AND u.id = t.user_id RETURNING u.name"""
_SEEN: Final = f"""UPDATE access_users SET role = new.role,
    updated_at = CASE WHEN access_users.role = new.role THEN updated_at ELSE now() END
    FROM (SELECT id, CASE WHEN $3 = 0 OR ({ADMINISTRATES} AND ({ADMINISTRATORS}) = 1)
        THEN role ELSE $3 END AS role FROM access_users WHERE issuer = $1 AND subject = $2) AS new
    WHERE access_users.id = new.id RETURNING access_users.id"""
_BIND: Final = f"""UPDATE access_users SET issuer = $2, subject = $3, updated_at = now()
    WHERE {OF_NAME} AND issuer IS NULL AND password_hash IS NULL RETURNING id"""
_ADD: Final = """INSERT INTO access_users (name, role, issuer, subject) VALUES ($1, $4, $2, $3)
    ON CONFLICT (lower(name)) DO NOTHING RETURNING id"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whom a provider has seen. `role` 0: it does not say."""

    issuer: str
    subject: str
    name: str
    role: int = 0


class Sessions:
    """Every method raises Unavailable while the database is away."""

    def __init__(self, database: Database, clock: Clock, *, lifetime_s: float) -> None:
        self._database = database
        self._attempts = Attempts(clock)
        self._lifetime_s = lifetime_s
        self._hashing = asyncio.Semaphore(MAX_HASHING)
        self._waiting = 0
        self.told: Callable[[Known], None] | None = None
        """As `AccessStore.told`."""

    async def by_password(self, name: str, password: str, address: str) -> tuple[str, Credential]:
        """The secret of a new session, and how it is known.

        Raises:
            Unauthenticated: LOGIN_FAILED.
            ResourceExhausted: LOGIN_RATE_LIMITED; LOGIN_BUSY.
        """
        async with self._database.connection() as connection:
            account = await connection.fetchrow(_ACCOUNT, name[: MAX_NAME_CHARACTERS + 1].replace("\0", "?"))
        self._attempts.spend(account["name"], address)
        try:
            if not await self._matches(account["password_hash"], password):
                raise _failed()
            opened = await self._open(account["id"], account["password_hash"])
        except Unauthenticated:
            raise
        except OpenManagerError:  # nothing was learnt of the password
            self._attempts.give_back(account["name"], address)
            raise
        self._attempts.right(account["name"], address)
        return opened

    async def by_identity(self, identity: Identity) -> tuple[str, Credential]:
        """The same for whom a provider has seen.

        Raises:
            InvalidArgument: naming the field; a name that no user can have.
            PermissionDenied: IDENTITY_UNKNOWN; he is no user, and none is made of him.
        """
        for field in ("issuer", "subject"):
            checks.check_text(getattr(identity, field), f"identity.{field}", max_characters=1_024)
        check_name(identity.name, "identity.name")
        if identity.role:
            check_role(identity.role, "identity.role")
        return await self._open(await self._user_of(identity))

    async def end(self, digest: bytes) -> str:
        """Ends the session with this hash; whose it was, empty: there was none."""
        async with changing(self._database, self.told) as connection:
            return await connection.fetchval(_END, digest) or ""

    async def _matches(self, kept: str | None, password: str) -> bool:
        if self._waiting >= MAX_WAITING:
            raise ResourceExhausted("too many log in at once; try again", reason="LOGIN_BUSY", retry_after_s=2.0)
        self._waiting += 1
        try:
            async with self._hashing:
                found = await secrets.matches(kept, password[:MAX_PASSWORD_BYTES])
        finally:
            self._waiting -= 1
        return found and len(password.encode()) <= MAX_PASSWORD_BYTES

    async def _user_of(self, identity: Identity) -> Any:
        who = (identity.name, identity.issuer, identity.subject)
        async with changing(self._database) as connection:
            found = await connection.fetchval(_SEEN, identity.issuer, identity.subject, identity.role)
            if found is None:
                found = await connection.fetchval(_BIND, *who)
            if found is None and identity.role:
                found = await connection.fetchval(_ADD, *who, identity.role)
        if found is None:
            raise PermissionDenied(
                f"{identity.name!r} is not a user here, or one who logs in with a password", reason="IDENTITY_UNKNOWN"
            )
        return found

    async def _open(self, user_id: Any, kept: str | None = None) -> tuple[str, Credential]:
        """`kept`: of the password that was shown; None: it was none that was shown."""
        secret = secrets.new_session()
        async with changing(self._database) as connection:
            made = await connection.fetchval(_NEW, user_id, secrets.digest(secret), self._lifetime_s, kept)
            if made is not None:
                await connection.execute(_MAKE_ROOM, user_id, MAX_SESSIONS - 1, made)
            row: asyncpg.Record | None = await connection.fetchrow(_CREDENTIAL, made)
        if row is None:  # disabled, deleted or given another password meanwhile
            raise _failed()
        return secret, credential_of(row)


def _failed() -> Unauthenticated:
    return Unauthenticated("the name or the password is not right", reason="LOGIN_FAILED")
