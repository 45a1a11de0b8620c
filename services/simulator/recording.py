"""A recorded CSV file, read once in bounded memory and made ready to be played in the order of its times.

Recordings are often sorted by server and not by time, and to let one end now its last time must be known first. So one
pass parses the file into runs: binary files of rows sorted by time, in a folder of our own; playing then merges the
runs. What must stay true: memory is bounded whatever the file's size; a line that cannot be read is counted and named,
never fatal; rows of equal time keep the order of the file.
"""

import csv
import gzip
import math
import re
import shutil
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TextIO

import numpy as np
from numpy.typing import NDArray

from fleet.model import Metric, MetricKind, MetricSet
from fleet.validation import MAX_NAME_BYTES, MAX_SET_METRICS, server_id_fault
from runtime.errors import Cancelled, InvalidArgument

CHUNK_ROWS: Final = 100_000
"""Rows that are parsed and sorted at once ..."""
CHUNK_CELLS: Final = 4_000_000
"""... but for those of many columns: a cell takes 90 bytes meanwhile, so 100,000 rows of 511 would take 4.6 GB."""
MERGE_ROWS: Final = 200_000
"""Rows held while merging, over all runs ..."""
MERGE_CELLS: Final = 8_000_000
"""... but for those of many columns: three times 64 MB."""
MAX_NAMED_LINES: Final = 20
"""How many bad lines are named; all are counted."""
MAX_SERVERS: Final = 100_000
"""Different servers in one recording; lines of further ones are bad."""
_LATEST_S: Final = 32_503_680_000.0  # the year 3000: beyond it, a time is in milliseconds by mistake

_METRIC_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_SUFFIXES: Final = (
    ("_bytes_per_second", "By/s", MetricKind.GAUGE),
    ("_per_second", "1/s", MetricKind.GAUGE),
    ("_bytes_total", "By", MetricKind.COUNTER),
    ("_seconds_total", "s", MetricKind.COUNTER),
    ("_total", "1", MetricKind.COUNTER),
    ("_bytes", "By", MetricKind.GAUGE),
    ("_usage", "%", MetricKind.GAUGE),
    ("_percent", "%", MetricKind.GAUGE),
    ("_milliseconds", "ms", MetricKind.GAUGE),
    ("_seconds", "s", MetricKind.GAUGE),
    ("_celsius", "Cel", MetricKind.GAUGE),
    ("_count", "1", MetricKind.GAUGE),
)


def metric_of_column(name: str) -> Metric:
    """Returns the metric of a column; its unit and kind are what the name's ending says."""
    for suffix, unit, kind in _SUFFIXES:
        if name.endswith(suffix):
            return Metric(name=name, unit=unit, kind=kind)
    return Metric(name=name, kind=MetricKind.GAUGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Where a recording has what: columns of the time and the server, and the metrics with their columns."""

    time: int
    server: int
    columns: tuple[int, ...]
    metric_set: MetricSet
    width: int


def read_header(path: Path) -> Header:
    """Returns the header of a recording.

    Raises:
        InvalidArgument: the file cannot be read, or a column is missing, doubled or no metric's name.
    """
    with _open(path) as file:
        return _parse_header(csv.reader(file))


def _open(path: Path) -> TextIO:
    try:
        with path.open("rb") as probe:
            zipped = probe.read(2) == b"\x1f\x8b"
        if zipped:
            return gzip.open(path, "rt", encoding="utf-8-sig", errors="replace", newline="")
        return path.open("rt", encoding="utf-8-sig", errors="replace", newline="")
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}", field="SIMULATOR_REPLAY_FILE") from error


def _parse_header(reader: "Iterator[list[str]]") -> Header:
    try:
        names = [name.strip() for name in next(reader, [])]
    except (csv.Error, OSError, EOFError, zlib.error) as error:
        raise _bad_header(f"the first line cannot be read: {error}") from error
    for needed in ("time", "server_id"):
        if needed not in names:
            raise _bad_header(f"the column {needed!r} is missing; the first line has {', '.join(names)[:200]!r}")
    columns = tuple(column for column, name in enumerate(names) if name not in {"time", "server_id"})
    if not columns:
        raise _bad_header("there is no column of a metric beside 'time' and 'server_id'")
    if len(columns) > MAX_SET_METRICS:
        raise _bad_header(f"there are {len(columns)} metrics; at most {MAX_SET_METRICS} are taken (MAX_SET_METRICS)")
    seen: set[str] = set()
    for column, name in enumerate(names):
        if name in seen:
            raise _bad_header(f"the column {name[:80]!r} is there twice")
        seen.add(name)
        if len(name) > MAX_NAME_BYTES:
            raise _bad_header(f"column {column + 1}, {name[:80]!r}..., is a name of over {MAX_NAME_BYTES} bytes")
        if not _METRIC_NAME.fullmatch(name):
            raise _bad_header(
                f"column {column + 1}, {name[:80]!r}, is not the name of a metric (letters, digits and _)"
            )
    return Header(
        time=names.index("time"),
        server=names.index("server_id"),
        columns=columns,
        metric_set=MetricSet(tuple(metric_of_column(names[column]) for column in columns)),
        width=len(names),
    )


def _bad_header(message: str) -> InvalidArgument:
    return InvalidArgument(message, field="SIMULATOR_REPLAY_FILE", reason="RECORDING_HEADER")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Rows in the order of time: milliseconds, indexes of servers, values of shape (rows, metrics)."""

    times_ms: NDArray[np.int64]
    servers: NDArray[np.int32]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.times_ms)


@dataclass(slots=True, kw_only=True)
class Recording:
    """What a recording holds, and the runs that hold it.

    Attributes:
        first_ms, last_ms: least and greatest time, milliseconds since the Unix epoch.
        interval_ms: the usual distance of two rows of a server.
        bad_lines: lines that could not be read; ``named_lines`` has the first ones, each with its number.
    """

    header: Header
    server_ids: list[str] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    rows: int = 0
    first_ms: int = 0
    last_ms: int = 0
    interval_ms: int = 0
    bad_lines: int = 0
    named_lines: list[str] = field(default_factory=list)

    def bad(self, line: int, reason: str) -> None:
        """Counts a bad line, and names it while there are few."""
        self.bad_lines += 1
        if len(self.named_lines) < MAX_NAMED_LINES:
            self.named_lines.append(f"line {line}: {reason}")

    def blocks(self, *, after_rows: int = 0) -> Iterator[Block]:
        """Yields all rows in the order of time, but for the blocks that the first `after_rows` rows were."""
        runs = [np.memmap(path, dtype=_row_type(self.header), mode="r") for path in self.runs]
        at = [0] * len(runs)
        held = min(MERGE_ROWS, MERGE_CELLS // len(self.header.columns))
        ahead = max(1, held // max(1, len(runs)))
        while any(position < len(run) for position, run in zip(at, runs, strict=True)):
            # Up to the earliest time at which some run's next part ends, all runs are known.
            ends = [
                int(run["time"][min(p + ahead, len(run)) - 1]) for p, run in zip(at, runs, strict=True) if p < len(run)
            ]
            limit, parts = min(ends), []
            for index, run in enumerate(runs):
                part = run[at[index] : at[index] + ahead]
                taken = int(np.searchsorted(part["time"], limit, side="right"))
                parts.append(part[:taken])
                at[index] += taken
            if after_rows > 0:
                after_rows -= sum(map(len, parts))
                continue
            merged = np.concatenate(parts)
            merged = merged[np.argsort(merged["time"], kind="stable")]
            yield Block(
                times_ms=merged["time"].astype(np.int64),
                servers=merged["server"].astype(np.int32),
                values=np.ascontiguousarray(merged["values"]),
            )


def _row_type(header: Header) -> np.dtype[np.void]:
    return np.dtype([("time", "<i8"), ("server", "<i4"), ("values", "<f8", (len(header.columns),))])


class RecordingReader:
    """Parses a recording into runs, once."""

    def __init__(self, path: Path, folder: Path) -> None:
        """Prepares; ``folder`` is emptied, and holds about 8 bytes for each cell afterwards."""
        self._path = path
        self._folder = folder
        self._indexes: dict[str, int] = {}
        self._times_ms, self._servers = np.empty(0, np.int64), np.empty(0, np.int32)  # while the interval is not known
        self._given_up = threading.Event()

    def give_up(self) -> None:
        """Makes ``read``, which runs in another thread, end after the chunk it is at: about half a second."""
        self._given_up.set()

    def read(self) -> Recording:
        """Reads the whole file; blocking, about 3 us a row.

        Raises:
            InvalidArgument: the header is wrong, or there is no row at all.
            Cancelled: ``give_up`` was called.
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        with _open(self._path) as file:
            reader = csv.reader(file)
            recording = Recording(header=_parse_header(reader))
            for lines, rows in _chunks(reader, recording):
                if self._given_up.is_set():
                    raise Cancelled("reading the recording was given up")
                self._take(recording, lines, rows)
                del lines, rows  # they are not to be there beside the next ones
        if not recording.rows:
            named = f"; {recording.named_lines[0]}" if recording.named_lines else ""
            raise InvalidArgument(f"there is no row that can be read{named}", field="SIMULATOR_REPLAY_FILE")
        recording.server_ids = list(self._indexes)
        return recording

    def _take(self, recording: Recording, lines: list[int], rows: list[list[str]]) -> None:
        header = recording.header
        run = self._parse(recording, lines, rows)
        if not len(run):
            return
        run = run[np.argsort(run["time"], kind="stable")]
        first, last = int(run["time"][0]), int(run["time"][-1])
        recording.first_ms = min(first, recording.first_ms) if recording.rows else first
        recording.last_ms = max(last, recording.last_ms) if recording.rows else last
        if not recording.interval_ms:  # a chunk may be too short for a server to be in it twice
            self._times_ms = np.concatenate((self._times_ms, run["time"]))[-CHUNK_ROWS:]
            self._servers = np.concatenate((self._servers, run["server"]))[-CHUNK_ROWS:]
            recording.interval_ms = _usual_interval(self._times_ms, self._servers)
        recording.rows += len(run)
        path = self._folder / f"run-{len(recording.runs):05d}"
        assert run.dtype == _row_type(header)
        run.tofile(path)
        recording.runs.append(path)

    def _parse(self, recording: Recording, lines: list[int], rows: list[list[str]]) -> NDArray[np.void]:
        """Returns the rows that can be read: all columns at once, or one by one where a cell is at fault."""
        header = recording.header
        run = np.zeros(len(rows), dtype=_row_type(header))
        if not rows:
            return run
        cells = list(zip(*rows, strict=True))
        try:
            times_s = _times_s(cells[header.time])
            for place, column in enumerate(header.columns):
                run["values"][:, place] = [float(text) if text else math.nan for text in cells[column]]
            if np.isinf(run["values"]).any():
                raise ValueError
            for text in set(cells[header.server]):
                self._server(text)
            run["server"] = [self._indexes[text] for text in cells[header.server]]
        except ValueError:
            return self._parse_singly(recording, lines, rows)
        run["time"] = np.rint(times_s * 1000.0)
        return run

    def _parse_singly(self, recording: Recording, lines: list[int], rows: list[list[str]]) -> NDArray[np.void]:
        header = recording.header
        run = np.zeros(len(rows), dtype=_row_type(header))
        good = 0
        for line, row in zip(lines, rows, strict=True):
            try:
                time_s = _time_s(row[header.time])
                values = [_value(row[column]) for column in header.columns]
                server = self._server(row[header.server])
            except ValueError as error:
                recording.bad(line, str(error))
                continue
            run[good] = (round(time_s * 1000.0), server, values)
            good += 1
        return run[:good]

    def _server(self, text: str) -> int:
        index = self._indexes.get(text)
        if index is None:
            if fault := server_id_fault(text):
                raise ValueError(f"server_id: {text[:40]!r}: {fault}")
            if len(self._indexes) >= MAX_SERVERS:
                raise ValueError(f"server_id: {text[:40]!r} is one more than {MAX_SERVERS} servers (MAX_SERVERS)")
            index = self._indexes[text] = len(self._indexes)
        return index


def _chunks(reader: "csv._reader", recording: Recording) -> Iterator[tuple[list[int], list[list[str]]]]:  # type: ignore[name-defined]
    """Yields line numbers and rows of the right width, as many as are parsed at once."""
    width = recording.header.width
    at_once = max(1, min(CHUNK_ROWS, CHUNK_CELLS // width))
    lines: list[int] = []
    rows: list[list[str]] = []
    more = True
    while more:
        try:
            for row in reader:
                if len(row) == width:
                    rows.append(row)
                    lines.append(reader.line_num)
                    if len(rows) == at_once:
                        yield lines, rows
                        lines, rows = [], []
                elif row:
                    recording.bad(reader.line_num, f"{len(row)} cells instead of {width}")
            more = False
        except csv.Error as error:
            recording.bad(reader.line_num, str(error))
        except (EOFError, OSError, zlib.error) as error:
            recording.bad(reader.line_num + 1, f"the file ends too early: {error}")
            more = False
    yield lines, rows


def _times_s(texts: tuple[str, ...]) -> NDArray[np.float64]:
    """Returns the seconds of many times; ValueError when one cannot be read."""
    try:
        seconds = np.array([float(text) for text in texts])
    except ValueError:
        return np.array([_time_s(text) for text in texts])
    if not ((seconds >= 0.0) & (seconds <= _LATEST_S)).all():
        raise ValueError
    return seconds


def _time_s(text: str) -> float:
    """Returns seconds since the Unix epoch of a number or an RFC 3339 time; ValueError says what is wrong."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text.strip())
        except ValueError:
            raise ValueError(f"time: {text[:40]!r} is neither seconds since the epoch nor RFC 3339") from None
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not 0.0 <= seconds <= _LATEST_S:  # also refuses NaN
        raise ValueError(f"time: {text[:40]!r} is not between the years 1970 and 3000; is it in milliseconds?")
    return seconds


def _value(text: str) -> float:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        raise ValueError(f"{text[:40]!r} is not a number") from None
    if math.isinf(value):
        raise ValueError(f"{text[:40]!r} is not finite")
    return value


def _usual_interval(times_ms: NDArray[np.int64], servers: NDArray[np.int32]) -> int:
    """Returns the median distance of two rows of a server, milliseconds; 0 when no server has two."""
    order = np.lexsort((times_ms, servers))
    distances = np.diff(times_ms[order])[np.diff(servers[order]) == 0]
    distances = distances[distances > 0]
    return int(np.median(distances)) if len(distances) else 0
