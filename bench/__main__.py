"""`python -m bench`: runs the rows, prints a line a step and a table at the end, writes everything as JSON."""

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from bench import ingest, peers, queries, report, storage
from bench.load import SERVERS, TICKS_A_DAY, Mix

ROWS: Final = ("ingest", "storage", "queries")
EXAMPLES: Final = """examples:
  make bench                                     everything, under 8 minutes
  make bench ARGS="--quick"                      everything with little load, under 60 s; its numbers are for no table
  make bench ARGS="--only queries"               one row; repeat --only for more
  make bench ARGS="--only storage --output s.json"

The peers are found on the PATH as victoria-metrics and influxd; rows lack those that are not there.
Recordings are found in OPENMANAGER_TEST_DATA or beside the checkout.
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


FULL: Final = Size(
    servers=SERVERS,
    ingest_ticks=720,
    ingest_rounds=5,
    storage_ticks=TICKS_A_DAY,
    recordings=True,
    query_ticks=1_620,
    query_share=1.0,
)
QUICK: Final = Size(
    servers=SERVERS,
    ingest_ticks=120,
    ingest_rounds=2,
    storage_ticks=720,
    recordings=False,
    query_ticks=360,
    query_share=0.2,
)


class Progress:
    """Says each step with the seconds since the start, to stderr: stdout is for the table."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - self._started:6.1f} s  {text}\n")
        sys.stderr.flush()


def run(size: Size, only: Sequence[str], folder: Path, say: Progress) -> dict[str, Any]:
    """Measures rows and returns the whole report. `folder` is for the servers' files."""
    started = datetime.now(UTC)
    machine = report.machine()
    for name in peers.missing():
        say(f"{peers.PROGRAMS[name]} is not on the PATH: rows against {name} are not measured")
    results: dict[str, Any] = {}
    if "ingest" in only:
        results["ingest"] = ingest.measure(
            folder / "ingest", servers=size.servers, ticks=size.ingest_ticks, rounds=size.ingest_rounds, say=say
        )
    if "storage" in only:
        results["storage"] = storage.measure(
            folder / "storage", servers=size.servers, ticks=size.storage_ticks, recordings=size.recordings, say=say
        )
    if "queries" in only:
        results["queries"] = queries.measure(
            folder / "queries", servers=size.servers, ticks=size.query_ticks, share=size.query_share, say=say
        )
    return {
        "format": report.FORMAT,
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "commit": report.commit(),
        "machine": machine | {"load_1m_at_the_end": os.getloadavg()[0]},
        "size": asdict(size),
        "mix": Mix(size.servers).describe(),
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
    parser.add_argument("--only", action="append", choices=ROWS, help="measure only this row; may be repeated")
    parser.add_argument("--quick", action="store_true", help="little load: does it work, not what it costs")
    parser.add_argument("--output", type=Path, default=Path("bench.json"), help="the report as JSON (%(default)s)")
    return parser.parse_args()


def main() -> int:
    """The exit status is 0 when everything could be measured, whether targets are met or not."""
    arguments = _arguments()
    say = Progress()
    try:
        with tempfile.TemporaryDirectory(prefix="openmanager-bench-") as folder:
            found = run(QUICK if arguments.quick else FULL, arguments.only or ROWS, Path(folder), say)
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
