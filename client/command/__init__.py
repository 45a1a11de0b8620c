"""The `openmanager` command: what people and scripts do with a gateway from a shell.

What must stay true: results go to standard output and nothing else does; the exit status is what `--help` says it is;
a reader that leaves, and Ctrl-C, end it without a traceback. What a command needs is imported when it is called, so
that `--help` and completion do not wait for gRPC (0.3 s of 0.4, measured).
"""

import asyncio
import contextlib
import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Final

from client.command.arguments import parse, parser

_MODULES: Final = {
    "servers": "client.command.fleet",
    "server": "client.command.fleet",
    "status": "client.command.status",
    "audit": "client.command.status",
    "watch": "client.command.watch",
    "history": "client.command.history",
    "ingest": "client.command.ingest",
}
_INTERRUPTED, _READER_LEFT = 130, 141


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit status."""
    options = parse(arguments)
    try:
        if options.command == "completion":
            return _complete(options)
        status = _run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _leave_stdout()
        return _INTERRUPTED
    except BrokenPipeError:
        _leave_stdout()
        return _READER_LEFT
    return status


def _run(options: Namespace) -> int:
    from client.channel import BadAddress  # noqa: PLC0415
    from client.command import exits, terminal  # noqa: PLC0415
    from client.errors import OpenManagerError  # noqa: PLC0415

    try:
        return asyncio.run(_connected(options))
    except OpenManagerError as error:
        terminal.complain(f"{error} ({error.reason})" if error.reason != error.code.name else str(error))
        if error.hint:
            terminal.complain(f"hint: {error.hint}")
        return exits.of(error)
    except (exits.UsageError, BadAddress) as error:
        terminal.complain(str(error))
        return exits.USAGE
    except exits.CommandFailed as error:
        terminal.complain(str(error))
        return exits.FAILED
    except BrokenPipeError:
        raise
    except OSError as error:
        terminal.complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return exits.FAILED


async def _connected(options: Namespace) -> int:
    from client.api import OpenManager  # noqa: PLC0415
    from client.command.profile import connection  # noqa: PLC0415

    module = importlib.import_module(_MODULES[options.command])
    to = connection(options, os.environ)
    timeout_s = getattr(options, "timeout", None) or 10.0
    async with OpenManager.connect(to.address, token=to.token, ca_file=to.ca_file, timeout_s=timeout_s) as manager:
        status: int = await module.run(manager, options)
        return status


def _complete(options: Namespace) -> int:
    from client.command import completion  # noqa: PLC0415

    sys.stdout.write(completion.script(parser(), options.shell))
    sys.stdout.flush()
    return 0


def _leave_stdout() -> None:
    """What is still buffered goes nowhere: Python would try to write it at its end, and complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
