"""Servers as people record them: created, changed, deleted and restored, and how the live state hears of it.

The record (metadata) is the truth about which servers there are; the cache is the truth about how they are. What must
stay true: a change is refused when the record cannot take it; once the record has it, cache and history are told as
well as can be now, and ``seed`` tells the cache the rest whenever its whole state was received anew (it may have
started empty). While the record's database is away its copy may not know of what was restored last, so nothing is taken
out of the live state on its word.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager

from fleet.codec import descriptor_from_pb
from fleet.validation import check_descriptors
from fleet.writer import FleetWriter
from gateway.entry import FULL
from gateway.state import FleetState
from openmanager.cache.v1 import cache_pb2, cache_pb2_grpc
from openmanager.fleet.v1 import metric_pb2, status_pb2
from openmanager.gateway.v1 import fleet_pb2
from openmanager.metadata.v1 import metadata_pb2, metadata_pb2_grpc
from runtime.channel import Channel, calling
from runtime.clock import Clock
from runtime.errors import InvalidArgument, OpenManagerError

SHOWN_WITHIN_S = 2.0
"""How long a change waits to be seen in the live state, so that a reader who changed something reads the change."""

SEED_PAGE_SIZE = 1_000
ASK_AGAIN_S = 5.0
"""While the database is away."""
_log = logging.getLogger(__name__)


class Registry:
    """Changes the record and tells the rest of the product."""

    def __init__(
        self, *, metadata: Channel, cache: Channel, writer: FleetWriter, state: FleetState, clock: Clock
    ) -> None:
        self._records = metadata_pb2_grpc.ServerRegistryServiceStub(metadata.grpc)
        self._cache = cache_pb2_grpc.CacheServiceStub(cache.grpc)
        self._writer = writer
        self._state = state
        self._clock = clock
        self._unseeded = asyncio.Event()

    async def create(self, server: fleet_pb2.Server) -> fleet_pb2.Server:
        """Records a new server.

        Raises:
            InvalidArgument: naming the field.
            AlreadyExists: the id is taken, maybe by a deleted server.
        """
        descriptor = _checked(server)
        request = metadata_pb2.CreateServerRecordRequest(descriptor=descriptor)
        with _naming("server.id"):
            async with calling("metadata"):
                response = await self._records.CreateServerRecord(request)
        return await self._show(response.server.descriptor)

    async def update(self, server: fleet_pb2.Server, fields: Sequence[str]) -> fleet_pb2.Server:
        """Changes the named fields of a recorded server.

        Raises:
            InvalidArgument: naming the field.
            NotFound: no such record.
        """
        descriptor = _checked(server)
        request = metadata_pb2.UpdateServerRecordRequest(descriptor=descriptor)
        request.update_mask.paths.extend(fields)
        with _naming("server.id"):
            async with calling("metadata"):
                response = await self._records.UpdateServerRecord(request)
        return await self._show(response.server.descriptor)

    async def delete(self, server_id: str) -> None:
        """Marks a record deleted and takes the server out of the live state.

        Raises:
            NotFound: no such record.
        """
        request = metadata_pb2.DeleteServerRecordRequest(server_id=server_id)
        with _naming("id"):
            async with calling("metadata"):
                await self._records.DeleteServerRecord(request)
        try:
            async with calling("cache"):
                await self._cache.RemoveServers(cache_pb2.RemoveServersRequest(server_ids=[server_id]))
        except OpenManagerError as error:
            _log.warning("server %s is deleted, but the cache does not know yet: %s", server_id, error)
            self._unseeded.set()
        await self._state.until(lambda: server_id not in self._state, SHOWN_WITHIN_S)

    async def undelete(self, server_id: str) -> fleet_pb2.Server:
        """Restores a deleted record.

        Raises:
            NotFound: no such record.
        """
        request = metadata_pb2.UndeleteServerRecordRequest(server_id=server_id)
        with _naming("id"):
            async with calling("metadata"):
                response = await self._records.UndeleteServerRecord(request)
        return await self._show(response.server.descriptor)

    def snapshot_received(self) -> None:
        """Tells that the cache's whole state has arrived, so that ``seed`` compares it with the record."""
        self._unseeded.set()

    async def seed(self) -> None:
        """Tells the cache of recorded servers that it lacks, and of deleted ones, whenever there may be some."""
        while True:
            await self._unseeded.wait()
            self._unseeded.clear()
            try:
                if not await self._seed_once():
                    await self._clock.sleep(ASK_AGAIN_S)
                    self._unseeded.set()
            except BaseException:
                self._unseeded.set()
                raise

    async def _seed_once(self) -> bool:
        """Whether the record itself was asked."""
        missing: list[metric_pb2.ServerDescriptor] = []
        deleted: list[str] = []
        is_record = True
        async for page in self._pages():
            is_record &= not page.HasField("stale_since")
            for record in page.servers:
                server_id = record.descriptor.server_id
                if record.HasField("delete_time"):
                    deleted.append(server_id)
                elif server_id not in self._state:
                    missing.append(record.descriptor)
        async with calling("cache"):
            if missing:
                await self._cache.UpdateServers(cache_pb2.UpdateServersRequest(servers=missing))
            if deleted and is_record:
                await self._cache.RemoveServers(cache_pb2.RemoveServersRequest(server_ids=deleted))
        return is_record

    async def _pages(self) -> AsyncIterator[metadata_pb2.ListServerRecordsResponse]:
        token = ""
        while True:
            request = metadata_pb2.ListServerRecordsRequest(
                page_size=SEED_PAGE_SIZE, page_token=token, show_deleted=True
            )
            async with calling("metadata"):
                response = await self._records.ListServerRecords(request)
            yield response
            token = response.next_page_token
            if not token:
                return

    async def _show(self, descriptor: metric_pb2.ServerDescriptor) -> fleet_pb2.Server:
        server_id = descriptor.server_id
        try:
            async with calling("cache"):
                request = cache_pb2.UpdateServersRequest(servers=[descriptor], admit_removed=True)
                await self._cache.UpdateServers(request)
            await self._writer.tell_servers([descriptor_from_pb(descriptor)])
        except OpenManagerError as error:
            _log.warning("server %s is recorded, but not everyone knows yet: %s", server_id, error)
            self._unseeded.set()
        await self._state.until(lambda: self._shows(descriptor), SHOWN_WITHIN_S)
        entry = self._state.get(server_id) if self._state.known else None
        if entry is not None and self._shows(descriptor):
            return entry.message(FULL)
        return _server(descriptor)

    def _shows(self, descriptor: metric_pb2.ServerDescriptor) -> bool:
        if descriptor.server_id not in self._state:
            return False
        entry = self._state.get(descriptor.server_id)
        return entry is not None and _same(entry.state.descriptor, descriptor, _SHOWN_FIELDS)


_SHOWN_FIELDS = ("hostname", "environment", "role", "location")


def _same(one: metric_pb2.ServerDescriptor, other: metric_pb2.ServerDescriptor, fields: Iterable[str]) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def _descriptor(server: fleet_pb2.Server) -> metric_pb2.ServerDescriptor:
    return metric_pb2.ServerDescriptor(
        server_id=server.id,
        hostname=server.hostname or server.id,
        environment=server.environment,
        role=server.role,
        location=server.location,
    )


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """What metadata calls server_id has this name in the request of the public API."""
    try:
        yield
    except OpenManagerError as error:
        if error.field == "server_id":
            error.field = field
        raise


def _checked(server: fleet_pb2.Server) -> metric_pb2.ServerDescriptor:
    descriptor = _descriptor(server)
    try:
        check_descriptors([descriptor_from_pb(descriptor)], field="server")
    except InvalidArgument as error:  # it counts from 0 and says server_id, where the public API has one with an id
        name = (error.field or "").rpartition(".")[2]
        error.field = f"server.{'id' if name == 'server_id' else name}"
        raise
    return descriptor


def _server(descriptor: metric_pb2.ServerDescriptor) -> fleet_pb2.Server:
    return fleet_pb2.Server(
        id=descriptor.server_id,
        hostname=descriptor.hostname,
        environment=descriptor.environment,
        role=descriptor.role,
        location=descriptor.location,
        status=status_pb2.SERVER_STATUS_OFFLINE,
    )
