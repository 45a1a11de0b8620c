"""Time as a thing that is handed in, so that tests decide what o'clock it is and never wait for it.

What must stay true: code with a schedule, an expiry or a back-off asks a Clock; `now_ms` (what people call the time,
may jump) is never used to measure a duration, `monotonic` is.
"""

import asyncio
import heapq
import itertools
import time
from typing import Protocol


class Clock(Protocol):
    """Reads and waits for time."""

    def now_ms(self) -> int:
        """UTC, milliseconds since the Unix epoch."""

    def monotonic(self) -> float:
        """Seconds that only go forward; the zero means nothing."""

    async def sleep_until(self, monotonic_s: float) -> None:
        """Returns once `monotonic()` is at least `monotonic_s`."""

    async def sleep(self, seconds: float) -> None:
        """Returns `seconds` from now. Zero still yields once to the event loop."""


class SystemClock:
    """The machine's time."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep_until(self, monotonic_s: float) -> None:
        await asyncio.sleep(max(0.0, monotonic_s - time.monotonic()))

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))


class ManualClock:
    """Time that stands still until a test calls `advance`."""

    def __init__(self, now_ms: int = 1_700_000_000_000, monotonic_s: float = 1_000.0) -> None:
        self._now_ms = float(now_ms)
        self._monotonic_s = monotonic_s
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now_ms(self) -> int:
        return int(self._now_ms)

    def monotonic(self) -> float:
        return self._monotonic_s

    @property
    def sleepers(self) -> int:
        """How many tasks wait for this clock: lets a test advance only when the code under test has gone to sleep."""
        return sum(not sleeper.done() for _, _, sleeper in self._sleepers)

    def advance(self, seconds: float) -> None:
        """Moves both readings on and wakes, in order of their times, everyone whose time has come."""
        self._now_ms += seconds * 1_000
        self._monotonic_s += seconds
        while self._sleepers and self._sleepers[0][0] <= self._monotonic_s:
            _, _, sleeper = heapq.heappop(self._sleepers)
            if not sleeper.done():
                sleeper.set_result(None)

    def set_now_ms(self, now_ms: int) -> None:
        """Jumps the wall clock alone, as a correction of the machine's time does."""
        self._now_ms = float(now_ms)

    async def sleep_until(self, monotonic_s: float) -> None:
        if monotonic_s <= self._monotonic_s:
            await asyncio.sleep(0)
            return
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (monotonic_s, next(self._order), sleeper))
        await sleeper

    async def sleep(self, seconds: float) -> None:
        await self.sleep_until(self._monotonic_s + seconds)
