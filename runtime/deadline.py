"""The time a running call has left, carried through the code it runs so that every hop gets what is left.

What must stay true: the deadline belongs to the call, not to the context it was set in. A background task started
inside a call copies the context and outlives the call, so a finished call's deadline counts for nothing.
"""

import time
from contextvars import ContextVar
from typing import Final

from runtime.errors import DeadlineExceeded

DEFAULT_DEADLINE_S: Final = 10.0
"""A unary call that names no deadline gets this one, on both sides."""
MAX_DEADLINE_S: Final = 60.0
"""The longest deadline a server honours for a unary call."""
DEADLINE_MARGIN_S: Final = 0.05
"""Kept back from what is left when a call calls on, so that our answer still reaches our caller."""


class CallDeadline:
    """When the running call must be over, in time.monotonic() seconds (None: no limit)."""

    __slots__ = ("at", "over")

    def __init__(self, at: float | None) -> None:
        self.at = at
        self.over = False


current: ContextVar[CallDeadline | None] = ContextVar("openmanager_call_deadline", default=None)


def remaining_s() -> float | None:
    """Seconds the running call has left (may be negative); None outside of a call or without a limit."""
    deadline = current.get()
    if deadline is None or deadline.over or deadline.at is None:
        return None
    return deadline.at - time.monotonic()


def for_unary_call(wanted_s: float | None, default_s: float = DEFAULT_DEADLINE_S) -> float:
    """The timeout of an outgoing unary call: what it asks for or the default, never past the running call's end.

    DeadlineExceeded when nothing is left: gRPC lets a quick peer answer a call whose time is already over.
    """
    timeout_s = default_s if wanted_s is None else wanted_s
    left_s = remaining_s()
    if left_s is None:
        return timeout_s
    if left_s <= DEADLINE_MARGIN_S:
        raise DeadlineExceeded("no time is left for a further call")
    return min(timeout_s, left_s - DEADLINE_MARGIN_S)
