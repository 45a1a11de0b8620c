"""How one command is added to the tree: its help, its examples, and the options that all have."""

import argparse
from typing import Final

from client.command.values import span_s

Commands = argparse._SubParsersAction
EXITS: Final = """\
exit status:
  0    all is well
  1    failed: rows were rejected, a store is down, a file cannot be read, ...
  2    what was asked for makes no sense
  3    this gateway, or this installation, does not have it
  4    not found: no such server, no points
  5    the gateway refused: no token, a wrong one, or one that may not do this
  6    the gateway is not reachable, or did not answer in time
  130  interrupted; 141 whoever read the output left"""


def common() -> argparse.ArgumentParser:
    """Options that are understood before and after the command."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    group = common.add_argument_group("gateway")
    group.add_argument("--address", metavar="HOST:PORT", help="where it is (default: OPENMANAGER_ADDRESS)")
    group.add_argument("--token", metavar="TOKEN", help="its bearer token (default: OPENMANAGER_TOKEN)")
    group.add_argument("--ca-file", metavar="FILE", help="the authority of its certificate, PEM")
    group.add_argument("--profile", metavar="NAME", help="take all three from OPENMANAGER_NAME_ADDRESS and so on")
    group.add_argument(
        "--timeout", metavar="SPAN", type=_timeout, help="how long a call may take; streams may take longer (10s)"
    )
    return common


def _timeout(text: str) -> float:
    seconds = span_s(text)
    if seconds <= 0:
        raise argparse.ArgumentTypeError("a call needs some time, for example 10s")
    return seconds


def add(
    commands: "Commands[argparse.ArgumentParser]", name: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    """A command, or an action of one."""
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"{examples}\n\n{EXITS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common()],
        allow_abbrev=False,
    )


def add_output(command: argparse.ArgumentParser) -> None:
    """`--output`."""
    command.add_argument(
        "--output", choices=("table", "json"), default="table", help="for people, or as the HTTP API answers"
    )
