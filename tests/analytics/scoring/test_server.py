"""What must hold of a server's score."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.analytics.scoring import parameters as p
from services.analytics.scoring.server import FleetScorer
from services.analytics.scoring.threshold import Thresholds

START_S = 1_600_041_600.0
STEP_S = 300.0
DAY = 288


def fleet(seed: int, days: int, sizes: list[int]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(days * DAY)[:, None]
    width = sum(sizes)
    return 40 + 10 * np.sin(2 * np.pi * (time / DAY + rng.random(width))) + rng.normal(size=(len(time), width))


def scored(values: np.ndarray, sizes: list[int], scorer: FleetScorer | None = None, first: int = 0):
    """(score, alarm, raw), shape (T, S) each."""
    scorer = scorer or FleetScorer(sizes)
    windows = [scorer.update(START_S + (first + place) * STEP_S, row) for place, row in enumerate(values)]
    return tuple(np.array([getattr(window, name) for window in windows]) for name in ("score", "alarm", "raw"))


def test_a_broken_server_is_found_and_its_series_are_named() -> None:
    sizes = [40, 40, 12]
    values = fleet(0, 5, sizes)
    at = 4 * DAY + 30
    broken = [43, 47, 51, 55, 59, 63, 67, 71, 75, 79, 44, 48]
    values[at : at + 10, broken] = 0.0
    scorer = FleetScorer(sizes)
    score, alarm, _ = scored(values[: at + 2], sizes, scorer)
    assert score[at, 1] > 1.5 * score[2 * DAY : at, 1].max()
    assert alarm[at : at + 2, 1].any() and not alarm[at : at + 2, [0, 2]].any()
    window = scorer.update(START_S + (at + 2) * STEP_S, values[at + 2])
    assert window.is_finding.tolist() == [False, True, False]
    named = scorer.contributors(window, 1)
    assert len(named) == 10 and set(named) <= {place - 40 for place in broken}
    assert scorer.contributors(window, 1, 3) == named[:3]


def test_a_quiet_fleet_has_alarms_but_no_finding() -> None:
    sizes = [100] * 5
    scorer = FleetScorer(sizes)
    alarms = findings = 0
    for place, row in enumerate(fleet(12, 8, sizes)):
        window = scorer.update(START_S + place * STEP_S, row)
        alarms, findings = alarms + int(window.alarm.sum()), findings + int(window.is_finding.sum())
    assert alarms > 10 and findings == 0


def test_one_series_of_many_pages_nobody() -> None:
    values = fleet(1, 5, [60])
    values[4 * DAY : 4 * DAY + 20, 7] = 500.0
    score, _, _ = scored(values, [60])
    assert score[4 * DAY : 4 * DAY + 20].max() < score[2 * DAY : 4 * DAY].max() + 0.1


def test_constant_and_missing_series_neither_count_nor_hold_others_down() -> None:
    values = fleet(2, 4, [12])
    values[3 * DAY + 50 : 3 * DAY + 55, :6] += 80
    more = np.concatenate((values, np.full((len(values), 20), 3.0), np.full((len(values), 20), np.nan)), axis=1)
    few, many = scored(values, [12]), scored(more, [52])
    for one, other in zip(few, many, strict=True):
        np.testing.assert_allclose(one.astype(float), other.astype(float), atol=1e-12)


@settings(max_examples=3, deadline=None)
@given(order=st.permutations(range(9)))
def test_the_order_of_series_changes_nothing(order: list[int]) -> None:
    values = fleet(3, 3, [9])
    one, other = scored(values, [9]), scored(values[:, order], [9])
    np.testing.assert_allclose(one[0], other[0], atol=1e-9)


def test_servers_do_not_know_of_each_other() -> None:
    values = fleet(4, 3, [5, 1, 8])
    together, _, _ = scored(values, [5, 1, 8])
    for place, part in enumerate((slice(0, 5), slice(5, 6), slice(6, 14))):
        alone, _, _ = scored(values[:, part], [part.stop - part.start])
        np.testing.assert_allclose(together[:, place], alone[:, 0], atol=1e-12)


def test_the_only_series_of_a_server_speaks_for_it() -> None:
    values = fleet(5, 4, [1])
    values[3 * DAY : 3 * DAY + 30] = 0.0
    scorer = FleetScorer([1])
    for place, row in enumerate(values):
        window = scorer.update(START_S + place * STEP_S, row)
        assert window.score[0] == window.series.rested[0]


@settings(max_examples=3, deadline=None)
@given(cut=st.integers(1, 4 * DAY - 1))
@pytest.mark.full
def test_restored_it_goes_on_with_equal_scores(cut: int) -> None:
    sizes = [6, 1, 4]
    values = fleet(6, 4, sizes)
    values[3 * DAY + 40 : 3 * DAY + 60, :3] = 0.0
    values[2 * DAY, 9] = np.nan
    whole = scored(values, sizes)
    scorer = FleetScorer(sizes)
    scored(values[:cut], sizes, scorer)
    again = FleetScorer.of_arrays(scorer.arrays())
    for one, other in zip(whole, scored(values[cut:], sizes, again, cut), strict=True):
        np.testing.assert_allclose(one[cut:].astype(float), other.astype(float), atol=1e-9, rtol=0)


def test_servers_and_series_come_and_go() -> None:
    sizes = [3, 4, 2]
    values = fleet(8, 3, sizes)
    whole = scored(values, sizes)
    scorer = FleetScorer(sizes)
    scored(values[:DAY], sizes, scorer)
    # the first goes, a new one comes before the second, the third gets one series more
    now = scorer.rearranged([2, 4, 3], np.array([-1, 1, 2]), np.array([-1, -1, 3, 4, 5, 6, 7, 8, -1]))
    assert now.learned() == pytest.approx([0.0, 1.0, 1.0], abs=0.01)
    after = np.concatenate((fleet(9, 2, [2]), values[DAY:, 3:], np.full((2 * DAY, 1), np.nan)), axis=1)
    score, alarm, _ = scored(after, [2, 4, 3], now, DAY)
    np.testing.assert_allclose(score[:, 1:], whole[0][DAY:, 1:], atol=1e-9)
    np.testing.assert_array_equal(alarm[:, 1:], whole[1][DAY:, 1:])
    assert (score[: DAY - 1, 0] == 0).all() and score[DAY + 10 :, 0].max() > 0


def test_copies_of_a_series_count_once() -> None:
    values = fleet(10, 6, [12])
    values[5 * DAY : 5 * DAY + 5, 0] += 200  # one metric, and all that is made of it
    copies = np.concatenate([values] + [values[:, :1] * scale + 5 for scale in np.linspace(0.1, 9, 12)], axis=1)
    at = slice(5 * DAY, 5 * DAY + 5)
    _, _, one = scored(values, [12])
    _, _, many = scored(copies, [24])
    assert many[at].max() < 1.3 * one[at].max()
    _, _, apart = scored(np.concatenate((values, fleet(11, 6, [12])), axis=1), [24])
    assert many[3 * DAY : 5 * DAY].mean() == pytest.approx(one[3 * DAY : 5 * DAY].mean(), rel=0.15)
    assert apart[at].max() < one[at].max()


def test_state_that_is_none_is_refused() -> None:
    arrays = FleetScorer([3, 2]).arrays()
    for name in arrays:
        with pytest.raises(ValueError, match="the array"):
            FleetScorer.of_arrays({key: array for key, array in arrays.items() if key != name})


def test_scores_are_from_0_to_1_from_the_first_window_on_and_0_while_learning() -> None:
    values = fleet(7, 3, [8, 1])
    values[100] = 1e90
    values[700] = np.nan
    values[2 * DAY + 100 :, :4] = -1e9
    score, alarm, raw = scored(values, [8, 1])
    assert np.isfinite(score).all() and score.min() >= 0 and score.max() <= 1
    assert (score[: DAY - 1] == 0).all() and not alarm[: 2 * DAY - 1].any() and np.isfinite(raw).all()


@pytest.mark.parametrize(("step_s", "scale"), [(60.0, 1.0), (300.0, 1.0), (300.0, 0.2), (3600.0, 1.0)])
def test_an_alarm_level_is_passed_as_often_as_asked_for(step_s: float, scale: float) -> None:
    rng = np.random.default_rng(0)
    thresholds = Thresholds(4)
    windows = int(30 * p.DAY_S / step_s)
    scores = scale * np.exp(rng.normal(size=(windows, 4)) * np.array([0.1, 0.3, 0.6, 1.0]))
    above = np.array(
        [thresholds.update(START_S + place * step_s, step_s, row, np.ones(4, bool)) for place, row in enumerate(scores)]
    )
    a_day = above[windows // 3 :].sum(axis=0) / 20
    assert (np.abs(a_day - p.ALARMS_PER_DAY) < 0.8).all()


def test_a_long_incident_does_not_carry_the_level_off() -> None:
    rng = np.random.default_rng(1)
    thresholds = Thresholds(1)
    scores = np.exp(0.3 * rng.normal(size=40 * DAY))
    scores[20 * DAY : 22 * DAY] += np.where(rng.random(2 * DAY) < 0.2, 20.0, 0.0)
    levels, above = [], []
    for place, score in enumerate(scores):
        above.append(thresholds.update(START_S + place * STEP_S, STEP_S, np.array([score]), np.ones(1, bool))[0])
        levels.append(float(thresholds.levels()[0]))
    assert above[20 * DAY] or any(above[20 * DAY : 20 * DAY + 20])
    assert levels[27 * DAY] < 3 * levels[20 * DAY - 1]
