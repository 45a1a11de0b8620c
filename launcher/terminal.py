"""What the launcher says, printed by a thread of its own.

A terminal can be stopped (Ctrl-S, the copy mode of `screen`), and a pipe can have nobody who reads: printing then waits
for ever. What must stay true: that stops the thread and nothing else, neither the starting again of what dies nor the
reading of what the processes print, without which they would stop, too.
"""

import contextlib
import os
import queue
import threading
from typing import Final, TextIO

MAX_WAITING: Final = 1_000
"""Texts that wait for the terminal; those that come when so many do are not shown. The log files have all of them."""
LAST_WORDS_BOUND_S: Final = 2.0


class Terminal:
    """Prints in order; never waits."""

    def __init__(self, stream: TextIO | None) -> None:
        """`stream`: where to; None where it was closed before we began."""
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._texts: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        if stream is not None:
            arguments = (stream.fileno(),)
            self._thread = threading.Thread(target=self._print, args=arguments, name="terminal", daemon=True)
            self._thread.start()

    def say(self, text: str) -> None:
        """Prints it as soon as the terminal takes it."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._texts.put_nowait(text)

    def close(self) -> None:
        """Waits until all is printed, for so long as somebody may be reading."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._texts.put_nowait(None)
            self._thread.join(LAST_WORDS_BOUND_S)

    def _print(self, descriptor: int) -> None:
        while (text := self._texts.get()) is not None:
            line = f"{text}\n".encode(self._encoding, "backslashreplace")  # not all have every character
            with contextlib.suppress(OSError):  # the terminal is gone, or the file that it is has no room
                while line:
                    line = line[os.write(descriptor, line) :]
