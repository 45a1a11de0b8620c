"""A dead or hanging store shows within 5 s; asking never waits for it."""

import asyncio

from fleet.status import PROBE_INTERVAL_S, PROBE_TIMEOUT_S, StoreMonitor, StoreProbe
from openmanager.fleet.v1 import status_pb2
from runtime.clock import SystemClock
from runtime.errors import MAX_MESSAGE_TEXT_BYTES, Unavailable
from tests.harness import eventually


def test_probe_and_timeout_together_are_within_the_promise() -> None:
    assert PROBE_INTERVAL_S + PROBE_TIMEOUT_S < 5


async def test_states_follow_the_probes() -> None:
    answers: dict[str, object] = {"redis": StoreProbe(server_version="Redis 7")}

    async def probe() -> StoreProbe:
        answer = answers["redis"]
        if isinstance(answer, Exception):
            raise answer
        if answer == "hang":
            await asyncio.Event().wait()
        assert isinstance(answer, StoreProbe)
        return answer

    async with StoreMonitor("cache", {"redis": ("follower", probe)}, SystemClock()) as monitor:

        def state() -> status_pb2.StoreState.ValueType:
            return monitor.statuses()[0].state

        await eventually(lambda: state() == status_pb2.STORE_STATE_UP, within_s=5)
        up = monitor.statuses()[0]
        assert (up.name, up.role, up.service, up.server_version) == ("redis", "follower", "cache", "Redis 7")
        assert not up.HasField("last_error_time")

        answers["redis"] = Unavailable("connection refused")
        await eventually(lambda: state() == status_pb2.STORE_STATE_DOWN, within_s=10)
        assert monitor.statuses()[0].last_error == "connection refused"

        answers["redis"] = StoreProbe(degraded="behind by 10 points", lag_points=10)
        await eventually(lambda: state() == status_pb2.STORE_STATE_DEGRADED, within_s=10)
        assert monitor.statuses()[0].lag_points == 10

        answers["redis"] = "hang"
        await eventually(lambda: state() == status_pb2.STORE_STATE_DOWN, within_s=10)
        assert "no answer" in monitor.statuses()[0].last_error


async def test_an_error_that_nobody_foresaw_is_shown_without_secrets_and_bounded() -> None:
    async def probe() -> StoreProbe:
        raise RuntimeError(f"cannot use postgresql://ann:secret-1@here/fleet {'x' * 100_000}")

    async with StoreMonitor("metadata", {"postgresql": ("primary", probe)}, SystemClock()) as monitor:
        await eventually(lambda: bool(monitor.statuses()[0].last_error), within_s=5)
        for _ in range(2):
            said = monitor.statuses()[0].last_error
            assert "secret-1" not in said and len(said) <= MAX_MESSAGE_TEXT_BYTES
            monitor.record_error("postgresql", f"shipping failed: {said} to redis://:secret-1@here")
