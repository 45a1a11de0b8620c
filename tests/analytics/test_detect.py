"""What the detector promises: it finds what is abnormal, and nothing else."""

import numpy as np
import pytest

from fleet.model import Metric, MetricSet
from services.analytics import servers as servers_module
from services.analytics.detect import EwmaDetector, EwmaRules
from services.analytics.findings import Anomaly, finding_id
from tests.analytics.fakes import METRIC_SET, METRICS, T0_MS, TICK_MS, Series


def usual(count: int, seed: int = 1, level: float = 30.0, deviation: float = 2.0) -> list[float]:
    return list(level + deviation * np.random.default_rng(seed).standard_normal(count))


def test_a_spike_is_found_grows_and_is_closed() -> None:
    series = Series()
    assert series.show(*usual(100)) == []
    assert series.show(90.0, 91.0) == []  # two points are not enough
    (opened,) = series.show(92.0)
    assert (opened.server_id, opened.metric, opened.detector) == ("web-1", "cpu_usage", "ewma")
    assert opened.start_ms == series.time_ms(100)
    assert opened.end_ms is None
    assert opened.value == 92.0
    assert opened.peak_ms == series.time_ms(102)
    assert 0.9 < opened.score < 1
    assert opened.expected_low < 30 < opened.expected_high < 60
    assert opened.id == finding_id("web-1", "ewma", "cpu_usage", series.time_ms(100))
    (grown,) = series.show(99.0)
    assert grown.id == opened.id
    assert grown.score > opened.score
    assert series.show(80.0) == []  # still abnormal, but no new peak
    assert series.show(*usual(5, seed=2)) == []
    (closed,) = series.show(30.0)
    assert closed.id == opened.id
    assert closed.end_ms == series.time_ms(104)
    assert (closed.value, closed.peak_ms) == (99.0, series.time_ms(103))
    assert len(series.found) == 1


def test_a_drop_is_abnormal_too() -> None:
    series = Series()
    series.show(*usual(100, level=60.0))
    (found,) = series.show(1.0, 1.0, 1.0)
    assert found.value == 1.0 < found.expected_low


def test_usual_noise_is_not_abnormal() -> None:
    detector = EwmaDetector(EwmaRules())
    columns, servers = detector.columns_of(METRIC_SET), [f"server-{number}" for number in range(100)]
    rng = np.random.default_rng(1)
    for tick in range(500):
        time_ms = T0_MS + tick * TICK_MS
        values = 40 + 4 * rng.standard_normal((100, len(METRICS)))
        assert detector.observe(columns, servers, np.full(100, time_ms, np.int64), values, time_ms) == []
    assert detector.learned == 1.0


@pytest.mark.parametrize("level", [0.0, 55.0, 100.0])
def test_a_constant_series_never_alarms(level: float) -> None:
    series = Series()
    series.show(*[level] * 500)
    assert (
        series.show(*(level + np.tile([0.9, 0.9, 0.9, 0.9, -0.9, -0.9, -0.9, -0.9], 80))) == []
    )  # noise under the floor
    assert series.found == {}


def test_a_single_outlier_is_no_finding() -> None:
    series = Series()
    series.show(*usual(100))
    for _ in range(20):
        series.show(99.0, *usual(3))
    assert series.found == {}


def test_nothing_is_judged_before_the_cold_start_is_over() -> None:
    series = Series(cold_start_points=60)
    assert series.detector.learned == 0.0
    series.show(*usual(40))
    series.show(*[99.0] * 10)
    series.show(*usual(9))
    assert (series.detector.learned, series.found) == (0.0, {})
    series.show(30.0)
    assert series.detector.learned == 1.0


def test_learned_is_the_share_of_series_past_the_cold_start() -> None:
    series = Series(cold_start_points=10)
    series.show(*usual(10))
    other = Series(series.detector, "web-2")
    other.show(30.0)
    assert series.detector.learned == 0.5


def test_missing_values_change_nothing() -> None:
    whole, holed = Series(), Series()
    values = [*usual(100), 95.0, 95.0, 95.0, *usual(20, seed=3)]
    whole.show(*values)
    for tick, value in enumerate(values):
        holed.show(value)
        if tick % 3 == 0:
            for nothing in (np.nan, np.inf, -np.inf, 1e300):
                holed.show(nothing, at_ms=holed.time_ms(tick) + 1)
    assert len(whole.found) == 1
    assert holed.found == whole.found
    state, expected = holed.detector.state(), whole.detector.state()
    for name, array in expected.arrays.items():
        if name != "heard_ms":
            np.testing.assert_array_equal(state.arrays[name], array, name)


def test_a_gap_is_no_anomaly() -> None:
    series = Series()
    series.show(*usual(100))
    series.tick += 5_000
    series.show(*usual(200, seed=4))
    assert series.found == {}


def test_late_and_doubled_points_are_passed_over() -> None:
    series = Series()
    series.show(*usual(100))
    before = series.detector.state()
    for _ in range(10):
        assert series.show(99.0, at_ms=series.time_ms(99)) == []
        assert series.show(99.0, at_ms=series.time_ms(50)) == []
    after = series.detector.state()
    for name in ("mean", "variance", "points", "high", "last_ms"):
        np.testing.assert_array_equal(before.arrays[name], after.arrays[name], name)


def test_between_the_two_limits_a_finding_stays_as_it_is() -> None:
    series = Series(min_deviation=1.0)
    series.show(*[50.0] * 100)
    assert series.show(*[54.5] * 10) == []  # 4.5 deviations: not enough to open
    series = Series(min_deviation=1.0)
    series.show(*[50.0] * 100)
    series.show(*[60.0] * 3)
    assert len(series.found) == 1
    series.show(*[54.5] * 10)  # but enough to go on
    (finding,) = series.found.values()
    assert finding.end_ms is None
    (closed,) = series.show(*[50.0] * 6)
    assert closed.end_ms == series.time_ms(112)


def test_after_an_alarm_there_is_rest() -> None:
    series = Series(rest_ms=60 * TICK_MS)
    series.show(*usual(300))
    series.show(*[99.0] * 3, *usual(6, seed=5))
    assert len(series.found) == 1
    series.show(*[99.0] * 10, *usual(40, seed=6))
    assert len(series.found) == 1
    series.show(*usual(20, seed=7))
    series.show(*[99.0] * 3)
    assert len(series.found) == 2


def test_an_abnormal_stretch_hardly_moves_the_mean() -> None:
    series = Series()
    series.show(*usual(400))
    mean = series.detector.state().arrays["mean"][0]
    series.show(*[99.0] * 30)
    assert abs(series.detector.state().arrays["mean"][0] - mean) < 1.0
    (found,) = series.found.values()
    assert found.end_ms is None


def test_a_level_that_stays_is_learnt_in_the_end() -> None:
    series = Series()
    series.show(*usual(400, deviation=1.0))
    series.show(*usual(2_000, seed=8, level=80.0, deviation=1.0))
    (found,) = series.found.values()
    assert found.end_ms is not None
    assert 300 < (found.end_ms - found.start_ms) / TICK_MS < 1_200


def test_findings_of_a_silent_server_are_closed() -> None:
    series = Series(silence_ms=900_000)
    series.show(*usual(100), 99.0, 99.0, 99.0)
    last_ms = series.time_ms(102)
    heard_ms = T0_MS + series.tick * TICK_MS
    assert series.detector.close_silent(heard_ms + 900_000) == []
    (closed,) = series.detector.close_silent(heard_ms + 900_001)
    assert closed.end_ms == last_ms
    assert series.detector.close_silent(heard_ms + 900_002) == []


def test_a_set_without_headline_metrics_is_passed_over() -> None:
    detector = EwmaDetector(EwmaRules())
    columns = detector.columns_of(MetricSet((Metric(name="load"), Metric(name="cpu_usage", labels=(("cpu", "0"),)))))
    assert columns.tolist() == [-1, -1, -1]
    assert detector.observe(columns, ["a"], np.array([T0_MS]), np.ones((1, 2)), T0_MS) == []
    assert detector.state().server_ids == ()


def test_new_servers_leave_the_others_as_they_are() -> None:
    alone = Series()
    alone.show(*usual(100), 99.0, 99.0, 99.0)
    crowded = Series()
    crowded.show(*usual(50))
    for number in range(300):
        Series(crowded.detector, f"other-{number}").show(30.0)
    crowded.show(*usual(100)[50:], 99.0, 99.0, 99.0)
    assert len(alone.found) == 1
    assert crowded.found == alone.found


def test_servers_beyond_the_bound_are_counted_and_silent_ones_make_room(caplog: pytest.LogCaptureFixture) -> None:
    detector = EwmaDetector(EwmaRules(cold_start_points=2), max_servers=3)
    columns, day_ms = detector.columns_of(METRIC_SET), 86_400_000

    def show(servers: list[str], time_ms: int) -> list[Anomaly]:
        values = np.full((len(servers), len(METRICS)), 20.0)
        return detector.observe(columns, servers, np.full(len(servers), time_ms, np.int64), values, time_ms)

    show(["a", "b", "c"], T0_MS)
    show(["b", "c", "d", "e"], T0_MS + day_ms)
    assert detector.unwatched_rows == 2
    assert caplog.text.count("MAX_SERVERS") == 1
    assert detector.state().server_ids == ("a", "b", "c")
    show(["d", "c", "b"], T0_MS + servers_module.FORGET_AFTER_MS + 1)
    state = detector.state()
    assert state.server_ids == ("b", "c", "d")
    assert state.arrays["points"].reshape(3, 3)[:, 0].tolist() == [3, 3, 1]
    assert detector.unwatched_rows == 2


def test_scores_stay_between_zero_and_one() -> None:
    series = Series(min_deviation=0.001)
    series.show(*usual(100))
    series.show(1e12, -1e12, 1e12)
    (found,) = series.found.values()
    assert 0 <= found.score <= 1
    assert np.isfinite([found.value, found.expected_low, found.expected_high]).all()
    assert all(np.isfinite(array).all() for array in series.detector.state().arrays.values())
