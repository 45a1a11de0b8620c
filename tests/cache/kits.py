"""A StateStore under test, whichever it is, and short ways to write and read."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from services.cache.model import ServerState, Stored
from services.cache.store import Lifetimes, StateStore, Written
from tests.cache.samples import World

SHORT = Lifetimes(all_s=100, count_s=200, healthy_s=100, server_s=200)
LIST_EXPIRES = Lifetimes(all_s=50)


@dataclass
class Kit:
    """A store under test, others on the same data with shorter lifetimes, and how time passes for it."""

    store: StateStore
    short: StateStore
    list_expires: StateStore
    pass_time: Callable[[float], Awaitable[None]]


def facts(state: Stored | None) -> object:
    """What a store must give back of a state."""
    assert isinstance(state, ServerState)
    return state.descriptor, state.status, state.observed_ms, state.received_ms, state.metrics()


async def put(store: StateStore, world: World, *server_ids: str) -> Written:
    """Writes these as they are now, removed ones too, and the fleet."""
    stored = [found for server_id in server_ids if (found := world.live.stored(server_id)) is not None]
    written = await store.write(stored, world.live.bases, world.fleet())
    newer = {one.server_id for one in written.newer}
    world.live.bases.update({one.server_id: one.version for one in stored if one.server_id not in newer})
    return written


async def get(store: StateStore, server_id: str) -> ServerState | None:
    found = [one for one in await store.read([server_id]) if isinstance(one, ServerState)]
    return found[0] if found else None


async def everything(store: StateStore, versions: Mapping[str, str] | None = None) -> list[Stored]:
    return [stored async for part in store.differences(versions or {}) for stored in part.found]
