"""The points that everybody gets: the simulator's fleet at fixed times, and a recording of real machines.

What must stay true: the same run makes the same points, bit for bit; a point is a value that is there (not NaN).
"""

import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import orjson
from numpy.typing import NDArray

from bench.peers import ROOT
from fleet.codec import descriptor_to_pb, metric_set_to_pb, rows_to_pb
from fleet.model import MetricKind, MetricSet, Rows, ServerDescriptor
from openmanager.timeseries.v1 import timeseries_pb2
from services.simulator.catalogue import CATALOGUE
from services.simulator.fleet import build_fleet
from services.simulator.recording import RecordingReader
from services.simulator.signals import SignalGenerator

MEASUREMENT: Final = "server_metrics"
SERVERS: Final = 20
SEED: Final = 7
INTERVAL_MS: Final = 10_000
START_MS: Final = 1_772_409_600_000  # Monday 2026-03-02 00:00 UTC: in the past, and no month ends within a day
TICKS_A_DAY: Final = 86_400_000 // INTERVAL_MS

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows of one data set: row i is what `server_ids[i]` measured at `times_ms[i]`; values (rows x metrics)."""

    metric_set: MetricSet
    servers: tuple[ServerDescriptor, ...]
    server_ids: tuple[str, ...]
    times_ms: NDArray[np.int64]
    values: Floats

    @property
    def rows(self) -> Rows:
        """As the engine takes them."""
        return Rows(
            metric_set_id=self.metric_set.id, server_ids=self.server_ids, times_ms=self.times_ms, values=self.values
        )


class Mix:
    """The simulator's healthy fleet. Tick k is `start_ms` + k x `INTERVAL_MS`."""

    def __init__(self, servers: int = SERVERS, *, start_ms: int = START_MS) -> None:
        """`start_ms` is a multiple of the interval."""
        fleet = build_fleet(servers, seed=SEED, interval_ms=INTERVAL_MS)
        self.servers = tuple(server.descriptor for server in fleet)
        self.server_ids = tuple(server.server_id for server in self.servers)
        self.metric_set = MetricSet(tuple(spec.metric for spec in CATALOGUE))
        self._signals = SignalGenerator(fleet, seed=SEED, interval_ms=INTERVAL_MS)
        self.start_ms = start_ms
        self._first = start_ms // INTERVAL_MS

    @cached_property
    def _lines(self) -> list[bytes]:
        """The text of each server's line; made when it is wanted, since it takes 15 KB a server."""
        names = [metric.name.encode() for metric in self.metric_set.metrics]
        fields = b",".join(name + b"=%b" for name in names)
        return [
            f"{MEASUREMENT},environment={one.environment},role={one.role},server_id={one.server_id} ".encode() + fields
            for one in self.servers
        ]

    @property
    def tick_points(self) -> int:
        """Points of one tick."""
        return len(self.servers) * len(self.metric_set)

    def values(self, tick: int) -> Floats:
        """What the fleet reads at a tick, (servers x metrics)."""
        return self._signals.values(self._first + tick)

    def part(self, tick: int, ticks: int) -> Part:
        """Some ticks, in the order of time."""
        values = np.concatenate([self.values(number) for number in range(tick, tick + ticks)])
        times = self.start_ms + np.arange(tick, tick + ticks, dtype=np.int64) * INTERVAL_MS
        return Part(
            metric_set=self.metric_set,
            servers=self.servers,
            server_ids=self.server_ids * ticks,
            times_ms=np.repeat(times, len(self.servers)),
            values=values,
        )

    def describe(self) -> str:
        """What is in it, constants counted over half an hour."""
        kinds = [metric.kind for metric in self.metric_set.metrics]
        seen = np.stack([self.values(tick) for tick in range(0, 180, 10)])
        constant = int((seen == seen[0]).all(axis=0).sum())
        counters = sum(kind is MetricKind.COUNTER for kind in kinds)
        return (
            f"{len(self.servers)} servers x {len(kinds)} metrics every {INTERVAL_MS // 1000} s: "
            f"{len(kinds) - counters} gauges, {counters} counters; "
            f"{constant} of {seen[0].size} series did not change within half an hour"
        )

    def register(self) -> bytes:
        """An AppendRequest that tells the set and the servers, without rows."""
        return timeseries_pb2.AppendRequest(
            metric_sets=[metric_set_to_pb(self.metric_set)], servers=[descriptor_to_pb(one) for one in self.servers]
        ).SerializeToString()

    def request(self, tick: int, values: Floats, chosen: slice = slice(None)) -> bytes:
        """One tick, or the chosen servers of it, as an AppendRequest."""
        ids = self.server_ids[chosen]
        times = np.full(len(ids), self.start_ms + tick * INTERVAL_MS, np.int64)
        rows = Rows(metric_set_id=self.metric_set.id, server_ids=ids, times_ms=times, values=values[chosen])
        return timeseries_pb2.AppendRequest(batch=rows_to_pb(rows)).SerializeToString()

    def lines(self, tick: int, values: Floats) -> bytes:
        """The same tick as Influx lines: one a server, times in milliseconds, values as their shortest text."""
        end = b" %d\n" % (self.start_ms + tick * INTERVAL_MS)
        texts = (orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",") for row in values)
        return b"".join(line % tuple(text) + end for line, text in zip(self._lines, texts, strict=True))


def bitbrains() -> Path | None:
    """The recording bitbrains-20, in OPENMANAGER_TEST_DATA or beside the checkout; None when it is not there."""
    folders = [os.environ.get("OPENMANAGER_TEST_DATA", ""), *(str(up / "shared" / "data") for up in ROOT.parents)]
    folders.append("/work/shared/data")
    for folder in filter(None, folders):
        path = Path(folder) / "bitbrains-20.csv.gz"
        if path.is_file():
            with gzip.open(path, "rb") as file:
                file.read(1)
            return path
    return None


def recording(path: Path, folder: Path) -> Iterator[Part]:
    """A recording in the order of time, without rows that repeat a server's time (the last one is kept)."""
    read = RecordingReader(path, folder).read()
    servers = tuple(
        ServerDescriptor(server_id=one, hostname=one, environment="recorded", role="vm") for one in read.server_ids
    )
    ids = np.array(read.server_ids, dtype=object)
    for block in read.blocks():  # a block ends between two times, so equal ones are in the same block
        keys = block.times_ms * len(ids) + block.servers
        _, last = np.unique(keys[::-1], return_index=True)
        kept = len(keys) - 1 - last
        yield Part(
            metric_set=read.header.metric_set,
            servers=servers,
            server_ids=tuple(ids[block.servers[kept]]),
            times_ms=block.times_ms[kept],
            values=block.values[kept],
        )
