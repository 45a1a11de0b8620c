"""Other replicas are not waited for until the caller has no time left."""

import math
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NoReturn

import pytest

from runtime import deadline
from runtime.channel import Channel
from runtime.clock import ManualClock
from runtime.errors import Unavailable
from services.timeseries.engine import Query
from services.timeseries.remote.replica import CALL_TIMEOUT_S, Peer

QUERY = Query(metrics=("a",), start_ms=0, end_ms=1)


@pytest.mark.parametrize(
    "ask", [lambda peer: peer.query(QUERY), lambda peer: peer.unshipped(QUERY, "b"), lambda peer: peer.list_metrics("")]
)
async def test_a_replica_gets_less_time_than_the_caller_has(ask: Callable[[Peer], object]) -> None:
    timeouts: list[float] = []

    def method(_request: object, timeout: float) -> NoReturn:
        timeouts.append(timeout)
        raise Unavailable("it is not there")

    async with Channel("127.0.0.1:1") as channel:
        peer = Peer(channel, ManualClock(), max_points=1)
        peer._stub = SimpleNamespace(Query=method, ReadUnshipped=method, ListMetrics=method)
        peer._metrics_until_s = math.inf
        for left_s in (None, 1_000.0, 10.0):
            peer._circuit.reset()
            token = deadline.current.set(deadline.CallDeadline(None if left_s is None else time.monotonic() + left_s))
            with pytest.raises(Unavailable):
                await ask(peer)  # type: ignore[misc]
            deadline.current.reset(token)
    assert timeouts[:2] == [CALL_TIMEOUT_S, CALL_TIMEOUT_S]
    assert timeouts[2] <= 8.0
