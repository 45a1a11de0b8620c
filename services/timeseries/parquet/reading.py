"""Reads Parquet files row by row as points of series, and finds what of them cannot be taken.

What must stay true: a file that lacks a column is refused before a row of any file is read; a row that cannot be
taken is blamed once, on its first column at fault; the checks of names are those of every sender
(`fleet.validation`). Equal neighbours are looked at once, since most files are sorted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fleet import validation
from fleet.model import Metric, MetricKind, MetricSet, ServerDescriptor
from runtime.clock import Clock
from runtime.errors import InvalidArgument
from services.timeseries.parquet.faults import MAX_PLACES, Book
from services.timeseries.parquet.layout import ParquetError
from services.timeseries.parquet.schema import KINDS, SERVERS, TEXT_COLUMNS, columns_to_read, labels_of

BATCH_ROWS: Final = 1 << 17
"""Rows read at once."""
READ_BYTES: Final = 1 << 20
"""What is read of a column at once: a file may be one row group of any size."""
_UNREADABLE: Final = (OSError, pa.ArrowException, ValueError)
_PER_MS: Final = {"ms": 1, "us": 1_000, "ns": 1_000_000}  # Parquet has no others


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Points:
    """Points of some rows: `series` (int32, numbers of `SeriesTable.series`), times_ms (int64), values (float64, no
    NaN) and `rows` (int64, their places)."""

    series: NDArray[np.int32]
    times_ms: NDArray[np.int64]
    values: NDArray[np.float64]
    rows: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A metric of a server."""

    server_id: str
    metric: Metric


class SeriesTable:
    """Gives each combination of a row's texts a number, the same where server and identity of the metric are.

    Attributes:
        series: by number.
        faults: for the numbers that can be no series, the column at fault and what is wrong.
    """

    def __init__(self) -> None:
        self.series: list[Series] = []
        self.faults: dict[int, tuple[str, str]] = {}
        self._numbers: dict[tuple[str | None, ...], int] = {}
        self._places: dict[tuple[str, str], int] = {}
        self._metrics: dict[tuple[str | None, ...], tuple[Metric, tuple[str, str] | None]] = {}

    def number(self, texts: tuple[str | None, ...]) -> int:
        """`texts` as in TEXT_COLUMNS."""
        found = self._numbers.get(texts)
        if found is None:
            found = self._numbers[texts] = self._add(texts)
        return found

    def _add(self, texts: tuple[str | None, ...]) -> int:
        server_id, *described = texts
        known = self._metrics.get(tuple(described))
        if known is None:
            known = self._metrics[tuple(described)] = _metric(*described)
        metric, fault = known
        series = Series(server_id=server_id or "", metric=metric)
        if wrong := validation.server_id_fault(series.server_id):
            fault = "server_id", wrong
        number = len(self.series)
        if fault is None:
            number = self._places.setdefault((series.server_id, metric.key), number)
        else:
            self.faults[number] = fault
        if number == len(self.series):
            self.series.append(series)
        return number


def _metric(
    name: str | None, labels: str | None, unit: str | None, kind: str | None
) -> tuple[Metric, tuple[str, str] | None]:
    metric = Metric(name=name or "", unit=unit or "")
    try:
        pairs = labels_of(labels)
    except (ValueError, RecursionError):
        return metric, ("labels", "it is no JSON object of texts")
    if kind and kind not in KINDS:
        return metric, ("kind", f"it is none of {', '.join(sorted(filter(None, KINDS)))}")
    metric = Metric(name=name or "", unit=unit or "", kind=KINDS.get(kind, MetricKind.UNSPECIFIED), labels=pairs)
    try:
        validation.check_metric_set(MetricSet((metric,)), "set")
    except InvalidArgument as error:
        column = (error.field or "").rpartition(".")[2]
        return metric, ("metric" if column == "name" else column, error.message)
    except UnicodeEncodeError:
        return metric, ("labels", "it has half a character")
    return metric, None


class Reader:
    """Reads the files of one import; making it checks their columns. Raises ParquetError."""

    def __init__(self, files: Sequence[Path], clock: Clock) -> None:
        self.table = SeriesTable()
        self.book = Book(files=list(files), starts=[])
        self._clock = clock
        self.total = 0
        self._columns: list[list[str]] = []
        for path in files:
            with _opened(path) as file:
                self._columns.append(columns_to_read(path, file.schema_arrow))
                self.book.starts.append(self.total)
                self.total += file.metadata.num_rows

    def forget(self) -> None:
        """Begins a new table; points that were read before have numbers of the old one."""
        self.table = SeriesTable()

    def points(self) -> Iterator[tuple[Path, Points]]:
        """What can be taken, in the order of files and rows; a file whose bytes are damaged ends there, noted."""
        for path, columns, first in zip(self.book.files, self._columns, self.book.starts, strict=True):
            start = first
            try:
                with _opened(path, [name for name in columns if name in TEXT_COLUMNS]) as file:
                    for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                        yield path, self._points(batch, start)
                        start += batch.num_rows
            except _UNREADABLE as error:
                self.book.damaged.append(f"{path}: {_said(error)}")

    def _points(self, batch: Any, start: int) -> Points:
        self.book.rows += batch.num_rows
        series = self._series(batch)
        times, time_known = _times(batch.column("time"))
        values = _values(batch.column("value"))
        good = self._judged(series, times, time_known, start)
        present = ~np.isnan(values)
        self.book.without_value += int(np.count_nonzero(good & ~present))
        rows = np.flatnonzero(good & present)
        return Points(series=series[rows], times_ms=times[rows], values=values[rows], rows=rows + start)

    def _series(self, batch: Any) -> NDArray[np.int32]:
        codes, texts = [], []
        for name in TEXT_COLUMNS:
            if name in batch.schema.names:
                coded, dictionary = _coded(batch.column(name))
                codes.append(coded)
                texts.append(dictionary)
            else:
                texts.append([None])
                codes.append(np.zeros(batch.num_rows, np.int32))
        changed = np.zeros(batch.num_rows, np.bool_)
        changed[:1] = True
        for coded in codes:
            changed[1:] |= coded[1:] != coded[:-1]
        starts = np.flatnonzero(changed)
        numbers: dict[tuple[int, ...], int] = {}
        runs = np.empty(len(starts), np.int32)
        for run, key in enumerate(zip(*(coded[starts].tolist() for coded in codes), strict=True)):
            number = numbers.get(key)
            if number is None:
                number = self.table.number(tuple(texts[at][code] for at, code in enumerate(key)))
                numbers[key] = number
            runs[run] = number
        return np.repeat(runs, np.diff(starts, append=batch.num_rows))

    def _judged(
        self, series: NDArray[np.int32], times: NDArray[np.int64], time_known: NDArray[np.bool_], start: int
    ) -> NDArray[np.bool_]:
        """Which rows can be taken; the others are blamed."""
        bad = np.zeros(len(series), np.bool_)

        def blame(rows: NDArray[np.bool_], column: str, what: str) -> None:
            places = np.flatnonzero(rows & ~bad)
            if len(places):
                self.book.blame(column, what, len(places), (start + place for place in places[:MAX_PLACES].tolist()))
                bad[places] = True

        kinds: dict[tuple[str, str], list[int]] = {}
        if faults := self.table.faults:
            for number in np.unique(series[np.isin(series, list(faults))]).tolist():
                kinds.setdefault(faults[number], []).append(number)
        for kind, numbers in kinds.items():
            blame(np.isin(series, numbers), *kind)
        blame(~time_known, "time", "it is missing")
        outside = (times < validation.MIN_TIME_MS) | (times > validation.MAX_TIME_MS)
        blame(outside, "time", "it lies outside 1970-01-01 to 2262-04-11")
        ahead = times > self._clock.now_ms() + validation.MAX_AHEAD_MS
        blame(ahead, "time", "it lies more than 1 h ahead of our clock")
        return ~bad


def read_servers(path: Path) -> list[ServerDescriptor]:
    """The described servers of an export; raises ParquetError."""
    with _opened(path) as file:
        if missing := [name for name in SERVERS.names if name not in file.schema_arrow.names]:
            raise ParquetError(f"{path}: column {missing[0]} is missing")
        try:
            rows = file.read(columns=SERVERS.names).to_pylist()
        except _UNREADABLE as error:
            raise ParquetError(f"{path}: {_said(error)}") from error
    return [ServerDescriptor(**row) for row in rows if row["hostname"] is not None]


def _opened(path: Path, coded: Sequence[str] = ()) -> Any:
    try:
        return pq.ParquetFile(
            path,
            read_dictionary=list(coded),
            page_checksum_verification=True,
            pre_buffer=False,
            buffer_size=READ_BYTES,
        )
    except _UNREADABLE as error:
        raise ParquetError(f"{path}: {_said(error)}") from error


def _coded(column: Any) -> tuple[NDArray[np.int32], list[str | None]]:
    """A text column as places in a list, the last of which is None."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    indices, texts = column.indices, column.dictionary.to_pylist()
    if indices.null_count:
        indices = indices.cast(pa.int64()).fill_null(len(texts))
    return indices.to_numpy(zero_copy_only=False).astype(np.int32, copy=False), [*texts, None]


def _times(column: Any) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Milliseconds, rounded down, and where there are any."""
    unit, column = column.type.unit, column.view(pa.int64())
    known = np.ones(len(column), np.bool_)
    if column.null_count:
        known = column.is_valid().to_numpy(zero_copy_only=False)
        column = column.fill_null(0)
    times: NDArray[np.int64] = column.to_numpy()
    return times // _PER_MS[unit], known


def _values(column: Any) -> NDArray[np.float64]:
    """Numbers as the nearest double; NaN where there is none."""
    if column.type != pa.float64():
        column = column.cast(pa.float64(), safe=False)
    values: NDArray[np.float64] = column.to_numpy(zero_copy_only=False)  # nulls become NaN
    return values


def _said(error: Exception) -> str:
    return f"it cannot be read ({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})"
