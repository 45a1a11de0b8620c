"""What a running call tells the audit log of itself: what it acts upon, and how that was before and is afterwards.

    audited.note(target="server-1", before={...}, after={...})        # in the process that writes the event
    audited.tell(context, before={...})                               # in an inner service that it is forwarded to

What must stay true: outside of a call that is audited all of this does nothing; secrets are for the caller to leave
out; what travels fits into the metadata of an answer.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import orjson

from runtime.caller import Caller

KEY: Final = "openmanager-audit-bin"
MAX_TOLD_BYTES: Final = 4_096
"""gRPC takes 8 KiB of metadata in all."""


@dataclass(slots=True)
class Note:
    """What was told so far."""

    target: str = ""
    before: object = None
    after: object = None
    actor: Caller | None = None
    """Who it was, where only the call itself finds that out: a log-in."""
    idle: bool = False
    """Whether nothing was changed after all."""


current: ContextVar[Note | None] = ContextVar("openmanager_audit_note", default=None)
"""Of the running call, where it is audited."""


def note(*, target: str = "", before: object = None, after: object = None, actor: Caller | None = None) -> None:
    """Tells something; what is left out stays as it was told before."""
    found = current.get()
    if found is None:
        return
    found.target = target or found.target
    found.before = found.before if before is None else before
    found.after = found.after if after is None else after
    found.actor = actor or found.actor


def nothing_changed() -> None:
    """Tells that the call went well and changed nothing: it is counted, not recorded."""
    found = current.get()
    if found is not None:
        found.idle = True


def tell(context: Any, *, target: str = "", before: object = None, after: object = None) -> None:
    """The same to the process that forwarded the call; what is too long for that is left out."""
    said = {"target": target, "before": before, "after": after}
    raw = orjson.dumps(said, default=str)
    if len(raw) > MAX_TOLD_BYTES:
        raw = orjson.dumps({"target": target[: MAX_TOLD_BYTES // 4], "before": None, "after": None})
    context.set_trailing_metadata(((KEY, raw),))


def take(trailers: Iterable[tuple[str, Any]]) -> None:
    """Notes what an inner service told."""
    for key, value in trailers:
        if key == KEY:
            note(**orjson.loads(value))
