"""Asks a store over HTTP by the first of its addresses that answers; it stays with that one until it fails.

Three nodes without a load balancer before them are so used as one. What must stay true: every request ends within its
bound, also when a node accepts it and then says nothing or drips; an answer is bounded in bytes; a node that is away,
or says that it cannot now (5xx), costs the next one a try, never the caller an error, as long as one answers; no
message holds a token. urllib3's connections are made for threads, so callers run this in theirs.
"""

import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any, Final

import urllib3
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from runtime.errors import Cancelled, ResourceExhausted, Unavailable, clip
from runtime.redaction import redact, remember_secret

CONNECT_TIMEOUT_S: Final = 2.0
READ_CHUNK_BYTES: Final = 1 << 16
MAX_ERROR_BYTES: Final = 300
CONNECTIONS: Final = 4
"""Kept open to a node."""
_OBJECT: Final = re.compile(r"^(?:<[^>]*>|\w+\([^)]*\)): ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a node said; its status is under 500, and not 429."""

    status: int
    headers: Mapping[str, str]
    data: bytes

    @property
    def text(self) -> str:
        """The answer for people."""
        return shown(self.data)


def shown(data: bytes) -> str:
    """Text of a store as it may be shown."""
    return clip(redact(" ".join(data[: 4 * MAX_ERROR_BYTES].decode(errors="replace").split())), MAX_ERROR_BYTES)


class Nodes:
    """The addresses of one store; safe to use from several threads."""

    def __init__(self, urls: Sequence[str], *, bearer_token: str = "", tenant: str = "") -> None:
        """Prepares connections; none is made before the first request.

        Args:
            urls: at least one, http:// or https://, checked by the settings.
            bearer_token: sent with every request when not empty.
            tenant: the value of X-Scope-OrgID, by which Mimir, Cortex and the like tell tenants apart.
        """
        self._urls = [url.rstrip("/") for url in urls]
        self._headers = {"User-Agent": "openmanager"}
        if bearer_token:
            remember_secret(bearer_token)
            self._headers["Authorization"] = f"Bearer {bearer_token}"
        if tenant:
            self._headers["X-Scope-OrgID"] = tenant
        self._pool = urllib3.PoolManager(retries=False, maxsize=CONNECTIONS)
        self._pool.pool_classes_by_scheme = {
            "http": _bounded(HTTPConnectionPool),
            "https": _bounded(HTTPSConnectionPool),
        }
        self._current = 0

    @property
    def address(self) -> str:
        """Where the store is, for people."""
        return ", ".join(self._urls)

    def request(
        self,
        method: str,
        path: str = "",
        *,
        body: bytes | None = None,
        fields: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        timeout_s: float,
        max_bytes: int = 1 << 20,
        may_cut: bool = False,
        cancel: threading.Event | None = None,
    ) -> Answer:
        """One request to the node that answered last, else to the next one; `timeout_s` is for each of them.

        Args:
            method: GET puts `fields` into the address, POST into the body.
            path: behind the address.
            body: instead of fields.
            fields: name and value, in order.
            headers: further ones.
            timeout_s: until the whole answer is there.
            max_bytes: of the answer.
            may_cut: a longer one is cut, and no error.
            cancel: when it is set, the answer is no longer wanted.

        Raises:
            Unavailable: no node answers, or all say 5xx, or one says 429, with `retry_after_s` where it names a time.
            ResourceExhausted: the answer is longer than `max_bytes`.
            Cancelled: `cancel` was set.
        """
        first = self._current
        failure: Unavailable | None = None
        for offset in range(len(self._urls)):
            number = (first + offset) % len(self._urls)
            try:
                answer = self._ask(number, method, path, body, fields, headers, timeout_s, max_bytes, may_cut, cancel)
            except Unavailable as error:
                failure = error
                if error.reason == "STORE_THROTTLES":
                    break
            else:
                self._current = number
                return answer
        assert failure is not None
        raise failure

    def close(self) -> None:
        """Ends idle connections."""
        self._pool.clear()

    def _ask(
        self,
        number: int,
        method: str,
        path: str,
        body: bytes | None,
        fields: Sequence[tuple[str, str]],
        headers: Mapping[str, str] | None,
        timeout_s: float,
        max_bytes: int,
        may_cut: bool,
        cancel: threading.Event | None,
    ) -> Answer:
        url = self._urls[number]
        ends = time.monotonic() + timeout_s
        timeout = urllib3.Timeout(connect=min(CONNECT_TIMEOUT_S, timeout_s), total=timeout_s)
        given: dict[str, object] = {"body": body} if body is not None else {"fields": list(fields)}
        if method == "POST" and body is None:
            given["encode_multipart"] = False
        try:
            response = self._pool.request(
                method,
                url + path,
                headers=self._headers | dict(headers or {}),
                timeout=timeout,
                preload_content=False,
                redirect=False,
                **given,  # type: ignore[arg-type]  # one of two shapes
            )
            try:
                data = _read(response, url, ends, max_bytes, cancel)
            except BaseException:
                response.close()  # not drained: the connection cannot be used again
                raise
            if len(data) <= max_bytes:
                response.release_conn()
            else:
                response.close()
        except (HTTPError, OSError) as error:
            raise Unavailable(f"{url} does not answer: {_words(error)}", reason="STORE_UNAVAILABLE") from error
        if response.status == 429 or response.status >= 500:
            raise Unavailable(
                f"{url} answers {response.status}: {shown(data)}",
                reason="STORE_THROTTLES" if response.status == 429 else "STORE_UNAVAILABLE",
                retry_after_s=_seconds(response.headers.get("Retry-After")),
            )
        if len(data) > max_bytes and not may_cut:
            raise ResourceExhausted(
                f"the answer of {url} is longer than {max_bytes} bytes: a shorter range, or fewer servers or metrics",
                reason="MAX_POINTS",
            )
        return Answer(status=response.status, headers=response.headers, data=data[:max_bytes])


def _read(
    response: urllib3.BaseHTTPResponse, url: str, ends: float, max_bytes: int, cancel: threading.Event | None
) -> bytes:
    """The answer, or a little more of it than `max_bytes`."""
    chunks = bytearray()
    while chunk := response.read1(READ_CHUNK_BYTES):  # what is there; another read waits for all of that
        chunks += chunk
        if len(chunks) > max_bytes:
            break
        if cancel is not None and cancel.is_set():
            raise Cancelled("the reader went away")
        if time.monotonic() > ends:
            raise Unavailable(f"{url} does not answer in time", reason="STORE_UNAVAILABLE")
    return bytes(chunks)


def _bounded(pool: Any) -> Any:
    """A pool whose connections wait no longer than their time-out for the head of an answer, which else holds for each
    part of it that comes."""

    class Bounded(pool.ConnectionCls):  # type: ignore[misc]
        def getresponse(self) -> Any:
            ends = time.monotonic() + self.timeout
            watch = threading.Timer(self.timeout, _shut, (self.sock,))
            watch.daemon = True
            watch.start()
            try:
                response = super().getresponse()
            except (HTTPException, OSError) as error:
                if time.monotonic() >= ends:  # it was us who shut it, and not the node
                    raise TimeoutError("no answer in time") from error
                raise
            finally:
                watch.cancel()
            if time.monotonic() >= ends:  # its head was cut off, and looks whole
                response.close()
                raise TimeoutError("no answer in time")
            return response

    return type(pool.__name__, (pool,), {"ConnectionCls": Bounded})


def _shut(one: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        socket.socket.shutdown(one, socket.SHUT_RDWR)  # TLS's own would take the layer away under who is reading


def _words(error: Exception) -> str:
    """A driver's error without the names of its objects."""
    return clip(redact(_OBJECT.sub("", str(error))), MAX_ERROR_BYTES)


def _seconds(text: str | None) -> float | None:
    """Retry-After: seconds, or a date."""
    if text is None:
        return None
    if text.isdecimal():
        return float(text)
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None
