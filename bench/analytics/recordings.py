"""The recordings that are judged on, and the judge that comes with them.

What must stay true: what is not there is None, not an error; nothing is copied from them into this project; hours are
those of the clock, for all machines alike, and an hour in which nothing was measured is NaN.
"""

import csv
import gzip
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from bench.peers import ROOT, BenchError
from services.analytics.forecasting.grid import HOUR_MS, hourly

Floats = NDArray[np.float64]

JUDGE: Final = "score_events.py"
BITBRAINS: Final = "bitbrains-20.csv.gz"
MACHINE_METRICS: Final = ("cpu_usage", "memory_usage")
STEPS_S: Final = {"smd": 60, "asd": 300}
"""The sets of labelled recordings, and their sampling interval in seconds."""
NOT_THERE: Final = "the recordings are neither in OPENMANAGER_TEST_DATA nor beside the checkout"


class Judge(Protocol):
    """What score_events.py offers; its text says what each means."""

    events: Callable[[NDArray[np.int64]], list[tuple[int, int]]]
    false_alarms: Callable[[NDArray[np.bool_], NDArray[np.int64], int], int]
    score: Callable[[list[Floats], list[NDArray[np.int64]], int, tuple[float, ...]], dict[float, tuple[float, float]]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labelled:
    """A server's recording.

    Attributes:
        name: of the server.
        kind: the set it is of.
        learnt, tested: rows x metrics.
        label: of each tested row, 1 for abnormal.
    """

    name: str
    kind: str
    learnt: Floats
    tested: Floats
    label: NDArray[np.int64]

    @property
    def step_s(self) -> int:
        """From row to row."""
        return STEPS_S[self.kind]

    @property
    def rows_a_day(self) -> int:
        """As the judge wants it."""
        return 86_400 // self.step_s


def folder() -> Path | None:
    """Where the recordings are."""
    named = os.environ.get("OPENMANAGER_TEST_DATA")
    places = [Path(named)] if named else [up / "shared" / "data" for up in ROOT.parents]
    return next((place for place in places if (place / JUDGE).is_file()), None)


def judge(data: Path) -> Judge:
    """Loads the judge."""
    spec = importlib.util.spec_from_file_location("score_events", data / JUDGE)
    if spec is None or spec.loader is None:
        raise BenchError(f"{data / JUDGE} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast("Judge", module)


def labelled(data: Path, servers: int | None, learnt: int | None, tested: int | None) -> list[Labelled]:
    """The labelled recordings of all sets; so many servers of each, so many rows of each server."""
    found = []
    for kind in STEPS_S:
        for path in sorted(data.glob(f"{kind}-*.npz"))[:servers]:
            with np.load(path) as arrays:
                train, test, label = (np.asarray(arrays[name]) for name in ("train", "test", "label"))
            if not np.isfinite(train).all() or not np.isfinite(test).all():
                raise BenchError(f"{path.name} has gaps, and the yardsticks know none")
            found.append(
                Labelled(
                    name=path.stem,
                    kind=kind,
                    learnt=train[-(learnt or len(train)) :].astype(np.float64),
                    tested=test[:tested].astype(np.float64),
                    label=label[:tested].astype(np.int64),
                )
            )
    return found


def machine_hours(data: Path) -> tuple[list[str], Floats]:
    """Hourly means of CPU and memory of the real machines: names, and shape (series, hours)."""
    tables = _machine_tables(data / BITBRAINS)
    first = min(times[0] for times, _ in tables.values()) // HOUR_MS
    last = max(times[-1] for times, _ in tables.values()) // HOUR_MS
    names, rows = [], []
    for server, (times, values) in tables.items():
        hours = hourly(times, values)
        end = hours.end_ms // HOUR_MS - first
        for metric, series in zip(MACHINE_METRICS, hours.values, strict=True):
            row = np.full(last - first + 1, np.nan)
            row[end - len(series) : end] = series
            names.append(f"{server}/{metric}")
            rows.append(row)
    return names, np.array(rows)


def _machine_tables(path: Path) -> dict[str, tuple[NDArray[np.int64], Floats]]:
    times: dict[str, list[int]] = {}
    values: dict[str, list[list[float]]] = {}
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows: Any = csv.reader(file)
        header = next(rows)
        columns = [header.index(metric) for metric in MACHINE_METRICS]
        time_at, server_at = header.index("time"), header.index("server_id")
        for row in rows:
            times.setdefault(row[server_at], []).append(int(row[time_at]) * 1_000)
            values.setdefault(row[server_at], []).append([float(row[column] or "nan") for column in columns])
    return {server: (np.array(times[server], np.int64), np.array(values[server])) for server in times}
