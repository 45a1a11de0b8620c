"""What standard output is: a terminal or not, with colours or not, how wide, which characters it can show.

What must stay true: no escape sequence is written where no terminal reads it, nor where NO_COLOR is set; text from
outside never reaches a terminal with control characters in it.
"""

import io
import os
import shutil
import sys
import unicodedata
from collections.abc import Mapping
from typing import Final, TextIO

_COLOURS: Final = {"red": "31", "green": "32", "yellow": "33", "dim": "2", "bold": "1"}


class Terminal:
    """One output, asked once what it is."""

    def __init__(self, out: TextIO, environ: Mapping[str, str] = os.environ) -> None:
        self.out = out
        self.is_terminal = out.isatty() and environ.get("TERM") != "dumb"
        self.has_colours = self.is_terminal and not environ.get("NO_COLOR")
        self.shows_unicode = _can_write(out, "▁█…")

    def coloured(self, text: str, colour: str | None) -> str:
        """The text in a colour of `_COLOURS`, where there are any."""
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if colour and self.has_colours else text

    def size(self) -> tuple[int, int]:
        """Columns and lines."""
        try:
            columns, lines = os.get_terminal_size(self.out.fileno())
        except (OSError, ValueError):
            columns = lines = 0
        if columns and lines:
            return columns, lines
        fallback = shutil.get_terminal_size()
        return columns or fallback.columns, lines or fallback.lines

    def line(self, text: str = "") -> None:
        """Writes a line; what cannot be shown becomes a question mark."""
        encoding = self.out.encoding or "utf-8"
        self.out.write(text.encode(encoding, "replace").decode(encoding) + "\n")


def in_utf8(out: TextIO) -> TextIO:
    """The same output for what programs read, which is UTF-8 whatever a terminal here could show."""
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(encoding="utf-8")
    return out


def complain(text: str) -> None:
    """Says on standard error what went wrong."""
    try:
        Terminal(sys.stderr).line(f"openmanager: {clean(text)}")
        sys.stderr.flush()
    except OSError:
        return  # nobody reads it; the exit status says it too


def clean(text: str) -> str:
    """The text without control characters, which could move the cursor or worse."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "�" for character in text)


def width(text: str) -> int:
    """How many columns of a terminal a text takes: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(_cell_width(character) for character in text)


def clip(text: str, columns: int, mark: str = "…") -> str:
    """The text, cut to so many columns."""
    if width(text) <= columns:
        return text
    kept, used = "", width(mark)
    for character in text:
        used += _cell_width(character)
        if used > columns:
            break
        kept += character
    return kept + mark if columns >= width(mark) else ""


def _cell_width(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in {"Mn", "Me", "Cf"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def _can_write(out: TextIO, text: str) -> bool:
    try:
        text.encode(out.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
