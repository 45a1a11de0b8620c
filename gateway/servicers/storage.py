"""``StorageService``: the truth about the stores, joined from the services that own them.

A service that does not answer takes its stores down with it as far as anybody can tell: they are shown as they were
last known, DOWN, with what happened as their last error.
"""

import asyncio
from collections.abc import Mapping, Sequence

from fleet.codec import timestamp_from_ms
from openmanager.fleet.v1 import status_pb2, status_pb2_grpc
from openmanager.gateway.v1 import storage_pb2
from runtime.channel import Channel, calling
from runtime.clock import Clock
from runtime.errors import OpenManagerError

ASK_TIMEOUT_S = 1.0
"""A service answers from memory; one that takes longer is as good as away."""

OWNED = {"timeseries": ("engine", "primary"), "metadata": ("postgresql", "primary")}
"""The store that a service has in any case, and its role: shown when it never answered since the gateway started."""

Statuses = list[status_pb2.StoreStatus]


def replica_names(timeseries: Sequence[Channel]) -> dict[str, Channel]:
    """The replicas of timeseries as owners: a single one is called as its service, several by their targets, too."""
    if len(timeseries) == 1:
        return {"timeseries": timeseries[0]}
    return {f"timeseries {channel.target}": channel for channel in timeseries}


class StorageServicer:
    """Answers ``openmanager.gateway.v1.StorageService``."""

    def __init__(self, owners: Mapping[str, Channel], clock: Clock) -> None:
        """Takes the channels of the store-owning services by name."""
        self._stubs = {name: status_pb2_grpc.StoreStatusServiceStub(channel.grpc) for name, channel in owners.items()}
        self._clock = clock
        self._last: dict[str, Statuses] = {name: self._never_seen(name) for name in owners}

    async def GetStorageStatus(
        self, _request: storage_pb2.GetStorageStatusRequest, _context: object
    ) -> storage_pb2.GetStorageStatusResponse:
        """Asks every owner at once."""
        return storage_pb2.GetStorageStatusResponse(stores=await self.statuses())

    async def statuses(self) -> Statuses:
        """Every configured store, in order of owner and name."""
        answers = await asyncio.gather(*(self._ask(name) for name in sorted(self._stubs)))
        return [status for answer in answers for status in answer]

    async def _ask(self, owner: str) -> Statuses:
        try:
            async with calling(owner):
                request = status_pb2.ListStoreStatusesRequest()
                response = await self._stubs[owner].ListStoreStatuses(request, timeout=ASK_TIMEOUT_S)
        except OpenManagerError as error:
            self._mark_down(owner, f"{owner} does not answer: {error.message}")
        else:
            self._last[owner] = list(response.stores)
            for status in self._last[owner]:
                status.service = owner
        return self._last[owner]

    def _mark_down(self, owner: str, text: str) -> None:
        now = timestamp_from_ms(self._clock.now_ms())
        for status in self._last[owner]:
            if status.state != status_pb2.STORE_STATE_DOWN:
                status.state = status_pb2.STORE_STATE_DOWN
                status.since.CopyFrom(now)
            status.latency_ms = 0.0
            status.last_error = text
            status.last_error_time.CopyFrom(now)

    def _never_seen(self, owner: str) -> Statuses:
        service = owner.partition(" ")[0]
        if service not in OWNED:
            return []
        name, role = OWNED[service]
        return [
            status_pb2.StoreStatus(name=name, role=role, service=owner, since=timestamp_from_ms(self._clock.now_ms()))
        ]
