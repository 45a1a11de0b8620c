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
from typing import Final

from gateway.http.app import HttpApp
from gateway.http.generations import BACKLOG, CannotBegin, Generations
from gateway.http.idle import IdleBounds
from runtime import tasks
from runtime.limits import DRAIN_GRACE_S
from runtime.server import AddressInUse, AddressUnavailable
from runtime.settings import split_address
from runtime.tls import CertificateFiles

CUT_OFF_S: Final = 1.0
"""After the cut, how long the last answers may take to leave."""
ADDRESS_SETTING: Final = "GATEWAY_HTTP_ADDRESS"
IDLE: Final = IdleBounds()

_log = logging.getLogger(__name__)


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
    files = CertificateFiles(tls_cert_file, tls_key_file) if tls_cert_file and tls_key_file else None
    with listen(address, address_setting, share_port=share_port) as listener:
        servers = Generations(app, listener, files, idle)
        try:
            await servers.begin()
        except (OSError, ValueError, CannotBegin) as error:  # ssl.SSLError is an OSError
            raise AddressUnavailable(0, f"TLS_CERT_FILE and TLS_KEY_FILE cannot be used: {error}") from None
        try:
            host, port = listener.getsockname()[:2]
            real = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            _log.info("gateway listens on %s (HTTP%s)", real, ", TLS" if files is not None else "")
            if bound is not None:
                bound(real)
            async with tasks.beside("http-watch", servers.watch()):
                await _first(stopping, servers.broken)
            if servers.broken.is_set():
                raise RuntimeError("the HTTP server ended by itself")
        finally:
            listener.close()  # so that the kernel refuses new connections as soon as no server takes them
            await _stop(app, servers, grace_s)


async def _first(*events: asyncio.Event) -> None:
    waiting = {asyncio.create_task(event.wait(), name="http-wait") for event in events}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await tasks.cancel(*waiting)


async def _stop(app: HttpApp, servers: Generations, grace_s: float) -> None:
    app.begin_drain()
    ending = servers.stop()
    _, late = await asyncio.wait(ending, timeout=grace_s)
    if late:
        _log.warning("%d HTTP requests did not end within %s s and are cut off", app.in_flight, grace_s)
        app.cut_off()
        await asyncio.wait(late, timeout=CUT_OFF_S)
        for task in late:
            task.cancel()
        await asyncio.wait(late)


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
