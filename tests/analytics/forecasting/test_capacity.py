"""When a disk is full: dates on disks that fill up as told, and none on those that do not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.analytics.disks import FLAT, HOUR_MS, LIMIT, NOISES, START_MS, Disk, disk, flat
from services.analytics.forecasting.capacity import DAY_MS, Reason, exhaust
from services.analytics.forecasting.odds import odds_of_passing

SEEDS = 12


def line(days: int, start: float, per_day: float) -> tuple[np.ndarray, np.ndarray]:
    hours = np.arange(days * 24)
    return START_MS + hours.astype(np.int64) * HOUR_MS, start + per_day * hours / 24


def error(full: Disk) -> float:
    """Relative error of the time left; 1 without a date."""
    found = exhaust(full.times_ms, full.values, LIMIT)
    if found.date_ms is None:
        return 1.0
    return abs((found.date_ms - full.times_ms[-1]) / DAY_MS - full.days_left) / full.days_left


# Measured over 60 seeds, noise .02 / .2 / 1 %: linear .00/.00/.01, saw-tooth .00/.01/.01, weekly .00/.00/.01,
# jumps .23/.23/.29 (.16 for who knows the rate), jumps that are over .03/.01/.02, rate change .00/.01/.03.
@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        ("linear", 0.02),
        ("saw-tooth", 0.03),
        ("weekly clean-up", 0.03),
        ("jumps", 0.30),
        ("jumps once", 0.06),
        ("rate change", 0.04),
    ],
)
def test_the_date_is_right(kind: str, bound: float) -> None:
    errors = [error(disk(kind, seed, noise)) for noise in NOISES for seed in range(SEEDS)]
    assert np.median(errors) <= bound


def test_flat_disks_get_no_date() -> None:
    found = [
        exhaust(full.times_ms, full.values, LIMIT)
        for kind in FLAT
        for seed in range(SEEDS)
        for full in [flat(kind, seed, NOISES[seed % 3])]
    ]
    assert sum(answer.date_ms is not None for answer in found) == 0
    assert {answer.reason for answer in found} <= {Reason.FLAT, Reason.FALLING_AWAY, Reason.TOO_FAR}


def test_the_interval_holds_the_date() -> None:
    held = []
    for seed in range(2 * SEEDS):
        full = disk("linear", seed, 1.0)
        found = exhaust(full.times_ms, full.values, LIMIT)
        assert found.date_ms is not None and found.low_ms is not None and found.high_ms is not None
        assert found.low_ms <= found.date_ms <= found.high_ms
        held.append(found.low_ms <= full.times_ms[-1] + full.days_left * DAY_MS <= found.high_ms)
    assert np.mean(held) >= 0.75


def test_a_straight_line_is_exact() -> None:
    found = exhaust(*line(30, 40, 0.5), 90)
    assert found.date_ms is not None
    assert (found.date_ms - START_MS) / DAY_MS == pytest.approx(100, abs=0.6)
    assert found.rate_per_day == pytest.approx(0.5, rel=1e-6)
    assert (found.within_30_days, found.within_90_days) == (0.0, 1.0)
    assert found.backtest.trials == 2
    assert found.backtest.error < 0.05


def test_the_day_may_be_sampled_at_any_interval() -> None:
    for minutes in (5, 30, 60, 360, 1440):
        times = START_MS + np.arange(0, 40 * 1440, minutes, dtype=np.int64) * 60_000
        found = exhaust(times, 40 + 0.5 * (times - START_MS) / DAY_MS, 90)
        assert found.date_ms is not None
        assert (found.date_ms - START_MS) / DAY_MS == pytest.approx(100, abs=1.1)


def test_growing_faster_is_sooner_and_falling_is_the_mirror() -> None:
    times, values = line(40, 40, 0.5)
    plain, faster = exhaust(times, values, 90), exhaust(times, values, 90, growth=0.25)
    mirrored = exhaust(times, -values, -90, falling=True)
    assert plain.date_ms is not None and faster.date_ms is not None
    left = plain.date_ms - times[-1]
    assert (faster.date_ms - times[-1]) / left == pytest.approx(0.8, abs=0.01)
    assert (mirrored.date_ms, mirrored.low_ms, mirrored.high_ms) == (plain.date_ms, plain.low_ms, plain.high_ms)
    assert mirrored.rate_per_day == pytest.approx(-0.5, rel=1e-6)


@given(seed=st.integers(0, 500), scale=st.floats(1e-3, 1e9), shift=st.floats(-1e3, 1e3))
@settings(max_examples=12, deadline=None)
def test_the_unit_does_not_matter(seed: int, scale: float, shift: float) -> None:
    full = disk("linear", seed, 0.2)
    one = exhaust(full.times_ms, full.values, LIMIT)
    other = exhaust(full.times_ms, (full.values + shift) * scale, (LIMIT + shift) * scale)
    assert one.date_ms is not None and other.date_ms is not None
    assert other.date_ms == pytest.approx(one.date_ms, abs=60_000)
    assert other.reason == one.reason


def test_no_date_has_a_reason() -> None:
    times, values = line(40, 40, 0.5)
    assert exhaust(times, np.full(len(times), np.nan), 90).reason is Reason.NO_DATA
    assert exhaust(times[: 6 * 24], values[: 6 * 24], 90).reason is Reason.TOO_YOUNG
    assert exhaust(times, values, 50).reason is Reason.PAST
    assert exhaust(times, values, 50).within_30_days == 1.0
    assert exhaust(times, np.full(len(times), 40.0), 90).reason is Reason.FLAT
    assert exhaust(times, values, 5, falling=True).reason is Reason.FALLING_AWAY
    assert exhaust(times, 40 + (values - 40) / 100, 90).reason is Reason.TOO_FAR
    for limit in (1e19, 1e300):  # more days away than whole numbers can say
        assert exhaust(times, values, limit).reason is Reason.TOO_FAR
        assert exhaust(times, -values, -limit, falling=True).reason is Reason.TOO_FAR


def test_growth_that_a_clean_up_takes_back_is_too_uncertain() -> None:
    times, values = line(18, 40, 1.0)
    values -= 9 * (np.arange(len(values)) >= 9.5 * 24)  # and the next one would be due
    assert exhaust(times, values, 90).reason is Reason.TOO_UNCERTAIN


@pytest.mark.parametrize("noisy", [0.0, 0.02, 0.2])
def test_growth_that_bends_is_not_made_by_jumps(noisy: float) -> None:
    hours = np.arange(60 * 24)
    noise = noisy * np.random.default_rng(0).standard_normal(len(hours))
    times = START_MS + hours.astype(np.int64) * HOUR_MS
    for days in (3, 4, 8):  # a cache that fills up to 80 %, and stays there
        found = exhaust(times, 80 * (1 - np.exp(-hours / 24 / days)) + noise, LIMIT)
        assert (found.date_ms, found.reason) == (None, Reason.FLAT)
        assert found.rate_per_day < 0.1
    faster = exhaust(times, 20 + 60 * (hours / len(hours)) ** 2 + noise, LIMIT)  # at 80 % now, and faster each day
    assert faster.date_ms is not None
    assert (faster.date_ms - times[-1]) / DAY_MS == pytest.approx(60 * ((70 / 60) ** 0.5 - 1), rel=0.35)
    assert faster.rate_per_day == pytest.approx(2.0, rel=0.15)


def test_what_happened_before_the_rate_changed_does_not_count() -> None:
    times, values = line(60, 40, 0.1)
    values[40 * 24 :] += 0.9 * np.arange(20 * 24) / 24
    found = exhaust(times, values, 90)
    assert found.rate_per_day == pytest.approx(1.0, rel=0.02)
    assert found.changes_ms == pytest.approx([START_MS + 40 * DAY_MS], abs=2 * DAY_MS)


def test_gaps_change_nothing_much() -> None:
    full = disk("saw-tooth", 4, 0.2)
    holed = full.values.copy()
    holed[np.random.default_rng(1).random(len(holed)) < 0.3] = np.nan
    holed[100:250] = np.nan
    one, other = exhaust(full.times_ms, full.values, LIMIT), exhaust(full.times_ms, holed, LIMIT)
    assert one.date_ms is not None and other.date_ms is not None
    assert abs(one.date_ms - other.date_ms) < 0.05 * full.days_left * DAY_MS + DAY_MS


def test_the_odds_fall_with_the_limit_and_rise_with_the_days() -> None:
    rng = np.random.default_rng(1)
    peaks = 50 + np.cumsum(rng.standard_normal(56)) * 0.5 + rng.standard_normal(56)
    odds = np.array([[odds_of_passing(peaks, limit, days) for limit in range(48, 70)] for days in (7, 30, 90)])
    assert (np.diff(odds, axis=1) <= 0).all()
    assert (np.diff(odds, axis=0) >= -0.05).all()
    assert odds[0, 0] > 0.9
    assert odds[2, -1] < 0.3


def test_after_a_silence_of_months_there_are_no_odds() -> None:
    rng = np.random.default_rng(1)
    hours = np.append(np.arange(10 * 24), 100 * 24)  # ten days, three months of nothing, and a first measurement
    answer = exhaust(hours * HOUR_MS, 50 + rng.standard_normal(len(hours)), 90.0)
    assert answer.reason is Reason.FLAT
    assert np.isnan(answer.within_30_days) and np.isnan(answer.within_90_days)
