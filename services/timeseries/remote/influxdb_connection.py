"""Connections over which Flux is asked, each of which can be broken off while a thread waits for its answer.

The driver's client is synchronous, and a thread that waits in a socket cannot be cancelled; but its socket can be shut
down, and then InfluxDB ends the query too. What must stay true: nobody waits longer than the bounds below; a caller
that goes away costs neither side any further work; so many queries run at once and no more.
"""

import asyncio
import contextlib
import csv
import io
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from influxdb_client.domain.query import Query as FluxQuery
from influxdb_client.rest import ApiException
from influxdb_client.service.query_service import QueryService
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from runtime.errors import Cancelled, FailedPrecondition, OpenManagerError, Unavailable, clip
from runtime.redaction import redact
from services.timeseries.followers.influxdb_api import CONNECT_TIMEOUT_S, MAX_ERROR_BYTES, InfluxTarget

ANSWER_TIMEOUT_S: Final = 30.0
"""For the first bytes of an answer, and for each further part of it."""
QUERY_TIMEOUT_S: Final = 60.0
"""For all of an answer."""
CONCURRENT: Final = 4
"""Queries at once; more wait. InfluxDB itself has no bound by default."""
_BUFFER_BYTES: Final = 256 << 10

_T = TypeVar("_T")


class Asker:
    """A client for one query at a time, used in a thread; any thread may break it off."""

    def __init__(self, target: InfluxTarget) -> None:
        self._target = target
        self._sockets: list[socket.socket] = []
        self._is_broken_off = False
        self._client = target.client(ANSWER_TIMEOUT_S)
        self._service: Any = QueryService(self._client.api_client)  # type: ignore[no-untyped-call]  # half typed
        manager = self._client.api_client.rest_client.pool_manager
        manager.pool_classes_by_scheme = {
            "http": _telling(HTTPConnectionPool, self._connected),
            "https": _telling(HTTPSConnectionPool, self._connected),
        }

    def ask(self, flux: str, read: Callable[[Iterator[str]], _T]) -> _T:
        """What `read` makes of the lines of the answer.

        Raises:
            Unavailable: no answer, or no whole one, or one that is none; token or bucket refused.
            FailedPrecondition: InfluxDB cannot run the query on what it holds.
            Cancelled: it was broken off.
        """
        try:
            with self._target.as_ours(self._judge, "read"):
                answer = self._service.post_query(
                    org=self._target.org,
                    query=FluxQuery(  # type: ignore[no-untyped-call]
                        query=flux, dialect={"annotations": ["datatype"], "header": True, "delimiter": ","}
                    ),
                    _preload_content=False,
                    _request_timeout=(round(CONNECT_TIMEOUT_S * 1_000), round(ANSWER_TIMEOUT_S * 1_000)),
                )
                answer.auto_close = False
                try:
                    lines = io.TextIOWrapper(io.BufferedReader(answer, _BUFFER_BYTES), "utf-8", newline="")
                    return read(iter(lines))
                except BaseException:
                    answer.close()  # with the connection: there may be much more of it
                    raise
        except (OpenManagerError, ValueError, LookupError, csv.Error) as error:
            if self._is_broken_off:
                raise Cancelled("the reader went away") from None
            if isinstance(error, OpenManagerError):
                raise
            said = clip(redact(f"{type(error).__name__}: {error}"), MAX_ERROR_BYTES)
            raise Unavailable(f"INFLUXDB_URL does not answer as InfluxDB: {said}", reason="STORE_UNREADABLE") from error

    def break_off(self) -> None:
        """Ends a query that runs; the asker is of no use any more."""
        self._is_broken_off = True
        for one in self._sockets:
            _shut(one)

    def close(self) -> None:
        self._client.close()

    def _connected(self, connected: socket.socket) -> None:
        self._sockets[:] = [connected]
        if self._is_broken_off:
            _shut(connected)

    def _judge(self, status: int, said: str, _error: ApiException) -> OpenManagerError | None:
        bucket = self._target.bucket
        if status == 404:  # the same for one that may not be read
            words = f"INFLUXDB_BUCKET {bucket!r} does not exist, or INFLUXDB_TOKEN may not read it: {said}"
            return Unavailable(words, reason="STORE_REFUSED")
        if status in (400, 422):
            return FailedPrecondition(f"InfluxDB cannot answer from {bucket!r}: {said}", reason="STORE_REFUSED")
        return None


class Askers:
    """Hands out askers to the event loop, and threads to run them in."""

    def __init__(self, target: InfluxTarget) -> None:
        self._target = target
        self._free = asyncio.Semaphore(CONCURRENT)
        self._idle: list[Asker] = []
        self._threads = ThreadPoolExecutor(2 * CONCURRENT, "influxdb-read")  # those broken off have yet to notice

    async def ask(self, flux: str, read: Callable[[Iterator[str]], _T]) -> _T:
        """As `Asker.ask`, within QUERY_TIMEOUT_S; a cancelled caller breaks it off."""
        async with self._free:
            asker = self._idle.pop() if self._idle else Asker(self._target)
            running = self._threads.submit(asker.ask, flux, read)
            try:
                async with asyncio.timeout(QUERY_TIMEOUT_S):
                    answer = await asyncio.wrap_future(running)
            except BaseException as error:
                asker.break_off()
                running.add_done_callback(lambda _: asker.close())
                if isinstance(error, TimeoutError):
                    text = f"InfluxDB has not answered a query within {QUERY_TIMEOUT_S:.0f} s"
                    raise Unavailable(text, reason="STORE_UNAVAILABLE") from None
                raise
            self._idle.append(asker)
            return answer

    async def close(self) -> None:
        """Ends what is idle; queries that run are their callers' to cancel."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for asker in self._idle:
            await asyncio.to_thread(asker.close)


def _telling(pool: Any, connected: Callable[[socket.socket], None]) -> Any:
    """A pool whose connections tell their sockets."""

    class Telling(pool.ConnectionCls):  # type: ignore[misc]
        def connect(self) -> None:
            super().connect()
            connected(self.sock)

    return type(pool.__name__, (pool,), {"ConnectionCls": Telling})


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        socket.socket.shutdown(one, socket.SHUT_RDWR)  # TLS's own would take the layer away under who is reading
