"""The bounds of what goes over the wire, the same for servers and the channels that call them."""

from typing import Final

MAX_MESSAGE_BYTES: Final = 16 << 20
"""The largest request or response message, serialized."""
TRANSPORT_FACTOR: Final = 4
"""gRPC itself takes messages of this many times MAX_MESSAGE_BYTES, so that our refusal, which names the limit, is the
one that is seen; beyond it gRPC refuses (RESOURCE_EXHAUSTED, "Received message larger than max")."""
MAX_STREAMS_PER_CONNECTION: Final = 1_000
"""Calls running at once on one connection; a client's further ones wait."""
MAX_CONCURRENT_CALLS: Final = 10_000
"""Calls running at once in a server, streams included; more are refused with RESOURCE_EXHAUSTED."""
MAX_OPEN_CALLS: Final = MAX_CONCURRENT_CALLS // 2
"""Of these, to methods that are open to all. Strangers make them, and leave the other half to who is known."""
MAX_OPEN_CALLS_OF_ADDRESS: Final = 1_000
"""Of these, from one address: of clients behind a proxy each may watch health."""
MAX_OPEN_MESSAGES: Final = 2
"""Messages of one address to methods that are open to all which are read at once: of each gRPC keeps what has come, up
to TRANSPORT_FACTOR times MAX_MESSAGE_BYTES."""
OPEN_MESSAGE_WITHIN_S: Final = 5.0
"""How long such a message may take; clients send it with the call."""
MAX_PENDING_CALLS: Final = 1_000
"""Calls that gRPC has received and the event loop has not begun. From here on gRPC refuses some of them by itself, at
three times as many all: as HTTP/2's REFUSED_STREAM, which means "not processed" and which clients repeat by themselves,
UNAVAILABLE at last. At 7,000 reads a second so many wait for 0.15 to 0.45 s."""
DRAIN_GRACE_S: Final = 5.0
"""How long calls in flight may go on once the server stops."""
STREAM_GRACE_S: Final = 1.0
"""How long streams may; a watcher never ends by itself."""
KEEPALIVE_TIME_MS: Final = 20_000
"""A connection without traffic is probed after this time ..."""
KEEPALIVE_TIMEOUT_MS: Final = 5_000
"""... and given up when the probe is not answered within this."""
HANDSHAKE_TIMEOUT_MS: Final = 20_000
"""How long a connection may take until TLS is agreed on, and again until our settings of HTTP/2 are acknowledged."""
