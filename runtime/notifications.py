"""Where one process says that it is ready: the receiving end of ``runtime.notify``."""

import asyncio
import secrets
import socket
from typing import Self

MAX_NOTIFICATION_BYTES = 4096


class NotifySocket:
    """A datagram socket in Linux's abstract namespace: no file stays behind when its owner is killed."""

    def __enter__(self) -> Self:
        name = f"openmanager-{secrets.token_hex(16)}"
        self.address = f"@{name}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(f"\0{name}")
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    async def receive(self) -> bytes:
        """The next notification."""
        return await asyncio.get_running_loop().sock_recv(self._socket, MAX_NOTIFICATION_BYTES)
