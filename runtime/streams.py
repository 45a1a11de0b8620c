"""The streams of one server that run: whose each is, and how it is ended before its method ends it.

What must stay true: a stream is ended once, by cancelling its task, which interception answers with the reason that is
noted here; one that is just sending a message ends behind it, unless the process stops, or nobody takes the message.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from runtime.caller import Caller
from runtime.errors import OpenManagerError

Over = Callable[[Caller], OpenManagerError | None]
"""Says of somebody who was let in why he may not go on; None: he may."""
TAKEN_WITHIN_S: Final = 5.0
"""How long the last message of a stream that is to end may take to be sent. Who does not read would stay for ever."""
STREAMS_AT_ONCE: Final = 256  # are looked at before others have their turn: 0.3 ms


@dataclass(slots=True)
class Running:
    """A running one: whose it is, whether a message of it is being sent just now, and why it is to end."""

    who: Caller | None = None
    sending: bool = False
    over: OpenManagerError | None = None


class Streams:
    """Those that run, each in a task of its own."""

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[Any], Running] = {}
        self.all_end = False
        """Whether the process stops, which ends those that begin now, too."""

    def begin(self, task: asyncio.Task[Any]) -> Running:
        """Notes a stream; its owner says whose it is, and when it sends."""
        running = self._running[task] = Running()
        return running

    def end(self, task: asyncio.Task[Any]) -> None:
        """It has ended."""
        self._running.pop(task, None)

    def end_all(self) -> None:
        """Ends all of them, whatever they do."""
        self.all_end = True
        for task in tuple(self._running):
            task.cancel()

    async def end_of(self, over: Over) -> None:
        """Ends those of callers who may not go on: at once, but for one that is sending, behind that."""
        for number, (task, running) in enumerate(tuple(self._running.items()), start=1):
            if running.who is not None and running.over is None and self._running.get(task) is running:
                running.over = over(running.who)
                if running.over is not None and running.sending:
                    asyncio.get_running_loop().call_later(TAKEN_WITHIN_S, self._cut_off, task, running)
                elif running.over is not None:
                    task.cancel()
            if number % STREAMS_AT_ONCE == 0:
                await asyncio.sleep(0)

    def is_over(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether a task's stream is to end, by `end_of`."""
        running = None if task is None else self._running.get(task)
        return running is not None and running.over is not None

    def _cut_off(self, task: asyncio.Task[Any], running: Running) -> None:
        if self._running.get(task) is running:
            task.cancel()
