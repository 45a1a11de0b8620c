"""``GET /metrics`` of several gateway processes: whoever is asked asks the others, and tells of all.

Each worker listens on a socket in Linux's abstract namespace, which leaves no file behind, and gives its own page to
whoever connects, after its length: one that dies while it does ends its page as one does that has said all. Every line
of the whole page has a label `worker`; `openmanager_gateway_worker_up` says of each worker whether it answered.

What must stay true: a worker that is dead, starting or stuck costs the page its lines and no more than ANSWER_WITHIN_S,
whatever the others do; only processes of the same user are given a page, or believed.
"""

import asyncio
import logging
import os
import selectors
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from typing import Final

RUN_VARIABLE: Final = "OPENMANAGER_GATEWAY_RUN"
"""What the workers of one first process have in common, and no others."""
ANSWER_WITHIN_S: Final = 1.0
"""A page takes milliseconds to make."""
MAX_PAGE_BYTES: Final = 16 << 20
UP: Final = "openmanager_gateway_worker_up"
BACKLOG: Final = 64
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
_LENGTH: Final = struct.Struct(">Q")
_CHUNK_BYTES: Final = 64 << 10

Page = Callable[[], bytes]

_log = logging.getLogger(__name__)


class Siblings:
    """The workers of one gateway, seen from one of them."""

    def __init__(self, run: str, own: int, count: int, page: Page) -> None:
        """Takes what the workers have in common, which of how many this one is, and what makes its own page."""
        self._run = run
        self._own = own
        self._numbers = range(1, count + 1)
        self._page = page

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Gives the own page to the others for as long as the block runs."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.setblocking(False)
        listener.bind(self._address(self._own))
        listener.listen(BACKLOG)
        server = await asyncio.start_unix_server(self._answer, sock=listener)
        try:
            yield
        finally:
            server.close()

    async def _answer(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if _is_own_user(writer.get_extra_info("socket")):
                page = await asyncio.to_thread(self._page)
                writer.write(_LENGTH.pack(len(page)) + page)
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    await writer.drain()
        except (OSError, TimeoutError) as error:  # who asked has left
            _log.debug("a page of metrics was not taken: %r", error)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def whole_page(self) -> bytes:
        """The page of all workers. To be called in a thread: it waits."""
        others = [number for number in self._numbers if number != self._own]
        pages = {number: page for number, page in _asked({n: self._address(n) for n in others}).items() if page}
        pages[self._own] = self._page()
        return merged(pages, self._numbers)

    def _address(self, number: int) -> str:
        return f"\0openmanager-{self._run}-{number}"


def _is_own_user(connection: socket.socket) -> bool:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(raw)[1] == os.getuid())


def _asked(addresses: Mapping[int, str]) -> dict[int, bytes]:
    """What each says within ANSWER_WITHIN_S, of those that said all they had to."""
    ends_s = time.monotonic() + ANSWER_WITHIN_S
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        asked: dict[int, socket.socket] = {}
        for number, address in addresses.items():
            connection = stack.enter_context(closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
            connection.setblocking(False)
            with suppress(OSError):  # nobody is there, or too many ask
                connection.connect(address)
                if _is_own_user(connection):
                    selector.register(connection, selectors.EVENT_READ, number)
                    asked[number] = connection
        said = {number: bytearray() for number in asked}
        whole: dict[int, bytes] = {}
        while said and (left_s := ends_s - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                piece = _received(asked[key.data])
                if piece and len(said[key.data]) < MAX_PAGE_BYTES:
                    said[key.data] += piece
                    continue
                selector.unregister(asked[key.data])
                page = said.pop(key.data)
                if piece == b"" and page[: _LENGTH.size] == _LENGTH.pack(max(0, len(page) - _LENGTH.size)):
                    whole[key.data] = bytes(page[_LENGTH.size :])
    return whole


def _received(connection: socket.socket) -> bytes | None:
    """What has come; empty at the end, None when it was broken off."""
    try:
        return connection.recv(_CHUNK_BYTES)
    except OSError:
        return None


def merged(pages: Mapping[int, bytes], numbers: range) -> bytes:
    """One page of several in Prometheus's text format: each family once, each line with the worker's number."""
    heads: dict[str, list[str]] = {}
    lines: dict[str, list[str]] = {}
    for number, page in sorted(pages.items()):
        for family, line in _by_family(page.decode()):
            if line.startswith("#"):
                if line not in heads.setdefault(family, []):
                    heads[family].append(line)
            else:
                lines.setdefault(family, []).append(labelled(line, number))
    up = [f"# HELP {UP} Whether a worker answered.", f"# TYPE {UP} gauge"]
    up += [f'{UP}{{worker="{number}"}} {int(number in pages)}' for number in numbers]
    whole = [line for family, head in heads.items() for line in (*head, *lines.get(family, ()))]
    return "".join(f"{line}\n" for line in (*whole, *up)).encode()


def _by_family(page: str) -> Iterator[tuple[str, str]]:
    """Each line with its family: the name in the last comment before it."""
    family = ""
    for line in page.split("\n"):
        if line.startswith(("# HELP ", "# TYPE ")):
            family = line.split(" ", 3)[2]
        if line:
            yield family, line


def labelled(line: str, number: int) -> str:
    """A line with the label `worker` before its others. No name has a brace or a space in it, so the first ends it."""
    name, brace, rest = line.partition("{")
    if brace and " " not in name:
        return f'{name}{{worker="{number}",{rest}'
    name, _, rest = line.partition(" ")
    return f'{name}{{worker="{number}"}} {rest}'
