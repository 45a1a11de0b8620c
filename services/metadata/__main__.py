"""The metadata service: settings -> database (embedded or yours) -> store -> gRPC; with an argument, a command."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fleet.audit.configuration import record_configuration
from fleet.audit.log import FILE_NAME, AuditLog
from fleet.status import StoreMonitor, StoreStatusServicer
from runtime import tasks
from runtime.process import Process, run_process
from runtime.server import bind
from runtime.tasks import run_forever
from services.metadata import commands
from services.metadata.access import servicer as access
from services.metadata.access.feed import AccessFeed
from services.metadata.access.sessions import Sessions
from services.metadata.access.setup import offer_setup
from services.metadata.access.store import AccessStore
from services.metadata.anomalies.servicer import ANOMALY_STORE, AnomalyStoreServicer
from services.metadata.anomalies.store import AnomalyStore
from services.metadata.audit.keeper import Keeper
from services.metadata.audit.servicer import AUDIT, AUDIT_SINK, AuditServicer, AuditSinkServicer
from services.metadata.audit.store import AuditStore
from services.metadata.embedded import EmbeddedPostgres
from services.metadata.facts import Facts
from services.metadata.imports import ServerImports
from services.metadata.imports_servicer import SERVER_IMPORT, ServerImportServicer
from services.metadata.interactions_servicer import AiInteractionServicer
from services.metadata.maintenance import MaintenanceStore
from services.metadata.maintenance_servicer import MAINTENANCE_STORE, MaintenanceStoreServicer
from services.metadata.server_copy import ServerCopy
from services.metadata.servicer import SERVER_REGISTRY, ServerRegistryServicer
from services.metadata.settings import MetadataSettings
from services.metadata.store_connection import Database
from services.metadata.store_local import LocalFirstStore
from services.metadata.store_postgres import PostgresStore
from services.metadata.target import DatabaseTarget, target_of_url

RETENTION_INTERVAL_S = 3_600.0


@asynccontextmanager
async def _target(settings: MetadataSettings, process: Process[MetadataSettings]) -> AsyncIterator[DatabaseTarget]:
    """Where the database is; one of our own runs for as long as this is entered."""
    if settings.database_url is not None:
        yield target_of_url(settings.database_url.get_secret_value())
        return
    async with EmbeddedPostgres(process.folder, clock=process.clock) as postgres:
        yield postgres.target()


@asynccontextmanager
async def _retention(
    settings: MetadataSettings, store: LocalFirstStore, process: Process[MetadataSettings]
) -> AsyncIterator[None]:
    """Has what is too old deleted for as long as this is entered."""
    kept_s = settings.ai_retention
    if kept_s is None:
        yield
        return

    async def forget() -> None:
        while True:
            await store.forget_interactions(kept_s)
            await process.clock.sleep(RETENTION_INTERVAL_S)

    async with tasks.beside("ai-retention", run_forever("ai-retention", forget, clock=process.clock)):
        yield


@asynccontextmanager
async def _keeper(
    settings: MetadataSettings, process: Process[MetadataSettings], store: AuditStore, facts: Facts
) -> AsyncIterator[Keeper]:
    """The audit log, and this service's own events in it."""
    keeper = Keeper(
        process.folder,
        store,
        facts,
        clock=process.clock,
        retention_s=settings.audit_retention,
        legal_hold=settings.audit_legal_hold,
    )
    async with keeper:
        log = AuditLog(
            process.folder / FILE_NAME,
            "metadata",
            clock=process.clock,
            limit_bytes=settings.audit_journal_limit,
            ship=keeper.sink.append,
        )
        async with log:
            keeper.log = log
            await record_configuration(log, "metadata", settings, process.clock)
            yield keeper


async def serve(settings: MetadataSettings, process: Process[MetadataSettings]) -> None:
    """Serves until the process stops; the database may come and go meanwhile."""
    async with _target(settings, process) as target, Database(target, clock=process.clock) as database:
        postgres = PostgresStore(database)
        facts = Facts(process.folder, database, clock=process.clock, limit_bytes=settings.metadata_journal_limit)
        async with facts, ServerCopy(process.folder, postgres, database, clock=process.clock) as copy:
            store = LocalFirstStore(database, postgres, facts, copy, clock=process.clock)
            users = AccessStore(database)
            feed = AccessFeed(process.folder, users, process.clock)
            sessions = Sessions(database, process.clock, lifetime_s=settings.session_lifetime)
            users.told = sessions.told = feed.take
            audit = AuditStore(database)
            anomalies = await AnomalyStore.opened(database, facts, process.clock)
            maintenance = MaintenanceStore(database, clock=process.clock, changed=copy.changed)
            probes = {"postgresql": (target.role, store.probe)}
            async with (
                StoreMonitor("metadata", probes, process.clock) as monitor,
                tasks.beside("access", run_forever("telling who may come in", feed.follow)),
                tasks.beside("set-up", run_forever("offering the set-up", lambda: offer_setup(process.folder, users))),
                _retention(settings, store, process),
                _keeper(settings, process, audit, facts) as keeper,
            ):
                await process.serve_grpc(
                    settings.metadata_address,
                    [
                        bind(SERVER_REGISTRY, ServerRegistryServicer(store)),
                        bind("openmanager.gateway.v1.AiInteractionService", AiInteractionServicer(store)),
                        bind(access.ACCESS, access.AccessServicer(users, feed, process.folder)),
                        bind(access.FEED, access.AccessFeedServicer(users, feed)),
                        bind(access.SESSIONS, access.SessionServicer(sessions, feed)),
                        bind(AUDIT, AuditServicer(keeper, audit)),
                        bind(AUDIT_SINK, AuditSinkServicer(keeper)),
                        bind(ANOMALY_STORE, AnomalyStoreServicer(anomalies)),
                        bind(MAINTENANCE_STORE, MaintenanceStoreServicer(maintenance)),
                        bind(SERVER_IMPORT, ServerImportServicer(ServerImports(database, changed=copy.changed))),
                        bind("openmanager.fleet.v1.StoreStatusService", StoreStatusServicer(monitor)),
                    ],
                    address_setting="METADATA_ADDRESS",
                )


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(commands.main(sys.argv[1:]))
    run_process("metadata", MetadataSettings, serve)
