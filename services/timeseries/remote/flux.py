"""Flux text for what history asks of InfluxDB. Pure functions.

What must stay true: names are hostile input, so nothing of one reaches a query but as bytes of a string or characters
of a pattern; the storage engine can run each query by itself ("pushed down"): the filters compare tags and fields with
constants, and windows are made of single series, before anything is grouped.
"""

import datetime
from collections.abc import Iterable, Sequence
from typing import Final

from services.timeseries.engine.aggregate import Aggregation
from services.timeseries.engine.settings import MAX_TIME_MS
from services.timeseries.followers.influxdb_api import MEASUREMENT

FUNCTIONS: Final = {
    Aggregation.AVG: "mean",
    Aggregation.MIN: "min",
    Aggregation.MAX: "max",
    Aggregation.SUM: "sum",
    Aggregation.COUNT: "count",
    Aggregation.FIRST: "first",
    Aggregation.LAST: "last",
}
"""RATE is not among them: its resets want every point, which no pushed down function looks at."""

_SPECIAL: Final = frozenset(r"\.+*?()|[]{}^$/")
_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_LATEST: Final = "2262-04-11T23:47:16.854775806Z"
_KEPT: Final = 'keep(columns: ["server_id", "environment", "role", "_field", "_time", "_value"])'


def text(value: str) -> str:
    """A string literal. Raises UnicodeEncodeError for what is no text: no series has such a name."""
    plain = (chr(byte) if chr(byte).isalnum() and byte < 128 else f"\\x{byte:02x}" for byte in value.encode())
    return f'"{"".join(plain)}"'


def starting_with(prefix: str) -> str:
    """A pattern for names that begin with the prefix."""
    return f"/^{''.join(map(_itself, prefix))}/"


def _itself(letter: str) -> str:
    """Two languages read a pattern, the parser's and the storage's, and each refuses escapes that it does not need."""
    if letter in _SPECIAL:
        return f"\\{letter}"
    return letter if letter.isprintable() or not letter.isascii() else f"\\x{ord(letter):02x}"


def instant(time_ms: int) -> str:
    """A time literal; one past the last that a row can have is the last that InfluxDB knows."""
    if time_ms > MAX_TIME_MS:
        return _LATEST
    return f"{(_EPOCH + datetime.timedelta(milliseconds=time_ms)).replace(tzinfo=None).isoformat('T', 'milliseconds')}Z"


def fields(keys: Iterable[str], names: Iterable[str]) -> str:
    """A condition on the field: one of the keys, or a name with any labels."""
    return " or ".join(
        [f"r._field == {text(key)}" for key in keys] + [f"r._field =~ {starting_with(name + '{')}" for name in names]
    )


def servers(ids: Iterable[str]) -> str:
    """A condition on the server."""
    return " or ".join(f"r.server_id == {text(server_id)}" for server_id in ids)


def points(bucket: str, start_ms: int, end_ms: int, conditions: Sequence[str]) -> str:
    """The points of `[start, end)`, series by series."""
    return f"{_from(bucket, start_ms, end_ms, conditions)} |> {_KEPT}"


def windows(
    bucket: str, start_ms: int, end_ms: int, conditions: Sequence[str], step_ms: int, aggregation: Aggregation
) -> str:
    """The windows of `[start, end)` of each series, with the start of each clipped to the range."""
    made = f'aggregateWindow(every: {step_ms}ms, fn: {FUNCTIONS[aggregation]}, createEmpty: false, timeSrc: "_start")'
    return f"{_from(bucket, start_ms, end_ms, conditions)} |> {made} |> {_KEPT}"


def newest(bucket: str, conditions: Sequence[str]) -> str:
    """The newest point of each series."""
    return f"{_from(bucket, 0, MAX_TIME_MS + 1, conditions)} |> last() |> {_KEPT}"


def server_ids(bucket: str, start_ms: int, end_ms: int, conditions: Sequence[str]) -> str:
    """The ids of servers of which there may be points in the range."""
    return (
        'import "influxdata/influxdb/schema"\n'
        f'schema.tagValues(bucket: {text(bucket)}, tag: "server_id", predicate: (r) => {_all(conditions)},'
        f" start: {instant(start_ms)}, stop: {instant(end_ms)})"
    )


def _from(bucket: str, start_ms: int, end_ms: int, conditions: Sequence[str]) -> str:
    return (
        f"from(bucket: {text(bucket)}) |> range(start: {instant(start_ms)}, stop: {instant(end_ms)})"
        f" |> filter(fn: (r) => {_all(conditions)})"
    )


def _all(conditions: Sequence[str]) -> str:
    return " and ".join(f"({one})" for one in (f"r._measurement == {text(MEASUREMENT)}", *conditions) if one)
