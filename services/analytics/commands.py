"""What `python -m services.analytics COMMAND` does: the mathematics of the service on a CSV file, no service needed.

What must stay true: each command imports what it needs and no more, since starting the service is none of them; the
exit status is 0, or 2 for files and options that make no sense; whoever reads the output may leave, as `head` does.
"""

import argparse
import os
import sys
from collections.abc import Sequence
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
    try:
        status = run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        return 0
    return status
