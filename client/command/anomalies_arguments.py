"""What `openmanager anomalies` and `openmanager anomaly` can be told."""

import argparse
from typing import Final

from client.command.parsing import Commands, add, add_output
from client.command.values import moment_s

DEFAULT_COUNT: Final = 50


def add_anomalies(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Adds both commands."""
    listed = add(
        commands,
        "anomalies",
        "list what was found abnormal, newest first",
        "examples:\n  openmanager anomalies --open\n  openmanager anomalies web-01 --from -7d\n"
        "  openmanager anomalies --metric disk_usage --min-score 0.6 --environment production --output json",
    )
    listed.add_argument("id", metavar="SERVER", nargs="?", default="", help="only of this server")
    time_help = "-7d, 2026-11-01, 2026-11-01T12:00:00Z (a day ago)"
    listed.add_argument("--from", dest="start", metavar="TIME", type=moment_s, default="-1d", help=time_help)
    listed.add_argument("--to", dest="end", metavar="TIME", type=moment_s, default="now", help="not included (now)")
    listed.add_argument("--open", action="store_true", help="only those that go on")
    listed.add_argument("--unacknowledged", action="store_true", help="only those that nobody takes care of")
    listed.add_argument("--metric", metavar="M", default="", help="only those in which this metric had a part")
    listed.add_argument("--detector", metavar="NAME", default="", help="only of departure, silence or prediction")
    listed.add_argument("--min-score", metavar="S", type=_score, default=0.0, help="only from this score on, 0 to 1")
    listed.add_argument("--environment", metavar="NAME", default="", help="only of servers there")
    listed.add_argument("--role", metavar="NAME", default="", help="only of such servers")
    listed.add_argument(
        "--count", metavar="N", type=_count, default=DEFAULT_COUNT, help=f"at most so many ({DEFAULT_COUNT}); 0: all"
    )
    add_output(listed)
    one = add(
        commands,
        "anomaly",
        "show one finding, take care of it, or say whether it was real",
        "examples:\n  openmanager anomaly 6a45a721f0e43a7fd8ebed5e27519b63\n"
        "  openmanager anomaly 6a45a721f0e43a7fd8ebed5e27519b63 --acknowledge --comment 'on it'\n"
        "  openmanager anomaly 6a45a721f0e43a7fd8ebed5e27519b63 --false --comment 'the nightly backup'",
    )
    one.add_argument("id", metavar="ID", help="the finding's id, as `openmanager anomalies` lists it")
    what = one.add_mutually_exclusive_group()
    what.add_argument("--acknowledge", action="store_true", help="say that you take care of it")
    what.add_argument("--real", action="store_true", help="something was wrong: be as watchful again")
    what.add_argument("--false", action="store_true", help="nothing was wrong: expect more of this server")
    one.add_argument("--comment", metavar="TEXT", default="", help="what to write with it")
    add_output(one)


def _score(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number from 0 to 1")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number of findings")
    return int(text)
