"""Servers as people record them: created, changed, deleted and restored, and how the live state hears of it.

The record (metadata) is the truth about which servers there are; the cache is the truth about how they are. What must
stay true: a change is refused when the record cannot take it; once the record has it, cache and history are told as
well as can be now, ``seed`` tells the cache the rest whenever its whole state was received anew (it may have started
empty), and the record of servers that only the live state knows, and ``follow_records`` what others change. While the
record's database is away its copy may not know of what was restored last, so nothing is taken out of the live state on
its word, and nothing recorded.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager

from fleet.codec import descriptor_from_pb
from fleet.model import etag_of
from fleet.validation import check_descriptors
from fleet.writer import MAX_REGISTRATIONS, NO_ROOM, FleetWriter
from gateway.entry import FULL
from gateway.state import FleetState
from openmanager.cache.v1 import cache_pb2, cache_pb2_grpc
from openmanager.fleet.v1 import details_pb2, metric_pb2, status_pb2
from openmanager.gateway.v1 import fleet_pb2
from openmanager.metadata.v1 import metadata_pb2, metadata_pb2_grpc
from runtime import paging
from runtime.channel import Channel, calling
from runtime.clock import Clock
from runtime.errors import InvalidArgument, OpenManagerError, ResourceExhausted

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
        request = metadata_pb2.CreateServerRecordRequest(
            descriptor=descriptor, labels=server.labels, notes=server.notes
        )
        with _naming("server.id"):
            async with calling("metadata"):
                response = await self._records.CreateServerRecord(request)
        return await self._show(response.server)

    async def update(self, server: fleet_pb2.Server, fields: Sequence[str], etag: str = "") -> fleet_pb2.Server:
        """Changes the named fields of a recorded server.

        Raises:
            Aborted: with ETAG_MISMATCH, when `etag` is given and not the record's.
            InvalidArgument: naming the field.
            NotFound: no such record.
        """
        descriptor = _checked(server)
        request = metadata_pb2.UpdateServerRecordRequest(
            descriptor=descriptor, labels=server.labels, notes=server.notes, etag=etag
        )
        request.update_mask.paths.extend(fields)
        with _naming("server.id"):
            async with calling("metadata"):
                response = await self._records.UpdateServerRecord(request)
        return await self._show(response.server)

    async def delete(self, server_id: str, etag: str = "") -> None:
        """Marks a record deleted and takes the server out of the live state.

        Raises:
            Aborted: with ETAG_MISMATCH, when `etag` is given and not the record's.
            NotFound: no such record.
        """
        request = metadata_pb2.DeleteServerRecordRequest(server_id=server_id, etag=etag)
        with _naming("id"):
            async with calling("metadata"):
                response = await self._records.DeleteServerRecord(request)
        revision = response.server.details.revision
        try:
            async with calling("cache"):
                await self._cache.RemoveServers(
                    cache_pb2.RemoveServersRequest(server_ids=[server_id], revisions=[revision])
                )
        except OpenManagerError as error:
            _log.warning("server %s is deleted, but the cache does not know yet: %s", server_id, error)
            self._unseeded.set()
        await self._state.until(lambda: server_id not in self._state, SHOWN_WITHIN_S)

    async def undelete(self, server_id: str, etag: str = "") -> fleet_pb2.Server:
        """Restores a deleted record.

        Raises:
            Aborted: with ETAG_MISMATCH, when `etag` is given and not the record's.
            NotFound: no such record.
        """
        request = metadata_pb2.UndeleteServerRecordRequest(server_id=server_id, etag=etag)
        with _naming("id"):
            async with calling("metadata"):
                response = await self._records.UndeleteServerRecord(request)
        return await self._show(response.server)

    async def deleted(
        self,
        environment: str,
        role: str,
        labels: Sequence[tuple[str, str | None]],
        *,
        after_id: str,
        size: int,
    ) -> tuple[list["DeletedServer"], int]:
        """Deleted servers after an id, one more than `size` at most, and how many match in all."""
        request = metadata_pb2.ListServerRecordsRequest(
            page_size=size + 1,
            environment=environment,
            role=role,
            only_deleted=True,
            labels={key: value or "" for key, value in labels},
            after_id=after_id,
        )
        try:
            async with calling("metadata"):
                response = await self._records.ListServerRecords(request)
        except OpenManagerError as error:
            error.field = "label" if error.field == "labels" else error.field
            raise
        return [DeletedServer(record) for record in response.servers], response.total_size

    async def places(self, server_ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Environments and roles that servers have in the record, deleted ones too; of those that are not there,
        nothing."""
        return {
            one.descriptor.server_id: (one.descriptor.environment, one.descriptor.role)
            async for page in self._pages_of(server_ids)
            for one in page.servers
        }

    async def show_details(self, server_id: str, details: details_pb2.ServerDetails) -> None:
        """Tells the live state what the record of a server says now, and waits until it shows it."""
        try:
            async with calling("cache"):
                recorded = cache_pb2.RecordedDetails(server_id=server_id, details=details)
                await self._cache.UpdateServers(cache_pb2.UpdateServersRequest(details=[recorded]))
        except OpenManagerError as error:
            _log.warning("the record of %s has changed, but the cache does not know yet: %s", server_id, error)
            self._unseeded.set()
        await self._state.until(self._is_shown(server_id, details.revision), SHOWN_WITHIN_S)

    def snapshot_received(self) -> None:
        """Tells that the cache's whole state has arrived, so that ``seed`` compares it with the record."""
        self._unseeded.set()

    async def seed(self) -> None:
        """Tells the cache of recorded servers that it lacks, and of deleted ones, and the record of servers that it
        lacks, whenever there may be some."""
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

    async def follow_records(self) -> None:
        """Tells the cache what changes in the record, whoever changes it, until the stream of it breaks."""
        try:
            async with calling("metadata"):
                stream: AsyncIterator[metadata_pb2.WatchServerRecordsResponse]
                stream = self._records.WatchServerRecords(metadata_pb2.WatchServerRecordsRequest())
                async for changed in stream:
                    await self._tell(changed.servers)
        finally:
            self._unseeded.set()  # what changes until the stream is there again is told by nobody

    async def _seed_once(self) -> bool:
        """Whether the record itself was asked, and nothing is left to be told."""
        deleted: dict[str, int] = {}
        recorded: set[str] = set()
        is_record = fits = True
        async for page in self._pages():
            recorded.update(record.descriptor.server_id for record in page.servers)
            is_stale = page.HasField("stale_since")
            is_record &= not is_stale
            deleted.update(_deleted(page.servers))
            fits &= await self._tell(page.servers, is_stale=is_stale)
        removed = await self._remove(deleted) if is_record else 0
        if is_record:
            await self._record_all_but(recorded)
        return is_record and (fits or not removed)  # with those gone there may be room

    async def _remove(self, deleted: dict[str, int]) -> int:
        """Has the cache forget deleted servers, given with their revisions; returns how many it had."""
        # it took a while to read all: what was restored meanwhile is there again, and is asked about once more
        there = [server_id for server_id in deleted if server_id in self._state]
        async for page in self._pages_of(there):
            for record in page.servers:
                if not record.HasField("delete_time"):
                    del deleted[record.descriptor.server_id]
        told, removed = list(deleted), 0
        for start in range(0, len(told), SEED_PAGE_SIZE):  # together they may be over a message
            part = told[start : start + SEED_PAGE_SIZE]
            revisions = [deleted[server_id] for server_id in part]
            request = cache_pb2.RemoveServersRequest(server_ids=part, revisions=revisions)
            async with calling("cache"):
                removed += (await self._cache.RemoveServers(request)).removed
        return removed

    async def _record_all_but(self, recorded: Container[str]) -> None:
        """Has servers of the live state recorded that the record lacks: who was to tell it of them, and had told the
        cache, was stopped while it was away, and those who send rows of them do not describe them again."""
        entries = self._state.all() if self._state.known else []
        lacking = [entry.state.descriptor for entry in entries if not entry.revision and entry.id not in recorded]
        for start in range(0, len(lacking), MAX_REGISTRATIONS):
            part = lacking[start : start + MAX_REGISTRATIONS]
            try:
                async with calling("metadata"):
                    await self._records.RegisterServers(metadata_pb2.RegisterServersRequest(servers=part))
            except InvalidArgument as error:  # told again they would be refused again
                _log.error("metadata refused %d servers: %s", len(part), error)

    async def _tell(self, records: Iterable[metadata_pb2.ServerRecord], *, is_stale: bool = False) -> bool:
        """Tells the cache of servers that the live state lacks, and what it does not know of the others yet; False: it
        had no room for some."""
        request = cache_pb2.UpdateServersRequest()
        for record in records:
            server_id = record.descriptor.server_id
            if record.HasField("delete_time") or self._is_told(record, is_stale=is_stale):
                continue
            request.servers.append(record.descriptor)
            request.details.add(server_id=server_id, details=record.details)
        if not request.details:
            return True
        try:
            async with calling("cache"):
                await self._cache.UpdateServers(request)
        except ResourceExhausted as error:
            if error.metadata.get("limit") not in NO_ROOM:
                raise
            _log.error("cache has no room for some servers: %s", error)  # it has taken the others
            return False
        return True

    def _is_told(self, record: metadata_pb2.ServerRecord, *, is_stale: bool) -> bool:
        """Whether the live state knows the record, and who the server is by it: whoever told of the same revision, such
        as one of a maintenance window, may have told nothing else. A copy that is stale knows nothing better."""
        entry = self._state.find(record.descriptor.server_id)
        if entry is None or entry.revision < record.details.revision:
            return False
        is_same = _same(entry.state.descriptor, record.descriptor, _SHOWN_FIELDS)
        return is_same or is_stale or entry.revision > record.details.revision

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

    async def _pages_of(self, server_ids: Sequence[str]) -> AsyncIterator[metadata_pb2.ListServerRecordsResponse]:
        """Their records, deleted ones too."""
        for start in range(0, len(server_ids), paging.MAX_PAGE_SIZE):
            asked = server_ids[start : start + paging.MAX_PAGE_SIZE]
            request = metadata_pb2.ListServerRecordsRequest(page_size=len(asked), show_deleted=True, server_ids=asked)
            async with calling("metadata"):
                response = await self._records.ListServerRecords(request)
            yield response

    async def _show(self, record: metadata_pb2.ServerRecord) -> fleet_pb2.Server:
        descriptor = record.descriptor
        server_id = descriptor.server_id
        try:
            async with calling("cache"):
                request = cache_pb2.UpdateServersRequest(servers=[descriptor], admit_removed=True)
                request.details.add(server_id=server_id, details=record.details)
                await self._cache.UpdateServers(request)
            await self._writer.tell_servers([descriptor_from_pb(descriptor)])
        except OpenManagerError as error:
            _log.warning("server %s is recorded, but not everyone knows yet: %s", server_id, error)
            self._unseeded.set()
        is_shown = self._is_shown(server_id, record.details.revision)
        await self._state.until(lambda: is_shown() and self._shows(descriptor), SHOWN_WITHIN_S)
        entry = self._state.get(server_id) if self._state.known else None
        server = entry.message(FULL) if entry is not None and self._shows(descriptor) else _server(descriptor)
        return _with_remarks(server, record)

    def _is_shown(self, server_id: str, revision: int) -> Callable[[], bool]:
        return lambda: (self._state.revision(server_id) or 0) >= revision

    def _shows(self, descriptor: metric_pb2.ServerDescriptor) -> bool:
        if descriptor.server_id not in self._state:
            return False
        entry = self._state.get(descriptor.server_id)
        return entry is not None and _same(entry.state.descriptor, descriptor, _SHOWN_FIELDS)


def _deleted(records: Iterable[metadata_pb2.ServerRecord]) -> dict[str, int]:
    """The deleted ones among them, with their revisions."""
    return {one.descriptor.server_id: one.details.revision for one in records if one.HasField("delete_time")}


class DeletedServer:
    """A deleted server as it is listed."""

    def __init__(self, record: metadata_pb2.ServerRecord) -> None:
        self.id = record.descriptor.server_id
        self._record = record

    def server(self, _view: fleet_pb2.ServerView.ValueType) -> bytes:
        """A serialized Server; the same in each view."""
        message = _server(self._record.descriptor)
        message.status = status_pb2.SERVER_STATUS_UNSPECIFIED
        message.delete_time.CopyFrom(self._record.delete_time)
        message.etag = etag_of(self._record.details.revision)
        message.labels.update(self._record.details.labels)
        return message.SerializeToString(deterministic=True)


_REMARKS = ("labels", "notes")
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
        elif error.field in _REMARKS:
            error.field = f"server.{error.field}"
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


def _with_remarks(server: fleet_pb2.Server, record: metadata_pb2.ServerRecord) -> fleet_pb2.Server:
    """The server as a change has left it, whatever the live state shows of others that came after."""
    server.labels.clear()
    server.labels.update(record.details.labels)
    if record.notes:
        server.notes = record.notes
    server.etag = etag_of(record.details.revision)
    return server
