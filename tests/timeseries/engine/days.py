"""Days of rows around a noon, for the tests of what goes."""

import numpy as np

from fleet.model import Rows
from services.timeseries.engine import EngineSettings
from tests.timeseries.engine.model import metric_set, rows

DAY_MS = 86_400_000
TODAY = 19_700 * DAY_MS
NOON = TODAY + DAY_MS // 2
SET = metric_set("cpu_usage", "requests_total")
KEEPING = EngineSettings(sparse_points_a_day=0, head_rows=4, maintenance_interval_s=1e9, close_group_heads=1)
WIDE = metric_set(*(f"m{number}" for number in range(200)))
_RNG = np.random.default_rng(4)


def of_day(day: int, count: int = 3, value: float = 0.0) -> Rows:
    """Rows of two servers, spread over the day that lies `day` days from today, its first and last instant included."""
    times = np.linspace(TODAY + day * DAY_MS, TODAY + (day + 1) * DAY_MS - 1, count).astype(np.int64).tolist()
    return rows(SET, [(server, time, [value + time % 97, float(time)]) for time in times for server in "ab"])


def noise(day: int, at: int, count: int = 50) -> Rows:
    """Rows that no encoding makes smaller: 1,600 bytes each."""
    lines = [("a", TODAY + day * DAY_MS + (at + row) * 1_000, _RNG.random(len(WIDE))) for row in range(count)]
    return rows(WIDE, [(server, time, values.tolist()) for server, time, values in lines])
