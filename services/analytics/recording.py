"""A recording in a file: CSV, packed by gzip or not, with a `timestamp` and a column for each metric, read row by row.

What must stay true: memory does not grow with the file; whatever is wrong is said with its row (the first is row 1,
blank ones count) and column, and nothing is guessed.
"""

import csv
import errno
import gzip
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TextIO

import numpy as np

from services.analytics.scoring.arrays import Floats

TIMESTAMP: Final = "timestamp"
MAX_COLUMNS: Final = 100_000
MAX_FIELD_CHARACTERS: Final = 1_000_000
MIN_EPOCH_S: Final = -62_135_596_800.0
MAX_EPOCH_S: Final = 253_086_768_000.0
"""The years 1 to 9989; dates of exhaustion lie up to eight years later, and there is no year 10000. Epoch times beyond
are milliseconds taken for seconds."""
MAX_SET_BACK_S: Final = 3_600.0
"""By so much a time may lie before the latest above: local clocks are set back once a year."""
_UNDECODED: Final = "surrogateescape"
_NO_VALUE: Final = frozenset(("", "nan", "null", "none", "na", "n/a"))


class BadRecordingError(Exception):
    """The file is not what it should be; the text says where."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its time as it was written, as seconds since the epoch, and its values (NaN where there is none)."""

    text: str
    time_s: float
    values: Floats


class Recording:
    """An open recording; a context manager and an iterator over its rows."""

    def __init__(self, path: Path | str, *, in_order: bool = True, metrics: Sequence[str] = ()) -> None:
        """Opens the file ("-" is the standard input) and reads its header.

        Args:
            path: of the file.
            in_order: rows must be in order of time.
            metrics: only these columns are read, in this order, whatever is in the others; all where none is named.

        Raises:
            BadRecordingError: it cannot be read, or the header is not one.
        """
        self.name = str(path)
        self._in_order = in_order
        try:
            self._file = _opened(self.name)
        except OSError as error:
            raise BadRecordingError(f"{path}: {error.strerror or error}") from error
        csv.field_size_limit(MAX_FIELD_CHARACTERS)
        self._reader = csv.reader(self._file, strict=True)
        self._row = 0
        self._fields: list[str] = []
        try:
            self.metrics = self._header(tuple(dict.fromkeys(metrics)))
        except BadRecordingError:
            self.close()
            raise

    def _header(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        names: list[str] = []
        while not any(names):  # blank lines
            fields = self._next()
            if fields is None:
                raise BadRecordingError(f"{self.name}: the file is empty")
            names = [name.strip() for name in fields]
        if not _is_utf8(names):
            raise self._bad("")
        if names.count(TIMESTAMP) != 1:
            raise self._bad(f"there must be one column named {TIMESTAMP}, and there are {names.count(TIMESTAMP)}")
        if not 2 <= len(names) <= MAX_COLUMNS:
            raise self._bad(f"there must be 1 to {MAX_COLUMNS} metrics, and there are {len(names) - 1}")
        places: dict[str, int] = {}
        for place, name in enumerate(names):
            if not name or name in places:
                told = f"the name {name} is there twice" if name else "it has no name"
                raise self._bad(f"column {place + 1}: {told}")
            places[name] = place
        self._width, self._time_at = len(names), places.pop(TIMESTAMP)
        for name in wanted:
            if name not in places:
                raise BadRecordingError(f"{self.name}: there is no column {name}")
        found = wanted or tuple(places)
        self._places = [places[name] for name in found]
        return found

    def __iter__(self) -> Iterator[Row]:
        """The rows; raises BadRecordingError at the first that is not one."""
        latest_s = -math.inf
        while (fields := self._next()) is not None:
            if not any(map(str.strip, fields)):
                continue  # a blank line
            if len(fields) != self._width:
                raise self._bad(f"it has {len(fields)} fields, the header has {self._width}")
            text = fields[self._time_at].strip()
            time_s = self._time(text)
            if self._in_order and time_s < latest_s - MAX_SET_BACK_S:
                raise self._bad(f"column {TIMESTAMP}: {text} lies before the row above")
            latest_s = max(latest_s, time_s)
            yield Row(text, time_s, self._values([fields[place] for place in self._places]))

    def _next(self) -> list[str] | None:
        self._row += 1
        self._fields = []
        try:
            fields = next(self._reader, None)
        except csv.Error as error:
            raise self._bad(f"it is no CSV: {error}") from error
        except (OSError, EOFError, zlib.error) as error:  # gzip's are all three
            raise self._bad(f"it cannot be read: {getattr(error, 'strerror', None) or error}") from error
        self._fields = fields or []
        return fields

    def _time(self, text: str) -> float:
        try:
            time_s = epoch_s(text)
        except ValueError as error:
            raise self._bad(f"column {TIMESTAMP}: {error}") from error
        return time_s

    def _values(self, fields: list[str]) -> Floats:
        try:
            values = np.array(fields, np.float64)
        except ValueError:
            values = np.array([self._value(place, field) for place, field in enumerate(fields)], np.float64)
        if np.isinf(values).any():
            place = int(np.flatnonzero(np.isinf(values))[0])
            raise self._bad(f"column {self.metrics[place]}: {fields[place].strip()} is not finite")
        return values

    def _value(self, place: int, field: str) -> float:
        field = field.strip()
        if field.lower() in _NO_VALUE:
            return math.nan
        try:
            return float(field)
        except ValueError as error:
            raise self._bad(f"column {self.metrics[place]}: {field[:50]!r} is not a number") from error

    def _bad(self, what: str) -> BadRecordingError:
        if not _is_utf8(self._fields):
            what = "it is not UTF-8"
        return BadRecordingError(f"{self.name}: row {self._row}: {what}")

    def close(self) -> None:
        """Closes the file; the standard input stays open."""
        if self._file is not sys.stdin:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_utf8(fields: Sequence[str]) -> bool:
    """Whether a row is; bytes that are none become surrogates, so that they are found in their row: the file is decoded
    far ahead of it."""
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return False
    return True


def _opened(name: str) -> TextIO:
    if name == "-":
        if sys.stdin is None:
            raise OSError(errno.EBADF, "the standard input is closed")
        if isinstance(sys.stdin, TextIOWrapper):  # read as files are, whatever the locale
            sys.stdin.reconfigure(encoding="utf-8-sig", errors=_UNDECODED, newline="")
        return sys.stdin
    if name.endswith(".gz"):
        return gzip.open(name, "rt", encoding="utf-8-sig", errors=_UNDECODED, newline="")
    return Path(name).open(encoding="utf-8-sig", errors=_UNDECODED, newline="")


def epoch_s(text: str) -> float:
    """Seconds since the epoch of a time written as such, by RFC 3339, or as YYYY-MM-DD HH:MM:SS in UTC.

    Raises:
        ValueError: it is none of these; the text says so.
    """
    try:
        seconds = float(text)
    except ValueError:
        try:
            when = datetime.fromisoformat(text.upper())  # RFC 3339 has t and z as well
        except ValueError:
            raise ValueError(
                f"{text[:50]!r} is neither epoch seconds nor a time as 2026-01-31T12:00:00Z or 2026-01-31 12:00:00"
            ) from None
        seconds = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        if not MIN_EPOCH_S <= seconds < MAX_EPOCH_S:
            raise ValueError(f"{text[:50]!r} lies outside of the years 1 to 9989") from None
        return seconds
    if not MIN_EPOCH_S <= seconds < MAX_EPOCH_S:
        raise ValueError(f"{text[:50]} is no time in epoch seconds")
    return seconds
