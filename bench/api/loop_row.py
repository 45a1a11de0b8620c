"""Row `loop`: the longest that anything holds the gateway's event loop, while it is asked for all that it has.

20 servers are told a tick again and again; readers ask for one server, for lists of whole servers, over gRPC and HTTP,
packed and not, for history, for the stores' states and for the documents; six watch.
"""

import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

import grpc
import numpy as np

from bench.api import timed
from bench.api.checks import http_answer
from bench.api.feeder import feeding
from bench.api.judged import Judged, within
from bench.api.product import BEARER, CHANNEL_OPTIONS, Gateway, gateway, tell
from bench.api.size import Bench
from bench.api.turn import Found, now_ms
from openmanager.gateway.v1 import fleet_pb2, fleet_pb2_grpc

ROW: Final = "loop"
LIMIT_MS: Final = 2.0
SHARE: Final = 0.99
WATCHERS: Final = 3
"""Of each view."""
FULL: Final = fleet_pb2.SERVER_VIEW_FULL


def measure(bench: Bench) -> Found:
    """Milliseconds of the longest callbacks."""
    report = bench.folder / "loop.json"
    with ExitStack() as stack:
        settings = {timed.REPORT: str(report)}
        front = stack.enter_context(gateway(bench.inner, "gateway-loop", module=timed.__name__, settings=settings))
        tell(front, 0, now_ms())
        stack.enter_context(feeding(front, every_s=bench.size.tick_s))
        channel = stack.enter_context(grpc.insecure_channel(front.address, CHANNEL_OPTIONS))
        fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)
        for view in (fleet_pb2.SERVER_VIEW_BASIC, FULL) * WATCHERS:
            stream = fleet.WatchFleet(fleet_pb2.WatchFleetRequest(view=view), metadata=BEARER)
            threading.Thread(target=_drain, args=(stream,), daemon=True).start()
        _ask(front, fleet, 0)
        os.kill(front.server.process.pid, signal.SIGUSR1)
        rounds, until = 0, time.monotonic() + bench.size.seconds * bench.size.rounds
        while time.monotonic() < until:
            rounds += 1
            _ask(front, fleet, rounds)
        bench.say(f"{ROW}: {rounds} rounds of questions")
    return {"rounds": rounds} | _longest(json.loads(report.read_text()), bench.size.rounds, bench.say)


def _longest(slices: list[tuple[int, float, str]], rounds: int, say: Callable[[str], None]) -> Found:
    """Of the slices, in their order: the longest of each of so many equal parts, and of nearly all."""
    slices = sorted(slices)
    for _, taken_ms, what in sorted(slices, key=lambda one: one[1], reverse=True)[:3]:
        say(f"{ROW}: {taken_ms:.2f} ms of {what[:90]}")
    times = np.array([taken_ms for _, taken_ms, _ in slices])
    each = [float(part.max()) for part in np.array_split(times, rounds)]
    return {"slices": len(times), "longest": each, "usual": float(np.quantile(times, SHARE, method="higher"))}


def _ask(front: Gateway, fleet: Any, number: int) -> None:
    ids, keys = front.mix.server_ids, front.mix.metric_set.keys
    one, key = ids[number % len(ids)], keys[number % len(keys)]
    fleet.GetServer(fleet_pb2.GetServerRequest(id=one), metadata=BEARER)
    fleet.ListServers(fleet_pb2.ListServersRequest(view=FULL), metadata=BEARER)
    fleet.GetFleetSummary(fleet_pb2.GetFleetSummaryRequest(), metadata=BEARER)
    whole = "/v1/servers?view=SERVER_VIEW_FULL"
    history = f"/v1/servers/{one}/history?metric={key}&start_time=-1h&end_time=now"
    for path in (
        f"/v1/servers/{one}",
        "/v1/servers",
        whole,
        history,
        "/v1/storage/status",
        "/openapi.json",
        "/metrics",
    ):
        http_answer(front.http_address, path, dict(BEARER))
    http_answer(front.http_address, whole, dict(BEARER) | {"accept-encoding": "gzip"})


def _drain(stream: Any) -> None:
    try:
        for _ in stream:
            pass
    except grpc.RpcError:
        return  # the gateway has ended


def judged(found: Found) -> list[Judged]:
    """The median of the parts' longest. In each part everything is asked a hundred times and more, so what takes long
    takes long in most of them, while the machine's own milliseconds come where they like: callbacks that do nothing
    were noted with up to 15 ms. Beside it, as remarks, the longest of all and that of 99 of 100 slices."""
    work = f"longest turn of the gateway's loop, {found['rounds']:,} rounds of every read, ticks and watchers beside"
    slices = f"{SHARE:.0%} of {found['slices']:,} slices of {timed.SLICE_S * 1e3:g} ms"
    parts = found["longest"]
    remark = f"of {len(parts)} parts the median; the longest {max(parts):.2f}; {found['usual']:.2f} ms in {slices}"
    return [within(ROW, work, "ms of processor", statistics.median(parts), LIMIT_MS, remark=remark)]
