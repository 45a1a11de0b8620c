"""Secrets: how they are made, and what of them is kept.

Passwords are people's, so they are hashed slowly (argon2id, RFC 9106's second recommendation: 64 MiB, 3 passes, 4
lanes; about 60 ms, in a thread). Tokens are 256 random bits, which nobody guesses, so that SHA-256 is enough and a
gateway can compare one at each call (0.6 us).

What must stay true: comparing takes the same time whether a user exists or not.
"""

import asyncio
import hashlib
import secrets
from typing import Final

import argon2

TOKEN_PREFIX: Final = "om_"  # noqa: S105  so that scanners of source code and logs know one when they see it
SETUP_PREFIX: Final = "om-setup_"
SESSION_PREFIX: Final = "om-session_"

_hasher: Final = argon2.PasswordHasher.from_parameters(argon2.profiles.RFC_9106_LOW_MEMORY)
_NOBODYS: Final = _hasher.hash(secrets.token_urlsafe(32))


def new_token() -> str:
    """What a bearer shows."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def new_setup_token() -> str:
    """What the first administrator shows, once."""
    return SETUP_PREFIX + secrets.token_urlsafe(32)


def new_session() -> str:
    """What a cookie carries."""
    return SESSION_PREFIX + secrets.token_urlsafe(32)


def digest(secret: str) -> bytes:
    """What is kept of a token."""
    return hashlib.sha256(secret.encode()).digest()


async def hashed(password: str) -> str:
    """What is kept of a password."""
    return await asyncio.to_thread(_hasher.hash, password)


async def matches(kept: str | None, password: str) -> bool:
    """Whether a password is the one of which this was kept; None: there is none, which takes as long to say."""
    return await asyncio.to_thread(_matches, kept, password)


def _matches(kept: str | None, password: str) -> bool:
    try:
        return _hasher.verify(kept or _NOBODYS, password) and kept is not None
    except argon2.exceptions.VerificationError:
        return False
