"""Row 4: one metric over 365 days by the hour, from a store that holds a year as operation would have left it.

The store is filled through the engine's `append`, a day of rows at a time, by a clock that is the data's: a day is
maintained (heads become blocks, tiers are made of them, what is too old goes) when it is over. Then the real process
serves the store and is asked through `Query`; every answer is compared with what was generated. What must stay true:
the hours are counted from the very rows that were appended, by code that shares nothing with the engine.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from numpy.typing import NDArray

from bench import meter, peers
from bench.load import INTERVAL_MS, Floats
from bench.peers import BenchError
from fleet.model import Metric, MetricKind, MetricSet, Rows, ServerDescriptor
from openmanager.fleet.v1 import history_pb2
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc
from runtime.clock import ManualClock
from services.timeseries.engine import Engine
from services.timeseries.settings import TimeSeriesSettings

DAY_MS: Final = 86_400_000
HOUR_MS: Final = 3_600_000
HOURS_A_DAY: Final = 24
GAUGES, COUNTERS = 12, 8
SEED: Final = 11
KIND_BOUND_S: Final = 30.0
"""Questions of one kind end after so long, so that a slow store is measured too; at least five are asked."""
TOLERANCE: Final = 1e-9

ASKED: Final = {
    "AVG": history_pb2.AGGREGATION_AVG,
    "MAX": history_pb2.AGGREGATION_MAX,
    "RATE": history_pb2.AGGREGATION_RATE,
}

Say = Callable[[str], None]
Times = NDArray[np.int64]


class Year:
    """One server's rows, day after day, the same in every run; and what each hour of them comes to.

    Gauges follow the day with noise, rounded as agents round; counters grow in whole numbers and begin anew at a
    reboot; now and then the server says nothing for some time. Times are ticks; hours are counted from `start_ms`.
    """

    def __init__(self, start_ms: int, days: int) -> None:
        self.start_ms = start_ms
        self.days = days
        self.server = ServerDescriptor(server_id="year-01", hostname="year-01", report_interval_ms=INTERVAL_MS)
        names = [(f"gauge_{i:02d}", MetricKind.GAUGE) for i in range(GAUGES)]
        names += [(f"counter_{i:02d}", MetricKind.COUNTER) for i in range(COUNTERS)]
        self.metric_set = MetricSet(tuple(Metric(name=name, kind=kind) for name, kind in names))
        shape = (days * HOURS_A_DAY, len(names))
        self.counts = np.zeros(shape[0], np.int64)
        self.hours = {"AVG": np.full(shape, np.nan), "MAX": np.full(shape, np.nan), "RATE": np.full(shape, np.nan)}
        self.points = 0
        chosen = np.random.default_rng(SEED)
        self._level = chosen.uniform(20, 60, GAUGES)
        self._swing = chosen.uniform(5, 20, GAUGES)
        self._rate = chosen.uniform(5, 5_000, COUNTERS)
        self._totals = np.zeros(COUNTERS)
        self._last: tuple[int, Floats] | None = None

    def rows(self) -> Iterator[Rows]:
        """Days in order; the hours are known of what was given out."""
        for day in range(self.days):
            times, values = self._day(day)
            self._count(times, values)
            self.points += values.size
            yield Rows(
                metric_set_id=self.metric_set.id,
                server_ids=(self.server.server_id,) * len(times),
                times_ms=times,
                values=values,
            )

    def _day(self, day: int) -> tuple[Times, Floats]:
        drawn = np.random.default_rng([SEED, day])
        ticks = np.arange(DAY_MS // INTERVAL_MS)
        wave = np.sin(2 * np.pi * ticks / len(ticks))[:, None]
        slow = np.repeat(drawn.normal(0, 2, (len(ticks) // 60, GAUGES)), 60, axis=0)
        gauges = np.round(self._level + self._swing * wave + slow + drawn.normal(0, 0.5, slow.shape), 2)
        steps = drawn.poisson(self._rate * (1.2 + wave), (len(ticks), COUNTERS)).astype(np.float64)
        counters = self._totals + np.cumsum(steps, axis=0)
        if day % 40 == 17:  # a reboot
            at = int(drawn.integers(1, len(ticks)))
            counters[at:] -= counters[at - 1]
        self._totals = counters[-1]
        kept = np.ones(len(ticks), np.bool_)
        if day % 23 == 5:  # silence, of 10 s to 5 h
            at = int(drawn.integers(0, len(ticks) - 1_800))
            kept[at : at + int(drawn.integers(1, 1_800))] = False
        times = self.start_ms + day * DAY_MS + ticks[kept] * INTERVAL_MS
        return times, np.concatenate([gauges, counters], axis=1)[kept]

    def _count(self, times: Times, values: Floats) -> None:
        """Each hour by itself, plainly."""
        for hour in np.unique((times - self.start_ms) // HOUR_MS).tolist():
            begin_ms = self.start_ms + hour * HOUR_MS
            low, high = np.searchsorted(times, (begin_ms, begin_ms + HOUR_MS)).tolist()
            inside = values[low:high]
            self.counts[hour] = len(inside)
            self.hours["AVG"][hour] = [float(np.sum(column)) / len(column) for column in inside.T]
            self.hours["MAX"][hour] = inside.max(axis=0)
            joined_ms, joined = int(times[low]), inside
            if self._last is not None and begin_ms - self._last[0] <= HOUR_MS:  # the step from the sample before counts
                joined_ms, joined = self._last[0], np.vstack([self._last[1], inside])
            grown = np.diff(joined, axis=0)
            increase = np.where(grown < 0, joined[1:], grown).sum(axis=0)
            if int(times[high - 1]) > joined_ms:
                self.hours["RATE"][hour] = increase * 1_000 / (int(times[high - 1]) - joined_ms)
            self._last = int(times[high - 1]), inside[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Which hours of which metric."""

    kind: str
    column: int
    first_hour: int
    hours: int


def questions(kind: str, count: int, year: Year, window_days: int) -> list[Question]:
    """Different windows, the same in every run; RATE is asked of counters only."""
    chosen = random.Random(kind)
    first, spare = (GAUGES, 0) if kind == "RATE" else (0, COUNTERS)
    last_start = (year.days - window_days) * HOURS_A_DAY
    return [
        Question(
            kind=kind,
            column=chosen.randrange(first, GAUGES + COUNTERS - spare),
            first_hour=chosen.randrange(last_start + 1),
            hours=window_days * HOURS_A_DAY,
        )
        for _ in range(count)
    ]


async def _fill(folder: Path, year: Year, say: Say) -> dict[str, Any]:
    clock = ManualClock(now_ms=year.start_ms)
    began = told = time.monotonic()
    settings = TimeSeriesSettings.load({}).engine()
    async with Engine.open(folder, clock=clock, settings=settings) as engine:
        for day, rows in enumerate(year.rows()):
            clock.advance(DAY_MS / 1_000)
            await engine.append(rows, metric_sets=[year.metric_set], servers=[year.server])
            await engine.maintain(everything=True)
            if time.monotonic() - told > 10:
                told = time.monotonic()
                say(f"year: {day + 1} of {year.days} days are stored after {told - began:.0f} s")
        await engine.maintain(everything=True)
    return {"points": year.points, "seconds": time.monotonic() - began, "sizes": meter.sizes(folder)}


class _Client:
    def __init__(self, server: peers.Server, year: Year) -> None:
        options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 64 << 20)]
        self._channel = grpc.insecure_channel(server.address, options)
        self._stub: Any = timeseries_pb2_grpc.TimeSeriesServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {server.secret}"),)
        self._year = year

    def ask(self, asked: Question) -> float:
        """Milliseconds until the decoded answer, which is compared with what was generated."""
        year = self._year
        query = history_pb2.HistoryQuery(
            server_ids=[year.server.server_id],
            metrics=[year.metric_set.keys[asked.column]],
            aggregation=ASKED[asked.kind],
        )
        start_ms = year.start_ms + asked.first_hour * HOUR_MS
        query.start_time.FromMilliseconds(start_ms)
        query.end_time.FromMilliseconds(start_ms + asked.hours * HOUR_MS)
        query.step.seconds = HOUR_MS // 1_000
        request = timeseries_pb2.QueryRequest(query=query)
        times, values = [], []
        started = time.perf_counter()
        for response in self._stub.Query(request, metadata=self._metadata, timeout=120):
            for series in response.series:
                times.append(np.array(series.times))
                values.append(np.array(series.values))
        passed = time.perf_counter() - started
        self._compare(asked, start_ms, np.concatenate([[], *times]), np.concatenate([[], *values]))
        return passed * 1_000

    def _compare(self, asked: Question, start_ms: int, times_s: Floats, values: Floats) -> None:
        expected = self._year.hours[asked.kind][asked.first_hour : asked.first_hour + asked.hours, asked.column]
        there = ~np.isnan(expected)
        labels = (start_ms + np.flatnonzero(there) * HOUR_MS) / 1_000
        if not np.array_equal(times_s, labels):
            raise BenchError(f"{len(times_s)} hours were answered instead of {len(labels)} to {asked}")
        tolerance = 0.0 if asked.kind == "MAX" else TOLERANCE
        wrong = ~np.isclose(values, expected[there], rtol=tolerance, atol=0.0)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise BenchError(f"{asked}: hour {at} is {values[at]!r} instead of {expected[there][at]!r}")

    def close(self) -> None:
        self._channel.close()


def measure(folder: Path, *, days: int, window_days: int, count: int, say: Say) -> dict[str, Any]:
    """Returns milliseconds for each aggregation; `count` questions of each."""
    today_ms = int(time.time() * 1_000) // DAY_MS * DAY_MS
    year = Year(today_ms - days * DAY_MS, days)
    say(f"year: {len(year.metric_set)} metrics x {days} days are stored")
    filled = asyncio.run(_fill(folder / "timeseries", year, say))
    say(f"year: {filled['points'] / 1e6:.1f} M points in {filled['seconds']:.0f} s")
    times: dict[str, list[float]] = {}
    with peers.ours(folder, start_bound_s=120.0) as server:
        client = _Client(server, year)
        peers.settle([server])
        try:
            for kind in ASKED:
                times[kind] = _asked(client, questions(kind, count + 1, year, window_days))
                say(f"year: {kind}: p50/p95 ms {_summary(times[kind])} of {len(times[kind])} answers, all as generated")
        finally:
            client.close()
    together = [one for found in times.values() for one in found]
    return filled | {
        "window_days": window_days,
        "questions": {kind: len(found) for kind, found in times.items()},
        "kinds": {kind: _percentiles(found) for kind, found in times.items()},
        **_percentiles(together),
    }


def _asked(client: _Client, asked: list[Question]) -> list[float]:
    client.ask(asked[0])  # to warm up
    found: list[float] = []
    ends = time.monotonic() + KIND_BOUND_S
    for question in asked[1:]:
        if len(found) >= 5 and time.monotonic() > ends:
            break
        found.append(client.ask(question))
    return found


def _percentiles(times: list[float]) -> dict[str, float]:
    return {"p50_ms": float(np.percentile(times, 50)), "p95_ms": float(np.percentile(times, 95))}


def _summary(times: list[float]) -> str:
    return "/".join(f"{value:.1f}" for value in _percentiles(times).values())
