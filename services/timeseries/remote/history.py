"""What an external store must be able to answer so that history may live there.

What must stay true: the answer to a query is what the engine would answer from points alone: windows are multiples of
the step since the epoch, labelled by their start, clipped to [start, end); a window without points is absent; rows of
one server that were tagged differently over time (it moved from staging to production) are one series.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Final, Protocol

from fleet.model import Metric
from runtime import deadline
from runtime.circuit import Circuit
from runtime.clock import Clock
from runtime.errors import DeadlineExceeded
from services.timeseries.engine.query import Query, SeriesResult

PATIENCE: Final = 0.8
"""Of the time that the caller has left: the rest is for an answer without whom was waited for."""


def patience_s() -> float | None:
    """How long to wait for others; None: as long as they may take. A caller who runs out of time is cancelled, which
    tells a circuit nothing, and he has nothing of what is held here."""
    left_s = deadline.remaining_s()
    return None if left_s is None else max(0.0, PATIENCE * left_s)


@asynccontextmanager
async def patiently(name: str) -> AsyncIterator[None]:
    """Waits for no longer than that. Raises DeadlineExceeded."""
    limit = asyncio.timeout(patience_s())
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded(f"{name} did not answer in time", reason="STORE_DEADLINE_EXCEEDED") from None


class RemoteHistory(Protocol):
    """A store that holds what was shipped to it. Every call ends within a bound of its own, and one that is away is not
    waited for by every caller."""

    @property
    def name(self) -> str:
        """The store's name in the status: "influxdb", "prometheus"."""

    def query(self, query: Query, metrics: Mapping[str, Metric]) -> AsyncIterator[SeriesResult]:
        """The series that have points in the range, in order of server id and metric key.

        Args:
            query: what to read; bounds on points and series are the engine's (`max_points`, `max_series`).
            metrics: what is known of metrics by key: unit and kind for the results, labels, what a bare name matches.
                A metric that only the store knows has no unit and is of unspecified kind.

        Raises:
            Unavailable: the store does not answer, or refuses the token.
            DeadlineExceeded: it has not answered while the caller could wait.
            ResourceExhausted: a bound was reached; nothing is cut silently.
        """

    async def close(self) -> None:
        """Ends connections; no query may run."""


class Guarded:
    """A history behind a circuit, for one that has none of its own."""

    def __init__(self, history: RemoteHistory, clock: Clock) -> None:
        self._history = history
        self._circuit = Circuit(history.name, clock)

    @property
    def name(self) -> str:
        return self._history.name

    async def query(self, query: Query, metrics: Mapping[str, Metric]) -> AsyncIterator[SeriesResult]:
        """As `RemoteHistory.query`; also raises Unavailable, CIRCUIT_OPEN, and DeadlineExceeded."""
        with self._circuit.attempt():
            async with aclosing(self._history.query(query, metrics)) as results:  # type: ignore[type-var]
                while True:
                    async with patiently(self.name):
                        result = await anext(results, None)
                    if result is None:
                        break
                    yield result

    async def close(self) -> None:
        await self._history.close()
