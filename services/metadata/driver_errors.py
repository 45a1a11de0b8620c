"""What the driver's exceptions mean: the database is away, a race was lost, a value is refused, or it is set up wrong.

What must stay true: a refusal is about the one fact that was sent, so that others may go; whatever would befall every
fact alike (a missing table, a missing right, a full disk) is never a refusal.
"""

from typing import Final

import asyncpg

from runtime.errors import clip
from runtime.redaction import redact

MAX_ERROR_TEXT_BYTES: Final = 300

UNAVAILABLE: Final = (
    OSError,  # refused, reset, no such socket, TLS; TimeoutError is one too
    EOFError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shut down, killed, starting, statement timeout
    asyncpg.InsufficientResourcesError,  # too many connections, disk full, out of memory
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.LockNotAvailableError,
    # No host takes writes; also what the driver says of a connection that is used between the server's last words
    # ("terminating connection ...") and the end of the stream.
    asyncpg.InternalClientError,
    asyncpg.UndefinedTableError,
    asyncpg.InterfaceError,
)
GIVEN_UP: Final = (asyncpg.QueryCanceledError, asyncpg.LockNotAvailableError)
"""Two of them that are answers all the same: the server gave up on one statement, as a rule since somebody holds a lock
on its table (VACUUM FULL). Of the database as a whole that says nothing."""
DISK_FULL: Final = asyncpg.DiskFullError
"""One of them, but of inserting only: it reads all the same."""
ANSWERED: Final = (*GIVEN_UP, DISK_FULL)
"""Those of them that are no sign of an outage."""
ABORTED: Final = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)
CANNOT_SAY: Final = (
    asyncpg.InsufficientPrivilegeError,
    asyncpg.FeatureNotSupportedError,
    asyncpg.UndefinedFunctionError,
)
"""A server of another make that does not tell which database it is."""

_SET_UP_WRONG: Final = frozenset({"0A", "3F", "40", "42", "55", "58"})
"""SQLSTATE classes that say nothing of the values: features, schemas, races, rights and names, states, its disk."""


def describe(error: BaseException) -> str:
    """The fault for the status call and the log: kind and text, no secrets, no user, no row (DETAIL quotes it)."""
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return f"{type(error).__name__}: the database refuses the user or the password"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = error.args[0] if isinstance(error, asyncpg.PostgresError) and error.args else error
    return clip(redact(f"{type(error).__name__}: {text}"), MAX_ERROR_TEXT_BYTES)


def in_short(error: BaseException) -> str:
    """What callers are told, who learn no details."""
    if isinstance(error, GIVEN_UP):
        return "the metadata database could not do this in time"
    if isinstance(error, DISK_FULL):
        return "the disk of the metadata database is full"
    if isinstance(error, asyncpg.TooManyConnectionsError):
        return "the metadata database has no connection left"
    return "the metadata database does not answer"


def is_refusal(error: BaseException) -> bool:
    """Whether the database answered that it will not keep these values; repeating them would be answered alike."""
    if not isinstance(error, asyncpg.PostgresError) or isinstance(error, (*UNAVAILABLE, *ABORTED)):
        return False
    return (error.sqlstate or "")[:2] not in _SET_UP_WRONG
