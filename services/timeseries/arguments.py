"""What `python -m services.timeseries` can be told, in its own words: commands, options, help.

What must stay true: whatever makes no sense is said here, with exit status 2, before anything is opened.
"""

import argparse
import datetime
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from runtime.clock import SystemClock
from runtime.settings import parse_duration
from services.timeseries.backfill import DEFAULT_RATE
from services.timeseries.external import TARGETS

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
  python -m services.timeseries backfill --to influxdb --from -30d

The store is DATA_DIR/timeseries (DATA_DIR is ./data when unset). Exit status: 0 all is well, 1 failed,
damage found or not everything taken, 2 a command or settings that make no sense. docs/operations.md says more.
"""

_Add = Callable[[str, str, str], argparse.ArgumentParser]

_SPAN_AGO: Final = re.compile(r"-\d.*")

_METRICS: Final = re.compile(r'(?:\{(?:"(?:\\.|[^"\\])*"|[^"}])*\}|[^,{])+')
"""What stands between commas that are not in braces: the identity of a metric may have some."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its options; ends the process where they make no sense, or help was asked for."""
    whole = _parser()
    options = whole.parse_args(_joined(arguments))
    if options.command == "export" and None not in (options.start, options.end) and options.start >= options.end:
        whole.error("--start is not before --end")
    if options.command == "backfill":
        if options.start >= (SystemClock().now_ms() if options.until is None else options.until):
            whole.error("--from is not before --until")
        options.words = _what(arguments)
    return options


def _what(arguments: Sequence[str]) -> str:
    """The words of a back-fill that say what it copies, as they were typed: how fast is no part of it."""
    words = _joined(arguments)
    rates = {place for place, word in enumerate(words) if word == "--rate"}
    how = rates | {place + 1 for place in rates}
    return " ".join(
        word
        for place, word in enumerate(words)
        if place not in how and word not in ("--verify", "--restart") and not word.startswith("--rate=")
    )


def _joined(arguments: Sequence[str]) -> list[str]:
    """With `--from -30d` as one word: argparse takes what begins with a dash for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in ("--from", "--until") and _SPAN_AGO.fullmatch(argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


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
    _add_backfill(add)
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


def _add_backfill(add: _Add) -> None:
    filling = add(
        "backfill",
        "copy history to an external store that does not have it",
        "Set the store up as the service\nhas it (INFLUXDB_URL and so on) and start the service first: it ships what is"
        " written from then on.\nMay run beside the service. Interrupted, the same command goes on where it was;"
        " nothing is doubled.",
    )
    filling.add_argument("--to", required=True, choices=sorted(TARGETS), help="which of the stores that are set up")
    filling.add_argument(
        "--from",
        dest="start",
        required=True,
        metavar="TIME",
        type=_time_ms,
        help="first instant: -30d, 2026-11-01, now-7d",
    )
    filling.add_argument("--until", metavar="TIME", type=_time_ms, help="the end, not included (default: now)")
    filling.add_argument(
        "--server", dest="servers", metavar="S", action="extend", nargs="+", help="only these servers, by id"
    )
    filling.add_argument(
        "--rate",
        metavar="N",
        type=_rate,
        default=DEFAULT_RATE,
        help=f"points a second at most (default: {DEFAULT_RATE:,})",
    )
    filling.add_argument("--verify", action="store_true", help="count the points of each server and day there too")
    filling.add_argument("--restart", action="store_true", help="begin anew instead of going on")


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 1 <= rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of points a second, such as 200000")
    return rate


def _servers(text: str) -> tuple[str, ...]:
    return _named(text, text.split(","))


def _metrics(text: str) -> tuple[str, ...]:
    return _named(text, _METRICS.findall(text))


def _named(text: str, parts: Iterable[str]) -> tuple[str, ...]:
    """The names in a list of which there must be one: an empty one would mean all."""
    named = tuple(part.strip() for part in parts if part.strip())
    if not named:
        raise argparse.ArgumentTypeError(f"{text!r} names none; without the option all are taken")
    return named


def _time_ms(text: str) -> int:
    """A date or time, UTC unless it says otherwise, `now`, `now-7d` or, in short, `-7d`."""
    try:
        if _SPAN_AGO.fullmatch(text):
            text = f"now{text}"
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
