"""The store that forgets with the process: what the follower keeps when no Redis is configured.

It costs a reference for each state, keeps every path of the service the same with and without Redis, and is the model
that the Redis adapter must equal.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

from runtime.clock import Clock
from services.cache.model import Fleet, ServerState
from services.cache.store import LIFETIMES, Lifetimes, StoreIdentity

T = TypeVar("T")


class MemoryStateStore:
    """A StateStore in a dict."""

    address = ""

    def __init__(self, clock: Clock, lifetimes: Lifetimes = LIFETIMES) -> None:
        self._clock = clock
        self._lifetimes = lifetimes
        self._servers: dict[str, tuple[ServerState, float]] = {}  # the value and when it ends, monotonic
        self._all: tuple[Sequence[ServerState], float] | None = None
        self._count: tuple[int, float] | None = None
        self._healthy: tuple[int, float] | None = None

    async def write(self, changed: Sequence[ServerState], removed: Sequence[str], fleet: Fleet) -> bool:
        intact = await self.count() is not None
        now_s = self._clock.monotonic()
        lives = self._lifetimes
        for state in changed:
            self._servers[state.server_id] = state, now_s + lives.server_s
        for server_id in removed:
            self._servers.pop(server_id, None)
        self._all = fleet.states, now_s + lives.all_s
        self._count = fleet.summary.total, now_s + lives.count_s
        self._healthy = fleet.summary.healthy, now_s + lives.healthy_s
        return intact

    async def get(self, server_id: str) -> ServerState | None:
        return self._alive(self._servers.get(server_id))

    async def list_basic(self) -> Sequence[ServerState] | None:
        return self._alive(self._all)

    async def count(self) -> int | None:
        return self._alive(self._count)

    async def healthy(self) -> int | None:
        return self._alive(self._healthy)

    async def load(self) -> AsyncGenerator[Sequence[ServerState], None]:
        found = {state.server_id: state for state in self._alive(self._all) or ()}
        found |= {server_id: state for server_id, kept in self._servers.items() if (state := self._alive(kept))}
        yield list(found.values())

    async def ping(self) -> StoreIdentity:
        return StoreIdentity(version="memory", life=str(id(self)))

    async def close(self) -> None:
        """Nothing to let go of."""

    def _alive(self, kept: tuple[T, float] | None) -> T | None:
        return kept[0] if kept is not None and self._clock.monotonic() < kept[1] else None
