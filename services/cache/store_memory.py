"""The store that forgets with the process: what the follower keeps when no Redis is configured.

It costs a reference for each state, keeps every path of the service the same with and without Redis, and is the model
that the Redis adapter must equal. Its listeners are those of the same object, as two replicas in a test have it.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TypeVar

from runtime.clock import Clock
from services.cache.model import Fleet, ServerState, Stored
from services.cache.store import LIFETIMES, Difference, Heard, Lifetimes, StoreIdentity, Written

MAX_NOTES = 200_000
"""Servers and removals that are remembered; the oldest are forgotten first. Four times the servers there may be."""

T = TypeVar("T")


class MemoryStateStore:
    """A StateStore in a dict."""

    address = ""

    def __init__(self, clock: Clock, lifetimes: Lifetimes = LIFETIMES) -> None:
        self._clock = clock
        self._lifetimes = lifetimes
        self._servers: dict[str, tuple[ServerState, float]] = {}  # the value and when it ends, monotonic
        self._notes: dict[str, tuple[Stored, float]] = {}
        self._all: tuple[Fleet, float] | None = None
        self._count: tuple[int, float] | None = None
        self._healthy: tuple[int, float] | None = None
        self._listeners: list[asyncio.Queue[Heard]] = []

    async def write(self, changed: Sequence[Stored], bases: Mapping[str, str], fleet: Fleet | None) -> Written:
        intact = await self.count() is not None
        now_s = self._clock.monotonic()
        lives = self._lifetimes
        newer: list[Stored] = []
        lost = False
        for mine in changed:
            server_id = mine.server_id
            theirs = self._stored(server_id)
            if theirs is not None and not _may_follow(theirs, mine, bases.get(server_id, "")):
                newer.append(theirs)
                continue
            lost |= self._alive(self._notes.get(server_id)) is None and bases.get(server_id, "") != ""
            self._notes[server_id] = mine, now_s + lives.note_s
            if len(self._notes) > MAX_NOTES:
                del self._notes[next(iter(self._notes))]
            if isinstance(mine, ServerState):
                self._servers[server_id] = mine, now_s + lives.server_s
            else:
                self._servers.pop(server_id, None)
        there = self._alive(self._all)
        listed = fleet is None or there is None or _may_list(there, fleet)
        if fleet is not None and listed:
            self._all = fleet, now_s + lives.all_s
            self._count = fleet.summary.total, now_s + lives.count_s
            self._healthy = fleet.summary.healthy, now_s + lives.healthy_s
        for listener in self._listeners:
            versions = {mine.server_id: mine.version for mine in changed}
            listener.put_nowait(Heard(versions=versions, fleet=fleet.version if fleet is not None and listed else ""))
        return Written(intact=intact, lost=lost, listed=listed, newer=newer)

    async def read(self, server_ids: Sequence[str]) -> Sequence[Stored]:
        return [found for server_id in server_ids if (found := self._stored(server_id)) is not None]

    async def differences(self, versions: Mapping[str, str]) -> AsyncGenerator[Difference, None]:
        found = [
            stored
            for server_id in self._notes
            if (stored := self._stored(server_id)) is not None and stored.version != versions.get(server_id)
        ]
        listed = self._alive(self._all)
        found += [state for state in (listed.states if listed else ()) if self._has_only_list(state, versions)]
        missing = [server_id for server_id in versions if not self._stored(server_id)]
        yield Difference(found=found, missing=missing, fleets=[listed.version] if listed else [])

    async def heard(self) -> AsyncGenerator[Heard, None]:
        mine: asyncio.Queue[Heard] = asyncio.Queue()
        self._listeners.append(mine)
        try:
            yield Heard()
            while True:
                yield await mine.get()
        finally:
            self._listeners.remove(mine)

    async def list_basic(self) -> Sequence[ServerState] | None:
        fleet = self._alive(self._all)
        return None if fleet is None else fleet.states

    async def count(self) -> int | None:
        return self._alive(self._count)

    async def healthy(self) -> int | None:
        return self._alive(self._healthy)

    async def ping(self) -> StoreIdentity:
        return StoreIdentity(version="memory", life=str(id(self)))

    async def close(self) -> None:
        """Nothing to let go of."""

    def _has_only_list(self, state: ServerState, versions: Mapping[str, str]) -> bool:
        return state.server_id not in versions and self._stored(state.server_id) is None

    def _stored(self, server_id: str) -> Stored | None:
        note = self._alive(self._notes.get(server_id))
        return self._alive(self._servers.get(server_id)) if isinstance(note, ServerState) else note

    def _alive(self, kept: tuple[T, float] | None) -> T | None:
        return kept[0] if kept is not None and self._clock.monotonic() < kept[1] else None


def _may_list(there: Fleet, fleet: Fleet) -> bool:
    return _is_own_older(there.version, fleet.version) or there.version in fleet.bases


def _may_follow(theirs: Stored, mine: Stored, base: str) -> bool:
    return _is_own_older(theirs.version, mine.version) or theirs.version in (base, "")


def _is_own_older(there: str, mine: str) -> bool:
    return there.partition(".")[2] == mine.partition(".")[2] and there <= mine
