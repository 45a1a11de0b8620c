"""Background work that never ends silently.

What must stay true: a guarded task that fails is logged and started again after a back-off that grows and is capped;
only cancellation ends it; it does not inherit the deadline of the call in which it was started.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from runtime import deadline
from runtime.clock import Clock, SystemClock
from runtime.errors import OpenManagerError

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long to wait after the n-th failure in a row: initial * 2^n, capped, less up to half of it at random.

    A run of at least `healthy_after_s` counts as a recovery and starts over.
    """

    initial_s: float = 0.1
    max_s: float = 10.0
    healthy_after_s: float = 30.0

    def delay_s(self, failures: int, rng: random.Random) -> float:
        full_s: float = min(self.max_s, self.initial_s * 2 ** min(failures, 30))
        return full_s * (1 - rng.random() / 2)


DEFAULT_BACKOFF: Final = Backoff()
QUIET_FAILURES: Final = 4
"""So many failures in a row are logged as routine: the processes start in any order."""


async def run_forever(
    name: str,
    work: Callable[[], Awaitable[object]],
    backoff: Backoff = DEFAULT_BACKOFF,
    *,
    clock: Clock | None = None,
    rng: random.Random | None = None,
) -> None:
    """Runs `work()` again and again until cancelled. That it failed, or returned, is logged; then it waits."""
    clock = clock or SystemClock()
    rng = rng or random.Random()  # noqa: S311  jitter, no secret
    deadline.current.set(None)
    failures = 0
    while True:
        started = clock.monotonic()
        try:
            await work()
        except OpenManagerError as error:  # a store is away, and the like: no fault of the code
            _log.log(_level(failures), "background task %s waits: %s", name, error)
        except Exception as error:
            _log.exception("background task %s failed: %s", name, error)
        else:
            _log.info("background task %s ended", name)
        if clock.monotonic() - started >= backoff.healthy_after_s:
            failures = 0
        await clock.sleep(backoff.delay_s(failures, rng))
        failures += 1


def _level(failures: int) -> int:
    """How loudly to say that a task waits again: a short wait is routine, a long one is said ever more rarely.

    What is said at each try only shows at DEBUG: an outage of a night would push all else out of a log of bounded size.
    """
    if failures < QUIET_FAILURES:
        return logging.INFO
    is_power_of_two = failures & (failures - 1) == 0
    return logging.WARNING if is_power_of_two else logging.DEBUG


def start(name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A named task whose failure is logged when nobody awaits it. Prefer a TaskGroup where there is one."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_report)
    return task


@contextlib.asynccontextmanager
async def beside(name: str, work: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Runs `work` beside the block and cancels it at the block's end; should it fail before, that is logged."""
    task = start(name, work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits for their end, whatever it is. Asked again each second: on Python 3.11 a cancellation
    that meets the end of an `asyncio.wait_for` is lost (python/cpython 86296), and a loop around it then goes on."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=1.0)


def _report(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("task %s failed: %s", task.get_name(), error, exc_info=error)
