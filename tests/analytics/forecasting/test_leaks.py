"""What a simulated leak does to the date of its limit: it comes near, day by day."""

from typing import Any

import numpy as np
import pytest

from services.analytics.forecasting.capacity import DAY_MS, exhaust
from services.simulator.catalogue import METRIC_SET
from services.simulator.fleet import build_fleet
from services.simulator.synthetic import SyntheticSource

HOUR_MS = 3_600_000
START_MS = 1_760_054_400_000
SEED, LEAKS_ON_DAY, LEAK_DAYS = 7, 17, 5


async def measured(scenario: str, metric: str) -> tuple[Any, Any]:
    """Times and values by the hour of a server to which a scenario comes after LEAKS_ON_DAY quiet days."""
    servers = build_fleet(4, seed=SEED, interval_ms=HOUR_MS)
    source = SyntheticSource(servers, seed=SEED, interval_ms=HOUR_MS)
    server_id = servers[2].descriptor.server_id
    column = [one.key for one in METRIC_SET.metrics].index(metric)
    times, values = [], []
    for hour in range((LEAKS_ON_DAY + LEAK_DAYS) * 24):
        now_ms = START_MS + hour * HOUR_MS
        if hour == LEAKS_ON_DAY * 24:
            source.inject(server_id, scenario, LEAK_DAYS * 86_400, now_ms)
        for batch in await source.batches(now_ms // HOUR_MS, now_ms):
            if server_id in batch.rows.server_ids:
                times.append(now_ms)
                values.append(batch.rows.values[batch.rows.server_ids.index(server_id), column])
    return np.array(times), np.array(values)


def days_left(times: Any, values: Any, days: int, limit: float) -> float:
    """As told after so many days; infinite where there is no date."""
    known = times < START_MS + days * DAY_MS
    found = exhaust(times[known], values[known], limit)
    return float("inf") if found.date_ms is None else (found.date_ms - times[known][-1]) / DAY_MS


@pytest.mark.parametrize(
    ("scenario", "metric", "limit"), [("memory-leak", "memory_usage", 95.0), ("disk-fill", "disk_usage", 90.0)]
)
async def test_the_date_comes_near_while_it_leaks(scenario: str, metric: str, limit: float) -> None:
    times, values = await measured(scenario, metric)
    reached = times[np.argmax(values >= limit)]
    assert (values >= limit).any()
    left = {days: days_left(times, values, days, limit) for days in range(LEAKS_ON_DAY - 1, LEAKS_ON_DAY + 4)}
    quiet, told = left[LEAKS_ON_DAY], left[LEAKS_ON_DAY + 3]
    assert quiet > 30, "nothing is to come, or not soon"
    assert told < 5, left
    assert list(left.values()) == sorted(left.values(), reverse=True), "day by day it is nearer"
    truth = (reached - (START_MS + (LEAKS_ON_DAY + 3) * DAY_MS)) / DAY_MS
    assert abs(told - truth) < 2, (told, truth)
