"""Forecasts of real machines: floors a little below what was measured (in a comment beside each)."""

import csv
import gzip

import numpy as np
import pytest

from services.analytics.forecasting.forecast import forecast
from services.analytics.forecasting.grid import hourly
from tests.harness.data import recording

HISTORY, HORIZON = 56 * 24, 168


@pytest.fixture(scope="module")
def machines() -> np.ndarray:
    """Hourly CPU and memory of 20 machines; shape (series, hours)."""
    rows: dict[str, list[tuple[int, float, float]]] = {}
    with gzip.open(recording("bitbrains-20.csv.gz"), "rt") as file:
        reader = csv.reader(file)
        next(reader)
        for time, server, cpu, memory, *_ in reader:
            rows.setdefault(server, []).append((int(time) * 1000, float(cpu or "nan"), float(memory or "nan")))
    parts = []
    for table in rows.values():
        times = np.array([row[0] for row in table], np.int64)
        parts.append(hourly(times, np.array([row[1:] for row in table])).values)
    count = min(part.shape[1] for part in parts)
    return np.concatenate([part[:, -count:] for part in parts])


def test_seven_days_ahead_of_real_machines(machines: np.ndarray) -> None:
    errors, naive, inside80, inside95, told = [], [], [], [], []
    for origin in range(machines.shape[1] - HORIZON, HISTORY - 1, -HORIZON):
        history, truth = machines[:, origin - HISTORY : origin], machines[:, origin : origin + HORIZON]
        found = forecast(history, HORIZON)
        scale = np.nanmean(np.abs(history[:, 24:] - history[:, :-24]), axis=1)
        last = history[:, -24:]
        last = np.where(np.isnan(last), np.nanmedian(history, axis=1)[:, None], last)
        errors.append(np.nanmean(np.abs(found.value - truth), axis=1) / scale)
        naive.append(np.nanmean(np.abs(np.tile(last, 7) - truth), axis=1) / scale)
        known = np.isfinite(truth)
        inside80.append(((truth >= found.low80) & (truth <= found.high80))[known].mean())
        inside95.append(((truth >= found.low95) & (truth <= found.high95))[known].mean())
        told.append(np.nanmean(found.backtest.cover80))
    assert len(errors) >= 3
    assert np.median(errors) <= 0.80 * np.median(naive)  # measured .73
    assert 0.74 <= np.mean(inside80) <= 0.88  # .81
    assert 0.88 <= np.mean(inside95) <= 0.98  # .92
    assert abs(np.mean(told) - np.mean(inside80)) < 0.08
