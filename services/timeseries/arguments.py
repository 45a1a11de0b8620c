"""What `python -m services.timeseries` can be told, in its own words: commands, options, help.

What must stay true: whatever makes no sense is said here, with exit status 2, before anything is opened.
"""

import argparse
import datetime
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from runtime.clock import SystemClock
from runtime.settings import parse_duration

_EXAMPLES: Final = """\
examples:
  python -m services.timeseries                              serve, as `make run` does
  python -m services.timeseries backup /backups/2026-11-23   while the service runs
  python -m services.timeseries verify /backups/2026-11-23
  python -m services.timeseries verify                       the store in DATA_DIR, running or not
  DATA_DIR=/srv/new python -m services.timeseries restore /backups/2026-11-23
  python -m services.timeseries export /exports/november --start 2026-11-01 --end 2026-12-01
  python -m services.timeseries export /exports/web --servers web-01,web-02 --metrics cpu_usage --start now-7d
  python -m services.timeseries import /exports/november     into the service, or, if none runs, its store

The store is DATA_DIR/timeseries (DATA_DIR is ./data when unset). Exit status: 0 all is well, 1 failed,
damage found or not everything taken, 2 a command or settings that make no sense. docs/operations.md says more.
"""

_Add = Callable[[str, str, str], argparse.ArgumentParser]

_METRICS: Final = re.compile(r'(?:\{(?:"(?:\\.|[^"\\])*"|[^"}])*\}|[^,{])+')
"""What stands between commas that are not in braces: the identity of a metric may have some."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its options; ends the process where they make no sense, or help was asked for."""
    whole = _parser()
    options = whole.parse_args(arguments)
    if options.command == "export" and None not in (options.start, options.end) and options.start >= options.end:
        whole.error("--start is not before --end")
    return options


def _parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python -m services.timeseries",
        description="The history of the fleet. Without a command: serves it. With one: keeps it safe.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, more: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {more}",
            epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    _add_safety(add)
    _add_transfer(add)
    return whole


def _add_safety(add: _Add) -> None:
    backup = add(
        "backup",
        "copy the store, which may be in use, to a new folder",
        "It holds every point acknowledged before\nit began. PATH appears only when"
        " it is whole; until then it is PATH.partial.",
    )
    backup.add_argument("path", metavar="PATH", type=Path, help="a folder that does not exist yet, or is empty")
    restoring = add(
        "restore",
        "put a backup into an empty DATA_DIR/timeseries",
        "The service must be stopped. The\nbackup is checked against its manifest before anything is written.",
    )
    restoring.add_argument("path", metavar="PATH", type=Path, help="a backup")
    verifying = add(
        "verify",
        "read every block and batch of a store or backup and name what is damaged",
        "\nIt changes nothing and may run beside the service.",
    )
    verifying.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        nargs="?",
        help="a backup, or a store's folder (default: DATA_DIR/timeseries)",
    )


def _add_transfer(add: _Add) -> None:
    exporting = add(
        "export",
        "write points as Parquet files, which any tool reads",
        "It may run beside the\nservice, and has every point acknowledged before it began."
        " PATH appears only when it is whole.\nNeeds pyarrow (`make parquet`).",
    )
    exporting.add_argument("path", metavar="PATH", type=Path, help="a folder that does not exist yet, or is empty")
    exporting.add_argument("--servers", metavar="A,B", type=_servers, help="only these servers, by id")
    exporting.add_argument(
        "--metrics",
        metavar="A,B",
        type=_metrics,
        help="only these metrics: a name, or an identity such as 'disk_used{mount=\"/\"}'",
    )
    exporting.add_argument(
        "--start", metavar="TIME", type=_time_ms, help="first instant: 2026-11-01, 2026-11-01T12:00:00Z or now-7d (UTC)"
    )
    exporting.add_argument("--end", metavar="TIME", type=_time_ms, help="the end, which is not included")
    importing = add(
        "import",
        "take points from Parquet files",
        "They are from `export`, or have the columns server_id, metric,\ntime and value (and labels, unit, kind)."
        " They go to the service; if none runs, into its store.\nIt can be interrupted and repeated: nothing is"
        " doubled. Needs pyarrow (`make parquet`).",
    )
    importing.add_argument("path", metavar="PATH", type=Path, help="an export, a Parquet file, or a folder of them")


def _servers(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _metrics(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in _METRICS.findall(text) if part.strip())


def _time_ms(text: str) -> int:
    """A date or time, UTC unless it says otherwise, `now`, or `now-7d`."""
    try:
        if text == "now" or text.startswith("now-"):
            span_s = parse_duration(text[4:]) if text[4:] else 0.0
            return SystemClock().now_ms() - round(span_s * 1_000)
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        shapes = "2026-11-01, 2026-11-01T12:00:00Z, now or now-7d"
        raise argparse.ArgumentTypeError(f"{text!r} is no time: {shapes}") from None
    if time.tzinfo is None:
        time = time.replace(tzinfo=datetime.UTC)
    return (time - datetime.datetime.fromtimestamp(0, datetime.UTC)) // datetime.timedelta(milliseconds=1)
