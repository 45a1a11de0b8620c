"""One whole answer on its way out: its headers, an entity tag and whether the caller has it already, and gzip.

What must stay true: an answer that has an entity tag is compared by it alone, so that it is not encoded for a caller
who has it; what is compressed of a shared answer is compressed once.
"""

import asyncio
from dataclasses import dataclass
from typing import Final

from gateway.http.compression import ENCODING, MIN_BYTES, VARY, accepts_gzip, compress
from gateway.http.exchange import Exchange
from gateway.http.replies import API_HEADERS, JSON, NOT_MODIFIED, Header, Send, content_length, send_bytes
from runtime.prepared import Prepared

IN_THREAD_BYTES: Final = 256 << 10
"""Larger answers are compressed in a thread; up to it that takes 1 ms."""
_HEADERS: Final[tuple[Header, ...]] = ((b"content-type", JSON), *API_HEADERS, VARY)


def whole(body: bytes, shared: Prepared, *, gzip: bool) -> tuple[list[Header], bytes] | None:
    """Headers and body of a shared answer, kept with it; None: it is too large to be compressed here and now."""
    packs = gzip and len(body) >= MIN_BYTES
    made: tuple[list[Header], bytes] | None = shared.forms.get((packs, body))
    if made is None:
        if packs and len(body) > IN_THREAD_BYTES:
            return None
        sent = compress(body) if packs else body
        headers = _headers(shared, packed=packs)
        made = shared.forms[packs, body] = ([*headers, content_length(sent)], sent)
    return made


def _headers(shared: Prepared | None, *, packed: bool) -> list[Header]:
    headers = list(_HEADERS)
    if shared is not None and shared.etag:
        headers.append((b"etag", b'W/"%b"' % shared.etag.encode()))  # weak: compressed it has other bytes
    if packed:
        headers.append(ENCODING)
    return headers


@dataclass(frozen=True, slots=True)
class Answer:
    """JSON, and what it was made of where that is shared. Without JSON: the caller has it."""

    body: bytes
    shared: Prepared | None = None

    async def send(self, send: Send, exchange: Exchange, *, with_body: bool) -> None:
        """Sends it. `with_body` False: for HEAD."""
        told = [(name.encode(), value.encode()) for name, value in exchange.trailers]
        if not self.body:
            await send_bytes(send, NOT_MODIFIED, b"", [*_headers(self.shared, packed=False), *told])
            return
        body = self.body
        packed = len(body) >= MIN_BYTES and accepts_gzip(exchange.header(b"accept-encoding"))
        if packed:
            body = await self._compressed()
        await send_bytes(send, 200, body, [*_headers(self.shared, packed=packed), *told], with_body=with_body)

    async def _compressed(self) -> bytes:
        if self.shared is not None and (made := whole(self.body, self.shared, gzip=True)) is not None:
            return made[1]
        forms = {} if self.shared is None else self.shared.forms
        key = ("gzip", self.body)
        packed: bytes | None = forms.get(key)
        if packed is None:
            packed = forms[key] = await asyncio.to_thread(compress, self.body)
        return packed
