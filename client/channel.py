"""The connection to a gateway: address, TLS, token, retries of what may be repeated.

    127.0.0.1:50050             without TLS: nobody else is on the way
    gateway.example:50050       with TLS, as any address that is not this machine's
    https://gateway.example     with TLS, port 443
    http://gateway:50050        without TLS, because it is said so
    unix:/run/openmanager.sock  without TLS

What must stay true: a token never crosses a network in clear unless the address says http://; only methods whose proto
says that they may be repeated are retried here.
"""

import ipaddress
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.descriptor_pb2 import MethodOptions

from openmanager.gateway.v1 import fleet_pb2, history_pb2, ingest_pb2, storage_pb2

DEFAULT_ADDRESS: Final = "127.0.0.1:50050"
MAX_MESSAGE_BYTES: Final = 64 << 20
"""The gateway sends at most 16 MiB; its own bound names itself, gRPC's does not."""

_RETRIED: Final = frozenset({MethodOptions.NO_SIDE_EFFECTS, MethodOptions.IDEMPOTENT})
_KEEPALIVE_TIME_MS: Final = 20_000
"""A gateway that vanished without a word is noticed after this time and the next."""
_KEEPALIVE_TIMEOUT_MS: Final = 5_000
_PORT: Final = re.compile(r":\d{1,5}$")


class BadAddress(ValueError):  # noqa: N818  named as what it is about
    """An address or a certificate file that makes no sense, in words that say what would."""


def open_channel(address: str, ca_file: str | Path | None = None) -> grpc.aio.Channel:
    """A channel to the gateway; it connects with the first call.

    Raises:
        BadAddress: the address, or the file, makes no sense.
    """
    target, secure = endpoint(address)
    if ca_file is not None and address.startswith(("http://", "unix:")):
        raise BadAddress(f"{address} is without TLS, so it needs no authority: leave one of them out")
    options = _options(target)
    if not secure and ca_file is None:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(_authority(ca_file)), options)


def endpoint(address: str) -> tuple[str, bool]:
    """gRPC's target for an address, and whether it is with TLS."""
    if address.startswith("unix:"):
        return address, False
    scheme, separator, rest = address.partition("://")
    if not separator:
        scheme, rest = "", address
    elif scheme not in {"http", "https"}:
        raise BadAddress(f"{address}: use HOST:PORT, https://HOST:PORT or http://HOST:PORT")
    rest = rest.rstrip("/")
    if scheme and not _PORT.search(rest):
        rest += ":443" if scheme == "https" else ":80"
    host, _, port = rest.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or re.search(r"[/\s@]", host):
        raise BadAddress(f"{address!r} is no address: use HOST:PORT, for example {DEFAULT_ADDRESS}")
    return rest, scheme == "https" or (not scheme and not _is_loopback(host))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _authority(ca_file: str | Path | None) -> bytes | None:
    if ca_file is None:
        return None
    try:
        text = Path(ca_file).read_bytes()
    except OSError as error:
        raise BadAddress(f"the authority's file {ca_file}: {error.strerror or error}") from error
    if b"-----BEGIN CERTIFICATE-----" not in text:
        raise BadAddress(f"the authority's file {ca_file} has no certificate: it must be PEM")
    return text


def _options(target: str) -> Sequence[tuple[str, Any]]:
    local = target.startswith("unix:") or _is_loopback(target.rpartition(":")[0])
    return (
        ("grpc.service_config", json.dumps(service_config())),
        ("grpc.enable_http_proxy", 0 if local else 1),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", _KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    )


def service_config() -> dict[str, Any]:
    """gRPC's service config: a retry policy for the public methods that are safe to repeat."""
    names = [
        {"service": service.full_name, "method": method.name}
        for module in (fleet_pb2, history_pb2, ingest_pb2, storage_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if method.GetOptions().idempotency_level in _RETRIED
    ]
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return {"methodConfig": [{"name": names, "retryPolicy": policy}]}
