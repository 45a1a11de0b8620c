"""Runs the ASGI server (granian, embedded in the running event loop beside grpc.aio) until the process stops.

docs/adr/0002-http-server.md says why granian. We bind the socket ourselves: granian binds with SO_REUSEPORT, so a
second process would silently take half of the requests, and it does not tell which port it got for port 0.

What must stay true: an address in use is the same one-line error as with gRPC; no request that was accepted is lost at
an orderly stop, streams end within a second, and after the grace period the rest is cut off.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels
from granian.server.embed import Server

from gateway.http.app import HttpApp
from gateway.http.idle import IdleBounds, IdleConnections
from runtime import descriptors, tasks
from runtime.limits import DRAIN_GRACE_S
from runtime.server import AddressInUse, AddressUnavailable
from runtime.settings import split_address

BACKLOG: Final = 1_024
"""Connections the kernel holds until they are accepted."""
MAX_HEADER_BYTES: Final = 64 << 10
"""All headers of a request; more are answered with 431."""
HEADER_READ_TIMEOUT_MS: Final = 30_000
HTTP2_STREAMS_PER_CONNECTION: Final = 200
HTTP2_KEEPALIVE_MS: Final = 20_000
CUT_OFF_S: Final = 1.0
"""After the cut, how long the last answers may take to leave."""
ADDRESS_SETTING: Final = "GATEWAY_HTTP_ADDRESS"
IDLE: Final = IdleBounds()

# Incremental, because granian would otherwise reset the process's handlers and write to stdout.
_LOGGING: Final[dict[str, Any]] = {"incremental": True, "formatters": {}, "handlers": {}, "loggers": {}}

_log = logging.getLogger(__name__)


class _Server(Server):
    """Granian on a socket of ours."""

    def __init__(self, app: HttpApp, listener: socket.socket, cert: Path | None, key: Path | None) -> None:
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
            ssl_cert=cert,
            ssl_key=key,
            ssl_protocol_min=SSLProtocols.tls12,
        )
        self._listener = listener

    def _init_shared_socket(self) -> None:
        self._ssp = None
        # Granian closes the descriptor itself, so it is handed over: closed here too, it could be another's by then.
        self._shd = SocketHolder(self._listener.detach(), False, BACKLOG)  # type: ignore[call-arg,assignment]  # stubs


async def serve_http(
    app: HttpApp,
    address: str,
    stopping: asyncio.Event,
    *,
    bound: Callable[[str], None] | None = None,
    address_setting: str = ADDRESS_SETTING,
    tls_cert_file: Path | None = None,
    tls_key_file: Path | None = None,
    grace_s: float = DRAIN_GRACE_S,
    share_port: bool = False,
    idle: IdleBounds = IDLE,
) -> None:
    """Serves until `stopping`, lets calls in flight finish for `grace_s`, returns. `share_port`: others like this one
    listen on the same port.

    `bound` is called once with the address really listened on, when connections are accepted. AddressInUse or
    AddressUnavailable, naming `address_setting`, when it cannot be.
    """
    with listen(address, address_setting, share_port=share_port) as listener:
        try:
            server = _Server(app, listener, tls_cert_file, tls_key_file)
        except OSError as error:  # ssl.SSLError is one
            raise AddressUnavailable(0, f"TLS_CERT_FILE and TLS_KEY_FILE cannot be used: {error}") from None
        serving = asyncio.create_task(server.serve(), name="http-server")
        stop = asyncio.create_task(stopping.wait(), name="http-stop")
        try:
            host, port = listener.getsockname()[:2]
            real = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            tls = ", TLS" if tls_cert_file is not None else ""
            _log.info("gateway listens on %s (HTTP%s)", real, tls)
            if bound is not None:
                bound(real)
            async with tasks.beside("http-idle", IdleConnections(port, idle).watch()):
                await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                await serving
                raise RuntimeError("the HTTP server ended by itself")
        finally:
            stop.cancel()
            await _stop(app, server, serving, grace_s)


async def _stop(app: HttpApp, server: _Server, serving: "asyncio.Task[None]", grace_s: float) -> None:
    app.begin_drain()
    server.stop()  # type: ignore[no-untyped-call]
    done, _ = await asyncio.wait({serving}, timeout=grace_s)
    if not done:
        _log.warning("%d HTTP requests did not end within %s s and are cut off", app.in_flight, grace_s)
        app.cut_off()
        await asyncio.wait({serving}, timeout=CUT_OFF_S)
        serving.cancel()
        await asyncio.wait({serving})


def listen(address: str, address_setting: str, *, share_port: bool) -> socket.socket:
    """A listening socket; raises as `serve_http`."""
    listener = bound_socket(address, address_setting, share_port=share_port)
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _unavailable(error, address, address_setting) from None
    return listener


def bound_socket(address: str, address_setting: str, *, share_port: bool) -> socket.socket:
    """A socket that has the address and does not listen; raises as `serve_http`."""
    host, port = split_address(address)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _unavailable(error, address, address_setting) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(where)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise _unavailable(error, address, address_setting) from None
    return listener


def _unavailable(error: OSError, address: str, address_setting: str) -> AddressUnavailable:
    if error.errno == errno.EADDRINUSE:
        return AddressInUse(errno.EADDRINUSE, f"address {address} is already in use (set {address_setting})")
    reason = error.strerror or str(error)
    return AddressUnavailable(error.errno or 0, f"cannot listen on {address}: {reason} (set {address_setting})")
