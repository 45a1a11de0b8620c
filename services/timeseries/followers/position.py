"""How far a store has got with the journal, durably, and what it may lack of what it has acknowledged.

After an outage of a store that acknowledges before its sync the cursor goes back a minute: what it held in memory may
have died with it. That is owed to it until the cursor goes back, which the journal knows, too.

What must stay true: the cursor is moved only past what the store has acknowledged; what is owed is paid back however
this process ends; a store that comes and goes gets on.
"""

import asyncio
from typing import Final

from runtime.clock import Clock
from services.timeseries.engine import Engine
from services.timeseries.engine.cursors import SETTLED_AFTER_S
from services.timeseries.followers.backend import Backend
from services.timeseries.followers.run import Run


class Position:
    """Of one store."""

    def __init__(self, engine: Engine, backend: Backend, clock: Clock) -> None:
        self._cursors: Final = engine.cursors
        self._backend = backend
        self._clock = clock
        self.cursor = 0
        """The last sequence of the journal that the store has acknowledged with everything before it."""
        self.has_gone_back = False
        """Since `go_on`: what is shipped now comes after a cursor that is no longer true."""
        self._is_registered = False
        self._run: Run | None = None  # the blocks that are shipped, or were last
        self._is_ahead = False  # the store has acknowledged some of what comes after the cursor
        self._again_through = 0  # up to this sequence the store has acknowledged everything before
        self._owed: int | None = None  # the cursor to which to go back as soon as that may be; the journal has it, too
        self._may_go_back_s = float("-inf")
        self._is_going_back = False
        self._advanced = asyncio.Event()

    @property
    def is_owed(self) -> bool:
        """Whether the store may lack what it took before, and the cursor does not say so."""
        return self._owed is not None or self._is_going_back

    async def register(self) -> None:
        """Finds the cursor, and what is owed since before the process ended or could not pay."""
        self.cursor = await self._cursors.register(self._backend.name)
        self._is_registered = True
        owed = await self._cursors.owed(self._backend.name)
        if owed is not None:
            self._owed = owed if self._owed is None else min(owed, self._owed)

    async def go_on(self) -> None:
        """Whoever ships goes on from the cursor."""
        await self.pay_back()
        self.has_gone_back = self._is_ahead = False

    async def wait_for(self, sequence: int) -> None:
        """Returns once the store has everything up to a sequence."""
        while self.cursor < sequence:
            await self._advanced.wait()

    def has_taken(self) -> None:
        """The store has acknowledged some of what comes after the cursor."""
        self._is_ahead = True

    def is_again(self, sequence: int) -> bool:
        """Whether the store has acknowledged this batch before."""
        return sequence <= self._again_through

    async def advance(self, through: int) -> None:
        """The store has acknowledged everything up to a sequence."""
        if through > self.cursor:
            self.cursor = await self._cursors.advance(self._backend.name, through)
            self._is_ahead = False
            self._advanced.set()
            self._advanced = asyncio.Event()

    def run_before(self, first: int) -> Run:
        """What is to be shipped from blocks, since `first` is the oldest batch that the journal has."""
        run = self._run
        self._run = run.again() if run is not None and run.after == self.cursor else Run(self.cursor, first - 1)
        return self._run

    async def owe(self) -> None:
        """Notes that what the store acknowledged in the last minute it may have lost with what befell it. Durably, so
        that it holds however this process ends."""
        if self._backend.syncs or not self._is_registered:
            return
        if self._run is not None:
            self._run.lost(self._clock.monotonic())
        settled = self._cursors.lost(self._backend.name)
        self._owed = settled if self._owed is None else min(settled, self._owed)
        await self._cursors.owe(self._backend.name, self._owed)

    async def pay_back(self) -> None:
        """Takes the cursor back to where it is owed, durably. Not more than once a minute, so that a store that comes
        and goes gets on, too: what it lost within a minute of that is owed until then."""
        if self._owed is None:
            return
        is_lacking = self._owed < self.cursor or self._is_ahead  # a run through blocks may be hours ahead
        now_s = self._clock.monotonic()
        if is_lacking and now_s < self._may_go_back_s:
            return
        self._again_through = max(self.cursor, self._again_through)
        owed, self._owed = self._owed, None  # first: what a probe finds meanwhile is owed anew
        self._is_going_back = True
        try:
            self.cursor = await self._cursors.go_back(self._backend.name, owed)
        except BaseException:  # such as a full disk: it is owed still
            self._owed = owed if self._owed is None else min(owed, self._owed)
            raise
        finally:
            self._is_going_back = False
        if is_lacking:
            self._may_go_back_s = now_s + SETTLED_AFTER_S
            self.has_gone_back = True
