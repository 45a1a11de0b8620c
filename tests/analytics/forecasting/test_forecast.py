"""What a forecast promises: the right answer where there is one, the same answer in any unit, and honest intervals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.analytics.forecasting.candidates import fit, try_out
from services.analytics.forecasting.forecast import Forecasts, forecast
from services.analytics.forecasting.grid import HOUR_MS, hourly, rates
from services.analytics.forecasting.steps import UnusableError, forecast_measurements

DAY_SHAPE = np.tile(10.0 * np.sin(np.arange(24) * np.pi / 12), 7)
WEEK_SHAPE = DAY_SHAPE * np.repeat([1, 1, 1, 1, 1, 0.2, 0.2], 24)
START_MS = 1_750_032_000_000


def noisy(days: int, seed: int = 1, noise: float = 1.0, shape: np.ndarray = WEEK_SHAPE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 50 + np.resize(shape, days * 24) + noise * rng.standard_normal(days * 24)


def bounds(found: Forecasts) -> tuple[np.ndarray, ...]:
    return found.low95, found.low80, found.value, found.high80, found.high95


def test_a_week_without_noise_goes_on_as_it_was() -> None:
    history = np.resize(50 + WEEK_SHAPE, 8 * 168 + 5)[None]
    found = forecast(history, 168)
    np.testing.assert_allclose(found.value[0], np.roll(50 + WEEK_SHAPE, -5), atol=1e-9)
    assert found.backtest.mase[0] == pytest.approx(0, abs=1e-9)
    assert found.backtest.trials[0] == 8


def test_a_straight_line_goes_on() -> None:
    found = forecast((20 + 0.01 * np.arange(56 * 24))[None], 168)
    np.testing.assert_allclose(found.value[0], 20 + 0.01 * np.arange(56 * 24, 56 * 24 + 168), atol=0.05)


@pytest.mark.parametrize("level", [0.0, 37.5, -4.0])
def test_a_constant_series_stays_where_it_is(level: float) -> None:
    found = forecast(np.full((1, 30 * 24), level), 48)
    for values in bounds(found):
        np.testing.assert_array_equal(values, level)


@given(
    days=st.integers(1, 70),
    seed=st.integers(0, 1000),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-1e3, 1e3),
    gaps=st.floats(0, 0.6),
)
@settings(max_examples=25, deadline=None)
def test_the_unit_does_not_matter_and_gaps_are_no_trouble(
    days: int, seed: int, scale: float, shift: float, gaps: float
) -> None:
    history = noisy(days, seed) - 100  # below 0, so that there is no bound
    history[np.random.default_rng(seed).random(len(history)) < gaps] = np.nan
    if np.isnan(history).all():
        return
    found, other = forecast(history[None], 60), forecast((history * scale + shift - 1e6)[None], 60)
    for values, others in zip(bounds(found), bounds(other), strict=True):
        np.testing.assert_allclose(others, values * scale + shift - 1e6, rtol=1e-6, atol=2e-6 * scale + 1e-4)
    assert np.isfinite(found.value).all()
    if np.isfinite(found.low95).all():
        for lower, higher in zip(bounds(found)[:-1], bounds(found)[1:], strict=True):
            assert (lower <= higher + 1e-12).all()


def test_a_series_is_forecast_alike_alone_and_beside_others() -> None:
    many = np.full((5, 56 * 24), np.nan)
    for row, days in enumerate((56, 20, 3, 56, 0)):
        if days:
            many[row, -days * 24 :] = noisy(days, row)
    together = forecast(many, 100)
    for row in range(5):
        alone = forecast(many[row : row + 1], 100)
        np.testing.assert_allclose(together.value[row], alone.value[0])
        np.testing.assert_allclose(together.high95[row], alone.high95[0])
    assert np.isnan(together.value[4]).all()


def test_a_trial_knows_only_what_was_before_it() -> None:
    history = noisy(50)[None]
    trials = try_out(history, (84, 168), 168, 56 * 24)
    other = history.copy()
    other[:, -84:] = np.random.default_rng(5).random(84) * 1000
    for age, trial in ((84, 0), (168, 1)):
        expected = fit(history[:, :-age]).chosen_ahead(trials.chosen, age)
        np.testing.assert_allclose(history[:, -age:] - trials.errors[:, trial, :age], expected)
        np.testing.assert_array_equal(fit(other[:, :-age]).levels, fit(history[:, :-age]).levels)


def test_what_was_never_negative_is_not_forecast_negative() -> None:
    rng = np.random.default_rng(3)
    found = forecast(rng.exponential(1.0, (3, 40 * 24)) ** 3, 168)
    assert found.value.min() >= 0
    assert found.low95.min() == 0


def test_a_percentage_ends_at_100_when_history_says_so() -> None:
    busy = np.minimum(noisy(40, shape=2 * DAY_SHAPE) + 40, 100)[None]
    assert forecast(busy, 168).high95.max() == 100
    bytes_used = busy * 0.97 + np.linspace(0, 2, busy.shape[1])
    assert forecast(bytes_used, 168).high95.max() > 100
    assert forecast(busy * 0.97, 168, percent=np.array([True])).high95.max() <= 100


@pytest.mark.parametrize("hours", [1, 2, 5, 12, 30, 47, 24 * 5, 24 * 13, 24 * 16])
def test_a_young_series_is_forecast_by_what_there_is(hours: int) -> None:
    values = noisy(20)[-hours:]
    found = forecast(values[None], 168)
    assert np.isfinite(found.value).all()
    assert abs(np.median(found.value) - np.median(values)) < 15
    if hours < 48:
        assert np.ptp(found.value) < 1e-9 + 0.5 * np.ptp(values)  # no season is made of less than two days
    if hours >= 24 * 5:
        truth = np.resize(50 + WEEK_SHAPE, 21 * 168)[20 * 24 : 20 * 24 + 168]
        assert np.abs(found.value[0] - truth).mean() < (3.5 if hours >= 24 * 7 else 6)
    assert np.isfinite(found.low80).all() == (hours >= 5)


def test_a_level_shift_is_followed_within_two_days() -> None:
    history = noisy(56)
    history[-48:] += 30
    found = forecast(history[None], 168)
    assert np.median(found.value - np.resize(50 + WEEK_SHAPE, 57 * 168)[56 * 24 : 57 * 24 + 144]) > 20


def test_intervals_hold_what_they_say_on_noise() -> None:
    many = np.stack([noisy(63, seed) for seed in range(40)])
    found = forecast(many[:, :-168], 168)
    truth = many[:, -168:]
    assert 0.78 < np.mean((truth >= found.low80) & (truth <= found.high80)) < 0.9
    assert 0.94 < np.mean((truth >= found.low95) & (truth <= found.high95)) < 0.99
    assert 0.75 < np.nanmean(found.backtest.cover80) < 0.9
    assert found.backtest.mase.max() < 1


def test_the_mape_is_told_only_where_it_says_something() -> None:
    far, near = noisy(40) + 100, noisy(40) - 50
    found = forecast(np.stack((far, near)), 24)
    assert 0 < found.backtest.mape[0] < 0.05
    assert np.isnan(found.backtest.mape[1])


def test_a_step_of_a_day_is_the_mean_of_its_hours() -> None:
    rng = np.random.default_rng(2)
    spiky = np.where(rng.random(60 * 24) < 0.1, 20.0, 1.0) + rng.random(60 * 24)
    found = forecast(spiky[None], 7, step_hours=24)
    assert found.value[0] == pytest.approx(spiky.mean(), rel=0.25)
    assert found.low80[0, 0] < spiky.mean() < found.high80[0, 0]


def test_hours_of_the_clock_for_many_measurements_an_hour_and_own_hours_for_one() -> None:
    every_5 = START_MS + 300_000 * np.arange(12 * 24 * 3, dtype=np.int64)
    found = forecast_measurements(every_5, np.arange(len(every_5), dtype=float)[:, None], horizon_ms=2 * HOUR_MS)
    assert found.times_ms.tolist() == [START_MS + 72 * HOUR_MS, START_MS + 73 * HOUR_MS]
    odd = START_MS + 204_000 + HOUR_MS * np.arange(72, dtype=np.int64)
    odd[5] += 60_000
    assert np.isfinite(hourly(odd, np.ones((72, 1))).values).all()
    found = forecast_measurements(odd, np.ones((72, 1)), horizon_ms=HOUR_MS)
    assert found.times_ms.tolist() == [int(odd[-1]) + HOUR_MS]


def test_parts_of_an_hour_have_wider_intervals() -> None:
    times = START_MS + 300_000 * np.arange(12 * 24 * 20, dtype=np.int64)
    values = (20 + np.random.default_rng(1).standard_normal(len(times)))[:, None]
    by_hour = forecast_measurements(times, values, horizon_ms=24 * HOUR_MS).forecasts
    by_part = forecast_measurements(times, values, horizon_ms=24 * HOUR_MS, step_ms=300_000).forecasts
    assert by_part.value.shape == (1, 288)
    np.testing.assert_allclose(by_part.value[0, ::12], by_hour.value[0])
    assert (by_part.high80 - by_part.low80).mean() > 2.0 > (by_hour.high80 - by_hour.low80).mean()


def test_a_counter_is_forecast_as_a_rate_over_its_resets() -> None:
    times = START_MS + 60_000 * np.arange(60 * 24 * 10, dtype=np.int64)
    counts = 7.0 * 60 * np.arange(len(times))
    counts[5000:] -= counts[5000] - 30
    counts[777] = np.nan
    rate = rates(times, counts)
    np.testing.assert_allclose(rate[~np.isnan(rate)][[0, 100, 3000, -1]], 7.0)
    assert rate[5000] == 0.5
    found = forecast_measurements(times, counts[:, None], horizon_ms=24 * HOUR_MS, counters=[0])
    np.testing.assert_allclose(found.forecasts.value, 7.0, atol=1e-6)


@pytest.mark.parametrize(
    ("horizon_ms", "step_ms", "field"),
    [
        (731 * 24 * HOUR_MS, HOUR_MS, "horizon"),
        (HOUR_MS, 2 * HOUR_MS, "horizon"),
        (24 * HOUR_MS, 90 * 60_000, "step"),
        (24 * HOUR_MS, 7 * 60_000, "step"),
        (24 * HOUR_MS, 0, "step"),
        (700 * 24 * HOUR_MS, 1000, "step"),
    ],
)
def test_what_makes_no_sense_is_named(horizon_ms: int, step_ms: int, field: str) -> None:
    with pytest.raises(UnusableError) as refused:
        forecast_measurements(np.array([START_MS]), np.ones((1, 1)), horizon_ms=horizon_ms, step_ms=step_ms)
    assert refused.value.field == field
