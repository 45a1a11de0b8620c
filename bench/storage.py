"""Row 2: bytes a point on disk, of identical points and series, counted by each side itself.

Ours: the engine after every head is closed, the journal swept, maintained until its files shrink no more (by itself it
does so every 5 s) and left cleanly, which checkpoints them. VictoriaMetrics: after a forced merge of everything. Both:
`du` of every file, indexes and catalogues included. Folders of ours that hold coarser tiers are counted beside: the
peer keeps none.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from bench import host, peers
from bench.load import MEASUREMENT, Mix, Part, bitbrains, recording
from bench.peers import OURS, VICTORIA, BenchError
from runtime.clock import SystemClock
from services.timeseries.engine import Aggregation, Engine, EngineSettings, Query
from services.timeseries.engine.settings import MAX_TIME_MS

APPEND_ROWS: Final = 1_440  # rows of one append: 72 ticks of 20 servers, 6 MB
MERGE_BOUND_S: Final = 120.0
RAW_FOLDER: Final = "blocks"
EVER: Final = Query(metrics=None, start_ms=0, end_ms=MAX_TIME_MS, step_ms=MAX_TIME_MS, aggregation=Aggregation.COUNT)
"""How many points each series has."""

Say = Callable[[str], None]


def _count(part: Part) -> int:
    return int(np.count_nonzero(~np.isnan(part.values)))


async def _store(folder: Path, parts: Iterable[Part], feed: Callable[[Part], None], say: Say) -> dict[str, Any]:
    """Gives every part to the engine and then to `feed`."""
    settings = EngineSettings(journal_keep_s=0, raw_retention_s=None)  # recordings are old
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
        counts = [float(one.values.sum()) async for one in engine.query(EVER)]
    if status.head_points or status.points != sent or sum(counts) != sent:
        stored = f"{status.points} are stored, {sum(counts):.0f} can be read, {status.head_points} are in heads"
        raise BenchError(f"{sent} points were sent, {stored}")
    return _sizes(folder) | {
        "points": status.points,
        "series": len(counts),
        "hours": round((last_ms - first_ms) / 3_600_000, 2),
        "start_ms": first_ms,
        "end_ms": last_ms,
        "seconds": seconds,
    }


def _sizes(store: Path) -> dict[str, Any]:
    """Of the raw tier, and of each folder beside it."""
    folders = {path.name: peers.disk_bytes(path) for path in store.iterdir() if path.is_dir()}
    journal, blocks = peers.disk_bytes(store) - sum(folders.values()), folders.pop(RAW_FOLDER)
    return {
        "bytes": journal + blocks,
        "bytes_blocks": blocks,
        "bytes_journal": journal,
        "bytes_beside": folders,
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
                    "metric": {"__name__": f"{MEASUREMENT}_{metric.name}"} | labels | dict(metric.labels),
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
    counts = f'count_over_time({{__name__=~"{MEASUREMENT}_.+"}}[{span_s}s])'

    def asked(query: str) -> int:
        answer = orjson.loads(connection.get("/api/v1/query", query=query, time=stored["end_ms"] // 1000 + 1))
        return int(answer["data"]["result"][0]["value"][1])

    data = server.folder / "data"
    return {
        "points": asked(f"sum({counts})"),
        "series": asked(f"count({counts})"),
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
            with contextlib.closing(server.http()) as fresh:  # the other was idle while we closed and merged
                found[VICTORIA] = _merged(server, fresh, found[OURS])
        for what in ("points", "series"):
            if found[VICTORIA][what] != found[OURS][what]:
                raise BenchError(f"VictoriaMetrics holds {found[VICTORIA][what]} {what}, we {found[OURS][what]}")
    for name, one in found.items():
        one["bytes_a_point"] = one["bytes"] / one["points"]
        say(f"storage: {name} {one['bytes_a_point']:.3f} bytes/point ({one['points']} points, {one['series']} series)")
    for tier, size in found[OURS]["bytes_beside"].items():
        say(f"storage: {tier} {size / found[OURS]['points']:.3f} bytes for each raw point beside")
    return found


def measure(
    folder: Path, *, servers: int, ticks: int, recordings: bool, recorded: Path | None, say: Say
) -> dict[str, Any]:
    """Returns what was measured for each data set; a text instead says why one was not. `recorded`: see `host`."""
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
    if recorded is None:
        found["host"] = "no recording of this machine was given (--host)"
    else:
        own = host.read(recorded)
        say(f"storage: this machine's own metrics, {own.remark}")
        found["host"] = _compare(folder / "host", own.parts(), say)
        found["host"][OURS]["remark"] = own.remark
    return found
