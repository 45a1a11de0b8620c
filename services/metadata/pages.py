"""Page tokens: where a listing goes on, kept by the caller, so that no state is kept for one here.

A token is the sort key of the last row shown, with a digest over that key, the listing's name and its filters. So a
token that was altered, cut, or taken to other filters is refused instead of answering a wrong page. It is no secret and
no permission: what it names is checked like any input.
"""

import base64
import binascii
import hashlib
from collections.abc import Sequence

import orjson

from runtime.errors import InvalidArgument

MAX_TOKEN_CHARACTERS = 4_096
_DIGEST_BYTES = 8

Key = Sequence[str | int]


def page_token(listing: str, filters: Sequence[object], last: Key) -> str:
    """Returns the token for what follows the row with the sort key ``last``."""
    body = orjson.dumps(list(last))
    return base64.urlsafe_b64encode(_digest(listing, filters, body) + body).rstrip(b"=").decode()


def position(listing: str, filters: Sequence[object], token: str, kinds: tuple[type, ...]) -> list[str | int] | None:
    """Returns the sort key in ``token``; None when it is empty: from the start.

    Args:
        listing: name of the listing.
        filters: its filters, the same as for the token.
        token: as the caller sent it.
        kinds: the types of the key's parts.

    Raises:
        InvalidArgument: for ``page_token``, when it is not a token of this listing with these filters.
    """
    if not token:
        return None
    try:
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise ValueError
        raw = base64.b64decode(token.encode("ascii") + b"=" * (-len(token) % 4), altchars=b"-_", validate=True)
        digest, body = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
        if digest != _digest(listing, filters, body):
            raise ValueError
        key = orjson.loads(body)
        if not isinstance(key, list) or tuple(type(part) for part in key) != kinds:
            raise ValueError
    except (ValueError, binascii.Error):
        raise bad_token() from None
    return key


def bad_token() -> InvalidArgument:
    """The error for a token that names no place in the listing."""
    return InvalidArgument(
        "is not a token of this listing with these filters; ask for the first page again", field="page_token"
    )


def _digest(listing: str, filters: Sequence[object], body: bytes) -> bytes:
    bound = orjson.dumps([listing, *filters]) + body
    return hashlib.blake2b(bound, digest_size=_DIGEST_BYTES, person=b"openmgr-page").digest()
