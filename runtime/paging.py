"""Pages of a listing: how large they are, and the token that says where the next one begins.

The token is kept by the caller, so that no state is kept for one here and any worker can answer the next page.

A token is the sort key of the last row shown, with a digest over that key, the listing's name and its filters, keyed
with the secret of the installation, which all its processes have. So a token that was made elsewhere, altered, cut, or
taken to other filters is refused instead of answering a wrong page. It is no secret and no permission: what it names is
checked like any input.

A listing of a stretch of time carries its `Window` in the token. "The last hour" said again a moment later is another
pair of instants (HTTP has `-1h` and `now`), and still the same question: the first page fixes the window, and whether
each of its edges was given is all that later pages must say of it.
"""

import base64
import binascii
import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import orjson

from runtime.errors import InvalidArgument

DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1_000
MAX_TOKEN_CHARACTERS: Final = 4_096
_DIGEST_BYTES: Final = 8

_key = b""
Key = Sequence[str | int]
Item = TypeVar("Item")


class Window(NamedTuple):
    """The instants `[start, end)` that a listing is restricted to, as integers of its own unit; None: no edge."""

    start: int | None = None
    end: int | None = None


def sign_with(secret: str) -> None:
    """Has the tokens of this process signed with the secret of the installation. Called when a process starts."""
    global _key  # noqa: PLW0603  one process has one secret, and listings are many
    _key = hashlib.blake2b(secret.encode(), person=b"openmgr-page-key").digest()


def page_size(requested: int, default: int = DEFAULT_PAGE_SIZE) -> int:
    """The size of the page to answer: 0 is the default, more than MAX_PAGE_SIZE is taken as that.

    Raises:
        InvalidArgument: for ``page_size``, when it is negative.
    """
    if requested < 0:
        raise InvalidArgument("the page size is negative", field="page_size")
    return min(requested or default, MAX_PAGE_SIZE)


def page_of(
    items: Sequence[Item],
    key: Callable[[Item], Any],
    *,
    listing: str,
    filters: Sequence[object],
    size: int,
    token: str,
    window: Window | None = None,
) -> tuple[Sequence[Item], str]:
    """One page of a list in memory, and the token of the next page (empty: this was the last).

    Args:
        items: everything that matches the filters, ascending by ``key``.
        key: an item's sort key: a tuple of texts and numbers, unique in the listing.
        listing: name of the listing.
        filters: its filters, without times.
        size: most items in the page.
        token: as the caller sent it; empty: the first page.
        window: that of `continued`, by which the items were chosen; None: the listing knows no times.

    Raises:
        InvalidArgument: for ``page_token``, when it is not a token of this listing with these filters.
    """
    start = 0
    if token and (last := position(listing, filters, token)) is not None:
        last = last[: len(last) - len(window or ())]
        try:
            start = bisect_right(items, tuple(last), key=key)
        except TypeError:  # parts of other types than the key's
            raise bad_token() from None
    shown = items[start : start + size]
    more = start + size < len(items)
    return shown, page_token(listing, filters, key(shown[-1]), window) if more and shown else ""


def page_token(listing: str, filters: Sequence[object], last: Key, window: Window | None = None) -> str:
    """Returns the token for what follows the row with the sort key ``last``; `window` is that of the first page."""
    body = orjson.dumps([*last, *(window or ())])
    return base64.urlsafe_b64encode(_digest(listing, filters, body) + body).rstrip(b"=").decode()


def position(
    listing: str, filters: Sequence[object], token: str, kinds: tuple[type, ...] | None = None
) -> list[str | int] | None:
    """Returns the sort key in ``token``; None when it is empty: from the start.

    Args:
        listing: name of the listing.
        filters: its filters, the same as for the token.
        token: as the caller sent it.
        kinds: the types of the key's parts; None: whatever they are.

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
        if not isinstance(key, list) or (kinds is not None and tuple(type(part) for part in key) != kinds):
            raise ValueError
    except (ValueError, binascii.Error):
        raise bad_token() from None
    return key


def continued(
    listing: str, filters: Sequence[object], asked: Window, token: str, kinds: tuple[type, ...]
) -> tuple[Window, list[str | int] | None]:
    """The window and the sort key in ``token``; when it is empty, the window that is asked for and None.

    Whatever instants are asked for with a token, those of the listing's first page hold.

    Args:
        listing: name of the listing.
        filters: its filters, without times.
        asked: as the caller sent it.
        token: as the caller sent it.
        kinds: the types of the key's parts.

    Raises:
        InvalidArgument: for ``page_token``, when it is not a token of this listing with these filters, or was made
            for a window that had other edges.
    """
    edges = tuple(type(edge) for edge in asked)  # the same must be there as on the first page
    found: list[Any] | None = position(listing, filters, token, (*kinds, *edges))
    if found is None:
        return asked, None
    return Window(*found[len(kinds) :]), found[: len(kinds)]


def bad_token() -> InvalidArgument:
    """The error for a token that names no place in the listing."""
    return InvalidArgument(
        "is not a token of this listing with these filters; ask for the first page again", field="page_token"
    )


def _digest(listing: str, filters: Sequence[object], body: bytes) -> bytes:
    bound = orjson.dumps([listing, *filters]) + body
    return hashlib.blake2b(bound, key=_key, digest_size=_DIGEST_BYTES, person=b"openmgr-page").digest()
