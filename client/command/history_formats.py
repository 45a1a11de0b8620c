"""History as CSV and as JSON."""

import csv
import io
import json
import math
import sys
from typing import Protocol

import numpy as np

from client.command.spreadsheet import cell
from client.command.terminal import in_utf8
from client.history import Floats, Series

_CSV_ROWS = 10_000
"""Rows made into text at once: 1 MiB, so that a long series is not held twice."""


class Writer(Protocol):
    """Takes series as they come."""

    whole_series: bool
    """Whether it wants whole series, or takes their parts."""

    def begin(self) -> None:
        """The gateway has answered, and did not refuse."""

    def add(self, series: Series) -> None:
        """A series, or the next part of the last one."""

    def end(self, incomplete: list[str]) -> None:
        """That was all."""


class CsvWriter:
    """A row for each point: time (RFC 3339, UTC), server_id, metric, value, unit; the texts as `cell` has them."""

    whole_series = False

    def begin(self) -> None:
        """Writes the header."""
        in_utf8(sys.stdout).write("time,server_id,metric,value,unit\n")

    def add(self, series: Series) -> None:
        """Writes the points; what does not change from row to row is quoted once."""
        before, after = _csv(series.server_id, series.metric), _csv(series.unit)
        for begin in range(0, len(series.times), _CSV_ROWS):
            times = rfc3339(series.times[begin : begin + _CSV_ROWS])
            values = series.values[begin : begin + _CSV_ROWS].tolist()
            sys.stdout.write(
                "".join(f"{time},{before},{value!r},{after}\n" for time, value in zip(times, values, strict=True))
            )

    def end(self, _incomplete: list[str]) -> None:
        """Nothing is left to write."""


class JsonWriter:
    """One document, as the HTTP API answers."""

    whole_series = True

    def __init__(self) -> None:
        self._between = ""

    def begin(self) -> None:
        """Opens the document."""
        sys.stdout.write('{"series":[')

    def add(self, series: Series) -> None:
        """Writes a series."""
        document = {
            "serverId": series.server_id,
            "metric": series.metric,
            "times": series.times.tolist(),
            "values": [_json_number(value) for value in series.values.tolist()],
            "unit": series.unit,
        }
        if series.resolution_s:
            document["resolution"] = f"{series.resolution_s:g}s"
        sys.stdout.write(self._between + json.dumps(document, separators=(",", ":"), allow_nan=False))
        self._between = ","

    def end(self, incomplete: list[str]) -> None:
        """Closes the document."""
        sys.stdout.write(f'],"incomplete":{json.dumps(incomplete)}}}\n')


def rfc3339(times: Floats) -> list[str]:
    """`2026-11-23T00:30:30.000Z` of seconds since the epoch."""
    moments = np.round(times * 1_000).astype(np.int64).astype("datetime64[ms]")
    texts: list[str] = np.datetime_as_string(moments, unit="ms", timezone="UTC").tolist()
    return texts


def _json_number(value: float) -> float | str:
    """Proto3 JSON has no other way to say an infinity."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _csv(*fields: str) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(map(cell, fields))
    return out.getvalue()
