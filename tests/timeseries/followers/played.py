"""A store that a test plays, and the clock that has the shipping loop wait for it."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from runtime.clock import ManualClock
from runtime.errors import InvalidArgument, OpenManagerError, Unavailable
from services.timeseries.engine import EngineSettings
from services.timeseries.followers.backend import BackendInfo, Receipt, TaggedRows
from tests.timeseries.followers.samples import NOON_MS, metric_set

SET = metric_set("cpu_usage")
SETTINGS = EngineSettings(maintenance_interval_s=1e9)
MANY = 1_000


class PlayedBackend:
    """Takes what it is told to take."""

    name = "played"
    address = "here"
    syncs = False

    def __init__(self) -> None:
        self.room = MANY
        self.errors: list[OpenManagerError] = []
        self.bad: set[int] = set()
        self.asked: list[float] = []
        self.batches: list[list[TaggedRows]] = []
        self.clock = ManualClock(NOON_MS)

    async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
        self.asked.append(self.clock.monotonic())
        if len(self.batches) >= self.room:
            raise Unavailable("no room")
        if self.errors:
            raise self.errors.pop(0)
        if self.bad & {int(at) - NOON_MS for part in batch for at in part.rows.times_ms}:
            raise InvalidArgument("it is bad", reason="BAD")
        self.batches.append(list(batch))
        return Receipt(shipped=sum(part.rows.points for part in batch))

    async def probe(self) -> BackendInfo:
        return BackendInfo(version="played")

    async def close(self) -> None:
        pass

    @property
    def times(self) -> list[int]:
        return [int(at) - NOON_MS for batch in self.batches for part in batch for at in part.rows.times_ms]


async def let_run(clock: ManualClock, until: Callable[[], Awaitable[object]]) -> None:
    """Lets time pass until something has happened."""
    waiting = asyncio.ensure_future(until())
    while not waiting.done():
        clock.advance(0.01)  # slowly: what the disk keeps waiting is not to be settled meanwhile
        await asyncio.sleep(0.001)
    await waiting
