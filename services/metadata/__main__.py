"""The metadata service: settings -> database (embedded or yours) -> store -> gRPC; with an argument, a command."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fleet.status import StoreMonitor, StoreStatusServicer
from runtime.process import Process, run_process
from runtime.server import bind
from services.metadata import commands
from services.metadata.embedded import EmbeddedPostgres
from services.metadata.facts import Facts
from services.metadata.imports import ServerImports
from services.metadata.imports_servicer import SERVER_IMPORT, ServerImportServicer
from services.metadata.maintenance import MaintenanceStore
from services.metadata.maintenance_servicer import MAINTENANCE_STORE, MaintenanceStoreServicer
from services.metadata.server_copy import ServerCopy
from services.metadata.servicer import (
    INTERACTION_STORE,
    SERVER_REGISTRY,
    InteractionStoreServicer,
    ServerRegistryServicer,
)
from services.metadata.settings import MetadataSettings
from services.metadata.store_connection import Database
from services.metadata.store_local import LocalFirstStore
from services.metadata.store_postgres import PostgresStore
from services.metadata.target import DatabaseTarget, target_of_url


@asynccontextmanager
async def _target(settings: MetadataSettings, process: Process[MetadataSettings]) -> AsyncIterator[DatabaseTarget]:
    """Where the database is; one of our own runs for as long as this is entered."""
    if settings.database_url is not None:
        yield target_of_url(settings.database_url.get_secret_value())
        return
    async with EmbeddedPostgres(process.folder, clock=process.clock) as postgres:
        yield postgres.target()


async def serve(settings: MetadataSettings, process: Process[MetadataSettings]) -> None:
    """Serves until the process stops; the database may come and go meanwhile."""
    async with _target(settings, process) as target, Database(target, clock=process.clock) as database:
        postgres = PostgresStore(database)
        facts = Facts(process.folder, database, clock=process.clock, limit_bytes=settings.metadata_journal_limit)
        async with facts, ServerCopy(process.folder, postgres, database, clock=process.clock) as copy:
            store = LocalFirstStore(database, postgres, facts, copy, clock=process.clock)
            maintenance = MaintenanceStore(database, clock=process.clock, changed=copy.changed)
            probes = {"postgresql": (target.role, store.probe)}
            async with StoreMonitor("metadata", probes, process.clock) as monitor:
                await process.serve_grpc(
                    settings.metadata_address,
                    [
                        bind(SERVER_REGISTRY, ServerRegistryServicer(store)),
                        bind(MAINTENANCE_STORE, MaintenanceStoreServicer(maintenance)),
                        bind(SERVER_IMPORT, ServerImportServicer(ServerImports(database, changed=copy.changed))),
                        bind(INTERACTION_STORE, InteractionStoreServicer(store)),
                        bind("openmanager.fleet.v1.StoreStatusService", StoreStatusServicer(monitor)),
                    ],
                    address_setting="METADATA_ADDRESS",
                )


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(commands.main(sys.argv[1:]))
    run_process("metadata", MetadataSettings, serve)
