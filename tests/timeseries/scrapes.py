"""What series with times of their own and series that come and go cost: `python -m tests.timeseries.scrapes SHAPE`.

Some servers are scraped every 15 s for four hours, 500 series each; every scrape has a time of its own, milliseconds
off its grid, and 5 % of the series are replaced each hour by others. A shape is how a sender puts that into sets:

* `matrix`: to compare with: all servers at the same instants, the same 500 series all the time.
* `targets`: a set for each group of series that come and go together, as of a container: 20 groups of 25 series, one of
  which is replaced each hour; a scrape is one row in each of the 20.
* `whole`: one set of all 500; it is another set after each replacement, once an hour.
* `drip`: the same, but the 25 series of an hour are replaced one at a time, so that there are 25 sets an hour.
* `newcomers`: a set of the first 500, in which what is gone is NaN, and one for the newcomers of each hour.
* `single`: a set for each series.

Prints what was measured, as JSON.
"""

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import apsw
import numpy as np
from numpy.typing import NDArray

from fleet.model import Metric, MetricKind, MetricSet, Rows
from runtime.clock import ManualClock
from services.timeseries.engine import Engine, EngineSettings

DAY_MS: Final = 86_400_000
START_MS: Final = 19_700 * DAY_MS
INTERVAL_S: Final = 15
HOURS: Final = 4
SCRAPES_AN_HOUR: Final = 3_600 // INTERVAL_S
REPLACED_AN_HOUR: Final = 0.05
JITTER_MS: Final = 5
SERVERS: Final = 5
SERIES: Final = 500
SINGLE_SERIES: Final = 60
"""Of the shape `single`, of which each costs by itself."""
GROUPS: Final = 20
SHAPES: Final = ("matrix", "targets", "whole", "drip", "newcomers", "single")
SETTINGS: Final = EngineSettings(maintenance_interval_s=1e9, journal_keep_s=0.0)

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Part:
    """Some columns of a server's series that are sent as one set."""

    metric_set: MetricSet
    columns: NDArray[np.intp]


class Signals:
    """The values of all series: two in five are counters, two gauges that wander, one is constant."""

    def __init__(self, servers: int, series: int) -> None:
        self._rng = np.random.default_rng(4)
        self._kinds = np.arange(series) % 5
        self._values = np.round(self._rng.random((servers, series)) * 100, 2)
        self._speeds = self._rng.integers(1, 1_000, (servers, series))

    def step(self) -> Values:
        counts = self._rng.poisson(self._speeds).astype(np.float64)
        wandering = np.round(self._rng.normal(0, 0.5, self._values.shape), 2)
        self._values += np.where(self._kinds < 2, counts, np.where(self._kinds < 4, wandering, 0.0))
        self._values = np.round(self._values, 2)
        return self._values.copy()


def metric(server: int, column: int, life: int) -> Metric:
    """A series of a server; its label tells one life from the next."""
    pod = f"pod-{server}-{column * GROUPS // SERIES}-{life:x}"
    return Metric(name=f"container_metric_{column}", kind=MetricKind.GAUGE, labels=(("pod", pod),))


def part(server: int, columns: NDArray[np.intp], lives: NDArray[np.intp]) -> Part:
    named = (metric(server, column, int(lives[column])) for column in columns.tolist())
    return Part(MetricSet(tuple(named)), columns)


def parts_of(shape: str, server: int, series: int) -> Iterator[list[Part]]:
    """For each scrape in turn, how a server's series are put into sets."""
    everything, lives = np.arange(series), np.zeros(series, np.intp)
    replaced = round(series * REPLACED_AN_HOUR)
    groups = {"targets": GROUPS, "single": series}.get(shape, 1)
    parts = [part(server, columns, lives) for columns in np.array_split(everything, groups)]
    base, gone = parts[0], np.zeros(series, np.bool_)
    for number in range(HOURS * SCRAPES_AN_HOUR):
        hour, scrape = divmod(number, SCRAPES_AN_HOUR)
        if shape == "drip" and scrape % (SCRAPES_AN_HOUR // replaced) == 0 and number:
            lives[(hour * replaced + scrape * replaced // SCRAPES_AN_HOUR) % series] += 1
            parts = [part(server, everything, lives)]
        elif shape not in ("matrix", "drip") and scrape == 0 and number:
            columns = everything[hour * replaced % series :][:replaced]
            lives[columns] += 1
            if shape == "newcomers":
                gone[columns] = True
                parts = [Part(base.metric_set, np.where(gone, -1, everything)), *parts[1:]]
                parts.append(part(server, columns, lives))
            elif shape == "whole":
                parts = [part(server, everything, lives)]
            else:
                parts = [
                    part(server, one.columns, lives) if np.isin(one.columns, columns).any() else one for one in parts
                ]
        yield parts


def batches(shape: str, servers: int, series: int, signals: Signals) -> Iterator[list[tuple[MetricSet, Rows]]]:
    """For each scrape of all servers, the batches that are sent."""
    rng = np.random.default_rng(5)
    offsets = rng.integers(0, INTERVAL_S * 1_000, servers)
    shaped = [parts_of(shape, server, series) for server in range(servers)]
    for number in range(HOURS * SCRAPES_AN_HOUR):
        values, at_ms = signals.step(), START_MS + number * INTERVAL_S * 1_000
        if shape == "matrix":
            (of_set,) = (one.metric_set for one in next(shaped[0]))
            names = tuple(f"server-{server}" for server in range(servers))
            yield [(of_set, _rows(of_set, names, np.full(servers, at_ms), values))]
            continue
        sent = []
        for server, parts in enumerate(map(next, shaped)):
            time_ms = at_ms + offsets[server] + rng.integers(-JITTER_MS, JITTER_MS + 1)
            for one in parts:
                row = np.where(one.columns < 0, np.nan, values[server, one.columns])
                times = np.array([max(time_ms, START_MS)])
                sent.append((one.metric_set, _rows(one.metric_set, (f"server-{server}",), times, row[None, :])))
        yield sent


def _rows(of_set: MetricSet, names: tuple[str, ...], times_ms: NDArray[np.int64], values: Values) -> Rows:
    return Rows(metric_set_id=of_set.id, server_ids=names, times_ms=times_ms, values=values)


def resident_bytes(field: str) -> int:
    """A figure of /proc/self/status; VmHWM is the highest that VmRSS has been."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise LookupError(field)


async def measure(shape: str, folder: Path) -> dict[str, Any]:
    series = SINGLE_SERIES if shape == "single" else SERIES
    clock, points, sets = ManualClock(START_MS), 0, set[str]()
    async with Engine.open(folder, clock=clock, settings=SETTINGS) as engine:
        sending, made_s, heads, head_points = batches(shape, SERVERS, series, Signals(SERVERS, series)), 0.0, 0, 0
        before, started_s = resident_bytes("VmRSS"), time.process_time()
        for number in range(HOURS * SCRAPES_AN_HOUR):
            making_s = time.process_time()
            sent = next(sending)
            made_s += time.process_time() - making_s
            points += sum(rows.points for _, rows in sent)
            new = [of_set for of_set, _ in sent if of_set.id not in sets]
            sets.update(of_set.id for of_set in new)
            if new:
                await engine.append(metric_sets=new)
            await asyncio.gather(*(engine.append(rows) for _, rows in sent))
            clock.advance(INTERVAL_S)
            if number % 20 == 19:
                status = await engine.status()
                heads, head_points = max((heads, head_points), (status.head_bytes, status.head_points))
                await engine.maintain()
        highest = resident_bytes("VmHWM")
        await engine.maintain(everything=True)
        took_s = time.process_time() - started_s - made_s
        status = await engine.status()
        assert status.points == points and status.head_points == 0, status
    with closing(apsw.Connection(str(folder / "journal.db"))) as journal:
        pages = journal.pragma("page_count") - journal.pragma("freelist_count")
        catalog_bytes = pages * journal.pragma("page_size")
    return {
        "shape": shape,
        "points": points,
        "sets": len(sets),
        "block_bytes_per_point": sum(file.stat().st_size for file in (folder / "blocks").iterdir()) / points,
        "catalog_bytes_per_point": catalog_bytes / points,
        "head_bytes_per_point": heads / head_points,
        "resident_bytes_per_point": (highest - before) / head_points,
        "cpu_us_per_point": took_s / points * 1e6,
    }


if __name__ == "__main__":
    scratch = Path(tempfile.mkdtemp(prefix="openmanager-scrapes-"))
    try:
        print(json.dumps(asyncio.run(measure(sys.argv[1], scratch / "store"))))
    finally:
        shutil.rmtree(scratch)
