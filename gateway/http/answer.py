"""One whole answer on its way out: its headers, an entity tag and whether the caller has it already, and gzip.

What must stay true: an answer that has an entity tag is compared by it alone, so that it is not encoded for a caller
who has it; what is compressed of a shared answer is compressed once.
"""

import asyncio
from dataclasses import dataclass
from typing import Final

from gateway.http.compression import ENCODING, MIN_BYTES, VARY, accepts_gzip, compress
from gateway.http.exchange import Exchange
from gateway.http.replies import API_HEADERS, JSON, NOT_MODIFIED, Header, Send, send_bytes
from runtime.prepared import Prepared

IN_THREAD_BYTES: Final = 256 << 10
"""Larger answers are compressed in a thread; up to it that takes 1 ms."""
_HEADERS: Final[tuple[Header, ...]] = ((b"content-type", JSON), *API_HEADERS, VARY)


@dataclass(frozen=True, slots=True)
class Answer:
    """JSON, and what it was made of where that is shared. Without JSON: the caller has it."""

    body: bytes
    shared: Prepared | None = None

    async def send(self, send: Send, exchange: Exchange, *, with_body: bool) -> None:
        """Sends it. `with_body` False: for HEAD."""
        headers = [*_HEADERS, *((name.encode(), value.encode()) for name, value in exchange.trailers)]
        if self.shared is not None and self.shared.etag:
            headers.append((b"etag", b'W/"%b"' % self.shared.etag.encode()))  # weak: compressed it has other bytes
            if not self.body:
                await send_bytes(send, NOT_MODIFIED, b"", headers)
                return
        body = self.body
        if len(body) >= MIN_BYTES and accepts_gzip(exchange.header(b"accept-encoding")):
            body = await self._compressed()
            headers.append(ENCODING)
        await send_bytes(send, 200, body, headers, with_body=with_body)

    async def _compressed(self) -> bytes:
        forms = {} if self.shared is None else self.shared.forms
        key = ("gzip", self.body)
        packed = forms.get(key)
        if packed is None:
            in_thread = len(self.body) > IN_THREAD_BYTES
            packed = await asyncio.to_thread(compress, self.body) if in_thread else compress(self.body)
            forms[key] = packed
        return packed
