"""The `openmanager` command: what people and scripts do with a gateway from a shell.

What must stay true: results go to standard output and nothing else does; the exit status is what `--help` says it is;
a reader that leaves, and Ctrl-C, end it without a traceback.
"""

import asyncio
import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from client.api import OpenManager
from client.channel import BadAddress
from client.command import (
    access,
    anomalies,
    audit,
    completion,
    exits,
    fleet,
    history,
    ingest,
    outlook,
    predictions,
    status,
    watch,
)
from client.command.arguments import parse, parser
from client.command.profile import connection
from client.command.terminal import complain
from client.errors import OpenManagerError

_RUN: Final[Mapping[str, Callable[[OpenManager, Namespace], Awaitable[int]]]] = {
    "servers": fleet.run,
    "server": fleet.run,
    "status": status.run,
    "audit": audit.run,
    "setup": access.run,
    "token": access.run,
    "user": access.run,
    "watch": watch.run,
    "history": history.run,
    "anomalies": anomalies.run,
    "anomaly": anomalies.run,
    "trend": outlook.run,
    "capacity": outlook.run,
    "predictions": predictions.run,
    "ingest": ingest.run,
}


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit status."""
    _open_standard_streams()
    options = parse(arguments)
    try:
        if options.command == "completion":
            sys.stdout.write(completion.script(parser(), options.shell))
            result = exits.OK
        elif options.command == "certs":
            result = _local(options)
        else:
            result = _run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _leave_stdout()
        return exits.INTERRUPTED
    except BrokenPipeError:
        _leave_stdout()
        return exits.READER_LEFT
    except OSError as error:
        _leave_stdout()
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return exits.FAILED
    return result


def _open_standard_streams() -> None:
    """Those that the caller has closed lead to nothing; else what is opened next would get their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  it stays open


def _local(options: Namespace) -> int:
    """What asks no gateway; what it needs is only imported for it (40 ms)."""
    from client.command import certs  # noqa: PLC0415

    try:
        return certs.run(options)
    except exits.UsageError as error:
        complain(str(error))
        return exits.USAGE
    except exits.CommandFailed as error:
        complain(str(error))
        return exits.FAILED


def _run(options: Namespace) -> int:
    try:
        return asyncio.run(_connected(options))
    except OpenManagerError as error:
        complain(f"{error} ({error.reason})" if error.reason != error.code.name else str(error))
        if error.hint:
            complain(f"hint: {error.hint}")
        return exits.of(error)
    except (exits.UsageError, BadAddress) as error:
        complain(str(error))
        return exits.USAGE
    except UnicodeEncodeError as error:  # what a shell gave as other bytes, on its way into a message
        complain(f"{error.object!r} is not UTF-8")
        return exits.USAGE
    except exits.CommandFailed as error:
        complain(str(error))
        return exits.FAILED


async def _connected(options: Namespace) -> int:
    to = connection(options, os.environ)
    manager = OpenManager.connect(to.address, token=to.token, ca_file=to.ca_file, timeout_s=options.timeout)
    async with manager:
        return await _RUN[options.command](manager, options)


def _leave_stdout() -> None:
    """What is still buffered goes nowhere: Python would try to write it at its end, and complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
