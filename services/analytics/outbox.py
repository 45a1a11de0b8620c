"""Findings on their way to metadata, which keeps them: those that it has not acknowledged as they are now.

What must stay true: of a finding only what was told last waits, so there are never more than findings; beyond the bound
those that waited longest go, which is told; what is acknowledged goes only if it has not changed meanwhile.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

from fleet.anomaly import Anomaly, anomaly_to_pb
from openmanager.metadata.v1 import anomaly_pb2, anomaly_pb2_grpc
from runtime import telemetry
from runtime.channel import Channel, calling
from runtime.errors import InvalidArgument, ResourceExhausted

MAX_WAITING: Final = 10_000
"""Some 10 MB; a fleet of 20,000 quiet servers finds as many in two weeks."""
BATCH: Final = 200

_log = logging.getLogger(__name__)
_lost = telemetry.meter(__name__).create_counter(
    "openmanager.analytics.lost_findings", unit="{finding}", description="Findings that metadata was never given."
)


class Outbox:
    """The findings that wait, longest first."""

    def __init__(self, limit: int = MAX_WAITING) -> None:
        self._limit = limit
        self._waiting: dict[str, Anomaly] = {}
        self._something = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, finding_id: object) -> bool:
        return finding_id in self._waiting

    def put(self, findings: Iterable[Anomaly]) -> None:
        """Takes findings as they are now."""
        for finding in findings:
            before = self._waiting.pop(finding.id, finding)
            self._waiting[finding.id] = max(before, finding, key=lambda one: one.rank)
        while len(self._waiting) > self._limit:
            self.lose(self._waiting[next(iter(self._waiting))], "too many wait for metadata (MAX_WAITING)")
        if self._waiting:
            self._something.set()

    def all(self) -> tuple[Anomaly, ...]:
        """All that wait, longest first."""
        return tuple(self._waiting.values())

    async def first(self, count: int) -> list[Anomaly]:
        """Those that wait longest; returns once there are any."""
        while not self._waiting:
            self._something.clear()
            await self._something.wait()
        return list(islice(self._waiting.values(), count))

    def acknowledge(self, findings: Iterable[Anomaly]) -> None:
        """Metadata has them as they were given to it."""
        for finding in findings:
            if self._waiting.get(finding.id) is finding:
                del self._waiting[finding.id]

    def lose(self, finding: Anomaly, why: str) -> None:
        """Gives a finding up, and tells."""
        self._waiting.pop(finding.id, None)
        _lost.add(1)
        _log.error("a finding of %s is lost: %s", finding.server_id, why, extra={"finding": finding.id, "why": why})


class Reporter:
    """Gives metadata what waits."""

    def __init__(self, metadata: Channel, outbox: Outbox) -> None:
        self._stub = anomaly_pb2_grpc.AnomalyStoreServiceStub(metadata.grpc)
        self._outbox = outbox

    async def run(self) -> None:
        """Goes on until cancelled.

        Raises:
            OpenManagerError: metadata did not take them; call again.
        """
        while True:
            await self._give(await self._outbox.first(BATCH))

    async def _give(self, findings: Sequence[Anomaly]) -> None:
        request = anomaly_pb2.RecordAnomaliesRequest(anomalies=[anomaly_to_pb(finding) for finding in findings])
        try:
            async with calling("metadata"):
                await self._stub.RecordAnomalies(request)
        except (InvalidArgument, ResourceExhausted) as error:
            if isinstance(error, ResourceExhausted) and error.reason != "MESSAGE_TOO_LARGE":
                raise
            if len(findings) == 1:
                self._outbox.lose(findings[0], f"metadata refuses it: {error}")
                return
            middle = len(findings) // 2
            for half in (findings[:middle], findings[middle:]):
                await self._give(half)
        else:
            self._outbox.acknowledge(findings)
