"""How a service tells the truth about its stores.

Every store-owning service runs one ``StoreMonitor``: it probes each store in the background, so that asking for the
status never waits for a store that hangs, and a dead store shows within 5 s (probe interval + probe time-out = 3.5 s).
A probe returns a ``StoreProbe``; whatever it raises is the store's last error and means that the store is down.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from fleet.codec import timestamp_from_ms
from fleet.store_figures import FreeSpace, Latencies
from openmanager.fleet.v1 import status_pb2
from runtime import tasks
from runtime.clock import Clock
from runtime.errors import OpenManagerError, clip
from runtime.redaction import redact

PROBE_INTERVAL_S = 2.0
RECOVERY_INTERVAL_S = 0.5
"""Between the probes of a store that is not up, so that its return shows at once."""
PROBE_TIMEOUT_S = 1.5

StoreState = status_pb2.StoreState


@dataclass(slots=True, kw_only=True)
class Refusal:
    """Points refused for one reason, and when that happened first and last."""

    reason: str
    points: int
    first_ms: int
    last_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreProbe:
    """What a store's adapter found out about it just now.

    Attributes:
        address: where it is, without user or password.
        server_version: what it says it is.
        latency_ms: how long its answer took.
        lag_points: points acknowledged by us that it does not have.
        lag_seconds: age of the oldest of them.
        spool_bytes: bytes that wait on our disk for it.
        disk_free_bytes: free on its disk, where we can see it.
        degraded: why it does not keep up although it answers; empty when it does.
        down: why it does not answer, where the adapter knows its lag all the same; a probe that knows nothing raises.
        note: what else an operator should know.
        refusals: points that the store has refused for good, by reason.
    """

    address: str = ""
    server_version: str = ""
    latency_ms: float = 0.0
    lag_points: int = 0
    lag_seconds: float = 0.0
    spool_bytes: int = 0
    disk_free_bytes: int = 0
    degraded: str = ""
    down: str = ""
    note: str = ""
    refusals: tuple[Refusal, ...] = ()


Probe = Callable[[], Awaitable[StoreProbe]]


@dataclass(slots=True)
class _Store:
    role: str
    probe: Probe
    state: status_pb2.StoreState.ValueType = StoreState.STORE_STATE_UNSPECIFIED
    since_ms: int = 0
    last: StoreProbe = field(default_factory=StoreProbe)
    last_error: str = ""
    last_error_ms: int = 0
    latencies: Latencies = field(default_factory=Latencies)
    free: FreeSpace = field(default_factory=FreeSpace)


class StoreMonitor:
    """Probes stores for as long as it is entered; every store keeps the state of its last finished probe."""

    def __init__(self, service: str, probes: Mapping[str, tuple[str, Probe]], clock: Clock) -> None:
        """Prepares the probes.

        Args:
            service: the owner's name, for the answer.
            probes: by store name (``redis``, ``postgresql``, ...): its role and how to probe it.
            clock: the time of states and errors.
        """
        self._service = service
        self._clock = clock
        now = clock.now_ms()
        self._stores = {name: _Store(role, probe, since_ms=now) for name, (role, probe) in probes.items()}
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        for name, store in self._stores.items():
            self._tasks.append(asyncio.create_task(self._watch(name, store), name=f"probe-{name}"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await tasks.cancel(*self._tasks)

    def record_error(self, name: str, text: str) -> None:
        """Notes an error that happened between two probes; it does not change the state. Whoever raised it may not have
        thought of who reads the status: it is shown without secrets, and bounded."""
        store = self._stores[name]
        store.last_error, store.last_error_ms = clip(redact(text)), self._clock.now_ms()

    def statuses(self) -> list[status_pb2.StoreStatus]:
        """Every store as it was found last."""
        return [self._status(name, store) for name, store in self._stores.items()]

    async def _watch(self, name: str, store: _Store) -> None:
        while True:
            await self._probe(name, store)
            is_up = store.state == StoreState.STORE_STATE_UP
            await self._clock.sleep(PROBE_INTERVAL_S if is_up else RECOVERY_INTERVAL_S)

    async def _probe(self, name: str, store: _Store) -> None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                probe = await store.probe()
        except TimeoutError:
            self.record_error(name, f"no answer within {PROBE_TIMEOUT_S} s")
            self._enter(store, StoreState.STORE_STATE_DOWN)
        except OpenManagerError as error:
            self.record_error(name, error.message)
            self._enter(store, StoreState.STORE_STATE_DOWN)
        except Exception as error:
            self.record_error(name, f"{type(error).__name__}: {error}")
            self._enter(store, StoreState.STORE_STATE_DOWN)
        else:
            store.last = probe
            if not probe.down:
                store.latencies.add(self._clock.monotonic(), probe.latency_ms)
            if probe.disk_free_bytes:
                store.free.add(self._clock.monotonic(), probe.disk_free_bytes)
            if probe.down or probe.degraded:
                self.record_error(name, probe.down or probe.degraded)
            if probe.down:
                self._enter(store, StoreState.STORE_STATE_DOWN)
            else:
                self._enter(store, StoreState.STORE_STATE_DEGRADED if probe.degraded else StoreState.STORE_STATE_UP)

    def _enter(self, store: _Store, state: status_pb2.StoreState.ValueType) -> None:
        if store.state != state:
            store.state, store.since_ms = state, self._clock.now_ms()

    def _status(self, name: str, store: _Store) -> status_pb2.StoreStatus:
        last, now_s = store.last, self._clock.monotonic()
        return status_pb2.StoreStatus(
            name=name,
            role=store.role,
            state=store.state,
            lag_points=last.lag_points,
            lag_seconds=last.lag_seconds,
            spool_bytes=last.spool_bytes,
            disk_free_bytes=last.disk_free_bytes,
            last_error=store.last_error,
            last_error_time=timestamp_from_ms(store.last_error_ms) if store.last_error_ms else None,
            since=timestamp_from_ms(store.since_ms),
            address=last.address,
            server_version=last.server_version,
            latency_ms=0.0 if store.state == StoreState.STORE_STATE_DOWN else last.latency_ms,
            service=self._service,
            latency_p50_ms=store.latencies.percentile(now_s, 50),
            latency_p99_ms=store.latencies.percentile(now_s, 99),
            disk_days_left=store.free.days_left,
            note=last.note,
            refusals=[_refusal(refusal) for refusal in last.refusals],
        )


def _refusal(refusal: Refusal) -> status_pb2.StoreRefusal:
    return status_pb2.StoreRefusal(
        reason=refusal.reason,
        points=refusal.points,
        first_time=timestamp_from_ms(refusal.first_ms),
        last_time=timestamp_from_ms(refusal.last_ms),
    )


class StoreStatusServicer:
    """``openmanager.fleet.v1.StoreStatusService`` for the stores of one service."""

    def __init__(self, monitor: StoreMonitor) -> None:
        self._monitor = monitor

    async def ListStoreStatuses(
        self, _request: status_pb2.ListStoreStatusesRequest, _context: object
    ) -> status_pb2.ListStoreStatusesResponse:
        """Answers from the last probes."""
        return status_pb2.ListStoreStatusesResponse(stores=self._monitor.statuses())
