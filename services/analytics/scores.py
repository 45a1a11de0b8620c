"""Each server's score, minute by minute, as a series of the history: `anomaly_score`, 0 to 1.

It is written to timeseries only, and neither to the cache nor with a descriptor: a server that fell silent must not
look alive because it was judged. What must stay true: what is written here is not judged again, nor does it move the
tail's time; a minute that is judged again after a restart has the same score, so that writing it again changes nothing;
what waits is in the checkpoint, for its minutes are not judged again.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from fleet.codec import metric_set_to_pb, rows_to_pb
from fleet.model import Metric, MetricKind, MetricSet, Rows
from fleet.replicas import Replica
from runtime import telemetry
from runtime.channel import Channel
from runtime.clock import Clock
from runtime.errors import InvalidArgument
from services.analytics.scoring.arrays import Floats

METRIC: Final = "anomaly_score"
METRIC_SET: Final = MetricSet((Metric(name=METRIC, unit="1", kind=MetricKind.GAUGE),))
MAX_WAITING: Final = 1_000_000
"""Scores, 16 bytes each. While timeseries is away there are no new ones but those on their way; who was away himself
reads faster than he writes: a day of 500 servers waits."""

_log = logging.getLogger(__name__)
_lost = telemetry.meter(__name__).create_counter(
    "openmanager.analytics.lost_scores", unit="{row}", description="Scores that timeseries was never given."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The scores of some servers in the minute that begins at `start_ms`, shape (n,)."""

    start_ms: int
    server_ids: tuple[str, ...]
    scores: Floats

    def rows(self) -> Rows:
        """As rows of METRIC_SET."""
        times = np.full(len(self.server_ids), self.start_ms, np.int64)
        values = self.scores.reshape(-1, 1)
        return Rows(metric_set_id=METRIC_SET.id, server_ids=self.server_ids, times_ms=times, values=values)


class ScoreWriter:
    """Writes what was judged, oldest first."""

    def __init__(self, timeseries: Channel, clock: Clock) -> None:
        self._replica = Replica(timeseries, clock)
        self._set = metric_set_to_pb(METRIC_SET)
        self._waiting: deque[Scored] = deque()
        self._count = 0
        self._something = asyncio.Event()

    def put(self, scored: Iterable[Scored]) -> None:
        """Takes minutes; the oldest go where too many wait."""
        for one in scored:
            if one.server_ids:
                self._waiting.append(one)
                self._count += len(one.server_ids)
        while self._count > MAX_WAITING:
            self._lose(self._taken(), "too many wait for timeseries (MAX_WAITING)")
        if self._waiting:
            self._something.set()

    def all(self) -> tuple[Scored, ...]:
        """All that wait, oldest first."""
        return tuple(self._waiting)

    def _taken(self) -> Scored:
        one = self._waiting.popleft()
        self._count -= len(one.server_ids)
        return one

    def _lose(self, scored: Scored, why: object) -> None:
        _lost.add(len(scored.server_ids))
        _log.error("the scores of %d servers are lost: %s", len(scored.server_ids), why)

    async def run(self) -> None:
        """Goes on until cancelled.

        Raises:
            OpenManagerError: timeseries did not take them; call again.
        """
        while True:
            while not self._waiting:
                self._something.clear()
                await self._something.wait()
            scored = self._waiting[0]
            try:
                await self._replica.append(rows_to_pb(scored.rows()), self._set, ())
            except InvalidArgument as error:
                self._lose(scored, error)
            if self._waiting and self._waiting[0] is scored:
                self._taken()
