"""`python -m bench metadata`: runs rows, prints a line a step and a table at the end, writes everything as JSON."""

import argparse
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench.api.reported import Reported, delivered
from bench.metadata.rows import ROWS
from bench.metadata.size import FULL, QUICK, Bench, Size
from bench.peers import ROOT, START_BOUND_S, free_port, running, serves, wait

EXAMPLES: Final = """examples:
  make bench-metadata                                every row; takes some minutes, most of them to make interactions
  make bench-metadata ARGS="--quick"                 every row with little load; its numbers are for no table
  make bench-metadata ARGS="--only search"           one row
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", action="append", choices=tuple(ROWS), help="measure only this row; may be repeated")
    parser.add_argument("--quick", action="store_true", help="little load: does it work, not what it costs")
    parser.add_argument("--json", type=Path, default=Path("bench-metadata.json"), help="the report (%(default)s)")


def run(size: Size, only: Sequence[str], folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures rows and returns the whole report; `folder` is for the processes' files."""
    made = Reported(say)
    secret, address, data = secrets.token_hex(16), f"127.0.0.1:{free_port()}", folder / "data"
    environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    environ |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "gen"))), "SERVICE_SECRET": secret}
    environ |= {"METADATA_ADDRESS": address, "DATA_DIR": str(data)}
    with running("metadata", address, folder, [sys.executable, "-m", "services.metadata"], environ) as service:
        wait(service, lambda: serves(address), 2 * START_BOUND_S)
        bench = Bench(size=size, service=service, data=data, secret=secret, say=say)
        for name in only:
            made.row(name, partial(ROWS[name].measure, bench), ROWS[name].judged)
    return made.whole(size)


def main(arguments: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> int:
    """The exit status is 1 when a row is void."""
    found = run(QUICK if arguments.quick else FULL, arguments.only or tuple(ROWS), folder, say)
    return delivered(found, arguments.json, say)
