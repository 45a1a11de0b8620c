"""Exit statuses, and the error of a command line that makes no sense."""

from typing import Final

import grpc

from client.errors import OpenManagerError

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NOT_SUPPORTED: Final = 3
NOT_FOUND: Final = 4
REFUSED: Final = 5
UNAVAILABLE: Final = 6
INTERRUPTED: Final = 130
READER_LEFT: Final = 141

_BY_CODE: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: USAGE,
    grpc.StatusCode.OUT_OF_RANGE: USAGE,
    grpc.StatusCode.UNIMPLEMENTED: NOT_SUPPORTED,
    grpc.StatusCode.NOT_FOUND: NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED: REFUSED,
    grpc.StatusCode.PERMISSION_DENIED: REFUSED,
    grpc.StatusCode.UNAVAILABLE: UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: UNAVAILABLE,
}


class UsageError(Exception):
    """What was asked for makes no sense; the text says what would."""


class CommandFailed(Exception):  # noqa: N818  named as what happened
    """A command came to no good end; the text says why, and what to do."""


def of(error: OpenManagerError) -> int:
    """The exit status of a failed call."""
    return _BY_CODE.get(error.code, FAILED)
