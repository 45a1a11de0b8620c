"""Columns of text that line up, also where characters are two columns wide."""

from collections.abc import Sequence
from dataclasses import dataclass

from client.command.terminal import Terminal, clean, clip, width

_GAP = "  "


@dataclass(frozen=True, slots=True)
class Cell:
    """Text in a colour."""

    text: str
    colour: str | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its title, and whether its cells are numbers, which end where the column does."""

    title: str
    right: bool = False


def table(
    terminal: Terminal, columns: Sequence[Column], rows: Sequence[Sequence[str | Cell]], *, fit: int | None = None
) -> list[str]:
    """The lines of a table, its titles first.

    Args:
        terminal: where it is for.
        columns: from left to right.
        rows: as many cells as columns each.
        fit: lines are cut to so many columns of the terminal; None: never.
    """
    cells = [[Cell(clean(c)) if isinstance(c, str) else Cell(clean(c.text), c.colour) for c in row] for row in rows]
    widths = [
        max(width(column.title), *(width(row[index].text) for row in cells), 0) if cells else width(column.title)
        for index, column in enumerate(columns)
    ]
    titles = [Cell(column.title, "bold") for column in columns]
    return [_line(terminal, columns, widths, row, fit) for row in (titles, *cells)]


def _line(
    terminal: Terminal, columns: Sequence[Column], widths: Sequence[int], row: Sequence[Cell], fit: int | None
) -> str:
    left = fit
    line = ""
    for index, (column, wide, cell) in enumerate(zip(columns, widths, row, strict=True)):
        last = index == len(columns) - 1
        padding = " " * (wide - width(cell.text))
        before, after = (padding, "") if column.right else ("", "" if last else padding)
        gap = "" if last else _GAP
        if left is None:
            line += before + terminal.coloured(cell.text, cell.colour) + after + gap
            continue
        whole = clip(before + cell.text, left, "…" if terminal.shows_unicode else "~")
        shown = whole[len(before) :] if whole.startswith(before) else ""
        line += whole[: len(whole) - len(shown)] + terminal.coloured(shown, cell.colour)
        left -= width(whole)
        if whole != before + cell.text:
            break
        tail = (after + gap)[:left]
        line += tail
        left -= len(tail)
    return line.rstrip(" ")
