"""Page tokens: stateless, so that any worker can answer the next page.

A token holds the last key of its page and a digest of the filters, so that a token is not used with other filters by
mistake. It is no secret and grants nothing.
"""

import base64
import binascii
import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from runtime.errors import InvalidArgument

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1_000
_DIGEST_BYTES = 6

Item = TypeVar("Item")


def page_size_of(requested: int, default: int = DEFAULT_PAGE_SIZE) -> int:
    """The page size to use; larger than allowed is taken as the most allowed.

    Raises:
        InvalidArgument: a negative size.
    """
    if requested < 0:
        raise InvalidArgument("the page size is negative", field="page_size")
    return min(requested or default, MAX_PAGE_SIZE)


def encode_token(last_key: str, filters: Sequence[object]) -> str:
    """The token of the page after ``last_key``."""
    return base64.urlsafe_b64encode(_digest(filters) + last_key.encode()).decode().rstrip("=")


def decode_token(token: str, filters: Sequence[object]) -> str:
    """The key after which the page begins.

    Raises:
        InvalidArgument: not a token of ours, or one of other filters.
    """
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        digest, key = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:].decode()
    except (binascii.Error, ValueError):
        raise InvalidArgument("this is no page token of this API", field="page_token") from None
    if digest != _digest(filters):
        raise InvalidArgument("the page token belongs to a request with other filters", field="page_token")
    return key


def page(
    items: Sequence[Item], key: Callable[[Item], str], *, size: int, token: str, filters: Sequence[object]
) -> tuple[Sequence[Item], str]:
    """One page of items that are sorted by ``key``, and the token of the next (empty: none)."""
    start = 0
    if token:
        after = decode_token(token, filters)
        start = next((index for index, item in enumerate(items) if key(item) > after), len(items))
    chosen = items[start : start + size]
    more = start + size < len(items)
    return chosen, encode_token(key(chosen[-1]), filters) if more and chosen else ""


def _digest(filters: Sequence[object]) -> bytes:
    return hashlib.sha256(repr(tuple(filters)).encode()).digest()[:_DIGEST_BYTES]
