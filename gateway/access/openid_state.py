"""What one log-in by OpenID Connect carries from its beginning to its end: in a cookie, for any worker may see the end.

The cookie is signed, not encrypted: its owner may read what is in it, and nobody else may make one.

What must stay true: what was not sealed here, with the secret of this installation, within MAX_AGE_S, is nothing.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Final, Self

import orjson

from runtime.errors import Unauthenticated

MAX_AGE_S: Final = 600
"""How long somebody may take at the provider."""
MAX_AHEAD_S: Final = 60
"""How much the clock of the gateway that began a log-in may be ahead of that which ends it. A provider that knows the
browser sends it back at once."""
_SECRET_BYTES: Final = 32
_DIGEST_BYTES: Final = 32
_PERSON: Final = b"openmgr-openid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One log-in under way.

    Attributes:
        state: comes back with the code: the browser that ends it is the one that began it.
        nonce: comes back in the ID token: it was made for this log-in.
        verifier: the code is worth nothing without it (PKCE).
        began_ms: when.
    """

    state: str
    nonce: str
    verifier: str
    began_ms: int

    @classmethod
    def beginning(cls, now_ms: int) -> Self:
        """A new one."""
        state, nonce, verifier = (secrets.token_urlsafe(_SECRET_BYTES) for _ in range(3))
        return cls(state=state, nonce=nonce, verifier=verifier, began_ms=now_ms)


class Seal:
    """Signs what a cookie carries, with a key of its own derived from the secret of the installation."""

    def __init__(self, secret: str) -> None:
        self._key = hashlib.blake2b(secret.encode(), person=_PERSON).digest()

    def put_on(self, attempt: Attempt) -> str:
        """The value of the cookie."""
        body = orjson.dumps([attempt.state, attempt.nonce, attempt.verifier, attempt.began_ms])
        return base64.urlsafe_b64encode(self._digest(body) + body).rstrip(b"=").decode()

    def opened(self, carried: str, now_ms: int) -> Attempt:
        """What is in a cookie; raises Unauthenticated, OPENID_STATE_INVALID, for what is not one, or too old."""
        try:
            raw = base64.b64decode(carried.encode("ascii") + b"=" * (-len(carried) % 4), altchars=b"-_", validate=True)
            digest, body = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
            if not hmac.compare_digest(digest, self._digest(body)):
                raise ValueError
        except (ValueError, binascii.Error):
            raise Unauthenticated("no log-in has begun here", reason="OPENID_STATE_INVALID") from None
        state, nonce, verifier, began_ms = orjson.loads(body)
        if not -MAX_AHEAD_S * 1_000 <= now_ms - began_ms <= MAX_AGE_S * 1_000:
            raise Unauthenticated("the log-in has taken too long", reason="OPENID_STATE_INVALID")
        return Attempt(state=state, nonce=nonce, verifier=verifier, began_ms=began_ms)

    def _digest(self, body: bytes) -> bytes:
        return hashlib.blake2b(body, key=self._key, digest_size=_DIGEST_BYTES, person=_PERSON).digest()
