"""``ServerTransferService``: the record of the servers as a file, out and in."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Final

from gateway.server_files import (
    CSV_TYPE,
    JSON_LINES_TYPE,
    TEXTS,
    Row,
    csv_head,
    csv_row,
    json_row,
    read_csv,
    read_json_lines,
)
from openmanager.gateway.v1 import transfer_pb2 as pb
from openmanager.metadata.v1 import imports_pb2, imports_pb2_grpc, metadata_pb2, metadata_pb2_grpc
from runtime.channel import Channel, calling

PAGE_SIZE: Final = 100
"""Servers of one answer of the record, with notes of up to 64 KiB each."""
_COUNTED: Final = {
    pb.IMPORT_OUTCOME_CREATED: "created",
    pb.IMPORT_OUTCOME_UPDATED: "updated",
    pb.IMPORT_OUTCOME_UNCHANGED: "unchanged",
    pb.IMPORT_OUTCOME_FAILED: "failed",
}


class ServerTransferServicer:
    """Answers ``openmanager.gateway.v1.ServerTransferService``."""

    def __init__(self, metadata: Channel) -> None:
        self._records = metadata_pb2_grpc.ServerRegistryServiceStub(metadata.grpc)
        self._imports = imports_pb2_grpc.ServerImportServiceStub(metadata.grpc)

    async def ExportServers(
        self, request: pb.ExportServersRequest, _context: object
    ) -> AsyncGenerator[pb.ExportServersResponse, None]:
        """A page of the record after another."""
        is_json = request.format == pb.SERVER_FILE_FORMAT_JSON_LINES
        kind, write = (JSON_LINES_TYPE, json_row) if is_json else (CSV_TYPE, csv_row)
        inner = metadata_pb2.ListServerRecordsRequest(
            page_size=PAGE_SIZE, environment=request.environment, role=request.role, with_notes=True
        )
        head = "" if is_json else csv_head()
        while True:
            async with calling("metadata"):
                page = await self._records.ListServerRecords(inner)
            text = head + "".join(write(_values(record)) for record in page.servers)
            yield pb.ExportServersResponse(text=text, content_type=kind)
            head, inner.page_token = "", page.next_page_token
            if not inner.page_token:
                return

    async def ImportServers(self, request: pb.ImportServersRequest, _context: object) -> pb.ImportServersResponse:
        """Reads the file, then records what it says at once."""
        read = read_json_lines if request.format == pb.SERVER_FILE_FORMAT_JSON_LINES else read_csv
        rows = await asyncio.to_thread(read, request.text)
        good = [row for row in rows if row.fault is None]
        has_faults = len(good) < len(rows)
        inner = imports_pb2.ImportServerRecordsRequest(
            servers=[_imported(row) for row in good],
            dry_run=request.dry_run or (has_faults and not request.partial),
            partial=request.partial,
        )
        async with calling("metadata"):
            response = await self._imports.ImportServerRecords(inner)
        results = {row.number: result for row, result in zip(good, response.results, strict=True)}
        answer = pb.ImportServersResponse(applied=response.applied and (request.partial or not has_faults))
        for row in rows:
            said = answer.rows.add(row=row.number, id=str(row.values.get("id", "")))
            if row.fault is not None:
                said.outcome = pb.IMPORT_OUTCOME_FAILED
                said.field, said.message = row.fault
            else:
                result = results[row.number]
                said.outcome = pb.ImportOutcome.ValueType(result.outcome)
                said.field, said.message = result.field, result.message
            name = _COUNTED[said.outcome]
            setattr(answer, name, getattr(answer, name) + 1)
        return answer


def _values(record: metadata_pb2.ServerRecord) -> dict[str, Any]:
    said = record.descriptor
    return {
        "id": said.server_id,
        "hostname": said.hostname,
        "environment": said.environment,
        "role": said.role,
        "location": said.location,
        "labels": dict(sorted(record.details.labels.items())),
        "notes": record.notes,
    }


def _imported(row: Row) -> imports_pb2.ImportedServer:
    values = row.values
    imported = imports_pb2.ImportedServer(labels=values.get("labels", {}), notes=values.get("notes", ""))
    imported.descriptor.server_id = values.get("id", "")
    for name in TEXTS:
        if name != "notes":
            setattr(imported.descriptor, name, values.get(name, ""))
    imported.fields.paths.extend(name for name in values if name != "id")
    return imported
