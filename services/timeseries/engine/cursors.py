"""Followers as the engine knows them: how far each has shipped, what its store may lack, what the journal let go.

What must stay true: a cursor is durable when a call returns; what comes after one is in the journal or, over the
journal's limit, in blocks, unless a day's end took it. Belongs to the event loop; work goes to the writer's thread and
to readers.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial
from typing import Any, Final

from runtime.clock import Clock
from services.timeseries.engine.reads import Reads
from services.timeseries.engine.store import Store
from services.timeseries.engine.unsent import START, Place, Unsent, unsent
from services.timeseries.engine.unshipped import Ranges, Unshipped
from services.timeseries.engine.writer import Writer

SETTLED_AFTER_S: Final = 60.0
"""What a store acknowledged so long ago it shows and keeps. VictoriaMetrics holds rows in memory for up to 5 s and
shows results of its caches for 30; Prometheus and others acknowledge before their sync."""


class _Follower:
    """One follower in this life of the process; of the event loop."""

    def __init__(self, unshipped: Unshipped, settled: int, cursor: int, clock: Clock) -> None:
        """`settled` was so when the cursor was moved last; how long ago that was nobody knows any more."""
        self.unshipped = unshipped
        self._clock = clock
        self._settled = settled
        self._lately = deque([(clock.monotonic(), cursor)])  # (when, cursor), of a minute
        self._is_lacking = False  # the store, of what comes after what is settled, whatever it takes beyond that

    def shipped(self, cursor: int) -> None:
        """The store has just acknowledged everything up to a cursor, as far as it did not lose some of it before."""
        if not self._is_lacking:
            self._lately.append((self._clock.monotonic(), cursor))
            self.settled()

    def lost(self) -> int:
        """The store may have lost what is not settled."""
        settled = self.settled()
        self._lately.clear()
        self._is_lacking = True
        return settled

    def went_back(self, cursor: int) -> None:
        """What the store may have lost is shipped again from a cursor on, and settled a minute after that."""
        self._settled = min(self._settled, cursor)
        self._lately.clear()
        self._is_lacking = False

    def settled(self) -> int:
        """The cursor of SETTLED_AFTER_S ago."""
        settled_s = self._clock.monotonic() - SETTLED_AFTER_S
        while self._lately and self._lately[0][0] <= settled_s:
            self._settled = self._lately.popleft()[1]
        return self._settled


class Cursors:
    """The followers of one engine."""

    def __init__(self, store: Store, writer: Writer, reads: Reads) -> None:
        self._store = store
        self._writer = writer
        self._reads = reads
        self._followers: dict[str, _Follower] = {}

    async def register(self, name: str) -> int:
        """Adds a follower, for which the journal is kept from here on, or finds it; returns its cursor: the last
        sequence it has shipped, so that it goes on with `tail(cursor + 1)`."""
        cursor: int = await self._noted(partial(self._store.journal.register_follower, name))
        if name not in self._followers:
            settled = await self._noted(lambda _now_ms: self._store.journal.settled(name))
            owed = await self.owed(name)
            unshipped = await self._reads.read(lambda: Unshipped(self._store))
            found = _Follower(unshipped, settled, cursor, self._store.clock)
            if owed is not None:
                found.went_back(owed)
                found.lost()
            if self._followers.setdefault(name, found) is not found:  # another was quicker
                unshipped.close()
        return cursor

    async def advance(self, name: str, sequence: int) -> int:
        """Notes durably that a follower has shipped up to `sequence`; never goes back. Returns where it is.

        Raises:
            InvalidArgument: field name or sequence.
        """
        follower = self._followers.get(name)
        settled = sequence if follower is None else follower.settled()
        cursor: int = await self._noted(partial(self._store.journal.advance_cursor, name, sequence, settled))
        if follower is not None:
            follower.shipped(cursor)
        return cursor

    def lost(self, name: str) -> int:
        """Says that a registered follower's store may lack what it acknowledged in the last SETTLED_AFTER_S; returns
        the cursor up to which it has everything."""
        return self._followers[name].lost()

    async def owe(self, name: str, cursor: int) -> None:
        """Notes durably that a follower is to ship again what comes after a cursor, as soon as that may be."""
        await self._noted(lambda _now_ms: self._store.journal.owe(name, cursor))

    async def owed(self, name: str) -> int | None:
        """The cursor to which a follower is to `go_back`; None: it need not."""
        owed: int | None = await self._noted(lambda _now_ms: self._store.journal.owed(name))
        return owed

    async def go_back(self, name: str, cursor: int) -> int:
        """Notes durably that a follower ships again what comes after a cursor, and that no more is owed. Returns where
        it is."""
        follower = self._followers[name]
        follower.went_back(cursor)  # first: what is lost meanwhile is lost after that
        try:
            at: int = await self._noted(partial(self._store.journal.rewind_cursor, name, cursor))
        except BaseException:
            follower.lost()
            raise
        return at

    async def forget(self, name: str) -> None:
        """Drops a follower, so that the journal no longer waits for it."""
        await asyncio.wrap_future(self._writer.call(lambda: self._store.journal.forget_follower(name)))

    async def unshipped(self, name: str) -> Ranges:
        """The instants of what a follower's store may not show yet; of nothing when it was never registered."""
        if name not in self._followers:
            known: Mapping[str, int] = await asyncio.wrap_future(self._writer.call(self._store.journal.followers))
            if name not in known:
                return []
            await self.register(name)  # at a start readers may be quicker than who ships
        follower = self._followers[name]
        after = follower.settled()
        return await self._reads.read(lambda: follower.unshipped.ranges(after))

    def unsent(self, after: int, through: int, begin: Place = START) -> AsyncGenerator[Unsent, None]:
        """The rows of batches of `(after, through]` out of blocks, for what the journal does not have any more; from a
        place on, and not in the order of their sequences.

        Raises:
            Unavailable: STORAGE_FAILED, CLOSING.
        """
        return self._reads.each(partial(unsent, self._store, after, through, begin))

    def close(self) -> None:
        """Ends the connections; blocking."""
        for follower in self._followers.values():
            follower.unshipped.close()

    async def _noted(self, note: Callable[[int], Any]) -> Any:
        """Runs something between two commits, with the time."""
        now_ms = self._store.clock.now_ms()
        return await asyncio.wrap_future(self._writer.call(lambda: note(now_ms)))
