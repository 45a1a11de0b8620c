"""What `python -m services.analytics COMMAND` does: the mathematics of the service on a CSV file, no service needed.

What must stay true: each command imports what it needs and no more, since starting the service is none of them; the
exit status is 0, or 2 for files and options that make no sense and for an output that takes nothing; whoever reads the
output may leave, as `head` does; what is written is UTF-8 whatever the locale, as what is read is.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Final

from services.analytics.forecasting import command as forecasting
from services.analytics.scoring import command as scoring

_EXAMPLES: Final = """\
examples:
  python -m services.analytics                                              serve, as `make run` does
  python -m services.analytics score web-1.csv > scores.csv                 how abnormal is each row
  python -m services.analytics forecast web-1.csv --horizon 7d --step 1h    what comes next
  python -m services.analytics exhaust web-1.csv --metric disk_usage --limit 90

`python -m services.analytics COMMAND --help` says more of each.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit status."""
    whole = argparse.ArgumentParser(
        prog="python -m services.analytics",
        description="Without a command: serve. With one: judge a recording.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    scoring.add(commands)
    forecasting.add(commands)
    options = whole.parse_args(arguments)
    run = forecasting.run if options.command in forecasting.NAMES else scoring.run
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        status = run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_output()
        return 0
    except OSError as error:  # the commands tell of the files themselves
        _leave_output()
        sys.stderr.write(f"the standard output: {error.strerror or error}\n")
        return 2
    return status


def _leave_output() -> None:
    """Or Python complains when it flushes at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
