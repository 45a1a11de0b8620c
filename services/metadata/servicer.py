"""gRPC to the store and back: decode, call, encode. Every rule is in the store."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from fleet.codec import descriptor_from_pb, descriptor_to_pb, details_to_pb
from openmanager.metadata.v1 import metadata_pb2 as pb
from services.metadata.store import MetadataStore, Remarks, ServerFilter, ServerRecord

SERVER_REGISTRY = "openmanager.metadata.v1.ServerRegistryService"
MAX_NOTED_PAGE_SIZE = 100
"""Servers with notes of 64 KiB each in a message of at most 16 MiB."""


class ServerRegistryServicer:
    """``ServerRegistryService`` on a store."""

    def __init__(self, store: MetadataStore) -> None:
        self._store = store

    async def ListServerRecords(
        self, request: pb.ListServerRecordsRequest, _context: object
    ) -> pb.ListServerRecordsResponse:
        filters = ServerFilter(
            environment=request.environment,
            role=request.role,
            ids=tuple(request.server_ids),
            show_deleted=request.show_deleted,
            only_deleted=request.only_deleted,
            labels=tuple(request.labels.items()),
            after_id=request.after_id,
        )
        size = min(request.page_size or MAX_NOTED_PAGE_SIZE, MAX_NOTED_PAGE_SIZE)
        page = await self._store.list_servers(
            filters, page_size=size if request.with_notes else request.page_size, page_token=request.page_token
        )
        return pb.ListServerRecordsResponse(
            servers=[_record(server, with_notes=request.with_notes) for server in page.items],
            next_page_token=page.next_page_token,
            total_size=page.total_size,
            stale_since=_maybe_time(page.stale_since),
        )

    async def GetServerRecord(self, request: pb.GetServerRecordRequest, _context: object) -> pb.GetServerRecordResponse:
        server = await self._store.get_server(request.server_id)
        return pb.GetServerRecordResponse(server=_record(server), stale_since=_maybe_time(server.stale_since))

    async def CreateServerRecord(
        self, request: pb.CreateServerRecordRequest, _context: object
    ) -> pb.CreateServerRecordResponse:
        remarks = _remarks(request.labels, request.notes)
        server = await self._store.create_server(descriptor_from_pb(request.descriptor), remarks)
        return pb.CreateServerRecordResponse(server=_record(server))

    async def UpdateServerRecord(
        self, request: pb.UpdateServerRecordRequest, _context: object
    ) -> pb.UpdateServerRecordResponse:
        server = await self._store.update_server(
            descriptor_from_pb(request.descriptor),
            request.update_mask.paths,
            remarks=_remarks(request.labels, request.notes),
            etag=request.etag,
        )
        return pb.UpdateServerRecordResponse(server=_record(server))

    async def RegisterServers(self, request: pb.RegisterServersRequest, _context: object) -> pb.RegisterServersResponse:
        changed = await self._store.register_servers([descriptor_from_pb(server) for server in request.servers])
        return pb.RegisterServersResponse(changed=changed)

    async def DeleteServerRecord(
        self, request: pb.DeleteServerRecordRequest, _context: object
    ) -> pb.DeleteServerRecordResponse:
        server = await self._store.delete_server(request.server_id, etag=request.etag)
        return pb.DeleteServerRecordResponse(server=_record(server))

    async def UndeleteServerRecord(
        self, request: pb.UndeleteServerRecordRequest, _context: object
    ) -> pb.UndeleteServerRecordResponse:
        server = await self._store.undelete_server(request.server_id, etag=request.etag)
        return pb.UndeleteServerRecordResponse(server=_record(server))

    async def WatchServerRecords(
        self, _request: pb.WatchServerRecordsRequest, _context: object
    ) -> AsyncGenerator[pb.WatchServerRecordsResponse, None]:
        async with aclosing(self._store.watch_servers()) as changes:
            async for changed in changes:
                yield pb.WatchServerRecordsResponse(servers=[_record(server, with_notes=False) for server in changed])


def _time(instant: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(instant)
    return message


def _maybe_time(instant: datetime | None) -> Timestamp | None:
    return None if instant is None else _time(instant)


def _remarks(labels: Mapping[str, str], notes: str) -> Remarks:
    return Remarks(labels=tuple(sorted(labels.items())), notes=notes)


def _record(server: ServerRecord, *, with_notes: bool = True) -> pb.ServerRecord:
    return pb.ServerRecord(
        descriptor=descriptor_to_pb(server.descriptor),
        create_time=_time(server.create_time),
        update_time=_time(server.update_time),
        delete_time=_maybe_time(server.delete_time),
        details=details_to_pb(server.details),
        notes=server.notes if with_notes else "",
    )
