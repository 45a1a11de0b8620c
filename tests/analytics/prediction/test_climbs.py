"""Climbs to the limit are foretold in time, with an interval that holds; what is usual is not."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.analytics.prediction import parameters as p
from services.analytics.prediction.climbs import Climbs
from tests.analytics.prediction.made import DAY, MINUTE, climb, fed, saw


def told(values: Any) -> Any:
    """The probability of each minute, shape (T, R)."""
    return np.array([window.probability for window in fed(values)[1]])


@pytest.mark.parametrize("per_hour", [4.0, 8.0, 16.0, 40.0])
def test_a_straight_climb_is_foretold_with_its_date(per_hour: float) -> None:
    random = np.random.default_rng(3)
    minutes = round((p.LIMIT - 40.0) / per_hour * 60.0)
    values = np.concatenate([np.full(120, 40.0), climb(40.0, per_hour, minutes)]) + 0.2 * random.random(120 + minutes)
    windows = fed(values)[1]
    likely = [place for place, window in enumerate(windows) if window.probability[0] >= 0.5]
    first = likely[0]
    left = 120 + minutes - first
    assert left >= min(0.4 * minutes, 0.9 * p.HORIZON_MINUTES), "well before the limit"
    window = windows[first]
    assert window.minutes[0] == pytest.approx(left, rel=0.3)
    held = [windows[place].soonest[0] <= 120 + minutes - place <= windows[place].latest[0] for place in likely]
    assert np.mean(held) >= 0.8
    assert windows[-2].minutes[0] <= 5


@pytest.mark.parametrize("kind", ["constant", "falls", "noise", "step", "ramp of five minutes", "slow"])
def test_what_does_not_climb_to_the_limit_foretells_nothing(kind: str) -> None:
    minutes, random = 600, np.random.default_rng(5)
    values = {
        "constant": np.full(minutes, 70.0),
        "falls": 90.0 - np.arange(minutes) / 10.0,
        "noise": 60.0 + 5.0 * random.standard_normal(minutes),
        "step": np.where(np.arange(minutes) < 300, 30.0, 85.0),
        "ramp of five minutes": np.clip(30.0 + 11.0 * (np.arange(minutes) - 300), 30.0, 85.0),
        "slow": climb(30.0, 1.0, minutes),
    }[kind]
    assert told(values).max() < p.OPEN


def test_where_nothing_climbs_there_is_no_date() -> None:
    window = fed(np.full((100, 2), [50.0, 80.0]))[1][-1]
    assert np.isnan([window.minutes, window.soonest, window.latest]).all()
    assert window.value.tolist() == [50.0, 80.0]


@pytest.mark.full
def test_a_disk_that_is_filled_and_cleaned_as_usual_foretells_nothing() -> None:
    """Every six hours, every day and every week, to 93 %: once a cycle is known it is silent, over three weeks."""
    periods = (360, DAY, 7 * DAY)
    values = np.stack([saw(20.0, 93.0, period, 22 * DAY) for period in periods], axis=1)
    probability = told(values)
    for place, period in enumerate(periods):
        assert probability[period + 10 :, place].max() < p.CLOSE, period


@pytest.mark.full
def test_the_same_disk_is_foretold_when_it_fills_faster_or_is_not_cleaned() -> None:
    usual = saw(20.0, 80.0, DAY, 5 * DAY)
    faster = np.concatenate([usual, climb(20.0, 10.0, 400)])
    assert told(faster)[5 * DAY :].max() >= p.OPEN
    further = np.concatenate([usual, climb(20.0, 2.5, 1_795)])
    probability = told(further)[5 * DAY :, 0]
    first = int(np.argmax(probability >= p.OPEN))
    assert climb(20.0, 2.5, 1_795)[first] == pytest.approx(80.0 + p.HIGHER, abs=1.0)
    assert 1_795 - first >= 240, "four hours before the limit"


def test_a_climb_to_the_limit_never_becomes_usual() -> None:
    """A leak that is ended by a restart, each day."""
    day = np.concatenate([np.full(DAY - 300, 40.0), climb(40.0, 12.0, 300)])
    probability = told(np.tile(day, 5)).reshape(5, DAY)
    assert (probability.max(axis=1) == 1.0).all()
    assert ((probability[:, :-30] >= p.OPEN).sum(axis=1) > 120).all()


def test_what_is_full_has_failed_only_if_it_was_not_always_full() -> None:
    filled = np.concatenate([climb(40.0, 30.0, 120), np.full(200, 98.0)])
    values = np.stack([filled, np.full(320, 100.0), np.full(320, 97.0)], axis=1)
    windows = fed(values)[1]
    assert windows[-1].probability.tolist() == [1.0, 0.0, 0.0]
    assert windows[-1].minutes[0] == windows[-1].soonest[0] == windows[-1].latest[0] == 0.0


def test_a_resource_that_is_not_measured_any_more_foretells_nothing() -> None:
    values = np.concatenate([climb(40.0, 12.0, 200), np.full(40, np.nan)])
    probability = told(values)[:, 0]
    assert probability[199] >= p.OPEN
    assert probability[220:].max() == 0


@settings(max_examples=20, deadline=None)
@given(missing=st.sets(st.integers(60, 250), max_size=25), later=st.integers(0, 400))
@pytest.mark.full
def test_missing_minutes_hardly_matter(missing: set[int], later: int) -> None:
    values = climb(30.0, 12.0, 260)
    holed = values.copy()
    holed[list(missing)] = np.nan
    climbs, windows = fed(holed)
    if 259 not in missing:
        assert windows[-1].probability[0] == pytest.approx(told(values)[-1, 0], abs=0.45)
        assert windows[-1].minutes[0] == pytest.approx((p.LIMIT - values[-1]) / 0.2, rel=0.1)
    window = climbs.update(MINUTE + 260 + later, np.array([50.0]))
    assert np.isfinite(window.probability).all()
    if later > 160:
        assert np.isnan(climbs.state.points[1, 1:]).all(), "points that were passed over are empty"


@pytest.mark.full
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 999), max_size=4), seed=st.integers(0, 99))
def test_a_restart_at_any_minute_changes_nothing(cuts: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    values = 50.0 + np.cumsum(random.standard_normal((1_000, 3)), axis=0)
    values[random.random(values.shape) < 0.05] = np.nan
    whole, expected = fed(values)
    climbs: Climbs | None = None
    found = []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 1_000], strict=True):
        climbs, windows = (
            fed(values[start:end], climbs or Climbs.fresh(3), MINUTE + start) if end > start else (climbs, [])
        )
        found += windows
        if climbs is not None:
            climbs = Climbs.of_arrays(climbs.arrays(), 3)
    for window, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(window.probability, other.probability)
        np.testing.assert_array_equal(window.latest, other.latest)
    assert climbs is not None
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(array, climbs.arrays()[name])


def test_places_change_and_nothing_else() -> None:
    random = np.random.default_rng(8)
    values = 60.0 + np.cumsum(random.standard_normal((800, 4)), axis=0)
    whole = told(values)
    climbs, _ = fed(values[:500])
    moved = climbs.rearranged(np.array([3, -1, 0]))
    new = np.concatenate([values[500:, [3]], np.full((300, 1), 20.0), values[500:, [0]]], axis=1)
    probability = np.array([window.probability for window in fed(new, moved, MINUTE + 500)[1]])
    np.testing.assert_array_equal(probability[:, [0, 2]], whole[500:, [3, 0]])


@pytest.mark.parametrize("seed", [101, 102])
def test_probabilities_are_as_often_right_as_they_say(seed: int) -> None:
    """Of climbs straight but for noise, 3 of 10 of which end halfway; other seeds than the constants were found on."""
    random, resources, before = np.random.default_rng(seed), 300, 300
    hours, ends = random.choice([2.0, 4.0, 8.0, 16.0], resources), random.random(resources) < 0.3
    start = random.uniform(25.0, 60.0, resources)
    stop = np.where(ends, random.uniform(0.2, 0.8, resources), 1.0)
    minutes = np.arange(-before, 16 * 60)[:, None]
    progress = np.clip(minutes / 60.0 / hours, 0.0, stop)
    values = start + (98.0 - start) * progress + random.normal(0.0, 0.15, (len(minutes), resources))
    probability = told(values)
    failed = values >= p.LIMIT
    far = np.where(failed.any(axis=0), np.argmax(failed, axis=0), 10**6)[None] - np.arange(len(values))[:, None]
    open_ones = (far > 0) & (probability > 0)
    comes = far <= p.HORIZON_MINUTES
    for low, high in ((0.5, 0.8), (0.8, 1.0)):
        part = open_ones & (probability >= low) & (probability <= high)
        assert part.sum() > 200
        assert comes[part].mean() >= probability[part].mean() - 0.1, (low, high)
    unlikely = open_ones & (probability < 0.2)
    assert comes[unlikely].mean() < comes[open_ones & (probability >= 0.5)].mean() - 0.3
