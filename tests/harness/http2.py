"""HTTP/2 by hand, for clients that misbehave in ways that no library offers.

Header fields are written as literals, which needs no table; `indexed` and `remembered` are for those who misuse it.
"""

import asyncio
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
NO_ERROR, ENHANCE_YOUR_CALM = 0, 11
FRAME_BYTES: Final = 16_384
"""The largest frame that every peer takes."""

Pairs = Iterable[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def error_code(self) -> int:
        """Of a RST_STREAM or GOAWAY."""
        return int(struct.unpack_from(">I", self.payload, 4 if self.kind == GOAWAY else 0)[0])

    @property
    def debug(self) -> str:
        """What a GOAWAY says."""
        return self.payload[8:].decode("latin-1")


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """A frame's bytes."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: str, value: str) -> bytes:
    """A header field that no table remembers."""
    return b"\x00" + _text(name) + _text(value)


def remembered(name: str, value: str) -> bytes:
    """A header field that becomes the newest of the receiver's table, where it is number 62."""
    return b"\x40" + _text(name) + _text(value)


NEWEST: Final = b"\xbe"
"""One byte that stands for the whole header field remembered last."""


def block(pairs: Pairs) -> bytes:
    """A block of header fields."""
    return b"".join(literal(name, value) for name, value in pairs)


def _text(text: str) -> bytes:
    data = text.encode("latin-1")
    return _integer(len(data)) + data


def _integer(value: int) -> bytes:
    if value < 127:
        return bytes([value])
    rest, out = value - 127, bytearray([127])
    while rest >= 128:
        out.append(rest % 128 + 128)
        rest //= 128
    return bytes([*out, rest])


def request(authority: str, path: str, method: str = "GET", more: Pairs = ()) -> list[tuple[str, str]]:
    """The header fields of a request."""
    return [(":method", method), (":scheme", "http"), (":path", path), (":authority", authority), *more]


def grpc_request(authority: str, path: str, more: Pairs = ()) -> list[tuple[str, str]]:
    """Those of a gRPC call."""
    kind = [("te", "trailers"), ("content-type", "application/grpc")]
    return request(authority, path, "POST", [*kind, *more])


def message(length: int, data: bytes = b"") -> bytes:
    """A gRPC message, or the beginning of one: `length` is what it says of itself."""
    return b"\x00" + struct.pack(">I", length) + data


class Connection:
    """A connection that has said no more than it must."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, authority: str) -> None:
        self.reader = reader
        self.writer = writer
        self.authority = authority
        self._next = 1

    @classmethod
    async def open(cls, address: str) -> Self:
        """Connects, with preface and settings."""
        host, port = address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(PREFACE + frame(SETTINGS))
        return cls(reader, writer, address)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    def stream(self) -> int:
        """The number of a new stream."""
        number, self._next = self._next, self._next + 2
        return number

    def send(self, kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> None:
        """Sends a frame."""
        self.writer.write(frame(kind, flags, stream, payload))

    def call(self, path: str, more: Pairs = ()) -> int:
        """Begins a gRPC call."""
        number = self.stream()
        self.send(HEADERS, END_HEADERS, number, block(grpc_request(self.authority, path, more)))
        return number

    async def receive(self) -> Frame | None:
        """The next frame; None: the peer has closed the connection."""
        try:
            head = await self.reader.readexactly(9)
            kind, flags, stream = struct.unpack(">BBI", head[3:])
            payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        except (asyncio.IncompleteReadError, OSError):
            return None
        if kind == SETTINGS and not flags & ACK:
            self.send(SETTINGS, ACK)
        if kind == PING and not flags & ACK:
            self.send(PING, ACK, 0, payload)
        return Frame(kind, flags, stream & 0x7FFF_FFFF, payload)

    async def until(self, *kinds: int, stream: int | None = None) -> Frame | None:
        """The next frame of these kinds, on a stream if one is named; None: the connection was closed before."""
        while (got := await self.receive()) is not None:
            if got.kind in kinds and (stream is None or got.stream == stream):
                return got
        return None
