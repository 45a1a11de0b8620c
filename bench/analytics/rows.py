"""The rows by name: how each is measured, and how it is judged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from bench.analytics import (
    cost_row,
    detection_row,
    exhaustion_row,
    forecast_row,
    operating_row,
    quiet_row,
    restart_row,
    scenario_row,
)
from bench.analytics.size import Bench
from bench.api.judged import Judged


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row."""

    measure: Callable[[Bench], dict[str, Any]]
    judged: Callable[[dict[str, Any]], list[Judged]]


ROWS: Final = {
    detection_row.ROW: Row(measure=detection_row.measure, judged=detection_row.judged),
    operating_row.ROW: Row(measure=operating_row.measure, judged=operating_row.judged),
    forecast_row.ROW: Row(measure=forecast_row.measure, judged=forecast_row.judged),
    exhaustion_row.ROW: Row(measure=exhaustion_row.measure, judged=exhaustion_row.judged),
    quiet_row.ROW: Row(measure=quiet_row.measure, judged=quiet_row.judged),
    scenario_row.ROW: Row(measure=scenario_row.measure, judged=scenario_row.judged),
    restart_row.ROW: Row(measure=restart_row.measure, judged=restart_row.judged),
    cost_row.ROW: Row(measure=cost_row.measure, judged=cost_row.judged),
}
