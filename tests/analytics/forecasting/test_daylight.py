"""Clocks that are put forward or back: followed within two days, and none seen where none is."""

import numpy as np
import pytest

from services.analytics.forecasting.daylight import aligned
from services.analytics.forecasting.forecast import forecast


def business(days: int, seed: int, moved_ago: int | None, by: int = 1) -> np.ndarray:
    """Busy from 9 to 17 with a job at 3; the clock moves some days before the end."""
    rng = np.random.default_rng(seed)
    hour = np.arange(days * 24)
    local = hour - (by * (hour >= (days - moved_ago) * 24) if moved_ago is not None else 0)
    busy = np.where((local % 24 >= 9) & (local % 24 < 17), 30.0, 0.0) * np.where(local // 24 % 7 >= 5, 0.3, 1.0)
    return 20 + busy + 15.0 * (local % 24 == 3) + 2 * rng.standard_normal(len(hour))


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("moved_ago", [2, 4, 10, 20, 30])
def test_the_forecast_follows_the_clock(by: int, moved_ago: int) -> None:
    many = np.stack([business(63, seed, moved_ago + 7, by) for seed in range(8)])
    still = np.stack([business(63, seed, None) for seed in range(8)])
    error = np.abs(forecast(many[:, :-168], 168).value - many[:, -168:]).mean()
    usual = np.abs(forecast(still[:, :-168], 168).value - still[:, -168:]).mean()
    assert error < 1.4 * usual  # 3 times without


def test_a_clock_that_stands_still_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    many = np.stack(
        [business(56, seed, None) for seed in range(30)] + [rng.standard_normal(56 * 24) for _ in range(30)]
    )
    moved = (aligned(many) != many).any(axis=1)
    assert moved.mean() <= 0.04


def test_only_whole_hours_of_the_old_part_are_moved() -> None:
    history = business(56, 1, 9)[None]
    result = aligned(history)
    end = result.shape[1] - 9 * 24
    assert np.isnan(result[0, 0])
    np.testing.assert_array_equal(result[0, end + 24 :], history[0, end + 24 :])
    np.testing.assert_array_equal(result[0, 1 : end - 24], history[0, : end - 25])
