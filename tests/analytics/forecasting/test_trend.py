"""The long run of a metric: slope, significance, profiles, changes, the year before."""

import time

import numpy as np
import pytest

from services.analytics.forecasting.changes import noise_of, pieces_of
from services.analytics.forecasting.grid import HOUR_MS
from services.analytics.forecasting.robust import mann_kendall, median, slopes, slopes_with_interval
from services.analytics.forecasting.trend import trend

MONDAY_MS = 1_749_427_200_000  # 2025-06-09T00:00Z


def hours(days: int, start_ms: int = MONDAY_MS) -> np.ndarray:
    return start_ms + np.arange(days * 24, dtype=np.int64) * HOUR_MS


def ar(days: int, alike: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = np.empty(days)
    state = rng.standard_normal()
    for day in range(days):
        state = alike * state + np.sqrt(1 - alike**2) * rng.standard_normal()
        values[day] = state
    return values


def test_slope_profiles_and_level_of_a_known_year() -> None:
    times = hours(365)
    hour = np.arange(len(times))
    week = np.where(hour // 24 % 7 >= 5, -6.0, 0.0)
    values = 30 + 0.02 * hour / 24 + np.where(hour % 24 == 3, 8.0, 0.0) + week
    found = trend(times, values + np.random.default_rng(1).standard_normal(len(hour)))
    assert found.slope == pytest.approx(0.02, abs=0.001)
    assert found.slope_low < 0.02 < found.slope_high
    assert found.direction == 1
    assert found.daily.argmax() == 3
    assert found.daily[3] == pytest.approx(8, abs=1)
    assert found.weekly.reshape(7, 24).argmax(axis=1).tolist() == [3] * 7
    assert found.changes == ()
    assert found.year is None
    assert found.days == 365
    assert (found.start_ms, found.end_ms) == (times[0], times[-1] + HOUR_MS)


def test_four_years_take_about_four_times_as_long_as_one() -> None:
    """15 to 27 ms a year: a page asks for many. All pairs of hours would be 16 times as many."""

    def least_s(days: int) -> float:
        times = hours(days)
        values = np.random.default_rng(1).standard_normal(len(times))
        took = []
        for _ in range(5):
            begun = time.thread_time()
            trend(times, values)
            took.append(time.thread_time() - begun)
        return min(took)

    assert least_s(4 * 365) < 9 * least_s(365)


def test_changes_of_level_and_rate_are_found_where_they_are() -> None:
    times = hours(120)
    day = np.arange(len(times)) / 24
    values = 50 + 10.0 * (day >= 40) + np.maximum(day - 80, 0) * 0.5
    found = trend(times, values + 0.5 * np.random.default_rng(1).standard_normal(len(day)))
    jump, bend = found.changes
    assert jump.time_ms == pytest.approx(MONDAY_MS + 40 * 24 * HOUR_MS, abs=24 * HOUR_MS)
    assert jump.after - jump.before == pytest.approx(10, abs=0.5)
    assert bend.time_ms == pytest.approx(MONDAY_MS + 80 * 24 * HOUR_MS, abs=3 * 24 * HOUR_MS)
    assert bend.slope_after - bend.slope_before == pytest.approx(0.5, abs=0.05)


def test_noise_has_hardly_a_change_and_hardly_a_trend() -> None:
    for alike, most_cut, most_trends in ((0.0, 0.1, 0.1), (0.6, 0.15, 0.2)):
        many = [ar(90, alike, seed) for seed in range(60)]
        assert np.mean([len(pieces_of(days, noise_of(days))) > 1 for days in many]) <= most_cut
        assert np.mean([abs(mann_kendall(days)) > 1.96 for days in many]) <= most_trends


def test_an_outlier_is_no_change() -> None:
    days = 20 + 0.1 * ar(60, 0, 1)
    days[30] = 90
    days[45:48] = np.nan
    assert len(pieces_of(days)) == 1


def test_year_over_year_compares_the_same_weeks() -> None:
    times = hours(400)
    values = np.where(np.arange(len(times)) < 200 * 24, 20.0, 25.0)
    found = trend(times, values)
    assert found.year is not None
    assert (found.year.now, found.year.then) == (25.0, 20.0)
    assert found.year.share == pytest.approx(0.25)


def test_days_instead_of_hours_and_gaps() -> None:
    times = hours(365)[::24]
    values = 10 - 0.01 * np.arange(365) + 0.1 * ar(365, 0, 2)
    values[50:90] = np.nan
    found = trend(times, values)
    assert found.slope == pytest.approx(-0.01, abs=0.001)
    assert found.direction == -1
    assert not found.daily.any()


@pytest.mark.parametrize("count", [1, 2, 30])
def test_a_short_series_has_no_slope_but_a_level(count: int) -> None:
    found = trend(hours(2)[:count], np.full(count, 5.0))
    assert found.level == 5.0
    assert np.isnan(found.slope)
    assert found.direction == 0


def test_the_statistics_are_those_of_the_textbooks() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((4, 31))
    values[:, 5] = np.nan
    np.testing.assert_allclose(median(values), np.nanmedian(values, axis=1))
    expected = [
        np.nanmedian([(row[j] - row[i]) / (j - i) for i in range(31) for j in range(i + 1, 31)]) for row in values
    ]
    np.testing.assert_allclose(slopes(values), expected)
    slope, low, high = slopes_with_interval(np.arange(40) * 2.0 + 0.1 * rng.standard_normal(40))
    assert low < slope < high
    assert slope == pytest.approx(2.0, abs=0.01)


def test_the_slope_s_interval_holds_it() -> None:
    held = []
    for seed in range(100):
        _, low, high = slopes_with_interval(0.05 * np.arange(90) + ar(90, 0.3, seed))
        held.append(low <= 0.05 <= high)
    assert np.mean(held) >= 0.85
