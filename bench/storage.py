"""Row 2: bytes a point on disk, of identical points, counted by each side itself.

Ours: the engine after every head is closed, the journal swept, maintained until its files shrink no more (by itself it
does so every 5 s) and left cleanly, which checkpoints them. VictoriaMetrics: after a forced merge of everything. Both:
`du` of every file, indexes and catalogues included.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from bench import peers
from bench.load import MEASUREMENT, Mix, Part, bitbrains, recording
from bench.peers import OURS, VICTORIA, BenchError
from runtime.clock import SystemClock
from services.timeseries.engine import Engine, EngineSettings

APPEND_ROWS: Final = 1_440  # rows of one append: 72 ticks of 20 servers, 6 MB
MERGE_BOUND_S: Final = 120.0

Say = Callable[[str], None]


def _count(part: Part) -> int:
    return int(np.count_nonzero(~np.isnan(part.values)))


async def _store(folder: Path, parts: Iterable[Part], feed: Callable[[Part], None], say: Say) -> dict[str, Any]:
    """Gives every part to the engine and then to `feed`."""
    settings = EngineSettings(journal_keep_s=0)
    sent, seconds, began, told = 0, 0.0, time.monotonic(), time.monotonic()
    first_ms, last_ms = 1 << 62, 0
    async with Engine.open(folder, clock=SystemClock(), settings=settings) as engine:
        for part in parts:
            sent += _count(part)
            first_ms, last_ms = min(first_ms, int(part.times_ms[0])), max(last_ms, int(part.times_ms[-1]))
            started = time.monotonic()
            rows = part.rows
            for at in range(0, len(rows.server_ids), APPEND_ROWS):
                chosen = np.zeros(len(rows.server_ids), np.bool_)
                chosen[at : at + APPEND_ROWS] = True
                await engine.append(rows.select(chosen), metric_sets=[part.metric_set], servers=part.servers)
            seconds += time.monotonic() - started
            await asyncio.to_thread(feed, part)
            if time.monotonic() - told > 10:
                told = time.monotonic()
                say(f"storage: {sent / 1e6:.1f} M points on both sides after {told - began:.0f} s")
        started = time.monotonic()
        before = 0
        while before != (before := await asyncio.to_thread(peers.disk_bytes, folder)):
            await engine.maintain(everything=True)
        seconds += time.monotonic() - started
        status = await engine.status()
    if status.head_points or status.points != sent:
        raise BenchError(f"{sent} points were sent, {status.points} are stored, {status.head_points} in heads")
    total, blocks = peers.disk_bytes(folder), peers.disk_bytes(folder / "blocks")
    return {
        "points": status.points,
        "bytes": total,
        "bytes_blocks": blocks,
        "bytes_journal": total - blocks,
        "hours": round((last_ms - first_ms) / 3_600_000, 2),
        "start_ms": first_ms,
        "end_ms": last_ms,
        "seconds": seconds,
    }


def _import_lines(part: Part) -> Iterator[bytes]:
    """VictoriaMetrics' import format, a line a series; names and labels as it makes them of Influx lines."""
    ids = np.array(part.server_ids, dtype=object)
    for server in part.servers:
        rows = np.flatnonzero(ids == server.server_id)
        if not len(rows):
            continue
        times, values = part.times_ms[rows], np.ascontiguousarray(part.values[rows].T)
        labels = {"server_id": server.server_id, "environment": server.environment, "role": server.role}
        for metric, column in zip(part.metric_set.metrics, values, strict=True):
            there = ~np.isnan(column)
            if there.any():
                series = {
                    "metric": {"__name__": f"{MEASUREMENT}_{metric.name}"} | labels,
                    "values": column[there],
                    "timestamps": times[there],
                }
                yield orjson.dumps(series, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def _feed(connection: peers.Http, part: Part) -> None:
    lines: list[bytes] = []
    size = 0
    for line in _import_lines(part):
        lines.append(line)
        size += len(line)
        if size > 8_000_000:
            connection.ask("POST", "/api/v1/import", b"".join(lines))
            lines, size = [], 0
    if lines:
        connection.ask("POST", "/api/v1/import", b"".join(lines))


def _merged(server: peers.Server, connection: peers.Http, stored: dict[str, Any]) -> dict[str, Any]:
    """Merges everything and measures."""
    ends, before = time.monotonic() + MERGE_BOUND_S, 0
    while before != (before := peers.disk_bytes(server.folder / "data")):  # one round leaves parts that came late
        connection.get("/internal/force_flush")
        connection.get("/internal/force_merge")
        time.sleep(1.0)  # it begins in the background; parts that were merged are unlinked after it
        while b"\nvm_active_force_merges 0" not in connection.get("/metrics"):
            if time.monotonic() > ends:
                raise BenchError("VictoriaMetrics' forced merge did not end")
            time.sleep(0.2)
        connection.get("/internal/force_flush")
    span_s = (stored["end_ms"] - stored["start_ms"]) // 1000 + 60
    query = f'sum(count_over_time({{__name__=~"{MEASUREMENT}_.+"}}[{span_s}s]))'
    answer = orjson.loads(connection.get("/api/v1/query", query=query, time=stored["end_ms"] // 1000 + 1))
    data = server.folder / "data"
    return {
        "points": int(answer["data"]["result"][0]["value"][1]),
        "bytes": peers.disk_bytes(data),
        "bytes_data": peers.disk_bytes(data / "data"),
        "bytes_index": peers.disk_bytes(data / "indexdb"),
    }


def _compare(folder: Path, parts: Iterable[Part], say: Say) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if VICTORIA in peers.missing():
        found[OURS] = asyncio.run(_store(folder / OURS, parts, lambda _: None, say))
    else:
        with peers.victoria(folder / VICTORIA) as server, contextlib.closing(server.http()) as connection:
            found[OURS] = asyncio.run(_store(folder / OURS, parts, lambda part: _feed(connection, part), say))
            say("storage: VictoriaMetrics merges")
            found[VICTORIA] = _merged(server, connection, found[OURS])
        if found[VICTORIA]["points"] != found[OURS]["points"]:
            raise BenchError(f"VictoriaMetrics holds {found[VICTORIA]['points']} points, we {found[OURS]['points']}")
    for name, one in found.items():
        one["bytes_a_point"] = one["bytes"] / one["points"]
        say(f"storage: {name} {one['bytes_a_point']:.3f} bytes/point ({one['points']} points)")
    return found


def measure(folder: Path, *, servers: int, ticks: int, recordings: bool, say: Say) -> dict[str, Any]:
    """Returns what was measured for each data set; a text instead says why one was not."""
    found: dict[str, Any] = {}
    mix, step = Mix(servers), 720
    parts = (mix.part(tick, min(step, ticks - tick)) for tick in range(0, ticks, step))
    say(f"storage: the mix, {mix.tick_points * ticks / 1e6:.1f} M points")
    found["mix"] = _compare(folder / "mix", parts, say)
    path = bitbrains()
    if not recordings:
        found["bitbrains-20"] = "left out of a quick run"
    elif path is None:
        found["bitbrains-20"] = "the recording is not here (OPENMANAGER_TEST_DATA)"
    else:
        say("storage: bitbrains-20")
        found["bitbrains-20"] = _compare(folder / "bitbrains", recording(path, folder / "runs"), say)
    found["host"] = "24 h of this machine's own metrics take 24 h to record"
    return found
