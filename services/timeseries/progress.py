"""How far a command is, on stderr: a bar that redraws itself on a terminal, elsewhere a line for each file.

What must stay true: nothing is written to stdout, and a terminal is left with an empty line.
"""

import time
from typing import Final, TextIO

_BAR_CELLS: Final = 30
_BAR_INTERVAL_S: Final = 0.1
_LINE_INTERVAL_S: Final = 10.0
"""How often a line is written for a file that takes long."""


class Reporter:
    """A context manager. `progress` counts the bytes of one file after the other, `points` the points of all."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._bar = out.isatty()
        self._drawn_at = 0.0
        self._began_at: float | None = None
        self._pending = ""
        self._file = ""

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self._line()
        self.clear()

    def progress(self, name: str, done: int, total: int) -> None:
        """So many bytes of a file are done."""
        if self._bar:
            self._draw(min(1.0, done / total) if total else 1.0, f"{name}  {size_text(total)}")
        elif done >= total:
            self._write(f"{name}  {size_text(total)}\n")

    def points(self, name: str, points: int, share: float) -> None:
        """So many points of all files are done, which is this share; `name` is the file that is worked on.

        The rate is the mean since the first call.
        """
        now = time.monotonic()
        if self._began_at is None:
            self._began_at = now
        elapsed = now - self._began_at
        rate = f"  {count_text(points / elapsed)}/s" if elapsed > 1 else ""
        left = f"  {duration_text(elapsed * (1 / share - 1))} left" if elapsed > 1 and 0 < share < 1 else ""
        text = f"{name}  {points:,} points{rate}{left}"
        if self._bar:
            self._draw(share, text)
            return
        if name != self._file:
            self._line()
            self._file, self._drawn_at = name, now
        self._pending = text
        if now - self._drawn_at >= _LINE_INTERVAL_S:
            self._line()
            self._drawn_at = now

    def clear(self) -> None:
        """Makes room for a line."""
        if self._bar:
            self._write("\r\x1b[K")

    def _line(self) -> None:
        if self._pending:
            self._write(f"{self._pending}\n")
            self._pending = ""

    def _draw(self, share: float, text: str) -> None:
        now = time.monotonic()
        if now - self._drawn_at < _BAR_INTERVAL_S:
            return
        self._drawn_at = now
        full = round(_BAR_CELLS * share)
        self._write(f"\r\x1b[K[{'#' * full}{'.' * (_BAR_CELLS - full)}] {share:4.0%} {text}")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def size_text(count: int) -> str:
    """ "137.8 MiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1_024:
            break
        size, unit = size / 1_024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def count_text(count: float) -> str:
    """ "4.1 M"."""
    for unit in ("", " k", " M", " G"):
        if count < 1_000 or unit == " G":
            return f"{count:.1f}{unit}" if unit else f"{count:.0f}"
        count /= 1_000
    raise AssertionError


def duration_text(seconds: float) -> str:
    """ "0:42", "12:05", "1:03:00"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
