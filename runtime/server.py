"""The one builder of gRPC servers: the same interception, health, reflection, limits and graceful stop for all.

What must stay true: a second server on a port is refused (so_reuseport off, which gRPC has on) unless it is asked for;
stopping refuses new calls at once and waits for those in flight, but not for watchers.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from runtime import descriptors, limits, reflection
from runtime.doorman import Doorman, InTurn, Knows
from runtime.handlers import Bound, bind
from runtime.interception import HEALTH_SERVICE, Interception
from runtime.limits import MAX_MESSAGE_BYTES
from runtime.settings import split_address

__all__ = ["MAX_MESSAGE_BYTES", "AddressInUse", "AddressUnavailable", "Bound", "GrpcServer", "bind"]

_log = logging.getLogger(__name__)


class AddressUnavailable(OSError):  # noqa: N818  as AddressInUse
    """The address cannot be listened on."""


class AddressInUse(AddressUnavailable):
    """Somebody else listens on the address."""


class GrpcServer:
    """One listening server. `await start(address)`, then `set_serving`, at last `stop`."""

    def __init__(
        self,
        servicers: Sequence[Bound],
        interception: Interception,
        *,
        credentials: Any = None,
        max_concurrent_calls: int = limits.MAX_CONCURRENT_CALLS,
        share_port: bool = False,
        knows: Knows | None = None,
        open_to_all: Collection[str] = (),
    ) -> None:
        """Prepares. `knows`: who is refused before anything of his message is read; None: nobody. `open_to_all`: what
        he may call all the same."""
        self.interception = interception
        self._credentials = credentials
        self._share_port = share_port
        self._health = _Health()
        self._services = tuple(bound.service for bound in servicers)
        self._stopping = False
        for bound in servicers:
            if bound.missing:
                _log.info("%s: not implemented: %s", bound.service, ", ".join(bound.missing))
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=max_concurrent_calls,
            options=(
                ("grpc.so_reuseport", int(share_port)),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES * limits.TRANSPORT_FACTOR),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES * limits.TRANSPORT_FACTOR),
                ("grpc.max_allowed_incoming_connections", descriptors.max_connections()),
                ("grpc.max_concurrent_streams", limits.MAX_STREAMS_PER_CONNECTION),
                ("grpc.server.max_pending_requests", limits.MAX_PENDING_CALLS),
                ("grpc.server.max_pending_requests_hard_limit", 3 * limits.MAX_PENDING_CALLS),
                ("grpc.server_handshake_timeout_ms", limits.HANDSHAKE_TIMEOUT_MS),
                ("grpc.http2.settings_timeout", limits.HANDSHAKE_TIMEOUT_MS),
                ("grpc.keepalive_time_ms", limits.KEEPALIVE_TIME_MS),
                ("grpc.keepalive_timeout_ms", limits.KEEPALIVE_TIMEOUT_MS),
                ("grpc.http2.ping_timeout_ms", limits.KEEPALIVE_TIMEOUT_MS),  # or it would be a minute all the same
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", limits.KEEPALIVE_TIME_MS // 2),
            ),
        )
        in_turn = InTurn()
        served = (*servicers, *reflection.bound((*self._services, HEALTH_SERVICE)))
        self._server.add_generic_rpc_handlers((Doorman(served, interception, knows, open_to_all, in_turn),))
        # Open to all without interception: it says nothing more than up or down, and is too frequent to log.
        health_pb2_grpc.add_HealthServicer_to_server(self._health, cast("Any", _ByNoName(self._server, in_turn)))

    async def start(self, address: str) -> str:
        """Listens on `address` ("host:port") and returns it with the real port; health says NOT_SERVING at first."""
        await self.set_serving(False)
        host, _ = split_address(address)
        if not self._share_port:  # otherwise whoever reserved the port has looked
            _probe(address)
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise AddressUnavailable(errno.EADDRNOTAVAIL, f"cannot listen on {address}: {error}") from error
        await self._begin()
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def _begin(self) -> None:
        """gRPC's start, which must not be cut off: its task of serving would then fail on the future that the start
        waited for ("invalid state" in the log, before the reason of the cancellation), and the port stay open."""
        starting = asyncio.create_task(self._server.start(), name="grpc-start")
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait({starting})
            await self._server.stop(None)
            raise

    async def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 answers for the server ("") and each of its services."""
        if self._stopping:
            return
        kinds = health_pb2.HealthCheckResponse
        for service in ("", *self._services):
            await self._health.set(service, kinds.SERVING if serving else kinds.NOT_SERVING)

    async def stop(self, grace_s: float = limits.DRAIN_GRACE_S) -> None:
        """NOT_SERVING and no new calls at once; unary calls may finish within `grace_s`, streams end earlier."""
        self._stopping = True
        await self._health.enter_graceful_shutdown()
        grace_for_streams_s = min(limits.STREAM_GRACE_S, grace_s)
        timer = asyncio.get_running_loop().call_later(grace_for_streams_s, self.interception.end_streams)
        try:
            await self._server.stop(grace_s)
        finally:
            timer.cancel()


class _Health(health.aio.HealthServicer):
    """Without List: it would tell everybody which services there are, and grpc's own fails with a traceback."""

    async def List(self, _request: object, context: Any) -> None:
        """Refuses."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "services are not listed; ask for each by Check or Watch")


class _ByNoName:
    """A server to generated code, which is given a service's methods as all others.

    Of each method that is registered by name grpc.aio has a call waiting, and looks at all that wait whenever one comes
    of whatever method: the three of health cost every call 4 us of processor. They are open to all, so strangers'
    messages are read in turn.
    """

    def __init__(self, server: grpc.aio.Server, in_turn: InTurn) -> None:
        self._server = server
        self._in_turn = in_turn

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """They are those of below."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Adds them."""
        made = {name: self._in_turn.of(handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, made),))


def _probe(address: str) -> None:
    """Raises AddressUnavailable when nobody could listen on `address`.

    A plain socket tells why; gRPC does not, and writes lines of its own to stderr when it fails.
    """
    host, port = split_address(address)
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(errno.EADDRINUSE, f"address {address} is already in use") from None
        reason = error.strerror or str(error)
        raise AddressUnavailable(error.errno or 0, f"cannot listen on {address}: {reason}") from None
