"""Starts the gateway: `python -m gateway`."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import prometheus_client

from fleet.writer import FleetWriter
from gateway.access import grpc_authenticator
from gateway.admission import Admission
from gateway.changes import Changes
from gateway.http.app import Health, create_app
from gateway.http.guard import Guard
from gateway.http.server import serve_http
from gateway.metrics import OperatorMetrics
from gateway.notes import Notes
from gateway.registry import Registry
from gateway.servicers.fleet import FleetServicer
from gateway.servicers.history import HistoryServicer
from gateway.servicers.ingest import IngestServicer
from gateway.servicers.maintenance import MaintenanceServicer
from gateway.servicers.passing import AiInteractionServicer, AnalyticsServicer, SimulatorServicer
from gateway.servicers.storage import StorageServicer, replica_names
from gateway.servicers.transfer import ServerTransferServicer
from gateway.settings import GatewaySettings
from gateway.state import FleetState
from gateway.workers import own_number, serve_by_workers
from openmanager.gateway.v1 import (
    ai_pb2,
    analytics_pb2,
    fleet_pb2,
    history_pb2,
    ingest_pb2,
    maintenance_pb2,
    simulator_pb2,
    storage_pb2,
    transfer_pb2,
)
from runtime import tasks
from runtime.interception import Interception
from runtime.process import Process, run_process
from runtime.server import Bound, bind
from runtime.tasks import Backoff, run_forever
from runtime.waiting import Waiting

RECONNECT = Backoff(initial_s=0.1, max_s=2.0, healthy_after_s=5.0)


async def serve(settings: GatewaySettings, process: Process[GatewaySettings]) -> None:
    """Runs until the process is told to stop."""
    if settings.workers > 1 and own_number() is None:
        await serve_by_workers(settings, process)
    else:
        await serve_alone(settings, process)


async def serve_alone(settings: GatewaySettings, process: Process[GatewaySettings]) -> None:
    """Serves in this process."""
    async with AsyncExitStack() as stack:
        cache, metadata, simulator, analytics = [
            await stack.enter_async_context(process.open_channel(target))
            for target in (
                settings.cache_target,
                settings.metadata_target,
                settings.simulator_target,
                settings.analytics_target,
            )
        ]
        timeseries = await stack.enter_async_context(process.open_channels(settings.timeseries_targets))
        clock = process.clock
        state = FleetState(cache, clock)
        admission = Admission(clock, rate=settings.rate_limit, trusted_proxy=settings.trusted_proxy)
        waiting = Waiting(settings.max_waiting_calls, setting="GATEWAY_MAX_WAITING_CALLS")
        writer = await stack.enter_async_context(
            FleetWriter(timeseries=timeseries, cache=cache, metadata=metadata, clock=clock, describe=state.descriptor)
        )
        registry = Registry(metadata=metadata, cache=cache, writer=writer, state=state, clock=clock)
        storage = StorageServicer({"cache": cache, "metadata": metadata} | replica_names(timeseries), clock)
        operator = OperatorMetrics(storage, state, clock)
        services = [
            bind(
                fleet_pb2.DESCRIPTOR.services_by_name["FleetService"],
                FleetServicer(state, registry, Changes(state, clock), Notes(metadata)),
            ),
            bind(
                maintenance_pb2.DESCRIPTOR.services_by_name["MaintenanceService"],
                MaintenanceServicer(metadata, registry),
            ),
            bind(transfer_pb2.DESCRIPTOR.services_by_name["ServerTransferService"], ServerTransferServicer(metadata)),
            bind(history_pb2.DESCRIPTOR.services_by_name["HistoryService"], HistoryServicer(timeseries, state, clock)),
            bind(ingest_pb2.DESCRIPTOR.services_by_name["IngestService"], IngestServicer(writer, state)),
            bind(storage_pb2.DESCRIPTOR.services_by_name["StorageService"], storage),
            bind(analytics_pb2.DESCRIPTOR.services_by_name["AnalyticsService"], AnalyticsServicer(analytics)),
            bind(ai_pb2.DESCRIPTOR.services_by_name["AiInteractionService"], AiInteractionServicer(metadata)),
            bind(simulator_pb2.DESCRIPTOR.services_by_name["SimulatorService"], SimulatorServicer(simulator)),
        ]

        async def follow() -> None:
            await state.follow(registry.snapshot_received)

        background = [
            asyncio.create_task(run_forever("the live state", follow, RECONNECT), name="follow-cache"),
            asyncio.create_task(run_forever("telling the cache of servers", registry.seed, RECONNECT), name="seed"),
            asyncio.create_task(
                run_forever("following the record", registry.follow_records, RECONNECT), name="follow-records"
            ),
            asyncio.create_task(run_forever("asking the stores", operator.refresh, RECONNECT), name="store-metrics"),
        ]
        listening = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(
                    _serve_http(settings, process, services, state, admission, waiting, listening), name="http"
                )
                group.create_task(
                    _serve_grpc(settings, process, services, state, admission, waiting, listening), name="grpc"
                )
        finally:
            await tasks.cancel(*background)


async def _serve_grpc(
    settings: GatewaySettings,
    process: Process[GatewaySettings],
    services: Sequence[Bound],
    state: FleetState,
    admission: Admission,
    waiting: Waiting,
    http_listening: asyncio.Event,
) -> None:
    await process.serve_grpc(
        settings.grpc_address,
        services,
        address_setting="GATEWAY_GRPC_ADDRESS",
        public=True,
        ready=lambda: state.known and http_listening.is_set(),
        authenticator=grpc_authenticator(settings.token, admission),
        waiting=waiting,
        share_port=own_number() is not None,
    )


async def _serve_http(
    settings: GatewaySettings,
    process: Process[GatewaySettings],
    services: Sequence[Bound],
    state: FleetState,
    admission: Admission,
    waiting: Waiting,
    listening: asyncio.Event,
) -> None:
    def health() -> Health:
        return Health(ready=state.known, reasons=() if state.known else ("the cache has not been reached yet",))

    app = create_app(
        services,
        interception=Interception(None, waiting=waiting),
        guard=Guard(settings.token),
        health=health,
        metrics=prometheus_client.generate_latest,
        clock=process.clock,
        admission=admission,
    )
    await serve_http(
        app,
        settings.http_address,
        process.stopping,
        bound=lambda _address: listening.set(),
        tls_cert_file=settings.tls_cert_file,
        tls_key_file=settings.tls_key_file,
        share_port=own_number() is not None,
    )


if __name__ == "__main__":
    number = own_number()
    part = "" if number is None else f"worker-{number}"
    run_process("gateway", GatewaySettings, serve, prometheus=True, part=part)
