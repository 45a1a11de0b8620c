"""Files of servers: CSV and JSON lines, written and read.

A spreadsheet takes a cell that begins with `=`, `+`, `-`, `@`, a tab or a line's end for a formula and runs it, and who
registers a server is not who opens the file. So in CSV such a text has an apostrophe before it, but for a number; the
same that begins with apostrophes has one more, so that reading can take one away.

What must stay true: what is written is read back as it was; a row that cannot be read is named with its column and
keeps its number; what a row does not say is told from what it says to be empty.
"""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import orjson

from runtime.errors import InvalidArgument

TEXTS: Final = ("hostname", "environment", "role", "location", "notes")
COLUMNS: Final = ("id", "hostname", "environment", "role", "location", "labels", "notes")
CSV_TYPE: Final = "text/csv; charset=utf-8"
JSON_LINES_TYPE: Final = "application/x-ndjson"
MAX_ROWS: Final = 20_000
_BYTE_ORDER_MARK: Final = "\ufeff"
_FORMULA: Final = re.compile(r"'*[=+\-@\t\r\n]")
_NUMBER: Final = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)

csv.field_size_limit(16 << 20)


@dataclass(slots=True, kw_only=True)
class Row:
    """A row as it was read.

    Attributes:
        number: from 1, the row of names not counted.
        values: what it says; labels as a mapping.
        fault: the column that cannot be read, and why; None: none.
    """

    number: int
    values: dict[str, Any] = field(default_factory=dict)
    fault: tuple[str, str] | None = None


class RowFaultError(ValueError):
    """What is wrong with a cell or row, and in which column."""

    def __init__(self, column: str, message: str) -> None:
        super().__init__(message)
        self.column = column
        self.message = message


def csv_head() -> str:
    """The row of names."""
    return _csv_line(COLUMNS)


def csv_row(server: Mapping[str, Any]) -> str:
    """A server, with all COLUMNS."""
    cells = dict(server) | {"labels": _json(server["labels"]) if server["labels"] else ""}
    return _csv_line([_cell(cells[name]) for name in COLUMNS])


def json_row(server: Mapping[str, Any]) -> str:
    """A server, with all COLUMNS."""
    return _json({name: server[name] for name in COLUMNS}) + "\n"


def read_csv(text: str) -> list[Row]:
    """The rows of a CSV file.

    Raises:
        InvalidArgument: the row of names makes no sense, the file is no CSV, or has more than MAX_ROWS.
    """
    reader = csv.reader(io.StringIO(text.removeprefix(_BYTE_ORDER_MARK), newline=""), strict=True)
    rows: list[Row] = []
    try:
        names = next((cells for cells in reader if cells), [])
        _check_names(names)
        for cells in reader:
            if cells:
                rows.append(_read(len(rows) + 1, partial(_of_cells, names, cells)))
                _check_count(rows)
    except csv.Error as error:
        raise InvalidArgument(f"line {reader.line_num}: not CSV: {error}", field="text") from None
    return rows


def read_json_lines(text: str) -> list[Row]:
    """The rows of a file with an object on each line; empty lines are none.

    Raises:
        InvalidArgument: it has more than MAX_ROWS.
    """
    rows: list[Row] = []
    for line in text.removeprefix(_BYTE_ORDER_MARK).split("\n"):
        if line.strip():
            rows.append(_read(len(rows) + 1, partial(_of_line, line)))
            _check_count(rows)
    return rows


def _check_names(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise InvalidArgument(f"there is no column {unknown[0][:64]!r}: {', '.join(COLUMNS)}", field="text")
    if "id" not in names or len(set(names)) != len(names):
        raise InvalidArgument("the first row names the columns, each once, id among them", field="text")


def _check_count(rows: Sequence[Row]) -> None:
    if len(rows) > MAX_ROWS:
        raise InvalidArgument(f"more than {MAX_ROWS} rows (MAX_ROWS)", field="text")


def _read(number: int, read: Callable[[], dict[str, Any]]) -> Row:
    try:
        return Row(number=number, values=read())
    except RowFaultError as fault:
        return Row(number=number, fault=(fault.column, fault.message))


def _of_cells(names: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    if len(cells) != len(names):
        raise RowFaultError("", f"has {len(cells)} cells, where there are {len(names)} columns")
    values: dict[str, Any] = dict(zip(names, map(_text, cells), strict=True))
    if "labels" in values:
        values["labels"] = _labels(_parsed(values["labels"], "labels") if values["labels"].strip() else {})
    return values


def _of_line(line: str) -> dict[str, Any]:
    values = _parsed(line, "")
    if not isinstance(values, dict):
        raise RowFaultError("", "is no JSON object")
    for name, value in values.items():
        if name not in COLUMNS:
            raise RowFaultError(name, "there is no such column")
        if name != "labels" and not isinstance(value, str):
            raise RowFaultError(name, "is no text")
    if "labels" in values:
        values["labels"] = _labels(values["labels"])
    return values


def _labels(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise RowFaultError("labels", "is no JSON object of texts")
    return value


def _parsed(text: str, column: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RowFaultError(column, f"is not JSON: {error.msg}") from None


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _cell(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def _text(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _csv_line(cells: Sequence[str]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\r\n").writerow(cells)
    return out.getvalue()
