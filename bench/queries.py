"""Row 3: how long a reader waits, each server through its own public API, the same points, nothing asked twice.

Loaded by the same sender as the ingest row: 4.5 h, so that we answer from blocks and from heads as in operation. A
time is from sending the question until the answer is decoded: ours into protobuf, VictoriaMetrics' JSON by orjson,
InfluxDB's CSV only read (in its favour). Turns are interleaved query by query and their order rotates, since who comes
after a busy neighbour finds cold caches. Only the last values are asked again and again, as a screen does it: there is
one answer until something is written.
"""

import itertools
import random
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import orjson
from grpc.experimental import ChannelOptions

from bench import peers
from bench.ingest import Sender, send, sender, start
from bench.load import INTERVAL_MS, MEASUREMENT, START_MS, Mix
from bench.peers import BUCKET, INFLUX, ORG, OURS, VICTORIA, BenchError
from openmanager.fleet.v1 import history_pb2
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc

STEP_S: Final = 60
LAST_S: Final = 120
"""The peers look for last values so far back, we 7 days."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked: means of `STEP_S`, or (`last`) the last value; None is all. Points is what must come back."""

    server: str | None
    metric: str | None
    start_s: int
    end_s: int
    points: int
    last: bool = False


class Ours:
    """QueryOnce and LastValues of the timeseries process."""

    def __init__(self, server: peers.Server, mix: Mix) -> None:
        options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 64 << 20)]
        options += [(ChannelOptions.SingleThreadedUnaryStream, 1)]  # else a thread more reads each answer: 0.3 ms
        self._channel = grpc.insecure_channel(server.address, options)
        self._stub: Any = timeseries_pb2_grpc.TimeSeriesServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {server.secret}"),)
        self._metrics = mix.metric_set.keys

    def ask(self, asked: Question) -> int:
        """Returns the number of points."""
        if asked.last:
            points = 0
            everything = timeseries_pb2.LastValuesRequest()
            for answer in self._stub.LastValues(everything, metadata=self._metadata, timeout=60):
                points += sum(len(server.values) for server in answer.servers)
            return points
        query = history_pb2.HistoryQuery(metrics=[asked.metric] if asked.metric else self._metrics)
        if asked.server:
            query.server_ids.append(asked.server)
        query.start_time.seconds, query.end_time.seconds = asked.start_s, asked.end_s
        query.step.seconds, query.aggregation = STEP_S, history_pb2.AGGREGATION_AVG
        request = timeseries_pb2.QueryOnceRequest(query=query)
        answer = self._stub.QueryOnce(request, metadata=self._metadata, timeout=60)
        return sum(len(series.values) for series in answer.series)

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()


class Victoria:
    """/api/v1/query_range, and /api/v1/query for last values."""

    def __init__(self, server: peers.Server, _mix: Mix) -> None:
        self._http = server.http()

    def ask(self, asked: Question) -> int:
        """Returns the number of points."""
        name = f'__name__="{MEASUREMENT}_{asked.metric}"' if asked.metric else f'__name__=~"{MEASUREMENT}_.+"'
        selector = f'{{{name},server_id="{asked.server}"}}' if asked.server else f"{{{name}}}"
        if asked.last:
            query = f"last_over_time({selector}[{LAST_S}s])"
            answer = self._http.get("/api/v1/query", query=query, time=asked.end_s - 1)
            return len(orjson.loads(answer)["data"]["result"])
        query = f"avg_over_time({selector}[{STEP_S}s]) keep_metric_names"
        # a window is labelled by its end here, so the first full one is at start + step
        answer = self._http.get(
            "/api/v1/query_range", query=query, start=asked.start_s + STEP_S, end=asked.end_s, step=f"{STEP_S}s"
        )
        return sum(len(series["values"]) for series in orjson.loads(answer)["data"]["result"])

    def close(self) -> None:
        """Ends the connection."""
        self._http.close()


class Influx:
    """Flux."""

    def __init__(self, server: peers.Server, _mix: Mix) -> None:
        self._http = server.http()

    def ask(self, asked: Question) -> int:
        """Returns the number of points."""
        filters = [f'r._measurement == "{MEASUREMENT}"']
        filters += [f'r._field == "{asked.metric}"'] if asked.metric else []
        filters += [f'r.server_id == "{asked.server}"'] if asked.server else []
        function = "last()" if asked.last else f"aggregateWindow(every: {STEP_S}s, fn: mean, createEmpty: false)"
        flux = (
            f'from(bucket: "{BUCKET}") |> range(start: {asked.start_s}, stop: {asked.end_s})'
            f" |> filter(fn: (r) => {' and '.join(filters)}) |> {function}"
        )
        headers = {"Content-Type": "application/vnd.flux", "Accept": "application/csv"}
        answer = self._http.ask("POST", f"/api/v2/query?org={ORG}", flux.encode(), **headers)
        return answer.count(b"\r\n,_result,")

    def close(self) -> None:
        """Ends the connection."""
        self._http.close()


CLIENTS: Final[dict[str, Any]] = {OURS: Ours, VICTORIA: Victoria, INFLUX: Influx}
ROUNDS: Final = {
    "1 server, 1 metric, 2 h by 1 min": 100,
    "20 servers, 1 metric, 2 h by 1 min": 100,
    "1 server, 511 metrics, 2 h by 1 min": 40,
    "last values of all series": 40,
}
"""Questions of each kind; InfluxDB gets every fifth of the last two, it would take minutes."""


def questions(kind: str, count: int, mix: Mix, ticks: int) -> list[Question]:
    """Different ones, the same in every run."""
    chosen = random.Random(kind)
    metrics, servers = list(mix.metric_set.keys), list(mix.server_ids)
    end_s = START_MS // 1000 + ticks * INTERVAL_MS // 1000
    span_s = min(7_200, ticks * INTERVAL_MS // 2_000 // 60 * 60)
    found = []
    for _ in range(count):
        if kind.startswith("last"):
            start_s, points = end_s - LAST_S, mix.tick_points
            found.append(Question(server=None, metric=None, start_s=start_s, end_s=end_s, points=points, last=True))
            continue
        one_server, one_metric = kind.startswith("1 server"), "1 metric," in kind
        start_s = START_MS // 1000 + 60 * chosen.randrange((end_s - START_MS // 1000 - span_s) // 60 + 1)
        series = (1 if one_server else len(servers)) * (1 if one_metric else len(metrics))
        found.append(
            Question(
                server=chosen.choice(servers) if one_server else None,
                metric=chosen.choice(metrics) if one_metric else None,
                start_s=start_s,
                end_s=start_s + span_s,
                points=series * span_s // STEP_S,
            )
        )
    return found


def turns(names: list[str], number: int) -> list[str]:
    """The order of a round: each comes first, and after each other, equally often."""
    orders = list(itertools.permutations(names))
    return list(orders[number % len(orders)])


def _ask(client: Any, name: str, asked: Question) -> float:
    started = time.perf_counter()
    points = client.ask(asked)
    passed = time.perf_counter() - started
    if points != asked.points:
        raise BenchError(f"{name} answered {points} points instead of {asked.points} to {asked}")
    return passed * 1000


def _load(pool: Any, running: list[peers.Server], servers: int, ticks: int, say: Say) -> None:
    kinds = tuple(server.name for server in running)
    for tick in range(0, ticks, 540):
        count = min(540, ticks - tick)
        pool.submit(Sender.prepare, servers, tick, count, kinds).result()
        for server in running:
            send(pool, server)
        say(f"queries: {tick + count} of {ticks} ticks are loaded into {', '.join(kinds)}")


def measure(folder: Path, *, servers: int, ticks: int, share: float, say: Say) -> dict[str, Any]:
    """Returns milliseconds for each kind of query; `share` of the usual number of questions."""
    mix = Mix(servers)
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        running = start(stack, folder)
        with sender() as pool:
            _load(pool, running, servers, ticks, say)
        for server in running:
            if server.name == VICTORIA:  # what it acknowledged shows in answers a second or more later
                with closing(server.http()) as connection:
                    connection.get("/internal/force_flush")
        peers.settle(running)
        clients = {server.name: CLIENTS[server.name](server, mix) for server in running}
        for client in clients.values():
            stack.callback(client.close)
        for kind, rounds in ROUNDS.items():
            times: dict[str, list[float]] = {name: [] for name in clients}
            asked = questions(kind, max(5, round(rounds * share)) + 1, mix, ticks)
            for number, question in enumerate(asked):
                for name in turns(list(clients), number):
                    if name == INFLUX and rounds < 100 and number % 5:
                        continue
                    taken = _ask(clients[name], name, question)
                    if number:  # the first is to warm up
                        times[name].append(taken)
            results[kind] = {name: _summary(found) for name, found in times.items()}
            shown = ", ".join(f"{name} {one['p50_ms']:.2f}/{one['p95_ms']:.2f}" for name, one in results[kind].items())
            say(f"queries: {kind}: p50/p95 ms {shown}")
    return results


def _summary(times: list[float]) -> dict[str, float]:
    return {
        "queries": len(times),
        "p50_ms": float(np.percentile(times, 50)),
        "p95_ms": float(np.percentile(times, 95)),
    }
