"""This machine's own metrics as a data set: recorded into a file, and replayed from one.

A file is numpy's .npz. Segment i is a run of ticks with one metric set: `metrics_i` is JSON (as bytes) of
[[name, unit, kind, labels], ...], `times_i` are int64 milliseconds since the epoch, `values_i` float64 (ticks x
metrics), NaN where nothing was measured. What must stay true: a file is complete or not there (written beside, synced,
renamed); a replay has the recorded values bit for bit, and says so when its times are not the recorded ones.
"""

import asyncio
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import orjson
from numpy.typing import NDArray

from bench.load import INTERVAL_MS, Floats, Part
from bench.peers import BenchError
from fleet.model import Metric, MetricKind, MetricSet, ServerDescriptor
from runtime.clock import SystemClock
from services.simulator.host import HostSource
from services.simulator.schedule import Schedule

SAVED_TICKS: Final = 300
"""The file is written anew after so many ticks: what a crash may lose."""
PART_ROWS: Final = 720
SERVER: Final = ServerDescriptor(server_id="host", hostname="host", environment="local", role="host")

Say = Callable[[str], None]


@dataclass(slots=True)
class Segment:
    """Ticks that have one metric set."""

    metric_set: MetricSet
    times_ms: NDArray[np.int64]
    values: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What is in a file, its times as they will be replayed; `remark` says what was recorded and how it is replayed."""

    segments: tuple[Segment, ...]
    remark: str

    def parts(self) -> Iterator[Part]:
        """In the order of time."""
        for one in self.segments:
            for at in range(0, len(one.times_ms), PART_ROWS):
                times = one.times_ms[at : at + PART_ROWS]
                yield Part(
                    metric_set=one.metric_set,
                    servers=(SERVER,),
                    server_ids=(SERVER.server_id,) * len(times),
                    times_ms=times,
                    values=one.values[at : at + PART_ROWS],
                )


def read(path: Path) -> Recording:
    """Opens a recording; one of another interval than the bench's gets the times that it would have had."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:  # it leaves a torn one open
            count = sum(name.startswith("times_") for name in file.files)
            segments = tuple(
                Segment(_metric_set(file[f"metrics_{i}"].tobytes()), file[f"times_{i}"], file[f"values_{i}"])
                for i in range(count)
            )
    except (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise BenchError(f"{path} is no recording of this machine: {error}") from error
    if not sum(len(one.times_ms) for one in segments) > 1:
        raise BenchError(f"{path} holds fewer than two ticks")
    times = np.concatenate([one.times_ms for one in segments])
    interval_ms = int(np.median(np.diff(times)))
    if interval_ms <= 0:
        raise BenchError(f"{path}: its times do not ascend")
    hours, remark = (times[-1] - times[0]) / 3_600_000, f"recorded every {interval_ms / 1000:g} s"
    if interval_ms != INTERVAL_MS:  # its end stays where it was: nothing may lie in the future
        factor, end_ms = INTERVAL_MS / interval_ms, int(times[-1])
        for one in segments:
            one.times_ms = end_ms - np.rint((end_ms - one.times_ms) * factor).astype(np.int64)
        hours, remark = hours * factor, f"{remark}, replayed as every {INTERVAL_MS / 1000:g} s"
    return Recording(segments=segments, remark=f"{hours:.1f} h, {remark}")


def _metric_set(text: bytes) -> MetricSet:
    return MetricSet(
        tuple(
            Metric(name=name, unit=unit, kind=MetricKind(kind), labels=tuple((k, v) for k, v in labels))
            for name, unit, kind, labels in orjson.loads(text)
        )
    )


class Recorder:
    """Ticks as they are measured, in memory: 1 KB each."""

    def __init__(self, path: Path) -> None:
        """Raises BenchError where a file is already."""
        if path.exists():
            raise BenchError(f"{path} is there already")
        self._path = path
        self._runs: list[tuple[MetricSet, list[int], list[Floats]]] = []
        self.ticks = 0

    def add(self, metric_set: MetricSet, time_ms: int, values: Floats) -> None:
        """Takes one tick."""
        if not self._runs or self._runs[-1][0].id != metric_set.id:
            self._runs.append((metric_set, [], []))
        _, times, rows = self._runs[-1]
        times.append(time_ms)
        rows.append(values)
        self.ticks += 1

    def save(self) -> int:
        """Replaces the file by everything so far; returns its bytes."""
        arrays: dict[str, NDArray[np.generic]] = {}
        for number, (metric_set, times, rows) in enumerate(self._runs):
            described = [[m.name, m.unit, int(m.kind), m.labels] for m in metric_set.metrics]
            arrays[f"metrics_{number}"] = np.frombuffer(orjson.dumps(described), np.uint8)
            arrays[f"times_{number}"] = np.array(times, np.int64)
            arrays[f"values_{number}"] = np.stack(rows)
        packed = io.BytesIO()
        np.savez_compressed(packed, allow_pickle=False, **arrays)
        partial = self._path.with_name(f"{self._path.name}.partial")
        with partial.open("wb") as file:
            file.write(packed.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)
        return packed.getbuffer().nbytes


async def record(path: Path, *, ticks: int, interval_s: float, say: Say) -> None:
    """Measures this machine and keeps the file up to date; a tick that the machine was too busy for is not there."""
    if ticks < 2 or interval_s < 0.1:
        raise BenchError("a recording has at least 2 ticks, at least 0.1 s apart")
    interval_ms = round(interval_s * 1_000)
    source, recorder = HostSource(interval_ms=interval_ms), Recorder(path)
    schedule, skipped = Schedule(SystemClock(), interval_ms=interval_ms, most_late=0), 0
    try:
        while recorder.ticks < ticks:
            due = await schedule.next()
            skipped += due.skipped
            (batch,) = await source.batches(due.tick, due.time_ms)
            recorder.add(batch.metric_set, due.time_ms, batch.rows.values[0])
            if recorder.ticks % SAVED_TICKS == 0 and recorder.ticks < ticks:
                await asyncio.to_thread(recorder.save)
            if recorder.ticks == 1 or recorder.ticks % max(1, ticks // 100) == 0:
                left_s = (ticks - recorder.ticks) * interval_s
                say(f"recording: {recorder.ticks} of {ticks} ticks, {left_s / 60:.0f} min to go, {skipped} missed")
    finally:
        if recorder.ticks:
            size = recorder.save()
            say(f"recording: {recorder.ticks} ticks of {source.metric_count} metrics in {path}, {size} bytes")
