"""gRPC calls over a plain socket, for load generators: HTTP/2 with as little as a call needs.

Why not grpc.aio: there a call costs its client as much processor time as the server, on the same two cores, so half of
what is measured would be the client. Here a request is prepared bytes, and a reply is looked at frame by frame.

What must stay true: nothing is skipped silently: a reply whose trailers do not say `grpc-status: 0`, a reset stream and
a frame that is not expected are failures. So that trailers can be read without state, the server is told to keep no
table of headers; so that no window ever closes, both kinds are opened as wide as they go (2 GiB, far more than
one run needs).
"""

import re
import socket
from collections.abc import Mapping
from typing import Final, NamedTuple

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CONNECT_BOUND_S: Final = 20.0
RECEIVED_AT_ONCE: Final = 1 << 18
WIDEST_WINDOW: Final = (1 << 31) - 1
FIRST_WINDOW: Final = 65_535

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK = _END_STREAM = 0x1
_END_HEADERS: Final = 0x4
_NO_TABLE, _NO_PUSH, _WINDOW = (1, 0), (2, 0), (4, WIDEST_WINDOW)
_STATUS_OK: Final = b"\x0bgrpc-status\x010"
_STATUS: Final = re.compile(rb"grpc-status[\x01-\x02](\d{1,2})")


class Event(NamedTuple):
    """Something of a call: some data, or its end, with what went wrong unless it is empty."""

    stream: int
    data: bytes
    ended: bool
    fault: str


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame as it goes over the wire."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def header_block(authority: str, path: str, metadata: Mapping[str, str]) -> bytes:
    """The headers of a gRPC call, each told in full, which changes no table (RFC 7541, 6.2.2)."""
    named = {":authority": authority, ":path": path, "content-type": "application/grpc", "te": "trailers", **metadata}
    told = [b"\0" + _text(name.encode()) + _text(value.encode()) for name, value in named.items()]
    return b"\x83\x86" + b"".join(told)  # :method POST and :scheme http, of the table that everybody has


def _text(text: bytes) -> bytes:
    """A string without Huffman's code: its length as an integer of 7 bits and more (RFC 7541, 5.1), and itself."""
    length = len(text)
    if length < 127:
        return bytes((length,)) + text
    head, rest = bytearray((127,)), length - 127
    while rest >= 128:
        head.append(rest % 128 + 128)
        rest //= 128
    head.append(rest)
    return bytes(head) + text


class Connection:
    """One connection. `call` and `receive` may be used by a thread each."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), CONNECT_BOUND_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        settings = b"".join(
            number.to_bytes(2, "big") + value.to_bytes(4, "big") for number, value in (_NO_TABLE, _NO_PUSH, _WINDOW)
        )
        widened = (WIDEST_WINDOW - FIRST_WINDOW).to_bytes(4, "big")
        self._socket.sendall(PREFACE + frame(_SETTINGS, 0, 0, settings) + frame(_WINDOW_UPDATE, 0, 0, widened))
        self._socket.setblocking(False)
        self._buffer = bytearray()
        self._next_stream = 1

    def fileno(self) -> int:
        """For epoll."""
        return self._socket.fileno()

    def call(self, headers: bytes, message: bytes) -> int:
        """Sends a request, of a `header_block` and a serialized message; returns the number of its stream."""
        stream = self.next_stream
        self._next_stream += 2
        body = b"\0" + len(message).to_bytes(4, "big") + message
        # one small write, which the kernel takes whole or not at all; not at all is an error, as is everything else
        self._socket.sendall(frame(_HEADERS, _END_HEADERS, stream, headers) + frame(_DATA, _END_STREAM, stream, body))
        return stream

    @property
    def next_stream(self) -> int:
        """The number that the next call will have."""
        return self._next_stream

    def receive(self) -> list[Event]:
        """What has come; ConnectionError when the connection is over."""
        try:
            chunk = self._socket.recv(RECEIVED_AT_ONCE)
        except BlockingIOError:
            return []
        if not chunk:
            raise ConnectionError("the server closed the connection")
        buffer = self._buffer
        buffer += chunk
        events: list[Event] = []
        at = 0
        while len(buffer) - at >= 9:
            ends = at + 9 + int.from_bytes(buffer[at : at + 3], "big")
            if len(buffer) < ends:
                break
            kind, flags, stream = buffer[at + 3], buffer[at + 4], int.from_bytes(buffer[at + 5 : at + 9], "big")
            event = self._event(kind, flags, stream, bytes(buffer[at + 9 : ends]))
            if event is not None:
                events.append(event)
            at = ends
        del buffer[:at]
        return events

    def _event(self, kind: int, flags: int, stream: int, payload: bytes) -> Event | None:
        if kind == _DATA:
            ended = bool(flags & _END_STREAM)
            return Event(stream, payload, ended, "no trailers" if ended else "")
        if kind == _HEADERS:
            if not flags & _END_HEADERS:
                raise ConnectionError("headers in several frames")
            if flags & _END_STREAM:
                return Event(stream, b"", True, _fault(payload))
        elif kind == _RST_STREAM:
            return Event(stream, b"", True, f"reset with {int.from_bytes(payload, 'big')}")
        elif kind in {_SETTINGS, _PING}:
            if not flags & _ACK:
                self._socket.sendall(frame(kind, _ACK, 0, payload if kind == _PING else b""))
        elif kind == _GOAWAY:
            raise ConnectionError(f"the server goes away: {payload[8:]!r}")
        elif kind != _WINDOW_UPDATE:
            raise ConnectionError(f"a frame of kind {kind}")
        return None

    def close(self) -> None:
        """Ends it, and what runs on it."""
        self._socket.close()


def _fault(trailers: bytes) -> str:
    """Why a call failed, as its trailers tell; empty when it did not."""
    if _STATUS_OK in trailers:
        return ""
    found = _STATUS.search(trailers)
    return f"grpc-status {found[1].decode()}" if found else f"no grpc-status in the trailers {trailers!r}"


class Messages:
    """The gRPC messages of one stream, put together from its data."""

    def __init__(self) -> None:
        self._buffer = b""

    def add(self, data: bytes) -> list[bytes]:
        """The messages that are whole now."""
        buffer = self._buffer + data
        found = []
        while len(buffer) >= 5 and len(buffer) >= (ends := 5 + int.from_bytes(buffer[1:5], "big")):
            found.append(buffer[5:ends])
            buffer = buffer[ends:]
        self._buffer = buffer
        return found
