"""The JSON documents of a file or pipe: one on each line, or one that is the whole file.

The first line decides: if it is a whole JSON value, every line is. What must stay true: reading waits in a thread of
its own, so that a silent pipe holds nothing up, not even Ctrl-C; at most `CHUNKS_AHEAD` MiB are read ahead.
"""

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator
from typing import Final

import orjson

from client.command.body import BadBody, batch_of
from openmanager.gateway.v1.ingest_pb2 import WriteMetricsRequest

CHUNK_BYTES: Final = 1 << 20
CHUNKS_AHEAD: Final = 4
MAX_DOCUMENT_BYTES: Final = 256 << 20
"""A batch has at most 16 MiB as a message, which is some ten times as much in JSON."""


class Documents:
    """Reads batches, and remembers on which line those began that have no answer yet."""

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self.bytes_read = 0
        self._fd = fd
        self._line = 0
        self._unanswered: deque[int] = deque()

    @property
    def next_line(self) -> int:
        """The line of the first document without an answer."""
        return self._unanswered[0] if self._unanswered else self._line

    def answered(self) -> int:
        """An answer came: the line of its document."""
        return self._unanswered.popleft()

    async def batches(self) -> AsyncGenerator[WriteMetricsRequest, None]:
        """The batches, in order.

        Raises:
            BadBody: with the line.
            OSError: with the name.
        """
        whole: list[bytes] | None = None
        held, begun = 0, False
        async with contextlib.aclosing(self._lines()) as lines:
            async for line in lines:
                if whole is not None:
                    whole.append(line)
                    held += len(line)
                    if held > MAX_DOCUMENT_BYTES:  # or one bad line at the beginning would have all of a file read
                        raise BadBody(
                            f"{self._line}: not JSON, nor the beginning of a document of at most "
                            f"{MAX_DOCUMENT_BYTES >> 20} MiB"
                        )
                    continue
                self._line += 1
                if not line.strip():
                    continue
                if not begun and not _is_json(line):
                    whole = [line]
                    continue
                begun = True
                yield self._batch(line)
        if whole is not None:
            yield self._batch(b"".join(whole))

    def _batch(self, text: bytes) -> WriteMetricsRequest:
        try:
            request = batch_of(text)
        except BadBody as error:
            raise BadBody(f"{self._line}: {error}") from None
        self._unanswered.append(self._line)
        return request

    async def _lines(self) -> AsyncGenerator[bytes, None]:
        chunks: asyncio.Queue[bytes | OSError] = asyncio.Queue()
        slots = threading.Semaphore(CHUNKS_AHEAD)
        reader = threading.Thread(
            target=_read, args=(self._fd, chunks, slots, asyncio.get_running_loop()), name="read", daemon=True
        )
        reader.start()
        pieces: list[bytes] = []
        held = 0
        while chunk := await chunks.get():
            slots.release()
            if isinstance(chunk, OSError):
                raise OSError(chunk.errno, chunk.strerror, self.name)
            self.bytes_read += len(chunk)
            *ended, tail = chunk.split(b"\n")
            for end in ended:
                yield b"".join((*pieces, end, b"\n"))
                pieces, held = [], 0
            pieces.append(tail)
            held += len(tail)
            if held > MAX_DOCUMENT_BYTES:
                raise BadBody(f"{self._line + 1}: a line of over {MAX_DOCUMENT_BYTES >> 20} MiB: divide it")
        if held:
            yield b"".join(pieces)


def _read(
    fd: int, chunks: "asyncio.Queue[bytes | OSError]", slots: threading.Semaphore, loop: asyncio.AbstractEventLoop
) -> None:
    chunk: bytes | OSError = b" "
    while chunk and not isinstance(chunk, OSError):
        slots.acquire()
        try:
            chunk = os.read(fd, CHUNK_BYTES)
        except OSError as error:
            chunk = error
        try:
            loop.call_soon_threadsafe(chunks.put_nowait, chunk)
        except RuntimeError:
            return  # the loop is closed: nobody waits for it any more


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True
