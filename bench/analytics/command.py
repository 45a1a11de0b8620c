"""`python -m bench analytics`: runs rows, prints a line a step and a table at the end, writes everything as JSON."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench.analytics import recordings
from bench.analytics.rows import ROWS
from bench.analytics.size import FULL, QUICK, Bench, Size
from bench.api.reported import Reported, delivered

EXAMPLES: Final = """examples:
  make bench-analytics                               every row; takes half an hour of two cores, most of it scenarios
  make bench-analytics ARGS="--quick"                every row with little of everything; its numbers are for no table
  make bench-analytics ARGS="--only exhaustion"      one row; repeat --only for more

The recordings are found in OPENMANAGER_TEST_DATA or beside the checkout; rows without theirs say so. What is measured,
and how good it was: docs/accuracy.md.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", action="append", choices=tuple(ROWS), help="measure only this row; may be repeated")
    parser.add_argument("--quick", action="store_true", help="little of everything: does it work, not how good it is")
    parser.add_argument("--json", type=Path, default=Path("bench-analytics.json"), help="the report (%(default)s)")


def run(size: Size, only: Sequence[str], folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures rows and returns the whole report; `folder` is for files."""
    made = Reported(say)
    data = recordings.folder()
    say(f"recordings: {data}" if data else f"recordings: {recordings.NOT_THERE}")
    bench = Bench(size=size, say=say, data=data, folder=folder)
    for name in only:
        made.row(name, partial(ROWS[name].measure, bench), ROWS[name].judged)
    return made.whole(size, data=str(data or ""))


def main(arguments: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> int:
    """The exit status is 1 when a row is void."""
    found = run(QUICK if arguments.quick else FULL, arguments.only or tuple(ROWS), folder, say)
    return delivered(found, arguments.json, say)
