"""Tells whoever started the process that it is ready: the sd_notify protocol of systemd, which the launcher speaks too.

A health check cannot do this: it says that somebody serves on the port, maybe another instance. Without NOTIFY_SOCKET
nothing happens.
"""

import os
import socket
from typing import Final

VARIABLE: Final = "NOTIFY_SOCKET"
READY: Final = b"READY=1"
STOPPING: Final = b"STOPPING=1"


def notify(state: bytes) -> None:
    """Sends one state; OSError when the socket named is not there."""
    address = os.environ.get(VARIABLE, "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(state, address)
