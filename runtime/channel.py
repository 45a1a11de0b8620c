"""The one way to call another process: deadline, retries, keepalive, the service secret and tracing on every call.

    async with process.open_channel(settings.cache_target) as channel:
        stub = cache_pb2_grpc.CacheServiceStub(channel.grpc)
        async with calling("cache"):
            await stub.GetServer(request)

What must stay true: every unary call has a deadline, and a call made inside a call never has more time than its caller;
only methods whose proto option idempotency_level allows it are retried, here and nowhere else; behind `calling` no
grpc.RpcError is left.

Where the certificate that is shown to a peer was replaced, new channels take over and the old ones close when the last
of their calls has ended; a call that runs is never ended by that.

Deadline, secret and trace are added where a stub's method is called and not by grpc.aio interceptors, each of which
wraps every call in a task (measured here: 20-50 us of a 330 us call).
"""

import asyncio
import json
import re
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813  a function, named as a class

from runtime import deadline, tracing
from runtime.deadline import DEFAULT_DEADLINE_S
from runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    OpenManagerError,
    Unauthenticated,
    Unavailable,
    carried_error,
    from_rpc_error,
)
from runtime.interception import HEALTH_SERVICE, SERVICE_SECRET_REASON
from runtime.limits import KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS, MAX_MESSAGE_BYTES, TRANSPORT_FACTOR

RETRY_ATTEMPTS: Final = 4
RETRY_INITIAL_BACKOFF_S: Final = 0.1
RETRY_MAX_BACKOFF_S: Final = 2.0
RECONNECT_INITIAL_MS: Final = 100
RECONNECT_MAX_MS: Final = 2_000
"""A peer that was restarted is found again within this time."""
CONNECT_TIMEOUT_MS: Final = 5_000

_HANDSHAKE: Final = re.compile(r"Tls handshake failed .*OPENSSL_internal:(.*?)(?:: OK)?$")
_RETRIED: Final = frozenset({MethodOptions.NO_SIDE_EFFECTS, MethodOptions.IDEMPOTENT})


class Channel:
    """Connections to one target, and `grpc`, what stubs are made with."""

    def __init__(
        self,
        target: str,
        *,
        secret: str | None = None,
        credentials: Callable[[], Any] | None = None,
        default_deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> None:
        """`credentials` tells the grpc.ChannelCredentials to use, asked before each call; None: without TLS."""
        self.target = target
        self.grpc: Any = _StubChannel(target, secret, credentials, default_deadline_s)

    async def close(self, grace_s: float | None = None) -> None:
        """Ends the connections; calls in flight may go on for `grace_s` (default: they are cancelled)."""
        await self.grpc.close(grace_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _StubChannel(grpc.aio.Channel):
    """A grpc.aio.Channel for stubs: one real channel for each service, opened when its stub is made.

    gRPC takes retry policies only when a channel is made, and per service is when they are known. Channels with
    the same arguments share their connections.
    """

    def __init__(
        self, target: str, secret: str | None, credentials: Callable[[], Any] | None, default_deadline_s: float
    ) -> None:
        self._target = target
        self._credentials = credentials
        self._shown: Any = None if credentials is None else credentials()
        self._metadata = (("authorization", f"Bearer {secret}"),) if secret else ()
        self._default_deadline_s = default_deadline_s
        self._channels: dict[str, _Real] = {}
        self._old: set[_Real] = set()
        self._methods: weakref.WeakSet[_Method] = weakref.WeakSet()

    def _channel(self, service: str) -> "_Real":
        channel = self._channels.get(service)
        if channel is None:
            options = _options(service)
            channel = self._channels[service] = _Real(
                grpc.aio.insecure_channel(self._target, options)
                if self._shown is None
                else grpc.aio.secure_channel(self._target, self._shown, options)
            )
        return channel

    def _method(self, kind: str, path: str, unary_deadline: bool, *args: Any, **kwargs: Any) -> "_Method":
        def make() -> tuple[_Real, Callable[..., Any]]:
            real = self._channel(path.split("/")[1])
            return real, getattr(real.channel, kind)(path, *args, **kwargs)

        look = None if self._credentials is None else self._look
        method = _Method(path, make, look, self._metadata, self._default_deadline_s if unary_deadline else None)
        if look is not None:
            self._methods.add(method)
        return method

    def _look(self) -> None:
        """Goes over to new channels where there are new credentials; before each call."""
        assert self._credentials is not None
        credentials = self._credentials()
        if credentials is self._shown:
            return
        self._shown = credentials
        self._old |= set(self._channels.values())
        self._channels = {}
        for method in self._methods:
            method.renew()
        for channel in tuple(self._old):
            channel.close_when_idle(self._old.discard)

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._method("unary_unary", method, True, *args, **kwargs)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._method("unary_stream", method, False, *args, **kwargs)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._method("stream_unary", method, False, *args, **kwargs)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._method("stream_stream", method, False, *args, **kwargs)

    async def close(self, grace: float | None = None) -> None:
        for channel in (*self._channels.values(), *self._old):
            await channel.close(grace)
        self._channels, self._old = {}, set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        state: grpc.ChannelConnectivity = self._channel("").channel.get_state(try_to_connect)
        return state

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel("").channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel("").channel.channel_ready()


class _Real:
    """A channel of gRPC's, and how many calls run on it if anybody counts them."""

    __slots__ = ("_closing", "_running", "_then", "channel")

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self._running = 0
        self._then: Callable[[_Real], None] | None = None
        self._closing: asyncio.Task[None] | None = None

    def count(self, call: Any) -> None:
        """Counts a call that has begun, until it ends."""
        self._running += 1
        call.add_done_callback(self._ended)

    def close_when_idle(self, then: "Callable[[_Real], None]") -> None:
        """No call begins any more: it is closed when those that run have ended."""
        self._then = then
        self._close_if_idle()

    async def close(self, grace_s: float | None) -> None:
        await self.channel.close(grace_s)

    def _ended(self, _call: Any) -> None:
        self._running -= 1
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._then is not None and self._running == 0 and self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self.channel.close(), name="close-old-channel")
            self._closing.add_done_callback(lambda _: self._then and self._then(self))


class _Method:
    """A stub's method that adds the service secret, the trace and the deadline to the call."""

    __slots__ = (
        "__weakref__",
        "_call",
        "_default_deadline_s",
        "_is_traced",
        "_look",
        "_make",
        "_metadata",
        "_path",
        "_real",
    )

    def __init__(
        self,
        path: str,
        make: Callable[[], tuple[_Real, Callable[..., Any]]],
        look: Callable[[], None] | None,
        metadata: tracing.Metadata,
        default_deadline_s: float | None,
    ) -> None:
        self._path = path
        self._is_traced = not path.startswith(f"/{HEALTH_SERVICE}/")
        self._make = make
        self._real, self._call = make()
        self._look = look
        self._metadata = metadata
        self._default_deadline_s = default_deadline_s

    def renew(self) -> None:
        """From now on it is called over another channel."""
        self._real, self._call = self._make()

    def __call__(
        self, request: Any = None, *, timeout: float | None = None, metadata: Any = None, **kwargs: Any
    ) -> Any:
        if self._default_deadline_s is not None:
            timeout = deadline.for_unary_call(timeout, self._default_deadline_s)
        merged = self._metadata if metadata is None else (*self._metadata, *metadata)
        span = None
        if self._is_traced:
            recorder = tracing.recorder()
            place, span = (tracing.passed_on(), None) if recorder is None else recorder.outgoing(self._path)
            merged = (*merged, *place)
        if self._look is not None:
            self._look()
        call = self._call(request, timeout=timeout, metadata=merged, **kwargs)
        if self._look is not None:
            self._real.count(call)
        if span is not None:
            call.add_done_callback(span.end_with)
        return call


def _options(service: str) -> tuple[tuple[str, Any], ...]:
    return (
        ("grpc.enable_retries", 1),
        ("grpc.service_config", json.dumps(service_config(service))),
        ("grpc.enable_http_proxy", 0),  # inner calls never go through the machine's web proxy
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES * TRANSPORT_FACTOR),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES * TRANSPORT_FACTOR),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # or it would be a minute all the same
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_INITIAL_MS),
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MAX_MS),
    )


def service_config(service: str) -> dict[str, Any]:
    """gRPC's service config: a retry policy for the methods of `service` that are safe to repeat."""
    try:
        descriptor: ServiceDescriptor = default_pool().FindServiceByName(service)
    except KeyError:
        return {}
    names = [
        {"service": service, "method": method.name}
        for method in descriptor.methods
        if method.GetOptions().idempotency_level in _RETRIED
    ]
    if not names:
        return {}
    policy = {
        "maxAttempts": RETRY_ATTEMPTS,
        "initialBackoff": f"{RETRY_INITIAL_BACKOFF_S}s",
        "maxBackoff": f"{RETRY_MAX_BACKOFF_S}s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return {"methodConfig": [{"name": names, "retryPolicy": policy}]}


class calling:  # noqa: N801  reads as a statement: async with calling("cache")
    """The border where a failed call to `peer` becomes an OpenManagerError."""

    __slots__ = ("_peer",)

    def __init__(self, peer: str) -> None:
        self._peer = peer

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, grpc.RpcError):
            raise peer_error(self._peer, error) from error


def peer_error(peer: str, error: grpc.RpcError) -> OpenManagerError:
    """What a failed call to `peer` is to us: its own typed error, or what its silence means, said with its name."""
    typed = carried_error(error)
    metadata = {"peer": peer}
    if typed is not None and not (isinstance(typed, Unauthenticated) and typed.reason == SERVICE_SECRET_REASON):
        return typed
    if typed is not None:
        return Unavailable(
            f"{peer} refused this process: both must have the same DATA_DIR/service-secret or SERVICE_SECRET",
            reason="SERVICE_SECRET_REFUSED",
            metadata=metadata,
        )
    bare = from_rpc_error(error)
    if isinstance(bare, Unavailable):
        text = f"{peer} is not reachable{_refusal(bare.message)}"
        return Unavailable(text, reason="PEER_UNAVAILABLE", metadata=metadata)
    if isinstance(bare, DeadlineExceeded):
        return DeadlineExceeded(f"{peer} did not answer in time", reason="PEER_DEADLINE_EXCEEDED", metadata=metadata)
    if isinstance(bare, Cancelled):  # we did not cancel: that would be an asyncio.CancelledError
        return Unavailable(f"{peer} dropped the call", reason="PEER_UNAVAILABLE", metadata=metadata)
    return type(bare)(f"{peer}: {bare.message}", reason=bare.reason, metadata=metadata)


def _refusal(details: str) -> str:
    """What keeps the two from talking, where somebody listens there: that is not mended by waiting."""
    if not details.startswith("failed to connect to all addresses"):
        return ""
    if details.endswith(": Socket closed"):  # with TLS 1.3 a certificate of ours that is refused shows no other way
        return ": it closes the connection, as one does that has no TLS, or wants another certificate of us"
    if "Hostname Verification Check failed" in details:
        return ": its certificate is for other names"
    found = _HANDSHAKE.search(details)
    return f": no TLS with it: {found[1]}" if found else ""
