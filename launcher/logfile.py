"""What the processes print: kept in a file of bounded size, and shortened for the terminal.

The processes write JSON lines. People at a terminal want the warnings, in words; everything is in the file.
"""

import contextlib
import errno
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Self

MAX_FILE_BYTES = 10 << 20
"""A full file is renamed to ``.1``, of which there is one: a process keeps at most 20 MiB."""

_SHOWN_LEVELS = {"WARNING", "ERROR", "CRITICAL"}


class LogFile:
    """One process's log; append-only, turned over when full."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)

    def write(self, line: bytes) -> None:
        """Appends a line and hands it to the system at once.

        Raises:
            OSError: the disk is full, or takes no more; nothing of the line is in the file, and the next may be.
        """
        end = self._file.seek(0, os.SEEK_END)
        if end > MAX_FILE_BYTES:
            with contextlib.suppress(FileNotFoundError):  # it was moved away by somebody, or by a try that failed
                self.path.replace(self.path.with_suffix(self.path.suffix + ".1"))
            full, self._file, end = self._file, self.path.open("ab", buffering=0), 0
            full.close()
        if self._file.write(line) != len(line):
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def summary_of(line: bytes) -> str:
    """What a terminal should show of a line; empty when nothing.

    A line that is no JSON (a message before logging was set up, a traceback) is shown as it is.
    """
    text = line.decode(errors="replace").rstrip()
    try:
        entry = json.loads(text)
    except ValueError:
        return text
    if not isinstance(entry, dict) or entry.get("level") not in _SHOWN_LEVELS:
        return ""
    return f"{entry['level'].lower()}: {entry.get('message', '')}"


def is_of_set_up(line: bytes) -> bool:
    """Whether a line tells whoever starts the processes of his settings or machine, and not of how starting goes."""
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and bool(entry.get("of_set_up"))
