"""What the simulator's tests share: a writer that fails on command, and a small fleet at a fixed time."""

from fleet.model import WriteBatch
from fleet.writer import WriteResult
from runtime.errors import OpenManagerError
from services.simulator.fleet import build_fleet
from services.simulator.signals import SignalGenerator

SEED = 7
INTERVAL_MS = 10_000
NOON = 1_760_097_600_000 // INTERVAL_MS  # a tick: Friday 2025-10-10 12:00 UTC


def generator(servers: int = 20, *, seed: int = SEED, interval_ms: int = INTERVAL_MS) -> SignalGenerator:
    """A fleet's generator."""
    return SignalGenerator(build_fleet(servers, seed=seed, interval_ms=interval_ms), seed=seed, interval_ms=interval_ms)


class FakeWriter:
    """Keeps what it is given, or raises `error` while that is set."""

    def __init__(self) -> None:
        self.batches: list[WriteBatch] = []
        self.attempts: list[WriteBatch] = []
        self.error: OpenManagerError | None = None

    async def write(self, batch: WriteBatch) -> WriteResult:
        self.attempts.append(batch)
        if self.error is not None:
            raise self.error
        self.batches.append(batch)
        return WriteResult(sequence=len(self.batches), accepted_points=batch.rows.points, rejected_points=0, errors=())

    @property
    def times_ms(self) -> list[int]:
        """The first time of each batch that was taken."""
        return [int(batch.rows.times_ms[0]) for batch in self.batches]
