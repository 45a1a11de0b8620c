"""Row 6: the largest fleet for half an hour, as in operation: a tick of every server each 10 s, by the wall clock.

The player (`bench.player`) runs on the same machine. Sampled every second: how far it is behind, the server's memory,
what its engine says, its files. Then the server is killed with -9, started again, asked, and all acknowledged points
are counted by a query. What must stay true: what is judged is what a client sees; nothing is told to the engine.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from bench import meter
from bench.load import INTERVAL_MS, Mix
from bench.observed import Observed, observed
from bench.peers import BenchError
from bench.player import Play, Player, Report, player
from openmanager.fleet.v1 import history_pb2
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc

RESTART_BOUND_S: Final = 600.0
COUNT_BOUND_S: Final = 900.0
COUNTED_METRICS: Final = 3
SAMPLES_KEPT: Final = 360
BACKLOG_KEYS: Final = ("late_points", "waiting_bytes")
"""Judged, and beside them whatever the engine's status calls a backlog. Heads are none: they grow until due."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is run. `speed`: simulated seconds in a second of the wall clock, 1 as in operation; `settings` of the
    service and bounds of its `engine` that are not the defaults."""

    servers: int
    minutes: float
    speed: float = 1.0
    settings: Mapping[str, str] = field(default_factory=dict)
    engine: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """By the wall clock."""
        return self.minutes * 60.0 / self.speed

    @property
    def ticks(self) -> int:
        """Due in that time."""
        return max(1, round(self.minutes * 60_000 / INTERVAL_MS))


def measure(folder: Path, run: Run, say: Say) -> dict[str, Any]:
    """Returns what was acknowledged, samples, peaks, the restart and the count."""
    ahead_ms = 60_000 + run.ticks * INTERVAL_MS * (run.speed > 1)  # no row may be far ahead of the wall clock
    mix = Mix(run.servers, start_ms=(int(time.time() * 1_000) - ahead_ms) // INTERVAL_MS * INTERVAL_MS)
    play = Play(
        servers=run.servers,
        start_ms=mix.start_ms,
        ticks=run.ticks,
        seconds=run.seconds,
        pace_s=INTERVAL_MS / 1_000 / run.speed,
    )
    with observed(folder, settings=run.settings, engine=run.engine) as ours:
        with player(play, ours.server.address, ours.server.secret) as playing:
            samples = _watch(run, ours, playing, say)
            sent = playing.end()
        samples.append(_sample(ours, sent))
        say(_line(samples[-1], samples[0], "in all"))
        at_end = {"counts": meter.counts(ours.store), "sizes": meter.sizes(ours.store), "status": ours.status()}
        used = meter.usage(ours.server.process.pid)
        ours.server.process.kill()
        ours.server.process.wait()
    again = _restarted(folder, run, mix, sum(sent.rows), say)
    return {
        "run": asdict(run) | {"settings": dict(run.settings), "engine": dict(run.engine)},
        "servers": run.servers,
        "minutes": run.minutes,
        "points": sent.points,
        "wanted_points": run.ticks * mix.tick_points,
        "points_a_second": sent.points / max(sent.seconds, run.ticks * play.pace_s),
        "wanted_points_a_second": mix.tick_points / play.pace_s,
        "rows_acknowledged": sum(sent.rows),
        "player": asdict(sent),
        "server_cpu_s": used.cpu_s,
        "written_bytes": used.write_bytes,
        "written_bytes_a_point": used.write_bytes / max(1, sent.points),
        "cpu_ns_a_point": used.cpu_s * 1e9 / max(1, sent.points),
        "peak_bytes_before_restart": used.peak_bytes,
        "peak_bytes": max(used.peak_bytes, again["restart_peak_bytes"]),
        "backlog": backlog(samples, run.seconds),
        "at_end": at_end,
        "samples": samples[:: 1 + len(samples) // SAMPLES_KEPT],
    } | again


def _restarted(folder: Path, run: Run, mix: Mix, rows: int, say: Say) -> dict[str, Any]:
    """Starts the server that was killed, asks it at once, and has it count what it has of the acknowledged rows."""
    with ExitStack() as stack:
        killed = time.monotonic()
        again = stack.enter_context(
            observed(folder, settings=run.settings, engine=run.engine, start_bound_s=RESTART_BOUND_S)
        )
        serving_s = time.monotonic() - killed
        reader = _Reader(again, mix, stack)
        reader.first()
        answered_s, started = time.monotonic() - killed, meter.usage(again.server.process.pid)
        say(f"scale: killed with -9; serves {serving_s:.1f} s and answers a query {answered_s:.1f} s after that")
        say(f"scale: that took {started.cpu_s:.1f} s of processor time and {started.peak_bytes >> 20} MiB at most")
        asked = time.monotonic()
        counts = reader.counts()
        counted_s, peak_bytes = time.monotonic() - asked, meter.usage(again.server.process.pid).peak_bytes
    missing = {metric: rows - count for metric, count in counts.items()}
    say(f"scale: {rows} rows were acknowledged; missing by metric: {missing}")
    return {
        "restart_serving_s": serving_s,
        "restart_answer_s": answered_s,
        "restart_cpu_s": started.cpu_s,
        "restart_peak_bytes": peak_bytes,
        "rows_counted": counts,
        "rows_missing": max(missing.values()),
        "count_s": counted_s,
    }


def _watch(run: Run, ours: Observed, playing: Player, say: Say) -> list[dict[str, Any]]:
    """A sample a second until the play ends, and a line now and then."""
    interval_s, every_s = min(1.0, run.seconds / 30), min(60.0, run.seconds / 3)
    samples = [_sample(ours, Report())]
    told = samples[0]
    while not (report := playing.poll(interval_s)).ended:
        if ours.server.process.poll() is not None:
            log = (ours.server.folder / f"{ours.server.name}.log").read_text(errors="replace")
            raise BenchError(f"the server ended: {log[-2000:]}")
        samples.append(_sample(ours, report))
        if samples[-1]["seconds"] - told["seconds"] >= every_s:
            say(_line(samples[-1], told, f"minute {samples[-1]['seconds'] / 60:.1f}"))
            say(f"scale:   rows of tables: {meter.counts(ours.store)}")
            told = samples[-1]
    return samples


def _sample(ours: Observed, report: Report) -> dict[str, Any]:
    used = meter.usage(ours.server.process.pid)
    status = {key: value for key, value in ours.status().items() if isinstance(value, int | float)}
    status.pop("seconds", None)
    return status | {
        "seconds": report.seconds,
        "points_acknowledged": report.points,
        "late_points": max(0, report.due_points - report.points),
        "late_s": report.late_s,
        "sent_again": sum(report.sent_again.values()),
        "memory_bytes": used.memory_bytes,
        "cpu_s": used.cpu_s,
        "player_cpu_s": report.cpu_s,
        "written_bytes": used.write_bytes,
        "sizes": meter.sizes(ours.store),
    }


def _line(now: dict[str, Any], before: dict[str, Any], name: str) -> str:
    mib = 1 << 20
    seconds = max(1e-9, now["seconds"] - before["seconds"])
    points = now["points_acknowledged"] - before["points_acknowledged"]
    sizes = ", ".join(f"{kind} {size / mib:.0f}" for kind, size in sorted(now["sizes"].items()))
    return (
        f"scale: {name}: {points / 1e6:.1f} M points acknowledged ({points / seconds / 1e6:.2f} M/s),"
        f" behind by {now['late_points'] / 1e6:.1f} M points ({now['late_s']:.1f} s at the last tick),"
        f" {now['sent_again']} sent again; MiB: memory {now['memory_bytes'] / mib:.0f},"
        f" heads {now.get('head_bytes', 0) / mib:.0f}, waiting {now.get('waiting_bytes', 0) / mib:.0f}, {sizes};"
        f" cores: {(now['cpu_s'] - before['cpu_s']) / seconds:.2f}"
        f" + {(now['player_cpu_s'] - before['player_cpu_s']) / seconds:.2f} of the player"
    )


def backlog(samples: list[dict[str, Any]], seconds: float) -> dict[str, dict[str, float]]:
    """For what may pile up: the most of it around one third of the run, and at its end; both over a sixth of it."""
    keys = [*BACKLOG_KEYS, *sorted(key for key in samples[-1] if "backlog" in key)]
    found = {}
    for key in keys:
        third = [one.get(key, 0) for one in samples if 1 / 6 <= one["seconds"] / seconds <= 1 / 3]
        end = [one.get(key, 0) for one in samples if one["seconds"] / seconds >= 5 / 6]
        found[key] = {"third": float(max(third, default=0)), "end": float(max(end, default=0))}
    return found


FULL: Final = Run(servers=20_000, minutes=30.0)
QUICK: Final = Run(servers=200, minutes=1.0, speed=20.0)


class _Reader:
    """Queries of the restarted process."""

    def __init__(self, ours: Observed, mix: Mix, stack: ExitStack) -> None:
        self._mix = mix
        options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 64 << 20)]
        channel = stack.enter_context(grpc.insecure_channel(ours.server.address, options))
        self._stub: Any = timeseries_pb2_grpc.TimeSeriesServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {ours.server.secret}"),)

    def _ask(self, query: history_pb2.HistoryQuery) -> float:
        query.start_time.FromMilliseconds(self._mix.start_ms)
        query.end_time.FromMilliseconds(self._mix.start_ms + 86_400_000)
        query.step.seconds = 365 * 86_400
        query.aggregation = history_pb2.AGGREGATION_COUNT
        request = timeseries_pb2.QueryRequest(query=query)
        answer = self._stub.Query(request, metadata=self._metadata, timeout=COUNT_BOUND_S)
        return sum(sum(series.values) for response in answer for series in response.series)

    def first(self) -> None:
        """The first question after a restart: one series."""
        mix = self._mix
        if not self._ask(history_pb2.HistoryQuery(server_ids=mix.server_ids[:1], metrics=mix.metric_set.keys[:1])):
            raise BenchError("the restarted server has no points")

    def counts(self) -> dict[str, int]:
        """How many rows of all servers have a point, by some metrics."""
        keys = self._mix.metric_set.keys
        chosen = [keys[at * (len(keys) - 1) // (COUNTED_METRICS - 1)] for at in range(COUNTED_METRICS)]
        query = history_pb2.HistoryQuery
        return {
            key: round(self._ask(query(metrics=[key], across_servers=history_pb2.SERVER_AGGREGATION_SUM)))
            for key in chosen
        }
