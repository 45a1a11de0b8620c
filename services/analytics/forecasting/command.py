"""`forecast` and `exhaust`: the mathematics on a CSV file, so that anybody can judge it from outside.

What must stay true: the same file gives the same answer; whatever makes no sense is told with its row, column or option
and exit status 2, before anything is written.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from runtime.settings import parse_duration
from services.analytics.forecasting.capacity import Exhaustion, exhaust
from services.analytics.forecasting.percent import is_percent
from services.analytics.forecasting.steps import TimedForecasts, UnusableError, check_horizon, forecast_measurements
from services.analytics.forecasting.table import Table, lines, read_table, rfc3339
from services.analytics.recording import BadRecordingError

EXIT_OK, EXIT_USAGE = 0, 2
NAMES: Final = ("forecast", "exhaust")
_COLUMNS: Final = ("timestamp", "metric", "value", "low80", "high80", "low95", "high95")
_ANSWER: Final = ("date", "low", "high", "reason")

_NEGATIVE: Final = re.compile(r"-\.?\d")
"""How a value begins that is no option: argparse knows neither -1e9 nor -20% for one."""

_EXAMPLES: Final = """\
examples:
  python -m services.analytics forecast web-1.csv --horizon 7d --step 1h
  python -m services.analytics forecast web-1.csv --metric cpu_usage --horizon 28d --step 1d
  python -m services.analytics forecast net.csv --rate received_bytes_total
  python -m services.analytics exhaust web-1.csv --metric disk_usage --limit 90 --growth 20%
  python -m services.analytics exhaust web-1.csv --metric disk_free_bytes --limit 1e9 --falling --output json

FILE.csv has a column `timestamp` (epoch seconds, RFC 3339, or YYYY-MM-DD HH:MM:SS in UTC) and a column for each metric;
rows may be at any distance, empty cells are gaps. Exit status: 0, or 2 for a file or options that make no sense.
"""


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds both commands."""
    forecasting = _command(subparsers, NAMES[0], "forecast the metrics of a CSV file, with 80 and 95 % intervals")
    forecasting.add_argument(
        "--horizon", metavar="SPAN", type=_span, default="7d", help="how far ahead (7d), at most 2 years"
    )
    forecasting.add_argument(
        "--step", metavar="SPAN", type=_span, default="1h", help="what a value is the mean of (1h)"
    )
    forecasting.add_argument("--metric", metavar="M", action="append", default=[], help="only this column; repeatable")
    forecasting.add_argument(
        "--rate", metavar="M", action="append", default=[], help="a counter: forecast its rate per second; repeatable"
    )
    exhausting = _command(subparsers, NAMES[1], "say when a metric of a CSV file reaches a limit, or why not")
    exhausting.add_argument("--metric", metavar="M", required=True, help="the column")
    exhausting.add_argument("--limit", metavar="VALUE", type=_number, required=True, help="in the metric's unit")
    exhausting.add_argument("--falling", action="store_true", help="the limit is reached from above, as free space is")
    exhausting.add_argument(
        "--growth", metavar="PART", type=_part, default="0%", help="what if it grew by 20%% more a day"
    )
    exhausting.add_argument("--output", choices=("csv", "json"), default="csv", help="one line (csv)")


def _command(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str
) -> argparse.ArgumentParser:
    command = subparsers.add_parser(
        name,
        help=summary.replace("%", "%%"),
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command._negative_number_matcher = _NEGATIVE
    command.add_argument("file", metavar="FILE.csv", type=Path, help="see below; .gz is read too")
    return command


def run(options: argparse.Namespace) -> int:
    """Runs the command that the options are of; returns the exit status."""
    try:
        if options.command == NAMES[0]:
            _forecast(options)
        else:
            _exhaust(options)
    except UnusableError as error:
        print(f"--{error.field}: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_USAGE
    except BadRecordingError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return EXIT_USAGE
    return EXIT_OK


def _forecast(options: argparse.Namespace) -> None:
    check_horizon(options.horizon, options.step)
    table = read_table(options.file, [*options.metric, *options.rate] if options.metric else ())
    missing = [name for name in options.rate if name not in table.metrics]
    if missing:
        raise UnusableError("rate", f"there is no column {missing[0]}")
    found = forecast_measurements(
        table.times_ms,
        table.values,
        horizon_ms=options.horizon,
        step_ms=options.step,
        percent=np.array(
            [is_percent(name, column) for name, column in zip(table.metrics, table.values.T, strict=True)]
        ),
        counters=[table.metrics.index(name) for name in dict.fromkeys(options.rate)],
    )
    lines(_forecast_rows(table, found), sys.stdout)


def _forecast_rows(table: Table, found: TimedForecasts) -> Iterator[Sequence[str]]:
    yield _COLUMNS
    times = [table.time_text(time_ms) for time_ms in found.times_ms.tolist()]
    every = found.forecasts
    for series, metric in enumerate(table.metrics):
        columns = (every.value, every.low80, every.high80, every.low95, every.high95)
        for time, *values in zip(times, *(column[series].tolist() for column in columns), strict=True):
            yield time, metric, *("" if math.isnan(value) else f"{value:.9g}" for value in values)


def _exhaust(options: argparse.Namespace) -> None:
    table = read_table(options.file, [options.metric])
    answer = exhaust(table.times_ms, table.values[:, 0], options.limit, falling=options.falling, growth=options.growth)
    if options.output == "json":
        sys.stdout.write(json.dumps(_json(answer)) + "\n")
        return
    reason = "" if answer.reason is None else answer.reason.value
    lines(iter([_ANSWER, (*(_date(time_ms) or "" for time_ms in _dates(answer)), reason)]), sys.stdout)


def _dates(answer: Exhaustion) -> tuple[int | None, int | None, int | None]:
    return answer.date_ms, answer.low_ms, answer.high_ms


def _date(time_ms: int | None) -> str | None:
    return None if time_ms is None else rfc3339(time_ms)


def _json(answer: Exhaustion) -> dict[str, object]:
    def number(value: float) -> float | None:
        return None if math.isnan(value) else float(f"{value:.9g}")

    date, low, high = (_date(time_ms) for time_ms in _dates(answer))
    return {
        "date": date,
        "low": low,
        "high": high,
        "reason": None if answer.reason is None else answer.reason.value,
        "level": number(answer.level),
        "rate_per_day": number(answer.rate_per_day),
        "changes": [rfc3339(time_ms) for time_ms in answer.changes_ms],
        "within_30_days": number(answer.within_30_days),
        "within_90_days": number(answer.within_90_days),
        "backtest": {
            "trials": answer.backtest.trials,
            "error": number(answer.backtest.error),
            "coverage": number(answer.backtest.coverage),
        },
    }


def _span(text: str) -> int:
    """Milliseconds."""
    try:
        milliseconds = round(parse_duration(text) * 1000)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if milliseconds <= 0:
        raise argparse.ArgumentTypeError("it must be longer than nothing, for example 1h")
    return milliseconds


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number")
    return value


def _part(text: str) -> float:
    """0.2 of "20%"; over -1, as growth cannot turn round."""
    value = _number(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not -1 < value <= 100:
        raise argparse.ArgumentTypeError("growth is a part such as 20% or 0.2, over -100%")
    return value
