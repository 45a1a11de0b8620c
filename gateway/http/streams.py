"""Streamed answers on the wire: JSON lines, or Server-Sent Events.

JSON lines: a line for each message; a fault in mid-stream is a last line {"error": google.rpc.Status}.
Server-Sent Events: one for each element of the fields marked `sse_event`, in order of their numbers; the field marked
`sse_id` becomes the id. A marked bool is an event when it is true.

    event: server
    data: {"id":"server-1",...}

    event: server
    id: 65f1c2-1042
    data: {"id":"server-2",...}

The id stands on the last event of its message only: a browser that reconnects sends the last id it saw, and that must
mean that it has everything up to there. Events before it keep, by the standard, the id of the message before; but a
`snapshot` has the id 0, which stands for nothing: whoever is cut off behind it has dropped what he had.

What must stay true: the status line is not sent before the first message is there, so that a call that fails at once
has a proper HTTP status (an event stream that stays silent for HEARTBEAT_INTERVAL_S begins with a comment instead);
writes never overlap; a reader that does not read stops the servicer's generator, since nothing is sent ahead.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

import orjson
from google.protobuf.descriptor import MethodDescriptor

from gateway.http.encode import encoder_of, message_type
from gateway.http.replies import API_HEADERS, SECURITY_HEADERS, Header, Send, status_value, trace_headers
from openmanager.gateway.v1 import options_pb2
from runtime import tasks
from runtime.clock import Clock
from runtime.errors import OpenManagerError

HEARTBEAT_INTERVAL_S: Final = 15.0
RECONNECT_AFTER_MS: Final = 2_000
NOTHING: Final = b"id: 0\n"
"""As `after_version` the same as none."""


class Framer(Protocol):
    """How the messages of one method look on the wire."""

    headers: tuple[Header, ...]
    opening: bytes
    heartbeat: bytes
    """What keeps a silent connection alive; empty: nothing may."""

    def message(self, message: Any) -> bytes:
        """One message of the method."""

    def error(self, error: OpenManagerError) -> bytes:
        """A fault after the status line has gone."""


def if_match_field(method: MethodDescriptor) -> str:
    """The field of the method's request that the header If-Match is; empty: none."""
    marked = (field.name for field in method.input_type.fields if field.GetOptions().Extensions[options_pb2.if_match])
    return next(marked, "")


def is_watch(method: MethodDescriptor) -> bool:
    """Whether a method tells of changes, for as long as somebody listens."""
    wanted = method.GetOptions().Extensions[options_pb2.http_stream_format]
    return bool(wanted == options_pb2.HTTP_STREAM_FORMAT_SERVER_SENT_EVENTS)


def framer_of(method: MethodDescriptor) -> Framer:
    """The framing that the method's options ask for."""
    if is_watch(method):
        return EventFramer(method)
    wanted = method.GetOptions().Extensions[options_pb2.http_stream_format]
    if wanted == options_pb2.HTTP_STREAM_FORMAT_TEXT:
        return TextFramer()
    return LineFramer(method)


def last_id_field(method: MethodDescriptor) -> str:
    """The field of the request that Last-Event-ID is for; empty: none."""
    marked = (
        field.name for field in method.input_type.fields if field.GetOptions().Extensions[options_pb2.sse_last_id]
    )
    return next(marked, "")


class LineFramer:
    """application/x-ndjson."""

    headers: tuple[Header, ...] = ((b"content-type", b"application/x-ndjson"), *API_HEADERS)
    opening = b""
    heartbeat = b""

    def __init__(self, method: MethodDescriptor) -> None:
        self._encode = encoder_of(method.output_type)

    def message(self, message: Any) -> bytes:
        return orjson.dumps(self._encode(message), option=orjson.OPT_APPEND_NEWLINE)

    def error(self, error: OpenManagerError) -> bytes:
        return orjson.dumps({"error": status_value(error)}, option=orjson.OPT_APPEND_NEWLINE)


class TypedChunk(bytes):
    """The first chunk of an answer, which says of what type that is."""

    content_type: str


class TextFramer:
    """The `text` of messages that say their `content_type`; a fault is a last line that begins with `#error`."""

    headers: tuple[Header, ...] = API_HEADERS
    opening = b""
    heartbeat = b""

    def message(self, message: Any) -> bytes:
        chunk = TypedChunk(message.text.encode())
        chunk.content_type = message.content_type
        return chunk

    def error(self, error: OpenManagerError) -> bytes:
        return b"#error %b\n" % orjson.dumps(status_value(error))


class EventFramer:
    """text/event-stream."""

    headers: tuple[Header, ...] = (
        (b"content-type", b"text/event-stream"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # or nginx would hold events back
        *SECURITY_HEADERS,
    )
    opening = b"retry: %d\n\n" % RECONNECT_AFTER_MS
    heartbeat = b": still here\n\n"

    def __init__(self, method: MethodDescriptor) -> None:
        self._events: list[tuple[str, bytes, Callable[[Any], Any] | None]] = []
        self._id = ""
        for field in method.output_type.fields:
            options = field.GetOptions()
            if name := options.Extensions[options_pb2.sse_event]:
                encode = encoder_of(message_type(field)) if field.is_repeated else None
                self._events.append((field.name, name.encode(), encode))
            if options.Extensions[options_pb2.sse_id]:
                self._id = field.name
        self._encode = encoder_of(method.output_type)

    def message(self, message: Any) -> bytes:
        frames: list[bytes] = []
        begins_anew = False
        for name, event, encode in self._events:
            value = getattr(message, name)
            if encode is not None:
                frames += [b"event: %b\ndata: %b\n\n" % (event, orjson.dumps(encode(one))) for one in value]
            elif value:
                begins_anew = True
                frames.append(b"event: %b\ndata: {}\n\n" % event)
        if not self._events:
            frames.append(b"data: %b\n\n" % orjson.dumps(self._encode(message)))
        if self._id and (identity := _one_line(getattr(message, self._id))):
            last = frames.pop() if frames else b"\n"
            if begins_anew and frames:
                frames[0] = NOTHING + frames[0]
            frames.append(b"id: %b\n%b" % (identity, last))
        return b"".join(frames)

    def error(self, error: OpenManagerError) -> bytes:
        return b"event: error\ndata: %b\n\n" % orjson.dumps(status_value(error))


def _one_line(text: str) -> bytes:
    return text.replace("\n", "").replace("\r", "").replace("\0", "").encode()


class StreamWriter:
    """Writes one streamed answer, with heartbeats while there is nothing to say."""

    def __init__(self, send: Send, framer: Framer, clock: Clock) -> None:
        self._send = send
        self._framer = framer
        self._clock = clock
        self._lock = asyncio.Lock()
        self._last_write_s = clock.monotonic()
        self._beat: asyncio.Task[object] | None = None
        self.started = False

    async def write(self, chunk: bytes) -> None:
        """Sends a chunk, the headers before the first one."""
        async with self._lock:
            self._last_write_s = self._clock.monotonic()
            if not self.started:
                self.started = True
                headers = [*self._framer.headers, *trace_headers(200)]
                if isinstance(chunk, TypedChunk):
                    headers.append((b"content-type", chunk.content_type.encode()))
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
                chunk = self._framer.opening + chunk
            if chunk:
                await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end(self) -> None:
        """The end of the answer; an empty stream gets its headers here."""
        await self.write(b"")
        async with self._lock:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def start_heartbeat(self) -> None:
        """To be followed by close()."""
        if self._framer.heartbeat:
            self._beat = tasks.start("http-heartbeat", self._heartbeat())

    async def _heartbeat(self) -> None:
        while True:
            await self._clock.sleep_until(self._last_write_s + HEARTBEAT_INTERVAL_S)
            if self._clock.monotonic() - self._last_write_s >= HEARTBEAT_INTERVAL_S:
                await self.write(self._framer.heartbeat)

    def close(self) -> None:
        """Ends the heartbeat."""
        if self._beat is not None:
            self._beat.cancel()
