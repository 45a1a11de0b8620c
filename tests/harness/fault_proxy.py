"""A TCP proxy that breaks connections the ways networks do.

    cut         every connection is closed and new ones are refused
    reset       every connection ends with a reset; new ones work
    half_open   connections are accepted and stay, and nothing passes in either direction; nobody says so
    strand      connections that are there pass nothing any more, new ones work: a firewall has forgotten them
    delay_s     what passes is handed on so much later, in each direction
    bandwidth   bytes a second that pass, in each direction and connection

A setting holds for connections that are there and for new ones, until `restore`.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from typing import Final

CHUNK_BYTES: Final = 64 << 10
MAX_HELD_CHUNKS: Final = 64
"""What a delayed direction holds before it reads no more, as a network's buffers do."""
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class FaultProxy:
    """Listens on a port of 127.0.0.1 and passes everything on to a port there."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, ...]] = {}
        self._flows = asyncio.Event()
        self._flows.set()
        self.port = 0
        self.delay_s = 0.0
        self.bandwidth: float | None = None
        self.accepted = 0

    async def start(self) -> None:
        """Listens, on the same port as before."""
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Closes what there is and refuses what comes."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._end_all()

    def reset(self) -> None:
        """Ends every connection with a reset."""
        for task, writers in list(self._connections.items()):
            for writer in writers:
                raw: socket.socket = writer.get_extra_info("socket")
                if raw is not None and raw.fileno() >= 0:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                writer.transport.abort()
            task.cancel()

    def half_open(self) -> None:
        """Loses everything that is sent from now on."""
        self._flows.clear()

    def strand(self) -> None:
        """Loses everything that is sent from now on over the connections that are there."""
        self._flows.clear()
        self._flows = asyncio.Event()
        self._flows.set()

    async def restore(self) -> None:
        """Everything passes as it comes. Connections that lost something meanwhile are reset, as they would be."""
        if not self._flows.is_set():
            self.reset()
            self._flows.set()
        self.delay_s, self.bandwidth = 0.0, None
        if self._server is None:
            await self.start()

    async def close(self) -> None:
        """Ends it."""
        await self.cut()

    async def _end_all(self) -> None:
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.create_task(self._serve(reader, writer), name="fault-proxy-connection")
        self._connections[task] = (writer,)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        flows = self._flows
        try:
            await flows.wait()
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
            self._connections[task] = (writer, target_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, target_writer, flows))
                group.create_task(self._pass(target_reader, writer, flows))
        except* (OSError, asyncio.IncompleteReadError):
            pass  # one side went away: so does the other
        finally:
            for one in self._connections.pop(task):
                one.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flows: asyncio.Event) -> None:
        """Hands on in order; each chunk leaves `delay_s` after it came, so that a delay costs no bandwidth."""
        loop = asyncio.get_running_loop()
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_HELD_CHUNKS)

        async def hand_on() -> None:
            while True:
                came_s, chunk = await held.get()
                await asyncio.sleep(max(0.0, came_s + self.delay_s - loop.time()))
                await flows.wait()
                if not chunk:
                    if writer.can_write_eof():
                        writer.write_eof()
                    return
                writer.write(chunk)
                await writer.drain()
                if self.bandwidth is not None:
                    await asyncio.sleep(len(chunk) / self.bandwidth)

        async def take() -> None:
            while True:
                chunk = await reader.read(CHUNK_BYTES)
                await held.put((loop.time(), chunk))
                if not chunk:
                    return

        async with asyncio.TaskGroup() as group:
            group.create_task(hand_on())
            group.create_task(take())


@contextlib.asynccontextmanager
async def fault_proxy(target_port: int) -> AsyncIterator[FaultProxy]:
    """A proxy that passes everything on until it is told otherwise, ended with the block."""
    proxy = FaultProxy(target_port)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
