"""The threads that compute, and how many calls may wait for them.

What must stay true: what nobody waits for any more is not begun; the tail, which shares the interpreter with these
threads, is never behind more than two of them.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self, TypeVar

from runtime.errors import ResourceExhausted

T = TypeVar("T")

THREADS: Final = 2
"""The second is so that one server's answer (20 to 80 ms) does not wait for the list of a fleet."""
MAX_WORKING: Final = 4
"""Calls that read or compute; each holds up to 1 MB of history."""
MAX_CALLS: Final = 64
"""Calls that work or wait: the last of them has its answer after 3 to 6 s."""


class Workers:
    """`async with workers.place(): ...; await workers.run(compute)`."""

    def __init__(self, *, max_calls: int = MAX_CALLS) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "outlook")
        self._working = asyncio.Semaphore(MAX_WORKING)
        self._max_calls = max_calls
        self._calls = 0

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A call's place, waited for.

        Raises:
            ResourceExhausted: too many wait already.
        """
        if self._calls >= self._max_calls:
            raise ResourceExhausted(
                f"{self._calls} calls of this kind work or wait (MAX_CALLS)",
                reason="TOO_MANY_WAITING",
                retry_after_s=1.0,
            )
        self._calls += 1
        try:
            async with self._working:
                yield
        finally:
            self._calls -= 1

    async def run(self, compute: Callable[[], T]) -> T:
        """Computes in a thread; cancelled, it is not begun any more, or its result is dropped."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, compute)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
