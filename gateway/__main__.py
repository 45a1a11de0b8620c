"""Starts the gateway: `python -m gateway`."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import prometheus_client
from starlette.routing import BaseRoute

from fleet.access import Caller, role_name
from fleet.audit.configuration import record_configuration
from fleet.audit.log import AuditLog
from fleet.writer import FleetWriter
from gateway import web
from gateway.access.callers import Callers, exchange_authenticator, grpc_authenticator, known_to
from gateway.access.origin import Origin
from gateway.access.policy import Policy
from gateway.access.sessions import Cookie, Sessions
from gateway.access.table import AccessTable
from gateway.admission import Admission
from gateway.audit import Audit, audited, left_behind, own_file, sending, telling
from gateway.changes import Changes
from gateway.findings import Findings
from gateway.http.app import Health, create_app
from gateway.http.guard import OPEN_PATHS, Guard
from gateway.http.server import serve_http
from gateway.http.streams import is_watch
from gateway.metrics import OperatorMetrics
from gateway.notes import Notes
from gateway.registry import Registry
from gateway.servicers.access import access_servicer
from gateway.servicers.anomalies import AnomalyServicer
from gateway.servicers.fleet import FleetServicer
from gateway.servicers.forward import forwarded
from gateway.servicers.history import HistoryServicer
from gateway.servicers.ingest import IngestServicer
from gateway.servicers.maintenance import MaintenanceServicer
from gateway.servicers.outlook import SERVICE as ANALYTICS_SERVICE
from gateway.servicers.outlook import analytics_servicer
from gateway.servicers.passing import SimulatorServicer
from gateway.servicers.storage import StorageServicer, replica_names
from gateway.servicers.transfer import ServerTransferServicer
from gateway.settings import OPENID_CALLBACK_PATH, OPENID_LOGIN_PATH, GatewaySettings
from gateway.state import FleetState
from gateway.workers import own_number, serve_by_workers, siblings
from openmanager.access.v1 import access_pb2 as access_feed_pb2
from openmanager.gateway.v1 import (
    access_pb2,
    ai_pb2,
    audit_pb2,
    fleet_pb2,
    history_pb2,
    ingest_pb2,
    maintenance_pb2,
    simulator_pb2,
    storage_pb2,
    transfer_pb2,
)
from runtime import caller, tasks
from runtime.channel import Channel
from runtime.errors import OpenManagerError
from runtime.interception import Interception
from runtime.process import Process, run_process, takes_no_arguments
from runtime.redaction import remember_secret
from runtime.server import Bound, bind
from runtime.tasks import Backoff, run_forever
from runtime.waiting import Waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Who is let in, and how many: the same for both transports."""

    callers: Callers
    table: AccessTable
    cookie: Cookie
    admission: Admission
    waiting: Waiting
    audit: Audit
    pages: Sequence[BaseRoute]
    """What browsers are shown before anybody is known."""


_AUDIT = audit_pb2.DESCRIPTOR.services_by_name["AuditService"]
_LOG_IN = "openmanager.gateway.v1.AccessService.LogIn"
PATHS_OF_ALL = OPEN_PATHS | web.PATHS | {OPENID_LOGIN_PATH, OPENID_CALLBACK_PATH}
"""Open to everybody: they tell nothing, or are for who is not known yet."""
WATCHES = frozenset(
    f"/{service.full_name}/{method.name}"
    for service in (fleet_pb2.DESCRIPTOR.services_by_name["FleetService"], ANALYTICS_SERVICE)
    for method in service.methods
    if is_watch(method)
)
"""Who goes on with one of these may hear nothing until something changes."""
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
        findings = Findings(metadata, state, clock)
        admission = Admission(clock, rate=settings.rate_limit)
        waiting = Waiting(settings.max_waiting_calls, setting="GATEWAY_MAX_WAITING_CALLS", watchers=WATCHES)
        table = AccessTable(metadata, clock)
        audit = Audit(await _audit_log(stack, settings, process, metadata), clock)
        if settings.token is not None:
            remember_secret(settings.token.get_secret_value())
        callers = Callers(settings.token, table, accounts=settings.accounts, origin=Origin(settings.trusted_proxy))
        cookie = Cookie(secure=settings.tls_cert_file is not None or settings.trusted_proxy is not None)
        sessions = Sessions(metadata, table, clock, cookie)
        pages = [*web.routes(), *await _openid_pages(stack, settings, process, sessions, audit)]
        door = Door(
            callers=callers,
            table=table,
            cookie=cookie,
            admission=admission,
            waiting=waiting,
            audit=audit,
            pages=pages,
        )
        writer = await stack.enter_async_context(
            FleetWriter(timeseries=timeseries, cache=cache, metadata=metadata, clock=clock, describe=state.descriptor)
        )
        registry = Registry(metadata=metadata, cache=cache, writer=writer, state=state, clock=clock)
        storage = StorageServicer({"cache": cache, "metadata": metadata} | replica_names(timeseries), clock)
        operator = OperatorMetrics(storage, state, clock)
        ai = ai_pb2.DESCRIPTOR.services_by_name["AiInteractionService"]
        services = [
            bind(
                fleet_pb2.DESCRIPTOR.services_by_name["FleetService"],
                FleetServicer(state, registry, Changes(state, findings, clock), Notes(metadata)),
            ),
            bind(
                maintenance_pb2.DESCRIPTOR.services_by_name["MaintenanceService"],
                MaintenanceServicer(metadata, registry),
            ),
            bind(transfer_pb2.DESCRIPTOR.services_by_name["ServerTransferService"], ServerTransferServicer(metadata)),
            bind(history_pb2.DESCRIPTOR.services_by_name["HistoryService"], HistoryServicer(timeseries, state, clock)),
            bind(
                ingest_pb2.DESCRIPTOR.services_by_name["IngestService"], IngestServicer(writer, state, registry.places)
            ),
            bind(storage_pb2.DESCRIPTOR.services_by_name["StorageService"], storage),
            bind(
                ANALYTICS_SERVICE,
                analytics_servicer(analytics, state, AnomalyServicer(metadata, analytics, state, findings, clock)),
            ),
            bind(ai, forwarded(ai, "metadata", metadata)),
            bind(simulator_pb2.DESCRIPTOR.services_by_name["SimulatorService"], SimulatorServicer(simulator)),
            bind(access_pb2.DESCRIPTOR.services_by_name["AccessService"], access_servicer(metadata, sessions)),
            bind(_AUDIT, forwarded(_AUDIT, "metadata", metadata)),
        ]
        services = [audited(bound, audit) for bound in services]

        async def follow() -> None:
            await state.follow(registry.snapshot_received)

        background = [
            asyncio.create_task(run_forever("the live state", follow, RECONNECT), name="follow-cache"),
            asyncio.create_task(run_forever("telling the cache of servers", registry.seed, RECONNECT), name="seed"),
            asyncio.create_task(
                run_forever("following the record", registry.follow_records, RECONNECT), name="follow-records"
            ),
            asyncio.create_task(run_forever("the findings", findings.follow, RECONNECT), name="follow-findings"),
            asyncio.create_task(run_forever("asking the stores", operator.refresh, RECONNECT), name="store-metrics"),
            asyncio.create_task(run_forever("who may come in", table.follow, RECONNECT), name="follow-access"),
            asyncio.create_task(run_forever("telling which tokens are used", table.report), name="report-access"),
            asyncio.create_task(run_forever("ending streams", table.end_streams), name="end-streams"),
        ]
        metrics: Callable[[], bytes] = prometheus_client.generate_latest
        others = siblings(settings, metrics)
        if others is not None:
            await stack.enter_async_context(others.answering())
            metrics = others.whole_page
        listening = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(
                    _serve_http(settings, process, services, state, door, metrics, listening), name="http"
                )
                group.create_task(_serve_grpc(settings, process, services, state, door, listening), name="grpc")
        finally:
            await tasks.cancel(*background)


async def _audit_log(
    stack: AsyncExitStack, settings: GatewaySettings, process: Process[GatewaySettings], metadata: Channel
) -> AuditLog:
    """This process's own: of several workers each has one. What others have left behind is shipped, too."""
    number = own_number()
    own = own_file(process.folder, number)
    logs = [
        await stack.enter_async_context(
            AuditLog(
                path,
                "gateway",
                clock=process.clock,
                limit_bytes=settings.audit_journal_limit,
                ship=sending(metadata),
            )
        )
        for path in (*left_behind(process.folder, number, settings.workers), own)
    ]
    await record_configuration(logs[-1], "gateway", settings, process.clock)
    return logs[-1]


async def _openid_pages(
    stack: AsyncExitStack,
    settings: GatewaySettings,
    process: Process[GatewaySettings],
    sessions: Sessions,
    audit: Audit,
) -> list[BaseRoute]:
    """Log-in with an OpenID provider, where one is set."""
    if settings.oidc_issuer is None:
        return []
    from gateway.access.openid import OpenId, Registration  # noqa: PLC0415  0.1 s and 15 MB
    from gateway.http.openid_pages import OpenIdPages  # noqa: PLC0415

    registration = Registration.of(settings)
    assert registration is not None  # settings without a part of it are refused

    async def opened(who: caller.Caller, session: access_feed_pb2.OpenSessionResponse) -> None:
        name, role = session.credential.name, role_name(session.credential.role)
        await audit.change(_LOG_IN, replace(who, name=name, role=role), target=name)

    def refused(who: caller.Caller, error: OpenManagerError) -> None:
        audit.refused(_LOG_IN, who, error)

    openid = await stack.enter_async_context(OpenId(registration, process.secret, process.clock))
    return OpenIdPages(openid, sessions, secure=sessions.cookie.secure, opened=opened, refused=refused).routes()


async def _serve_grpc(
    settings: GatewaySettings,
    process: Process[GatewaySettings],
    services: Sequence[Bound],
    state: FleetState,
    door: Door,
    http_listening: asyncio.Event,
) -> None:
    policy = Policy(services)
    authenticator = grpc_authenticator(door.callers, policy, door.admission)
    authenticator = telling(authenticator, door.audit.refused_call, door.callers.known)
    interception = Interception(authenticator, waiting=door.waiting)
    door.table.ends(interception.end_streams_of)
    await process.serve_grpc(
        settings.grpc_address,
        services,
        address_setting="GATEWAY_GRPC_ADDRESS",
        public=True,
        ready=lambda: not _lacks(settings, state, door) and http_listening.is_set(),
        interception=interception,
        knows=known_to(door.callers, policy),
        open_to_all=policy.open_to_all(),
        share_port=own_number() is not None,
    )


def _lacks(settings: GatewaySettings, state: FleetState, door: Door) -> tuple[str, ...]:
    """What has to be heard of once before this process can do its work."""
    lacks = [] if state.known else ["the cache has not been reached yet"]
    if settings.accounts and not door.table.known:
        lacks.append("who may come in is not known yet: metadata has not been reached")
    return tuple(lacks)


def _caller_of(exchange: Any) -> Caller:
    """Whom the guard has found."""
    caller: Caller = exchange.caller
    return caller


async def _serve_http(
    settings: GatewaySettings,
    process: Process[GatewaySettings],
    services: Sequence[Bound],
    state: FleetState,
    door: Door,
    metrics: Callable[[], bytes],
    listening: asyncio.Event,
) -> None:
    def health() -> Health:
        lacks = _lacks(settings, state, door)
        return Health(ready=not lacks, reasons=lacks)

    policy = Policy(services)
    authenticator = telling(exchange_authenticator(door.callers, policy), door.audit.refused_call, _caller_of)
    interception = Interception(authenticator, waiting=door.waiting)
    door.table.ends(interception.end_streams_of)
    app = create_app(
        services,
        interception=interception,
        guard=Guard(door.callers, cookie=door.cookie, open_paths=PATHS_OF_ALL),
        policy=policy,
        health=health,
        metrics=metrics,
        clock=process.clock,
        admission=door.admission,
        refused=door.audit.refused_request,
        extra=door.pages,
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
    takes_no_arguments("gateway", "The front door of the fleet: serves gRPC, HTTP/JSON and the web page.")
    number = own_number()
    part = "" if number is None else f"worker-{number}"
    run_process("gateway", GatewaySettings, serve, prometheus=True, part=part)
