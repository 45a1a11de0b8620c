"""How rows become what is judged: minutes, means and rates, each row once, in whatever batches they come."""

from typing import Any

import numpy as np
import pytest

from fleet.model import Metric, MetricKind, MetricSet
from services.analytics.fleet_detector import FleetDetector
from services.analytics.open_windows import SLOTS, WINDOW_MS
from tests.analytics.fakes import (
    FAST_MS,
    LEARN_TICKS,
    METRIC_SET,
    METRICS,
    SERVERS,
    T0_MS,
    TICK_MS,
    Shown,
    at_ms,
    fast_tick,
    fleet_tick,
    restarted,
    rows_of,
    same_state,
    show,
    trained,
    usual,
)

REQUESTS = METRICS.index("requests_total")


def test_windows_are_means_of_gauges_and_rates_of_counters(judged: list[Any]) -> None:
    detector = FleetDetector()
    total, sums = 5_000.0, []
    for number in range(20):
        values = np.full((1, len(METRICS)), float(number))
        total += 30.0
        values[0, REQUESTS] = total
        sums.append(number)
        show(detector, rows_of(["a"], [T0_MS + number * FAST_MS], values), T0_MS + number * FAST_MS + 200)
    assert [time_s for time_s, _, _ in judged] == [T0_MS / 1000, T0_MS / 1000 + 60]
    gauges = [values[:-2] for _, values, _ in judged]
    np.testing.assert_array_equal(gauges[0], 2.5)
    np.testing.assert_array_equal(gauges[1], 8.5)
    assert np.isnan(judged[0][1][-2:]).all()  # no rate of one value
    assert judged[1][1][-2] == 3.0  # requests_total


def test_a_minute_is_closed_a_quarter_of_a_minute_after_its_end(judged: list[Any]) -> None:
    detector = trained()
    end_ms = at_ms(1)
    show(detector, fleet_tick(LEARN_TICKS))
    judged.clear()
    assert detector.due(end_ms + 14_999) == 0
    detector.advance(end_ms + 14_999)
    assert judged == []
    assert detector.due(end_ms + 15_000) > 0
    detector.advance(end_ms + 15_000)
    assert [time_s for time_s, _, _ in judged] == [at_ms(0) / 1000]


def test_late_rows_count_until_their_minute_is_closed(judged: list[Any]) -> None:
    on_time, late = trained(), trained()
    for number in range(8):
        rows = fast_tick(number)
        show(on_time, rows)
        show(late, rows.select(np.array([True, number != 4, True])))
    missed = fast_tick(4).select(np.array([False, True, False]))
    show(late, missed, at_ms(1) + 14_000)
    show(on_time, fast_tick(13))
    show(late, fast_tick(13))
    by_start = [values for time_s, values, _ in judged if time_s == at_ms(0) / 1000]
    np.testing.assert_allclose(by_start[0], by_start[1], rtol=1e-12)
    assert late.untimely_rows == 0
    before = late.state()
    show(late, missed, at_ms(0) + 13 * FAST_MS)
    assert late.untimely_rows == 1
    ahead = rows_of(["server-1"], [at_ms(0) + (SLOTS + 1) * WINDOW_MS], usual(0, 1))
    show(late, ahead, at_ms(0) + 13 * FAST_MS)
    assert late.untimely_rows == 2
    for name in ("windows.amount", "windows.mark"):
        np.testing.assert_array_equal(before.arrays[name], late.state().arrays[name])


def test_rows_ahead_of_time_wait_for_their_minute(judged: list[Any]) -> None:
    detector = trained()
    judged.clear()
    for tick in range(5):
        show(detector, fleet_tick(LEARN_TICKS + tick), at_ms(tick) - 120_000)
    assert detector.untimely_rows == 0
    show(detector, fleet_tick(LEARN_TICKS + 5), at_ms(5) + 15_000)
    assert [time_s for time_s, _, _ in judged] == [at_ms(tick) / 1000 for tick in range(5)]


def test_a_missing_tick_changes_nothing(judged: list[Any]) -> None:
    whole, holed = trained(), trained()
    rates: list[list[float]] = [[], []]
    for place, detector in enumerate((whole, holed)):
        judged.clear()
        for number in range(6 * 20):
            # the last tick of a minute is the worst to miss: counters seem to have stood still for a sixth of it
            if detector is holed and number in (35, 65, 66):
                continue
            assert show(detector, fast_tick(number)) == []
        rates[place] = [float(window.raw.max()) for _, _, window in judged]
        counters = np.array([values[[10, 11, 22, 23, 34, 35]] for _, values, _ in judged[1:]])
        np.testing.assert_allclose(counters, 10.0, atol=0.5)
    assert max(rates[1]) < max(rates[0]) + 0.5


def test_nan_and_counter_resets_are_no_anomalies(judged: list[Any]) -> None:
    shown = Shown()
    shown.go_on(10)
    judged.clear()
    shift = 0.0
    for number in range(30):
        rows = fleet_tick(LEARN_TICKS + shown.tick)
        if number == 5:
            shift = rows.values[:, REQUESTS].min() - 100.0  # all start again
        rows.values[:, [REQUESTS, REQUESTS + 9]] -= shift
        if number in (10, 11, 17):
            rows.values[:, ::2] = np.nan
        if number == 20:
            rows.values[:] = np.nan
        if number == 23:
            rows.values[1, 3:5] = (np.inf, 1e300)
        shown.show(rows)
        shown.tick += 1
    assert shown.findings == []
    assert max(window.raw.max() for _, _, window in judged) < 4.0
    assert np.isnan(judged[5][1][[10, 11]]).all() or np.isnan(judged[6][1][[10, 11]]).all()
    state = shown.detector.state()
    assert all(np.isfinite(state.arrays[name]).all() for name in ("series.level", "series.variance", "server.recent"))


def test_rows_that_come_again_change_nothing() -> None:
    once, again = Shown(), Shown()
    for number in range(90):
        rows = fast_tick(number)
        if number > 30:
            rows.values[0, :6] += 60.0
        once.show(rows)
        again.show(rows)
        again.show(rows)
        again.show(rows.select(np.array([True, False, True])))
        if number % 6 > 3:
            again.show(fast_tick(number - 2), int(rows.times_ms[0]))
    assert len(once.findings) == 1
    assert again.findings == once.findings
    same_state(again.detector.state(), once.detector.state())
    assert again.detector.untimely_rows == 0


def test_how_rows_are_cut_into_batches_changes_nothing(judged: list[Any]) -> None:
    together, apart = trained(), trained()
    random = np.random.default_rng(3)
    for number in range(30):
        show(together, fast_tick(number))
    whole = {time_s: window.score for time_s, _, window in judged}
    judged.clear()
    for number in range(30):
        rows = fast_tick(number)
        for server in random.permutation(3):
            keep = np.arange(3) == server
            show(apart, rows.select(keep))
    for time_s, _, window in judged:
        np.testing.assert_allclose(window.score, whole[time_s], atol=1e-12)
    assert len(judged) == 4


def test_a_set_that_changes_keeps_what_is_known_of_its_metrics(judged: list[Any]) -> None:
    steady, changing = trained(), trained()
    other = MetricSet((Metric(name="new"), *reversed(METRIC_SET.metrics[1:])))  # without load, and one more
    for tick in range(40):
        rows = fleet_tick(LEARN_TICKS + tick)
        assert show(steady, rows) == []
        if tick < 10 or tick >= 30:
            assert show(changing, rows) == []
            continue
        values = np.concatenate((np.full((3, 1), 5.0), rows.values[:, :0:-1]), axis=1)
        changed = rows_of(SERVERS, rows.times_ms, values, other)
        assert show(changing, changed, metric_set=other) == []
    mine, theirs = changing.state(), steady.state()
    names = mine.texts["names"]
    assert set(names) == {"", "new", *METRICS}
    assert len(theirs.texts["names"]) == len(METRICS) + 1
    counts = {
        (int(server), names[int(name)]): float(mine.arrays["series.count"][place])
        for place, (server, name) in enumerate(
            sorted(zip(mine.arrays["cells.server"][1:], mine.arrays["cells.name"][1:], strict=True), key=lambda x: x[0])
        )
    }
    assert counts[0, "new"] == 20
    assert counts[0, "cpu_usage"] == LEARN_TICKS + 38
    assert counts[0, "load"] == LEARN_TICKS + 38 - 20
    assert changing.learned_of("server-0") == pytest.approx((12 + 20 / 1440) / 13, abs=0.01)


def test_a_metric_whose_kind_changes_is_another_series(judged: list[Any]) -> None:
    detector = FleetDetector()
    gauge, counter = (MetricSet((Metric(name="x", kind=kind),)) for kind in (MetricKind.GAUGE, MetricKind.COUNTER))
    for tick, metric_set in enumerate((gauge, gauge, counter, counter, counter, counter)):
        rows = rows_of(["a"], [T0_MS + tick * TICK_MS], [[60.0 * tick]], metric_set)
        show(detector, rows, metric_set=metric_set)
    assert judged[-1][1].tolist()[1] == 1.0
    assert np.isnan(judged[-1][1][0])


def test_a_disk_that_is_told_in_bytes_from_now_on_is_not_full() -> None:
    detector, found = FleetDetector(), {}
    for tick in range(120):
        metric = Metric(name="disk_usage", unit="%" if tick < 60 else "By")
        value = 40.0 if metric.unit == "%" else 40e9
        metric_set = MetricSet((metric, Metric(name="load")))
        rows = rows_of(["a"], [T0_MS + tick * TICK_MS], [[value, 1.0]], metric_set)
        found |= {one.id: one for one in show(detector, rows, metric_set=metric_set)}
        if tick in (61, 90):
            detector = restarted(detector)
    assert found == {}
    assert detector.foresight is not None
    (prediction,), _ = detector.foresight.of(["a"])
    assert (prediction.probability, prediction.date_ms) == (0.0, None)


def test_a_value_that_is_none_does_not_spoil_its_minute(judged: list[Any]) -> None:
    detector = FleetDetector()
    for number, value in enumerate((1.0, np.inf, 2.0, -1e300, np.nan, 3.0, 0.0, 0.0)):
        values = np.full((1, len(METRICS)), value)
        show(detector, rows_of(["a"], [T0_MS + number * FAST_MS], values), T0_MS + number * FAST_MS + 5_000)
    np.testing.assert_array_equal(judged[0][1][:-2], 2.0)
