"""One HTTP request while it is answered: its body, its deadline, its caller, and whether the caller is still there.

`Exchange` is what servicers get as context: it has what runtime.interception.CallContext asks for, so the method runs
through the same interception as under gRPC.

What must stay true: a caller that leaves cancels the work done for it, and that is seen on receive(), because the ASGI
server's send() goes on succeeding; the body is bounded in bytes and in time.
"""

import asyncio
import math
import re
import time
from collections.abc import Sequence
from typing import Any, Final

from fleet.access import Caller
from gateway.http.replies import BodyTooLarge, Receive, Scope
from runtime.errors import DeadlineExceeded, InvalidArgument
from runtime.settings import parse_duration

MAX_BODY_BYTES: Final = 16 << 20
"""The largest body of a request."""
MAX_OPEN_BODY_BYTES: Final = 16 << 10
"""The largest of a method that is open to all: a stranger's, of whom ten thousand may be here at once. A name and a
password take half of it, however they are escaped."""
BODY_READ_TIMEOUT_S: Final = 30.0
"""How long a body may take to arrive."""
DISCONNECT_WATCH_AFTER_S: Final = 0.05
"""A call that takes longer than this is worth watching its caller for; a watcher costs a task (10 us)."""
_ONE_TAG: Final = re.compile(r'"([^"]+)"|(W/"[^"]*"|[^",\s]+)')


class Exchange:
    """The context of one call over HTTP."""

    __slots__ = (
        "_body",
        "_deadline",
        "_metadata",
        "_receive",
        "_task",
        "_timer",
        "_watcher",
        "caller",
        "gone",
        "scope",
        "trailers",
        "values",
    )

    def __init__(self, scope: Scope, receive: Receive, caller: Caller, values: tuple[str, ...] = ()) -> None:
        self.scope = scope
        self.values = values
        """The path's variables, as they were sent."""
        self.caller = caller
        """Who calls, as the guard found."""
        self.gone = False
        """Whether the caller has left; the task was cancelled then."""
        self.trailers: Sequence[tuple[str, str]] = ()
        """What the method said beside its answer; over HTTP, headers."""
        self._receive = receive
        self._body: bytes | None = None
        self._metadata: tuple[tuple[str, str], ...] | None = None
        self._deadline = math.inf
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None

    def peer(self) -> str:
        """The caller's address as gRPC writes it."""
        client = self.scope.get("client")
        if client is None:
            return "unix:"
        host, port = client
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """The request's headers."""
        if self._metadata is None:
            self._metadata = tuple(
                (name.decode("latin-1"), value.decode("latin-1")) for name, value in self.scope["headers"]
            )
        return self._metadata

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str]]) -> None:
        """As under gRPC."""
        self.trailers = metadata

    def time_remaining(self) -> float | None:
        """Seconds until the deadline of the Request-Timeout header; None without one."""
        return None if self._deadline == math.inf else self._deadline - time.monotonic()

    def read_deadline(self) -> None:
        """Takes the Request-Timeout header (`5s`, `250ms`, `5`) over; InvalidArgument when it is none."""
        text = self.header(b"request-timeout")
        if text is not None:
            self._deadline = time.monotonic() + _timeout_s(text)

    def header(self, name: bytes) -> str | None:
        """The first header of a name."""
        for key, value in self.scope["headers"]:
            if key == name:
                return str(value.decode("latin-1"))
        return None

    def has(self, etag: str) -> bool:
        """Whether the caller says that he has an answer with this entity tag (If-None-Match)."""
        known = self.header(b"if-none-match")
        if known is None:
            return False
        return known.strip() == "*" or etag in [tag.strip().removeprefix("W/").strip('"') for tag in known.split(",")]

    def wanted_etag(self) -> str:
        """What If-Match names, without its quotes; empty where it is absent or `*`. A weak tag matches nothing.

        InvalidArgument where it is not one tag: of an empty one nothing would be left to hold the change back.
        """
        text = self.header(b"if-match")
        if text is None or text.strip() == "*":
            return ""
        found = _ONE_TAG.fullmatch(text.strip())
        if found is None:
            raise InvalidArgument(f'{text[:64]!r} is not one entity tag such as "r17", or *', field="if-match")
        return found[1] or found[2]

    async def body(self, most_bytes: int = MAX_BODY_BYTES) -> bytes:
        """The whole body, at most `most_bytes`, within BODY_READ_TIMEOUT_S; once it is here, the same again."""
        if self._body is not None:
            return self._body
        length = self.header(b"content-length")
        if length is not None and length.isdecimal() and int(length) > most_bytes:
            raise _too_large(most_bytes)
        limit = asyncio.timeout(BODY_READ_TIMEOUT_S)
        try:
            async with limit:
                self._body = await self._read(most_bytes)
        except TimeoutError:
            if limit.expired():
                raise DeadlineExceeded(f"the body took longer than {BODY_READ_TIMEOUT_S:g} s to arrive") from None
            raise
        return self._body

    async def _read(self, most_bytes: int) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] != "http.request":  # he may have left, too: then nobody reads the answer
                raise InvalidArgument("ended before it was complete, or is not chunked as HTTP has it", field="body")
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > most_bytes:
                raise _too_large(most_bytes)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def watch(self, after_s: float) -> None:
        """From `after_s` on, cancels the task that answers when the caller leaves. To be called once, after body()."""
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(after_s, self._start_watcher)

    def _start_watcher(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch(), name="http-disconnect")

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        if self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        """Ends the watching. Afterwards nothing is cancelled any more."""
        self._task = None
        if self._timer is not None:
            self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()


def _too_large(most_bytes: int) -> BodyTooLarge:
    return BodyTooLarge("MAX_BODY_BYTES" if most_bytes == MAX_BODY_BYTES else "MAX_OPEN_BODY_BYTES", most_bytes)


def _timeout_s(text: str) -> float:
    try:
        seconds = float(text) if text.replace(".", "", 1).isdecimal() else parse_duration(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise InvalidArgument(f"{text[:32]!r} is not a time such as 5s or 250ms", field="request-timeout")
    return seconds
