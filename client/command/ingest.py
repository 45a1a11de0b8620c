"""`openmanager ingest FILE`: a file, or what comes in, written until all of it is on the gateway's disk.

What must stay true: every document is acknowledged, or it is said which one was not and why; a line that comes in
slowly is sent when it comes; memory is that of a few documents.
"""

import contextlib
import os
import sys
import time
from argparse import Namespace
from typing import Final

import grpc

from client.api import OpenManager
from client.command import exits
from client.command.body import BadBody
from client.command.documents import Documents
from client.command.terminal import Terminal, complain
from client.errors import OpenManagerError
from client.writing import Totals

SHOWN_ERRORS: Final = 100
_REFUSED: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
_BAR_CELLS: Final = 30
_BAR_INTERVAL_S: Final = 0.1


async def run(manager: OpenManager, options: Namespace) -> int:
    """Runs the command; returns the exit status."""
    name = "standard input" if options.file == "-" else options.file
    fd = 0 if options.file == "-" else os.open(options.file, os.O_RDONLY)
    documents = Documents(fd, name)
    totals = Totals()
    with _Bar(Terminal(sys.stderr), name, os.fstat(fd).st_size) as bar:
        try:
            await _write(manager, options.retry_for, documents, totals, bar)
        except OpenManagerError as error:
            if error.is_transient or error.code not in _REFUSED:
                raise
            hint = f"; {error.hint}" if error.hint else ""
            raise exits.CommandFailed(f"{name}:{documents.next_line}: {error} ({error.reason}){hint}") from error
        except BadBody as error:
            raise exits.CommandFailed(f"{name}:{error}") from error
        finally:
            bar.clear()
            Terminal(sys.stdout).line(
                f"accepted {totals.accepted_points:,} points, rejected {totals.rejected_points:,}"
            )
    return exits.FAILED if totals.rejected_points else exits.OK


async def _write(manager: OpenManager, retry_for_s: float, documents: Documents, totals: Totals, bar: "_Bar") -> None:
    def on_lost(error: OpenManagerError, delay_s: float) -> None:
        bar.clear()
        complain(f"{error}; sending again in {delay_s:.1f} s")

    answers = manager.writing(documents.batches(), retry_for_s=retry_for_s, on_lost=on_lost)
    async with contextlib.aclosing(answers):
        async for answer in answers:
            line = documents.answered()
            room = SHOWN_ERRORS - len(totals.errors)
            for error in answer.errors[:room]:
                bar.clear()
                complain(f"{documents.name}:{line}: {error.field}: {error.message} ({error.reason})")
            totals.add(answer)
            bar.draw(totals.accepted_points, documents.bytes_read)
    if len(totals.errors) == SHOWN_ERRORS:
        complain(f"no more than {SHOWN_ERRORS} errors are shown")


class _Bar:
    """How far it is, on a terminal's standard error; elsewhere nothing."""

    def __init__(self, terminal: Terminal, name: str, total_bytes: int) -> None:
        self._terminal = terminal
        self._name = name
        self._total = total_bytes
        self._began = time.monotonic()
        self._drawn_at = 0.0

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Makes room for a line."""
        if self._terminal.is_terminal:
            self._write("\r\x1b[K")

    def draw(self, points: int, done_bytes: int) -> None:
        """So many points are on disk, and so much of the file was read."""
        now = time.monotonic()
        if not self._terminal.is_terminal or now - self._drawn_at < _BAR_INTERVAL_S:
            return
        self._drawn_at = now
        share = ""
        if self._total:
            part = min(1.0, done_bytes / self._total)
            full = round(_BAR_CELLS * part)
            share = f"[{'#' * full}{'.' * (_BAR_CELLS - full)}] {part:4.0%} "
        rate = points / max(now - self._began, 0.001)
        self._write(f"\r\x1b[K{share}{self._name}  {points:,} points  {rate:,.0f}/s")

    def _write(self, text: str) -> None:
        self._terminal.out.write(text)
        self._terminal.out.flush()
