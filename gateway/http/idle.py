"""Ends HTTP connections that hold a place and do nothing with it.

granian bounds how long a request's headers may take and pings HTTP/2, but two kinds of connection it keeps for ever:
one on which less was said than tells HTTP/1.1 from HTTP/2, and one whose other end does not read what it asked for. The
kernel knows of each connection how much came and when something last went either way, so it is asked, now and then.

What must stay true: a connection that is in use is left alone. Event streams beat every 15 s, HTTP/2 is pinged every
20 s, and a call has 60 s at most, so something moves on each of those within `quiet_s`. Looking holds neither the event
loop nor the interpreter for long. Where the kernel cannot be asked (it is not Linux) nothing is ended.
"""

import asyncio
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime import telemetry

FIRST_WORDS_BYTES: Final = 24
"""Shorter than any request; as long as what HTTP/2 begins with."""
LOOKED_AT_ONCE: Final = 100
"""Descriptors, before others get the interpreter: less than 1 ms."""
_PAUSE_S: Final = 0.001
_DESCRIPTORS: Final = Path("/proc/self/fd")
_LAST_SENT, _LAST_RECEIVED, _RECEIVED = (44, "I"), (52, "I"), (128, "Q")  # where linux/tcp.h has them in tcp_info
_INFO_BYTES: Final = 136

_log = logging.getLogger(__name__)
_ended = telemetry.meter(__name__).create_counter(
    "openmanager.gateway.ended.connections",
    unit="{connection}",
    description="HTTP connections ended for doing nothing.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleBounds:
    """How long a connection may do nothing."""

    first_words_s: float = 30.0
    """Until it has said FIRST_WORDS_BYTES."""
    quiet_s: float = 120.0
    """Without a byte in either direction; more than any call takes."""
    look_every_s: float = 10.0


class IdleConnections:
    """Watches the connections that came to one port of this process, and ends those that others want ended."""

    def __init__(
        self, port: int, bounds: IdleBounds, looked: Callable[[Collection[int]], None] = lambda _found: None
    ) -> None:
        """`looked` is told after each look which connections there are, by their inodes."""
        self._port = port
        self._bounds = bounds
        self._looked = looked
        self._unwanted: set[int] = set()
        self._since: dict[int, float] = {}  # inode of a connection -> when it was first seen
        self._others: set[int] = set()  # inodes of what is no connection to the port

    async def watch(self) -> None:
        """Looks again and again, until cancelled."""
        while _DESCRIPTORS.exists():
            await asyncio.sleep(self._bounds.look_every_s)
            await asyncio.to_thread(self.look)
            self._looked(self._since.keys())

    def end(self, connections: Iterable[int]) -> None:
        """Ends these at the next look."""
        self._unwanted.update(connections)

    def look(self) -> None:
        """Looks once at each."""
        since: dict[int, float] = {}
        others: set[int] = set()
        for number, entry in enumerate(_DESCRIPTORS.iterdir()):
            if number % LOOKED_AT_ONCE == 0:
                time.sleep(_PAUSE_S)
            with suppress(OSError):  # closed meanwhile
                inode = self._look_at(int(entry.name), others)
                if inode is not None:
                    since[inode] = self._since.get(inode, time.monotonic())
        self._since, self._others = since, others
        self._unwanted &= since.keys()

    def _look_at(self, descriptor: int, others: set[int]) -> int | None:
        """Its inode when it is a connection to the port, which then is ended if it is idle."""
        about = os.fstat(descriptor)
        if about.st_ino in self._others or not stat.S_ISSOCK(about.st_mode):
            others.add(about.st_ino)
            return None
        with _opened_again(descriptor) as connection:
            inode = os.fstat(connection.fileno()).st_ino  # another's, if the number was given away meanwhile
            if not self._is_ours(connection):
                others.add(inode)
                return None
            reason = self._reason(connection, inode)
            if reason:
                connection.shutdown(socket.SHUT_RDWR)  # which granian sees as the caller's leaving
                _ended.add(1, {"reason": reason})
                _log.info("a connection was ended: %s", reason)
            return inode

    def _is_ours(self, connection: socket.socket) -> bool:
        if connection.family not in {socket.AF_INET, socket.AF_INET6} or connection.type != socket.SOCK_STREAM:
            return False
        listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return not listens and connection.getsockname()[1] == self._port

    def _reason(self, connection: socket.socket, inode: int) -> str:
        """Why it is to be ended; empty: it is not."""
        if inode in self._unwanted:
            return "OLD_CERTIFICATE"
        since_s = self._since.get(inode, time.monotonic())
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        if len(info) < _INFO_BYTES:  # Linux before 4.1
            return ""
        sent_ms, received_ms, received = (
            struct.unpack_from(f"={kind}", info, offset)[0] for offset, kind in (_LAST_SENT, _LAST_RECEIVED, _RECEIVED)
        )
        if received < FIRST_WORDS_BYTES and time.monotonic() - since_s > self._bounds.first_words_s:
            return "SAID_NOTHING"
        return "QUIET" if min(sent_ms, received_ms) > self._bounds.quiet_s * 1_000 else ""


@contextmanager
def _opened_again(descriptor: int) -> Iterator[socket.socket]:
    """The same connection under a number of our own, which nobody closes and gives to another."""
    own = os.dup(descriptor)
    try:
        connection = socket.socket(fileno=own)
    except OSError:  # the number was given to what is no socket
        os.close(own)
        raise
    with connection:
        yield connection
