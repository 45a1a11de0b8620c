"""Which servers the running call's caller sees: all of the fleet, or those of his scope.

What must stay true: a server that he does not see is to him as one that there is not.
"""

from collections.abc import Iterable

from fleet import access
from gateway.entry import ServerEntry
from gateway.state import FleetState


def sees(state: FleetState, server_id: str) -> bool:
    """Whether he sees a server; of one that is not in the live state only its id is known."""
    scope = access.scope()
    if scope is None:
        return True
    entry = state.get(server_id)
    return scope.has(server_id, *(("", "") if entry is None else entry.place))


def seen(entries: Iterable[ServerEntry]) -> list[ServerEntry]:
    """Those that he sees."""
    scope = access.scope()
    return [entry for entry in entries if scope is None or scope.has(entry.id, *entry.place)]
