"""HTTP servers that follow each other on one socket, each with the certificate that the files held when it began.

granian reads a certificate once, when it begins. Where the files are replaced, a second server begins on the same
socket: on a duplicate of its descriptor, so that there is one queue of connections and both take from it. Then the
first takes no more; it keeps the connections that it has, with their handshakes, requests and streams, and ends after
the last of them. For as long it costs 0.2 MB and three threads (measured: 20 of them).

It cannot be asked to take no more connections: granian's own stop also closes those that wait for their next request,
which may be on its way. So the descriptor that it takes from is made that of a socket to which nobody connects.

What must stay true: one queue lives as long as the process, so no connection is lost; none is closed for the sake of a
certificate until MAX_OLD servers are older than it; a certificate that cannot be used changes nothing.
"""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from granian._granian import ASGIWorker, SocketHolder
from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels

from gateway.http.app import HttpApp
from gateway.http.certificate import Granian, in_memory, tried
from gateway.http.dispatch import Dispatch
from gateway.http.idle import IdleBounds, IdleConnections
from runtime import descriptors, tasks
from runtime.errors import Unavailable
from runtime.tls import LOOK_EVERY_S, Certificate, CertificateFiles

BACKLOG: Final = 1_024
"""Connections the kernel holds until they are accepted."""
MAX_HEADER_BYTES: Final = 64 << 10
"""All headers of a request; more are answered with 431."""
HEADER_READ_TIMEOUT_MS: Final = 30_000
HTTP2_STREAMS_PER_CONNECTION: Final = 200
HTTP2_KEEPALIVE_MS: Final = 20_000
MAX_OLD: Final = 4
"""Servers whose certificate was replaced; what is left of older ones (event streams, for days) is ended."""
FOLLOWS: Final = sys.platform == "linux"
"""Elsewhere there are no files in memory, and a certificate is read once."""

# Incremental, because granian would otherwise reset the process's handlers and write to stdout.
_LOGGING: Final[dict[str, Any]] = {"incremental": True, "formatters": {}, "handlers": {}, "loggers": {}}

_log = logging.getLogger(__name__)


class CannotBegin(Exception):  # noqa: N818  says what is so, not that it is an error
    """A server does not begin; the text says why."""


class _Server(Granian):
    """Granian on a descriptor of its own of a socket of ours."""

    def __init__(self, app: HttpApp, listener: socket.socket, chain: Path | None, key: Path | None) -> None:
        super().__init__(
            app,
            interface=Interfaces.ASGINL,
            http=HTTPModes.auto,
            websockets=False,
            backlog=BACKLOG,
            backpressure=descriptors.max_connections(),  # more wait in the backlog
            http1_settings=HTTP1Settings(header_read_timeout=HEADER_READ_TIMEOUT_MS, max_buffer_size=MAX_HEADER_BYTES),
            http2_settings=HTTP2Settings(
                max_concurrent_streams=HTTP2_STREAMS_PER_CONNECTION,
                max_headers_size=MAX_HEADER_BYTES,
                keep_alive_interval=HTTP2_KEEPALIVE_MS,
            ),
            log_dictconfig=_LOGGING,
            log_level=LogLevels.error,  # its one warning says that embedding is experimental
            ssl_cert=chain,
            ssl_key=key,
            ssl_protocol_min=SSLProtocols.tls12,
        )
        self._listener = listener
        self._descriptor = -1
        self._has_begun = asyncio.Event()
        self.stopped = False
        self.task = asyncio.create_task(self.serve(self._spawn), name="http-server")  # type: ignore[arg-type]  # stubs

    def _init_shared_socket(self) -> None:
        self._ssp = None
        # Granian closes the descriptor itself, so it gets one of its own: closed here too, it could be another's.
        self._descriptor = self._listener.dup().detach()
        self._shd = SocketHolder(self._descriptor, False, BACKLOG)  # type: ignore[call-arg,assignment]  # stubs

    async def _spawn(self, number: int, ending: Any, app: HttpApp, sockets: Any, *arguments: Any) -> None:
        # As granian's own, but that requests come to us (gateway.http.dispatch).
        *of_the_worker, _task_impl, mode, http1, http2, websockets, static, _log, tls, _scope = arguments
        worker: Any = cast("Any", ASGIWorker)(  # its stubs are of another version
            number, sockets, None, *of_the_worker, mode, http1, http2, websockets, static, *tls, (None, None)
        )
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        ending.add_cb(lambda: loop.call_soon_threadsafe(ended.set_result, None))
        worker.serve_async(Dispatch(loop, app, app.at_once), loop, ending)
        self._has_begun.set()
        await ended

    async def begin(self) -> None:
        """Returns when it takes connections; raises CannotBegin."""
        begun = asyncio.create_task(self._has_begun.wait(), name="http-begun")
        try:
            await asyncio.wait({begun, self.task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            begun.cancel()
        if self.task.done() or not all(worker.is_alive() for worker in self.wrks):  # type: ignore[no-untyped-call]
            await asyncio.wait({self.task})
            raise CannotBegin(str(self.task.exception()))

    def take_from(self, listener: socket.socket) -> None:
        """From now on new connections are those of another socket. Those that it has go on."""
        os.dup2(listener.fileno(), self._descriptor, inheritable=False)

    def stop(self) -> None:
        """Finishes the requests that run; idle connections are closed."""
        self.stopped = True
        super().stop()  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class _Old:
    """A server that takes no more. `left`: inodes of connections it may have; None: not looked at since."""

    server: _Server
    left: set[int] | None = None
    looks: int = 0


class Generations:
    """The servers of one socket: the one that takes connections, and those before it."""

    def __init__(self, app: HttpApp, listener: socket.socket, files: CertificateFiles | None, idle: IdleBounds) -> None:
        self._app = app
        self._listener = listener
        self._files = files
        self._connections = IdleConnections(listener.getsockname()[1], idle, self._looked)
        self._nobodys: socket.socket | None = None  # made when it is first wanted
        self._current: _Server | None = None
        self._old: list[_Old] = []
        self.broken = asyncio.Event()  # a server has ended by itself

    async def begin(self) -> None:
        """The first server; raises CannotBegin, OSError or ValueError where the certificate cannot be used."""
        if self._files is None:
            self._current = await self._begun(None, None)
        elif FOLLOWS:
            await self._begin(self._files.read(), is_first=True)
        else:
            self._files.read()
            self._current = await self._begun(self._files.cert, self._files.key)

    async def _begin(self, certificate: Certificate, *, is_first: bool = False) -> None:
        """A server with this certificate takes connections from now on, the one before takes no more."""
        before = self._current
        if before is not None and self._nobodys is None:
            self._nobodys = _nobodys_socket()
        with in_memory(certificate) as (chain, key):
            try:
                await asyncio.to_thread(tried, chain, key)
            except Unavailable as error:
                if not is_first:
                    raise
                _log.warning("%s", error)  # and there is no other one to go on with
            self._current = await self._begun(chain, key)
        if before is not None and self._nobodys is not None:
            before.take_from(self._nobodys)
            self._old.append(_Old(before))

    async def _begun(self, chain: Path | None, key: Path | None) -> _Server:
        server = _Server(self._app, self._listener, chain, key)
        try:
            await server.begin()
        except BaseException:
            server.stop()
            raise
        server.task.add_done_callback(lambda _: None if server.stopped else self.broken.set())
        return server

    async def watch(self) -> None:
        """Ends idle connections and old servers, and follows the files of the certificate, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._connections.watch(), name="http-idle")
            if self._files is not None and FOLLOWS:
                files = self._files
                group.create_task(tasks.run_forever("http-certificate", lambda: self._follow(files)))

    def stop(self) -> "set[asyncio.Task[Any]]":
        """Stops all servers; returns what ends with each."""
        servers = [old.server for old in self._old]
        servers += [self._current] if self._current is not None else []
        for server in servers:
            server.stop()
        if self._nobodys is not None:
            self._nobodys.close()
        return {server.task for server in servers}

    async def _follow(self, files: CertificateFiles) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            certificate = await asyncio.to_thread(files.renewed)
            if certificate is None:
                continue
            try:
                await self._begin(certificate)
            except (CannotBegin, OSError, ValueError) as error:
                files.refuse(error)
            except BaseException:  # it was not the certificate's fault: the next look sees it again
                files.forget()
                raise

    def _looked(self, found: Collection[int]) -> None:
        """Told after each look which connections there are, those of the newest server among them."""
        for old in tuple(self._old):
            old.looks += 1
            if old.looks == 1:
                continue  # it may have begun before the server took no more
            old.left = set(found) if old.left is None else old.left.intersection(found)
            if not old.left:
                self._old.remove(old)
                old.server.stop()
                _log.info("no connection of before the certificate was replaced is left")
        for old in self._old[:-MAX_OLD]:
            self._connections.end(old.left or ())


def _nobodys_socket() -> socket.socket:
    """One that listens, in Linux's abstract namespace, under a name that nobody is told: no connection ever waits."""
    listener = socket.socket(socket.AF_UNIX)
    listener.setblocking(False)
    listener.bind("")
    listener.listen(0)
    return listener
