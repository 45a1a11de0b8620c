"""What `openmanager trend`, `openmanager capacity` and `openmanager predictions` can be told."""

import argparse
import math
from typing import Final

from client.command.parsing import Commands, add, add_output
from client.command.values import moment_s, span_s

MAX_GROWTH: Final = 100.0


def add_outlook(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Adds `trend` and `capacity`."""
    trend = add(
        commands,
        "trend",
        "show what a metric of a server does in the long run",
        "examples:\n  openmanager trend web-01 cpu_usage\n"
        "  openmanager trend web-01 cpu_usage --from -90d --output json\n"
        "  openmanager trend web-01 'disk_used{mount=\"/\"}'",
    )
    trend.add_argument("id", metavar="ID", help="the server's id")
    trend.add_argument("metric", metavar="METRIC", help='a name, or name{label="value"} where it is of several')
    time_help = "-90d, 2026-11-01, 2026-11-01T12:00:00Z (365 days ago)"
    trend.add_argument("--from", dest="start", metavar="TIME", type=moment_s, default="-365d", help=time_help)
    trend.add_argument("--to", dest="end", metavar="TIME", type=moment_s, default="now", help="not included (now)")
    add_output(trend)
    capacity = add(
        commands,
        "capacity",
        "say when a metric of a server reaches a limit, or which servers reach it soon",
        "examples:\n  openmanager capacity\n  openmanager capacity web-01 --limit 95\n"
        "  openmanager capacity --metric memory_usage --within 90d --role db --growth 20%\n"
        "  openmanager capacity web-01 --metric disk_free_bytes --limit 1e9 --falling",
    )
    capacity.add_argument("id", metavar="ID", nargs="?", help="the server's id (all servers)")
    capacity.add_argument("--metric", metavar="M", default="disk_usage", help="which metric (disk_usage)")
    capacity.add_argument(
        "--limit", metavar="VALUE", type=_number, help="in the metric's unit (90 for a metric in percent)"
    )
    capacity.add_argument("--falling", action="store_true", help="the limit is reached from above, as of free space")
    capacity.add_argument(
        "--growth", metavar="PART", type=_part, default=0.0, help="what if it grew by 20%% more a day"
    )
    capacity.add_argument("--within", metavar="SPAN", type=span_s, default="30d", help="of all servers: how soon (30d)")
    capacity.add_argument("--environment", metavar="NAME", default="", help="of all servers: only those")
    capacity.add_argument("--role", metavar="NAME", default="", help="of all servers: only those")
    add_output(capacity)


def add_predictions(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    command = add(
        commands,
        "predictions",
        "show which servers are likely to fail within hours, and why",
        "examples:\n  openmanager predictions\n  openmanager predictions --min-probability 50% --role db\n"
        "  openmanager predictions --min-probability 0 --output json",
    )
    command.add_argument(
        "--min-probability", metavar="PART", type=_probability, default=0.1, help="such as 50%% or 0.5 (0.1)"
    )
    command.add_argument("--environment", metavar="NAME", default="", help="only servers of it")
    command.add_argument("--role", metavar="NAME", default="", help="only servers of it")
    add_output(command)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number")
    return value


def _part(text: str) -> float:
    """0.2 of `20%`."""
    value = _number(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not -1 < value <= MAX_GROWTH:
        raise argparse.ArgumentTypeError("growth is a part such as 20% or 0.2, over -100%")
    return value


def _probability(text: str) -> float:
    """0.5 of `50%`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no probability such as 50% or 0.5")
    return value
