"""Where one process says that it is ready: the receiving end of ``runtime.notify``."""

import asyncio
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Self

MAX_NOTIFICATION_BYTES = 4096


class NotifySocket:
    """A datagram socket in a folder of its own, which only this user may enter; gone when left."""

    def __enter__(self) -> Self:
        self._folder = tempfile.mkdtemp(prefix="openmanager-")  # 0700; a path in DATA_DIR could be over 107 bytes
        self.address = str(Path(self._folder) / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(self.address)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def receive(self) -> bytes:
        """The next notification."""
        return await asyncio.get_running_loop().sock_recv(self._socket, MAX_NOTIFICATION_BYTES)
