"""A recording as one table: all its rows in order of their times, for what looks at the whole.

What must stay true: of rows of the same time the last one counts; times are written back as the file writes them.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import numpy as np

from services.analytics.forecasting.grid import measurable
from services.analytics.forecasting.robust import Floats, Integers
from services.analytics.recording import BadRecordingError, Recording


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
    when = datetime.fromtimestamp(time_ms // 1000, UTC).replace(tzinfo=None)
    return f"{when.isoformat(timespec='seconds')}Z"  # strftime has years before 1000 with fewer digits


def read_table(path: Path | str, metrics: Sequence[str] = ()) -> Table:
    """Reads a file; only the named metrics, all columns where none is named.

    Raises:
        BadRecordingError: it cannot be read or understood.
    """
    with Recording(path, in_order=False, metrics=metrics) as recording:
        rows = [(row.text, row.time_s, row.values) for row in recording]
    if not rows:
        raise BadRecordingError(f"{path}: there are no rows after the header")
    times_ms = np.array([round(time_s * 1_000) for _, time_s, _ in rows], np.int64)
    order = np.argsort(times_ms, kind="stable")
    times_ms, values = times_ms[order], measurable(np.array([values for *_, values in rows])[order])
    newest = np.append(np.diff(times_ms) > 0, True)
    return Table(
        times_ms=times_ms[newest],
        metrics=recording.metrics,
        values=values[newest],
        epoch=all(map(_is_number, (text for text, *_ in rows))),
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def lines(rows: Iterator[Sequence[str]], file: TextIO) -> None:
    """Writes rows as CSV."""
    csv.writer(file, lineterminator="\n").writerows(rows)
