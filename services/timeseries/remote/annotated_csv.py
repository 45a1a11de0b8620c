"""InfluxDB's annotated CSV as arrays, read as it comes.

    #datatype,string,long,dateTime:RFC3339,double,string,string
    ,result,table,_time,_value,_field,server_id
    ,_result,0,2023-11-14T22:13:20Z,1,cpu_usage,a

An annotation and a header stand before each run of tables that have the same columns; an empty line ends the run. What
must stay true: text is held for `FLUSH_ROWS` rows only; an error that InfluxDB says in the midst of an answer, where a
status cannot tell it any more, is an error here and not the answer's end.
"""

import csv
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import Unavailable, clip
from runtime.redaction import redact

FLUSH_ROWS: Final = 50_000
"""Rows held as text, some 10 MB, before they become numbers of 16 bytes."""
MAX_FIELD_CHARS: Final = 1 << 20
_MAX_ERROR_BYTES: Final = 300
_NUMBERS: Final = frozenset({"double", "long", "unsignedLong"})


class Table(NamedTuple):
    """Some rows of a series, in order of time; a long series comes as several that follow each other."""

    server_id: str
    tags: tuple[str, str]
    field: str
    times_ms: NDArray[np.int64]
    values: NDArray[np.float64]


class _Header:
    """Where the columns of a run of tables are; `value` is -1 where they hold no numbers."""

    def __init__(self, names: list[str], types: dict[int, str]) -> None:
        place = {name: column for column, name in enumerate(names)}
        if "error" in place and "_value" not in place:
            self.error = place["error"]
            return
        self.error = -1
        self.table = place["table"]
        self.time = place.get("_time", -1)
        self.value = place["_value"] if types.get(place["_value"]) in _NUMBERS else -1
        self._names = [place.get(name, -1) for name in ("server_id", "environment", "role", "_field")]

    def names(self, row: list[str]) -> tuple[str, str, str, str]:
        server_id, environment, role, field = (row[at] if at >= 0 else "" for at in self._names)
        return server_id, environment, role, field


def tables(lines: Iterable[str]) -> Iterator[Table]:
    """The numbers of an answer; those of other types are left out.

    Raises Unavailable: the answer ends with an error.
    """
    times: list[str] = []
    values: list[str] = []
    names = ("", "", "", "")
    at: tuple[int, str] = (0, "")
    run = 0
    shared: tuple[list[str], NDArray[np.int64]] = ([], np.empty(0, np.int64))

    def made() -> Table:
        nonlocal shared
        if times != shared[0]:  # the series of a server, and the windows of all, have the same times
            shared = list(times), _times(times)
        server_id, environment, role, field = names
        table = Table(server_id, (environment, role), field, shared[1], np.array(list(map(float, values))))
        times.clear()
        values.clear()
        return table

    for header, row in _rows(lines):
        if header is None:
            run += 1
            continue
        if header.value < 0:
            continue
        here = (run, row[header.table])
        if here != at or len(values) >= FLUSH_ROWS:
            if values:
                yield made()
            at, names = here, header.names(row)
        times.append(row[header.time])
        values.append(row[header.value])
    if values:
        yield made()


def texts(lines: Iterable[str]) -> list[str]:
    """The column `_value` of an answer, whatever it holds. Raises as `tables`."""
    found: list[str] = []
    value = -1
    for header, row in _rows(lines):
        if header is None:
            value = row.index("_value")
        else:
            found.append(row[value])
    return found


def _rows(lines: Iterable[str]) -> Iterator[tuple[_Header | None, list[str]]]:
    """Each row with its header; a header by itself where it begins."""
    csv.field_size_limit(MAX_FIELD_CHARS)
    header: _Header | None = None
    types: dict[int, str] = {}
    for row in csv.reader(lines):
        if not row:
            header, types = None, {}
        elif row[0].startswith("#"):
            header = None
            if row[0] == "#datatype":
                types = dict(enumerate(row))
        elif header is None:
            header = _Header(row, types)
            if header.error < 0:
                yield None, row
        elif header.error >= 0:
            said = clip(redact(row[header.error]), _MAX_ERROR_BYTES)
            raise Unavailable(f"InfluxDB broke the answer off: {said}", reason="STORE_UNAVAILABLE")
        else:
            yield header, row


def _times(texts_: list[str]) -> NDArray[np.int64]:
    exact = np.array([one[:-1] for one in texts_], "datetime64[ns]")  # without the Z, which numpy does not know
    return exact.astype("datetime64[ms]").astype(np.int64)
