"""What ``GET /metrics`` tells operators, beside the call metrics that interception records.

The same truth as the status call: state, lag, spool and free disk of every store, as gauges, from the last answers.
"""

from collections.abc import Callable, Iterable

from opentelemetry.metrics import CallbackOptions, Observation

from gateway.entry import ServerEntry
from gateway.servicers.storage import Statuses, StorageServicer
from gateway.state import FleetState
from openmanager.fleet.v1 import status_pb2
from runtime import telemetry
from runtime.clock import Clock

REFRESH_INTERVAL_S = 2.0

Read = Callable[[status_pb2.StoreStatus], float | None]


def disk_free_bytes(status: status_pb2.StoreStatus) -> float | None:
    """None for a disk that we cannot see, of which the status says 0; of our own stores 0 is a full disk, unless nobody
    has looked yet."""
    is_seen = bool(status.server_version) and (status.name == "engine" or status.role == "embedded")
    return status.disk_free_bytes if is_seen or status.disk_free_bytes else None


def seconds_of(latency_ms: float) -> float | None:
    """None where nothing was measured: a store that does not answer is not one that answers in no time."""
    return latency_ms / 1_000 or None


def attributes_of(status: status_pb2.StoreStatus) -> dict[str, str]:
    """What tells a store from all others: of several timeseries replicas each has an engine of the same name."""
    _, _, replica = status.service.partition(" ")
    return {"store": status.name, "role": status.role} | ({"replica": replica} if replica else {})


_GAUGES: tuple[tuple[str, str, str, Read], ...] = (
    (
        "openmanager.store.up",
        "1",
        "1 up, 0.5 degraded, 0 down; absent: not known yet.",
        lambda status: _UP.get(status.state),
    ),
    ("openmanager.store.lag.points", "{point}", "Points a store lacks.", lambda status: status.lag_points),
    ("openmanager.store.lag", "s", "Age of the oldest point a store lacks.", lambda status: status.lag_seconds),
    ("openmanager.store.spool", "By", "Bytes that wait for a store.", lambda status: status.spool_bytes),
    ("openmanager.store.disk.free", "By", "Bytes free on a store's disk; absent: we cannot see it.", disk_free_bytes),
    ("openmanager.store.latency", "s", "How long the last probe took.", lambda status: seconds_of(status.latency_ms)),
    (
        "openmanager.store.latency.p50",
        "s",
        "Half of the probes took less.",
        lambda status: seconds_of(status.latency_p50_ms),
    ),
    (
        "openmanager.store.latency.p99",
        "s",
        "99 in 100 probes took less.",
        lambda status: seconds_of(status.latency_p99_ms),
    ),
    (
        "openmanager.store.disk.left",
        "d",
        "Days until a store's disk is full at the rate of the last day; absent: it does not fill, or is not known.",
        lambda status: status.disk_days_left if status.HasField("disk_days_left") else None,
    ),
)
_UP: dict[status_pb2.StoreState.ValueType, float] = {
    status_pb2.STORE_STATE_UP: 1.0,
    status_pb2.STORE_STATE_DEGRADED: 0.5,
    status_pb2.STORE_STATE_DOWN: 0.0,
}


class OperatorMetrics:
    """Keeps the last statuses and servers for the gauges, which are read from another thread.

    The live state is not to be read there: in the middle of a change a server is in no place of it.
    """

    def __init__(self, storage: StorageServicer, state: FleetState, clock: Clock) -> None:
        self._storage = storage
        self._state = state
        self._clock = clock
        self._last: Statuses = []
        self._entries: list[ServerEntry] = []
        meter = telemetry.meter("gateway")
        for name, unit, description, read in _GAUGES:
            meter.create_observable_gauge(name, [self._observer(read)], unit=unit, description=description)
        meter.create_observable_counter(
            "openmanager.store.refused.points",
            [self._refused],
            unit="{point}",
            description="Points a store refused for good, by reason.",
        )
        meter.create_observable_gauge(
            "openmanager.fleet.servers", [self._servers], unit="{server}", description="Servers by status."
        )

    async def refresh(self) -> None:
        """Asks the stores' owners again and again."""
        while True:
            self._entries = self._state.all() if self._state.known else []
            self._last = await self._storage.statuses()
            await self._clock.sleep(REFRESH_INTERVAL_S)

    def _observer(self, read: Read) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            values = ((read(status), attributes_of(status)) for status in self._last)
            return [Observation(value, labels) for value, labels in values if value is not None]

        return observe

    def _refused(self, _options: CallbackOptions) -> Iterable[Observation]:
        return [
            Observation(refusal.points, attributes_of(status) | {"reason": refusal.reason})
            for status in self._last
            for refusal in status.refusals
        ]

    def _servers(self, _options: CallbackOptions) -> Iterable[Observation]:
        counts: dict[str, int] = {}
        for entry in self._entries:
            name = status_pb2.ServerStatus.Name(entry.status).removeprefix("SERVER_STATUS_").lower()
            if entry.state.in_maintenance:
                name = "maintenance"
            counts[name] = counts.get(name, 0) + 1
        return [Observation(count, {"status": name}) for name, count in sorted(counts.items())]
