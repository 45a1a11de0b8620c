"""gRPC to imports and back: decode, call, encode."""

from typing import Final

from fleet.codec import descriptor_from_pb
from openmanager.metadata.v1 import imports_pb2 as pb
from runtime.errors import InvalidArgument
from services.metadata.imports import FIELDS, ImportedServer, ServerImports
from services.metadata.store import Remarks

SERVER_IMPORT: Final = "openmanager.metadata.v1.ServerImportService"


class ServerImportServicer:
    """``ServerImportService`` on a database."""

    def __init__(self, imports: ServerImports) -> None:
        self._imports = imports

    async def ImportServerRecords(
        self, request: pb.ImportServerRecordsRequest, _context: object
    ) -> pb.ImportServerRecordsResponse:
        servers = [_imported(said, f"servers[{index}]") for index, said in enumerate(request.servers)]
        results, applied = await self._imports.run(servers, dry_run=request.dry_run, partial=request.partial)
        return pb.ImportServerRecordsResponse(
            results=[
                pb.ImportResult(
                    outcome=pb.ImportOutcome.ValueType(int(result.outcome)), field=result.field, message=result.message
                )
                for result in results
            ],
            applied=applied,
        )


def _imported(said: pb.ImportedServer, where: str) -> ImportedServer:
    fields = frozenset(said.fields.paths)
    if unknown := fields - set(FIELDS):
        raise InvalidArgument(f"{min(unknown)[:64]!r} is not one of {', '.join(FIELDS)}", field=f"{where}.fields")
    return ImportedServer(
        descriptor=descriptor_from_pb(said.descriptor),
        remarks=Remarks(labels=tuple(sorted(said.labels.items())), notes=said.notes),
        fields=fields,
    )
