"""What `GET /metrics` says of stores and servers."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from opentelemetry.metrics import CallbackOptions, Observation

from gateway.metrics import OperatorMetrics, disk_free_bytes
from openmanager.fleet.v1 import status_pb2
from runtime import telemetry
from runtime.clock import ManualClock
from tests.gateway.played_fleet import CRITICAL, server_state, world
from tests.harness import eventually


class Meter:
    """Asks the callbacks of instruments for what they observe."""

    def __init__(self) -> None:
        self._callbacks: dict[str, Callable[[CallbackOptions], Iterable[Observation]]] = {}

    def create_observable_gauge(self, name: str, callbacks: Any, **_more: Any) -> None:
        (self._callbacks[name],) = callbacks

    create_observable_counter = create_observable_gauge

    def observed(self, name: str) -> list[tuple[float, dict[str, Any]]]:
        return [(one.value, dict(one.attributes or {})) for one in self._callbacks[name](CallbackOptions())]


class Stores:
    async def statuses(self) -> list[status_pb2.StoreStatus]:
        up, down = status_pb2.STORE_STATE_UP, status_pb2.STORE_STATE_DOWN
        return [
            status_pb2.StoreStatus(name="engine", role="primary", service="timeseries a:1", state=down),
            status_pb2.StoreStatus(name="engine", role="primary", service="timeseries b:1", state=up),
            status_pb2.StoreStatus(name="postgresql", role="embedded", service="metadata", state=up),
        ]


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    made = Meter()
    monkeypatch.setattr(telemetry, "meter", lambda _name: made)
    return made


async def refreshed(state: Any) -> None:
    """After one round of asking the stores."""

    class Clock(ManualClock):
        async def sleep(self, _seconds: float) -> None:
            raise TimeoutError

    metrics = OperatorMetrics(Stores(), state, Clock())  # type: ignore[arg-type]
    with pytest.raises(TimeoutError):
        await metrics.refresh()


async def test_each_replica_is_told_by_itself(meter: Meter) -> None:
    async with world() as w:
        await refreshed(w.state)
    assert meter.observed("openmanager.store.up") == [
        (0.0, {"store": "engine", "role": "primary", "replica": "a:1"}),
        (1.0, {"store": "engine", "role": "primary", "replica": "b:1"}),
        (1.0, {"store": "postgresql", "role": "embedded"}),
    ]


def a_store(state: status_pb2.StoreState.ValueType, **more: Any) -> status_pb2.StoreStatus:
    return status_pb2.StoreStatus(name="engine", role="primary", service="timeseries", state=state, **more)


@pytest.mark.parametrize(
    ("store", "told"),
    [
        (a_store(status_pb2.STORE_STATE_UNSPECIFIED), {}),
        (a_store(status_pb2.STORE_STATE_DOWN), {"up": 0.0}),
        (a_store(status_pb2.STORE_STATE_DOWN, server_version="engine 1"), {"up": 0.0, "disk.free": 0}),
        (
            a_store(
                status_pb2.STORE_STATE_UP, server_version="engine 1", latency_ms=1, latency_p50_ms=2, latency_p99_ms=3
            ),
            {"up": 1.0, "disk.free": 0, "latency": 0.001, "latency.p50": 0.002, "latency.p99": 0.003},
        ),
    ],
    ids=["not looked at", "never answered", "down", "up"],
)
async def test_what_was_not_measured_is_not_told_as_nought(
    meter: Meter, monkeypatch: pytest.MonkeyPatch, store: status_pb2.StoreStatus, told: dict[str, float]
) -> None:
    async def one(_stores: Stores) -> list[status_pb2.StoreStatus]:
        return [store]

    monkeypatch.setattr(Stores, "statuses", one)
    async with world() as w:
        await refreshed(w.state)
    names = ("up", "disk.free", "latency", "latency.p50", "latency.p99")
    observed = {name: meter.observed(f"openmanager.store.{name}") for name in names}
    assert {name: found[0][0] for name, found in observed.items() if found} == told


async def test_servers_are_counted_while_the_live_state_changes(meter: Meter) -> None:
    """Another thread counts them, and in the middle of a change a server is nowhere."""
    async with world() as w:
        await refreshed(w.state)
        assert meter.observed("openmanager.fleet.servers") == []
        w.cache.send(server_state("a"), server_state("b", status=CRITICAL), snapshot=True)
        await eventually(lambda: w.state.known)
        await refreshed(w.state)
        w.state._entries.pop("a")  # as it is for a moment when it changes
        assert meter.observed("openmanager.fleet.servers") == [(1, {"status": "critical"}), (1, {"status": "healthy"})]


@pytest.mark.parametrize(
    ("name", "role", "free", "told"),
    [
        ("engine", "primary", 5, 5),
        ("engine", "primary", 0, 0),
        ("postgresql", "embedded", 0, 0),
        ("postgresql", "primary", 0, None),
        ("redis", "follower", 0, None),
    ],
)
def test_a_disk_that_cannot_be_seen_is_not_told_as_a_full_one(
    name: str, role: str, free: int, told: int | None
) -> None:
    status = status_pb2.StoreStatus(name=name, role=role, disk_free_bytes=free, server_version="1")
    assert disk_free_bytes(status) == told
