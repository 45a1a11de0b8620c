"""The rows by name: what each needs, how it is measured, and how it is judged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from bench.api import grpc_row, http_rows, loop_row, paced_rows, tracing_row, watch_row
from bench.api.judged import Judged
from bench.api.size import Bench


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row; `lacking()` says what has to be installed first, and is empty when all is there."""

    measure: Callable[[Bench], dict[str, Any]]
    judged: Callable[[dict[str, Any]], list[Judged]]
    lacking: Callable[[], str] = lambda: ""


ROWS: Final = {
    grpc_row.ROW: Row(measure=grpc_row.measure, judged=grpc_row.judged, lacking=grpc_row.lacking),
    http_rows.HTTP: Row(measure=http_rows.measure_http, judged=http_rows.judged_http, lacking=http_rows.lacking),
    http_rows.STORES: Row(measure=http_rows.measure_stores, judged=http_rows.judged_stores, lacking=http_rows.lacking),
    paced_rows.PACED: Row(measure=paced_rows.measure_paced, judged=paced_rows.judged_paced),
    paced_rows.ASKING: Row(measure=paced_rows.measure_asking, judged=paced_rows.judged_asking),
    watch_row.ROW: Row(measure=watch_row.measure, judged=watch_row.judged),
    loop_row.ROW: Row(measure=loop_row.measure, judged=loop_row.judged),
    tracing_row.ROW: Row(measure=tracing_row.measure, judged=tracing_row.judged, lacking=tracing_row.lacking),
}
