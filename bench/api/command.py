"""`python -m bench api`: runs rows, prints a line a step and a table at the end, writes everything as JSON."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench.api.judged import absent
from bench.api.product import inner_services
from bench.api.reported import Reported
from bench.api.rows import ROWS
from bench.api.size import FULL, QUICK, Bench, Size
from bench.load import SERVERS, Mix

EXAMPLES: Final = """examples:
  make bench-api                                     every row
  make bench-api ARGS="--quick"                      every row with little load; its numbers are for no table
  make bench-api ARGS="--only grpc --only http"      two rows
  python -m bench api --only watch --subscribers 500 --rounds 3

h2load and wrk are Debian's packages nghttp2-client and wrk; prometheus and victoria-metrics are found on the PATH. A
row whose programs are not there is not measured, and says so. A row where a reply was wrong is void, and the exit
status 1.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", action="append", choices=tuple(ROWS), help="measure only this row; may be repeated")
    parser.add_argument("--quick", action="store_true", help="little load: does it work, not what it costs")
    parser.add_argument("--seconds", type=_positive(float), help=f"of each turn ({FULL.seconds:g})")
    parser.add_argument("--rounds", type=_positive(int), help=f"turns of each contender ({FULL.rounds})")
    parser.add_argument("--clients", type=_positive(int), help=f"of paced and asking ({FULL.clients})")
    parser.add_argument("--tick", type=_positive(float), help=f"seconds between ticks in these ({FULL.tick_s:g})")
    parser.add_argument("--subscribers", type=_positive(int), help=f"of watch ({FULL.subscribers})")
    parser.add_argument("--json", type=Path, default=Path("bench-api.json"), help="the report (%(default)s)")


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not more than 0")
        return value

    parse.__name__ = kind.__name__
    return parse


def size_of(arguments: argparse.Namespace) -> Size:
    """How much is asked for."""
    given = {
        "seconds": arguments.seconds,
        "rounds": arguments.rounds,
        "clients": arguments.clients,
        "tick_s": arguments.tick,
        "subscribers": arguments.subscribers,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    return replace(QUICK if arguments.quick else FULL, **chosen)


def run(size: Size, only: Sequence[str], folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures rows and returns the whole report; `folder` is for the processes' files."""
    made = Reported(say)
    lacking = {name: why for name in only if (why := ROWS[name].lacking())}
    for name, why in lacking.items():
        say(f"{name}: not measured: {why}")
        made.judged.append(absent(name, name, why))
    wanted = [name for name in only if name not in lacking]
    if wanted:
        with inner_services(folder / "product") as inner:
            for name in wanted:
                scratch = folder / name
                scratch.mkdir()
                bench = Bench(size=size, inner=inner, folder=scratch, say=say)
                made.row(name, partial(ROWS[name].measure, bench), ROWS[name].judged)
    return made.whole(size, mix=Mix(SERVERS).describe())
