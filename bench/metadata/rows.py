"""The rows by name: how each is measured, and how it is judged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from bench.api.judged import Judged
from bench.metadata import record_row, search_row, servers_row
from bench.metadata.size import Bench


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row."""

    measure: Callable[[Bench], dict[str, Any]]
    judged: Callable[[dict[str, Any]], list[Judged]]


ROWS: Final = {
    record_row.ROW: Row(measure=record_row.measure, judged=record_row.judged),
    search_row.ROW: Row(measure=search_row.measure, judged=search_row.judged),
    servers_row.ROW: Row(measure=servers_row.measure, judged=servers_row.judged),
}
