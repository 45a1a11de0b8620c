"""How much state there may be, and who has none of the room.

What must stay true: whoever does not fit keeps nobody else out: servers that are there already get what is news of
them, in place of their oldest samples where there is no more room, and new ones are taken in turn for as long as there
is some.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from runtime.errors import ResourceExhausted
from services.cache.arrivals import Arrivals
from services.cache.model import Sample

MAX_SERVERS = 50_000
MAX_LIVE_VALUES = 50_000_000
"""Values of all samples, 8 bytes each; 20,000 servers x 511 metrics take a fifth."""


class Crowd(NamedTuple):
    """Servers that do not fit, and why the last of them does not."""

    server_ids: frozenset[str]
    error: ResourceExhausted | None


def without_room(
    server_ids: Iterable[str],
    arrivals: Arrivals,
    sample_of: Callable[[str, str], Sample | None],
    held_by: Callable[[str], int | None],
    *,
    servers: int,
    values: int,
) -> Crowd:
    """Which servers of an update do not fit.

    Args:
        server_ids: those that it changes.
        arrivals: their rows.
        sample_of: what is known of a server and set.
        held_by: how many values a server has; None for one that is not known.
        servers: how many are known.
        values: how many values they have.
    """
    refused: set[str] = set()
    error: ResourceExhausted | None = None
    for server_id in server_ids:
        held = held_by(server_id)
        is_new, news = held is None, arrivals.get(server_id, {})
        more = sum(
            len(arrival.metric_set)
            for set_id, arrival in news.items()
            if is_new or sample_of(server_id, set_id) is None
        )
        at_least = sum(len(arrival.metric_set) for arrival in news.values()) - (held or 0)  # all else gives way
        if is_new and servers >= MAX_SERVERS:
            error = _over("MAX_SERVERS", f"servers would be over MAX_SERVERS ({MAX_SERVERS})")
        elif at_least > 0 and values + at_least > MAX_LIVE_VALUES:
            error = _over("MAX_LIVE_VALUES", f"current values would be over MAX_LIVE_VALUES ({MAX_LIVE_VALUES})")
        else:
            servers, values = servers + is_new, max(min(values + more, MAX_LIVE_VALUES), values + at_least)
            continue
        refused.add(server_id)
    return Crowd(frozenset(refused), error)


def _over(limit: str, text: str) -> ResourceExhausted:
    return ResourceExhausted(text, metadata={"limit": limit})
