"""`openmanager servers export FILE` and `import FILE`: the record of the servers as a file, out and in.

What must stay true: a file that is there is only replaced by a whole export, and nothing but a file is replaced; of an
import every row that was refused is named, and the last line says whether anything was recorded.
"""

import contextlib
import os
import stat
import sys
from argparse import Namespace
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final, TextIO, cast

from client.api import OpenManager
from client.command import exits
from client.command.terminal import Terminal, complain, in_utf8

SHOWN_ROWS: Final = 100
MAX_FILE_BYTES: Final = 15 << 20
"""Of a message of at most 16 MiB."""


async def run(manager: OpenManager, options: Namespace) -> int:
    """Runs the command; returns the exit status."""
    if options.action == "export":
        return await _export(manager, options)
    return await _import(manager, options)


async def _export(manager: OpenManager, options: Namespace) -> int:
    parts = manager.export_servers(_format(options), environment=options.export_environment, role=options.export_role)
    progress = _Progress()
    if options.file == "-":
        await _write(parts, in_utf8(sys.stdout))
        return exits.OK
    whole = _replaced(Path(options.file))
    if whole is None:
        with _open(Path(options.file), "w") as file:
            await _write(parts, file)
        return exits.OK
    draft = whole.with_name(f".{whole.name}.{os.getpid()}.part")
    try:
        with _open(draft, "x") as file:
            _keep_mode(whole, draft)
            async with contextlib.aclosing(parts):
                async for text in parts:
                    file.write(text)
                    progress.draw(f"{file.tell() / 1024:,.0f} KiB exported")
        draft.replace(whole)
    finally:
        draft.unlink(missing_ok=True)
        progress.clear()
    return exits.OK


def _replaced(path: Path) -> Path | None:
    """The file that an export takes the place of, where there is a link the one it leads to. None: there is a pipe or a
    device, which is written to."""
    return None if path.exists() and not path.is_file() else Path(os.path.realpath(path))


def _open(path: Path, mode: str) -> TextIO:
    return cast("TextIO", path.open(mode, encoding="utf-8", newline=""))


def _keep_mode(whole: Path, draft: Path) -> None:
    """Who may read the file may read the next one, and nobody else."""
    if whole.exists():
        draft.chmod(stat.S_IMODE(whole.stat().st_mode))


async def _write(parts: AsyncGenerator[str, None], out: TextIO) -> None:
    async with contextlib.aclosing(parts):
        async for text in parts:
            out.write(text)


async def _import(manager: OpenManager, options: Namespace) -> int:
    name = "standard input" if options.file == "-" else options.file
    raw = sys.stdin.buffer.read(MAX_FILE_BYTES + 1) if options.file == "-" else _read(Path(options.file))
    if len(raw) > MAX_FILE_BYTES:
        raise exits.CommandFailed(f"{name} is larger than {MAX_FILE_BYTES >> 20} MiB: import it in parts")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise exits.CommandFailed(f"{name} is not UTF-8: byte {error.start}") from None
    progress = _Progress()
    progress.draw(f"importing {len(raw) / 1024:,.0f} KiB")
    try:
        answer = await manager.import_servers(text, _format(options), dry_run=options.dry_run, partial=options.partial)
    finally:
        progress.clear()
    refused = [row for row in answer.rows if row.message]
    for row in refused[:SHOWN_ROWS]:
        column = f"{row.field}: " if row.field else ""
        complain(f"{name}: row {row.row}: {column}{row.message}")
    if len(refused) > SHOWN_ROWS:
        complain(f"no more than {SHOWN_ROWS} rows are shown")
    done = "nothing was recorded" if options.dry_run or not answer.applied else "recorded"
    Terminal(sys.stdout).line(
        f"created {answer.created:,}, updated {answer.updated:,}, unchanged {answer.unchanged:,}, "
        f"failed {answer.failed:,}: {done}"
    )
    return exits.FAILED if answer.failed else exits.OK


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def _format(options: Namespace) -> str:
    """As --format says, or by the end of the file's name: CSV unless that is of JSON lines."""
    if options.format:
        return str(options.format)
    return "json_lines" if Path(options.file).suffix in {".jsonl", ".ndjson", ".json"} else "csv"


class _Progress:
    """One line on a terminal's standard error; elsewhere nothing."""

    def __init__(self) -> None:
        self._terminal = Terminal(sys.stderr)

    def draw(self, text: str) -> None:
        """Shows the text in place of the one before."""
        if self._terminal.is_terminal:
            self._terminal.out.write(f"\r\x1b[K{text}")
            self._terminal.out.flush()

    def clear(self) -> None:
        """Makes room for a line."""
        self.draw("")
