"""`openmanager history ID METRIC...`: a table with a line of bars on a terminal, JSON, CSV or Parquet.

What must stay true: CSV and Parquet are written as the parts come, JSON series by series, so that a year of a metric
costs little memory; what is missing is said on standard error, whatever the output.
"""

import contextlib
import sys
from argparse import Namespace
from collections.abc import AsyncIterator
from typing import Final

import numpy as np

from client.api import OpenManager
from client.command import exits
from client.command.history_formats import CsvWriter, JsonWriter, Writer
from client.command.sparkline import ASCII_BARS, BARS, sparkline
from client.command.tables import Column, table
from client.command.terminal import Terminal, clean, complain
from client.command.values import number_text, time_text
from client.history import History, Joiner, Series

_SPARKLINE_CELLS: Final = 60
_NO_PYARROW: Final = """\
Parquet needs pyarrow, which is not installed: run `make parquet` in the checkout, or choose --output csv"""


async def run(manager: OpenManager, options: Namespace) -> int:
    """Runs the command; returns the exit status."""
    writer = await _writer(manager, options)
    if writer is None:
        complain(_NO_PYARROW)
        return exits.NOT_SUPPORTED
    seen: set[str] = set()
    incomplete: list[str] = []
    parts = manager.stream_history(
        options.id,
        options.metrics,
        start=options.start,
        end=options.end,
        step_s=options.step,
        aggregation=options.aggregation,
    )
    async with contextlib.aclosing(parts):
        await _write(parts, writer, seen, incomplete)
    for what in incomplete:
        complain(f"points may be missing: {what}")
    for metric in options.metrics:
        if not any(key == metric or key.startswith(metric + "{") for key in seen):
            complain(f"{options.id} has no points of {metric} in this range")
    return exits.OK if seen else exits.NOT_FOUND


async def _write(parts: AsyncIterator[History], writer: Writer, seen: set[str], incomplete: list[str]) -> None:
    joiner = Joiner()
    first = await anext(parts, None)  # before anything is written: a refusal must not leave half a document
    writer.begin()
    part = first
    while part is not None:
        seen.update(series.metric for series in part.series)
        incomplete += part.incomplete
        for series in joiner.add(part.series) if writer.whole_series else part.series:
            writer.add(series)
        part = await anext(parts, None)
    for series in joiner.end():
        writer.add(series)
    writer.end(incomplete)


async def _writer(manager: OpenManager, options: Namespace) -> Writer | None:
    match options.output:
        case "csv":
            return CsvWriter()
        case "json":
            return JsonWriter()
        case "parquet":
            return await _parquet(manager, options)
        case _:
            return _Table(options)


async def _parquet(manager: OpenManager, options: Namespace) -> Writer | None:
    if sys.stdout.isatty():
        raise exits.UsageError("Parquet is nothing for a terminal: add > FILE.parquet")
    try:
        from client.command.history_parquet import ParquetWriter  # noqa: PLC0415  an extra
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        return None
    described = {metric.key: metric async for metric in manager.metrics(options.id)}
    return ParquetWriter(described, options.aggregation if options.step else "")


class _Table:
    """A row for each time, a column for each metric; on a terminal, below it, each metric in one line."""

    whole_series = True

    def __init__(self, options: Namespace) -> None:
        self._options = options
        self._series: list[Series] = []

    def begin(self) -> None:
        """Nothing is written before everything is there."""

    def add(self, series: Series) -> None:
        """Keeps a series."""
        self._series.append(series)

    def end(self, _incomplete: list[str]) -> None:
        """Writes the table."""
        if not self._series:
            return
        terminal = Terminal(sys.stdout)
        times = np.unique(np.concatenate([series.times for series in self._series]))
        cells = np.full((len(times), len(self._series)), "-", object)
        for column, series in enumerate(self._series):
            places = np.searchsorted(times, series.times)
            cells[places, column] = [number_text(value) for value in series.values.tolist()]
        columns = [Column("TIME (UTC)"), *(Column(_title(series), right=True) for series in self._series)]
        rows = [(time_text(time), *row) for time, row in zip(times.tolist(), cells.tolist(), strict=True)]
        for line in table(terminal, columns, rows):
            terminal.line(line)
        if terminal.is_terminal:
            self._summarise(terminal)

    def _summarise(self, terminal: Terminal) -> None:
        terminal.line()
        bars = BARS if terminal.shows_unicode else ASCII_BARS
        cells = min(_SPARKLINE_CELLS, terminal.size()[0])
        for series in self._series:
            line = sparkline(
                series.times, series.values, start=self._options.start, end=self._options.end, width=cells, bars=bars
            )
            finite = series.values[np.isfinite(series.values)]
            facts = (
                f"min {number_text(finite.min())}  mean {number_text(finite.mean())}  max {number_text(finite.max())}"
                f"  last {number_text(float(series.values[-1]))}"
                if finite.size
                else "no finite values"
            )
            terminal.line(f"{terminal.coloured(clean(_title(series)), 'bold')}  {facts}")
            terminal.line(terminal.coloured(line, "green"))


def _title(series: Series) -> str:
    return f"{series.metric} ({series.unit})" if series.unit else series.metric
