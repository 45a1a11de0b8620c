"""HTTP to the OpenID provider: answers of a bounded size, over connections that outlive the client that asks.

What must stay true: nothing of an answer is kept beyond the bound; compressed answers, of which a small one may be
large, are not taken.
"""

from collections.abc import AsyncIterator
from typing import Final

import httpx2

MAX_ANSWER_BYTES: Final = 1 << 20


class BoundedTransport(httpx2.AsyncBaseTransport):
    """For one client. `connections` are the caller's, and are left open."""

    def __init__(self, connections: httpx2.AsyncBaseTransport) -> None:
        self._connections = connections

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        request.headers["accept-encoding"] = "identity"
        response = await self._connections.handle_async_request(request)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Bounded(response.stream)
        if "content-encoding" in response.headers:
            await response.aclose()
            raise httpx2.RemoteProtocolError("the answer is compressed, which nobody asked for")
        return response


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = MAX_ANSWER_BYTES
        async for part in self._stream:
            left -= len(part)
            if left < 0:
                raise httpx2.RemoteProtocolError(f"the answer is over {MAX_ANSWER_BYTES} bytes")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
