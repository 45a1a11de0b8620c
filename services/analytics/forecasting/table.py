"""Metrics from a CSV file: a `timestamp` column and a column for each metric.

What must stay true: what cannot be understood is said with its row (the line of the file) and column, and nothing is
guessed; an empty cell is a gap; rows may be at any distance and in any order.
"""

import csv
import gzip
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TextIO

import numpy as np

from services.analytics.forecasting.robust import Floats, Integers

TIME_COLUMN: Final = "timestamp"
MAX_EPOCH_S: Final = 253_402_300_800
"""The year 10,000: what is beyond is milliseconds taken for seconds."""
GAPS: Final = frozenset({"", "nan", "null", "none", "na", "n/a"})
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class TableError(Exception):
    """A file that cannot be used, and where."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Rows in order of their times.

    Attributes:
        times_ms: shape (rows,), strictly increasing.
        metrics: names of the columns.
        values: shape (rows, metrics); NaN for gaps.
        epoch: whether times were numbers; they are written back as they were read.
    """

    times_ms: Integers
    metrics: tuple[str, ...]
    values: Floats
    epoch: bool

    def time_text(self, time_ms: int) -> str:
        """A time as the file writes times: epoch seconds, or RFC 3339."""
        if self.epoch:
            return str(time_ms // 1000) if time_ms % 1000 == 0 else f"{time_ms / 1000:.3f}"
        return rfc3339(time_ms)


def rfc3339(time_ms: int) -> str:
    """A time in UTC, to the second."""
    return datetime.fromtimestamp(time_ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_table(path: Path, metrics: Sequence[str] = ()) -> Table:
    """Reads a file, gzip too; only the named metrics, all columns where none is named.

    Raises:
        TableError: it cannot be read or understood.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as packed:
                return _read(packed, metrics)
        with path.open(encoding="utf-8-sig", newline="") as plain:
            return _read(plain, metrics)
    except OSError as error:
        raise TableError(f"{path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error, EOFError) as error:
        raise TableError(f"{path}: it is no CSV file: {error}") from error
    except TableError as error:
        raise TableError(f"{path}: {error}") from None


def _read(file: TextIO, wanted: Sequence[str]) -> Table:
    rows = csv.reader(file)
    header = [name.strip() for name in next(rows, [])]
    time_column, columns = _columns(header, wanted)
    times: list[int] = []
    cells: list[list[float]] = []
    epochs = set()
    for row in rows:
        line = rows.line_num
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise TableError(f"row {line}: it has {len(row)} cells, the header {len(header)}")
        time_ms, epoch = _time(row[time_column].strip(), line, header[time_column])
        times.append(time_ms)
        epochs.add(epoch)
        cells.append([_number(row[column].strip(), line, header[column]) for column in columns])
    if not times:
        raise TableError("there are no rows after the header")
    order = np.argsort(np.array(times, np.int64), kind="stable")
    times_ms = np.array(times, np.int64)[order]
    values = np.array(cells, np.float64)[order]
    newest = np.append(np.diff(times_ms) > 0, True)  # of rows of the same time the last one counts
    return Table(
        times_ms=times_ms[newest],
        metrics=tuple(header[column] for column in columns),
        values=values[newest],
        epoch=epochs == {True},
    )


def _columns(header: list[str], wanted: Sequence[str]) -> tuple[int, list[int]]:
    if header.count(TIME_COLUMN) != 1:
        raise TableError(f"row 1: it must name one column {TIME_COLUMN}")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise TableError(f"row 1: the column {twice[0]} is there twice")
    missing = [name for name in wanted if name not in header or name == TIME_COLUMN]
    if missing:
        raise TableError(f"there is no column {missing[0]}")
    names = list(dict.fromkeys(wanted)) or [name for name in header if name != TIME_COLUMN]
    if not names:
        raise TableError("row 1: there is no metric column")
    return header.index(TIME_COLUMN), [header.index(name) for name in names]


def _time(text: str, line: int, column: str) -> tuple[int, bool]:
    """Milliseconds since the epoch, and whether it was a number."""
    if _NUMBER.fullmatch(text):
        seconds = float(text)
        if not 0 <= seconds < MAX_EPOCH_S:
            raise TableError(f"row {line}, column {column}: {text[:40]} is not seconds since the epoch")
        return round(seconds * 1000), True
    try:
        time = datetime.fromisoformat(text)
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time
        return round(time.timestamp() * 1000), False
    except (ValueError, OverflowError) as error:
        raise TableError(
            f"row {line}, column {column}: {text[:40]!r} is neither epoch seconds nor a time such as"
            " 2026-11-29T06:00:00Z or 2026-11-29 06:00:00"
        ) from error


def _number(text: str, line: int, column: str) -> float:
    if text.lower() in GAPS:
        return math.nan
    try:
        return float(text)
    except ValueError as error:
        raise TableError(f"row {line}, column {column}: {text[:40]!r} is not a number") from error


def lines(rows: Iterator[Sequence[str]], file: TextIO) -> None:
    """Writes rows as CSV."""
    csv.writer(file, lineterminator="\n").writerows(rows)
