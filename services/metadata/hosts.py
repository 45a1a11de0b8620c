"""Which of several hosts a connection goes to: the first that serves, found although others swallow packets.

What must stay true: a host that says nothing costs `STAGGER_S`, not its time-out, before the next one is asked; of a
host that answers at once no other is asked; no connection is left over.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from runtime import tasks

STAGGER_S: Final = 0.25
"""A connection takes 5 to 30 ms on a local network, with TLS across a continent about 200."""


async def first_that_serves(
    count: int,
    first: int,
    connect: Callable[[int], Coroutine[Any, Any, Any]],
    expected: tuple[type[BaseException], ...],
) -> tuple[int, Any]:
    """Connects to one of `count` hosts, beginning with number `first`; returns its number and the connection.

    Args:
        count: how many hosts there are.
        first: the number of the one that is asked first.
        connect: connects to a host by number, within a bound of its own.
        expected: what it raises for a host that does not serve; the last one is raised when none does.
    """
    asked: dict[asyncio.Task[Any], int] = {}
    left = [(first + step) % count for step in range(count)]
    failure: BaseException = TimeoutError()
    try:
        while left or asked:
            if left:
                number = left.pop(0)
                asked[asyncio.create_task(connect(number))] = number
            done, _ = await asyncio.wait(
                asked, timeout=STAGGER_S if left else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                number = asked.pop(task)
                error = task.exception()
                if error is None:
                    return number, task.result()
                if not isinstance(error, expected):
                    raise error
                failure = error
    finally:
        await tasks.cancel(*asked)
        for task in asked:
            if not task.cancelled() and task.exception() is None:
                task.result().terminate()
    raise failure
