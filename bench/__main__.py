"""`python -m bench`: runs the rows, prints a line a step and a table at the end, writes everything as JSON.

`scale` is a row that takes half an hour, so it is a command of its own; `api` measures the gateway, `metadata` the
record and `analytics` how good findings and forecasts are, not the history; `record-host` makes a data set.
"""

import argparse
import asyncio
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from bench import cost, host, ingest, peers, queries, report, scale, storage, year
from bench.analytics import command as analytics
from bench.api import command as api
from bench.api.reported import delivered
from bench.api.rows import ROWS as API_ROWS
from bench.load import SERVERS, TICKS_A_DAY, Mix
from bench.metadata import command as metadata
from runtime.settings import parse_duration

ROWS: Final = ("ingest", "storage", "queries", "year", "cost")
HOST_RECORDING: Final = "BENCH_HOST_RECORDING"
EXAMPLES: Final = """examples:
  make bench                                     everything but scale
  make bench ARGS="--quick"                      everything with little load; its numbers are for no table
  make bench ARGS="--only queries"               one row; repeat --only for more
  make bench ARGS="--only storage --host host.npz --output s.json"
  python -m bench record-host host.npz           24 h of this machine's own metrics, for --host
  make bench-scale                               20,000 servers for half an hour, kill -9, restart, count
  make bench-scale ARGS="--servers 2000 --minutes 3"
  make bench ARGS="--only cost --scale bench-scale.json"
  make bench-api                                 the gateway instead of the history; ARGS="--help"
  make bench-metadata                            the record of interactions; ARGS="--help"
  make bench-analytics                           how good detection and forecasts are; ARGS="--help"

The peers are found on the PATH as victoria-metrics and influxd; rows lack those that are not there.
Recordings are found in OPENMANAGER_TEST_DATA or beside the checkout, this machine's by --host or BENCH_HOST_RECORDING.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is done: servers of the mix, ticks and rounds of each row, share of the questions."""

    servers: int
    ingest_ticks: int
    ingest_rounds: int
    storage_ticks: int
    recordings: bool
    query_ticks: int
    query_share: float
    year_days: int
    year_window_days: int
    year_questions: int
    cost_servers: tuple[int, ...]
    cost_points: int
    cost_rows: int
    cost_bound_s: float


FULL: Final = Size(
    servers=SERVERS,
    ingest_ticks=720,
    ingest_rounds=5,
    storage_ticks=TICKS_A_DAY,
    recordings=True,
    query_ticks=1_620,
    query_share=1.0,
    year_days=380,
    year_window_days=365,
    year_questions=100,
    cost_servers=(20, 200, 2_000),
    cost_points=100_000_000,
    cost_rows=1_000,
    cost_bound_s=300.0,
)
QUICK: Final = Size(
    servers=SERVERS,
    ingest_ticks=120,
    ingest_rounds=2,
    storage_ticks=720,
    recordings=False,
    query_ticks=360,
    query_share=0.2,
    year_days=20,
    year_window_days=15,
    year_questions=10,
    cost_servers=(20, 200),
    cost_points=2_000_000,
    cost_rows=20,
    cost_bound_s=10.0,
)


class Progress:
    """Says each step with the seconds since the start, to stderr: stdout is for the table."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - self._started:6.1f} s  {text}\n")
        sys.stderr.flush()


def run(
    size: Size,
    only: Sequence[str],
    folder: Path,
    say: Progress,
    *,
    recorded: Path | None = None,
    sustained: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures rows and returns the whole report. `folder` is for the servers' files, `recorded` the host's metrics,
    `sustained` what a run of `scale` found."""
    started, machine = datetime.now(UTC), report.machine()
    for name in peers.missing():
        say(f"{peers.PROGRAMS[name]} is not on the PATH: rows against {name} are not measured")
    results: dict[str, Any] = {}
    if "ingest" in only:
        results["ingest"] = ingest.measure(
            folder / "ingest", servers=size.servers, ticks=size.ingest_ticks, rounds=size.ingest_rounds, say=say
        )
    if "storage" in only:
        results["storage"] = storage.measure(
            folder / "storage",
            servers=size.servers,
            ticks=size.storage_ticks,
            recordings=size.recordings,
            recorded=recorded,
            say=say,
        )
    if "queries" in only:
        results["queries"] = queries.measure(
            folder / "queries", servers=size.servers, ticks=size.query_ticks, share=size.query_share, say=say
        )
    if "year" in only:
        results["year"] = year.measure(
            folder / "year",
            days=size.year_days,
            window_days=size.year_window_days,
            count=size.year_questions,
            say=say,
        )
    if "cost" in only:
        results["cost"] = cost.measure(
            folder / "cost",
            servers=size.cost_servers,
            points=size.cost_points,
            rows=size.cost_rows,
            bound_s=size.cost_bound_s,
            say=say,
        )
        if sustained is not None:
            results["cost"]["fleets"] |= cost.of_scale(sustained)
    return _reported(started, machine, asdict(size) | {"host": str(recorded or "")}, Mix(size.servers), results)


def run_scale(wanted: scale.Run, folder: Path, say: Progress) -> dict[str, Any]:
    """The same for the row that takes long."""
    started, machine = datetime.now(UTC), report.machine()
    results = {"scale": scale.measure(folder / "scale", wanted, say)}
    return _reported(started, machine, {"servers": wanted.servers, "minutes": wanted.minutes}, Mix(SERVERS), results)


def _reported(
    started: datetime, machine: dict[str, Any], size: dict[str, Any], mix: Mix, results: dict[str, Any]
) -> dict[str, Any]:
    return {
        "format": report.FORMAT,
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "commit": report.commit(),
        "machine": machine | {"load_1m_at_the_end": os.getloadavg()[0]},
        "size": size,
        "mix": mix.describe(),
        "results": results,
        "table": [asdict(row) for row in report.rows(results)],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures the timeseries service beside VictoriaMetrics and InfluxDB, in one run on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recorded = os.environ.get(HOST_RECORDING)
    parser.add_argument("--only", action="append", choices=ROWS, help="measure only this row; may be repeated")
    parser.add_argument("--quick", action="store_true", help="little load: does it work, not what it costs")
    parser.add_argument("--host", type=Path, default=recorded and Path(recorded), help="a file of record-host")
    parser.add_argument("--scale", type=_report_of_scale, help="a report of bench-scale, whose fleet row cost has too")
    parser.add_argument("--output", type=Path, default=Path("bench.json"), help="the report as JSON (%(default)s)")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", dest="command")
    record = commands.add_parser("record-host", help="record this machine's own metrics into a file")
    record.add_argument("file", type=Path, help="is made; must not be there")
    record.add_argument("--ticks", type=int, default=TICKS_A_DAY, help="how many (%(default)s)")
    record.add_argument("--interval", type=parse_duration, default=10.0, help="from one to the next, such as 10s, 1s")
    long = commands.add_parser("scale", help="a large fleet in real time, then kill -9, restart and count")
    long.add_argument("--servers", type=int, default=scale.FULL.servers, help="of 511 metrics each (%(default)s)")
    long.add_argument("--minutes", type=float, default=scale.FULL.minutes, help="of the fleet's time (%(default)s)")
    long.add_argument("--speed", type=float, default=1.0, help="seconds of the fleet in one of ours (%(default)s)")
    long.add_argument("--quick", action="store_true", help="200 servers, 1 minute in 3 s: does it work")
    long.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the service")
    long.add_argument("--engine", action="append", default=[], metavar="NAME=VALUE", help="a bound of its engine")
    long.add_argument("--output", type=Path, default=Path("bench-scale.json"), help="the report (%(default)s)")
    api.add_arguments(commands.add_parser("api", help="the gateway beside bare servers: calls, latencies, watchers"))
    metadata.add_arguments(commands.add_parser("metadata", help="the record beside bare inserts; search"))
    analytics.add_arguments(
        commands.add_parser("analytics", help="how good detection and forecasts are, and their cost")
    )
    return parser.parse_args()


def _report_of_scale(path: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = orjson.loads(Path(path).read_bytes())["results"]["scale"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{path} is no report of bench-scale: {error}") from error
    return found


def _scale_of(arguments: argparse.Namespace) -> scale.Run:
    settings = dict(one.split("=", 1) for one in arguments.set)
    engine = {name: orjson.loads(value) for name, value in (one.split("=", 1) for one in arguments.engine)}
    if arguments.quick:
        return replace(scale.QUICK, settings=settings, engine=engine)
    return scale.Run(
        servers=arguments.servers, minutes=arguments.minutes, speed=arguments.speed, settings=settings, engine=engine
    )


def _run_api(arguments: argparse.Namespace, folder: Path, say: Progress) -> int:
    found = api.run(api.size_of(arguments), arguments.only or tuple(API_ROWS), folder, say)
    return delivered(found, arguments.json, say)


def main() -> int:
    """The exit status is 0 when everything could be measured, whether targets are met or not."""
    arguments = _arguments()
    say = Progress()
    try:
        if arguments.command == "record-host":
            asyncio.run(host.record(arguments.file, ticks=arguments.ticks, interval_s=arguments.interval, say=say))
            return 0
        with tempfile.TemporaryDirectory(prefix="openmanager-bench-") as folder:
            if arguments.command == "api":
                return _run_api(arguments, Path(folder), say)
            if arguments.command == "metadata":
                return metadata.main(arguments, Path(folder), say)
            if arguments.command == "analytics":
                return analytics.main(arguments, Path(folder), say)
            if arguments.command == "scale":
                found = run_scale(_scale_of(arguments), Path(folder), say)
            else:
                size = QUICK if arguments.quick else FULL
                found = run(
                    size,
                    arguments.only or ROWS,
                    Path(folder),
                    say,
                    recorded=arguments.host,
                    sustained=arguments.scale,
                )
    except peers.BenchError as error:
        say(f"bench: {error}")
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130
    arguments.output.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    print(f"\n{found['mix']}\n{found['machine']}\n")
    print(report.table([report.Row(**row) for row in found["table"]]))
    say(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
