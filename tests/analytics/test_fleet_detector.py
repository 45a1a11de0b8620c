"""What the detector promises: it finds servers that are not as usual, and nothing else."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.anomaly import Anomaly, finding_id
from fleet.model import Metric, MetricKind, MetricSet, Rows
from services.analytics import checkpoint
from services.analytics.core import Snapshot
from services.analytics.detect import DetectorState
from services.analytics.fleet_detector import FORGET_AFTER_MS, FleetDetector
from services.analytics.open_windows import SLOTS, WINDOW_MS
from services.analytics.openings import QUIET_WINDOWS, REST_MS
from services.analytics.registry import Limits
from services.analytics.scoring.server import FleetScorer, ServerWindow
from tests.analytics.fakes import (
    BROKEN_METRICS,
    LEARN_TICKS,
    METRIC_SET,
    METRICS,
    SERVERS,
    T0_MS,
    TICK_MS,
    Shown,
    at_ms,
    fleet_tick,
    rows_of,
    same_state,
    show,
    trained,
    trained_state,
    usual,
    written,
)

REQUESTS = METRICS.index("requests_total")
DISK = METRICS.index("disk_usage")
FAST_MS = 10_000


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[float, Any, ServerWindow]]]:
    """What is judged: start, values and window."""
    seen: list[tuple[float, Any, ServerWindow]] = []
    update = FleetScorer.update

    def spy(scorer: FleetScorer, time_s: float, values: Any) -> ServerWindow:
        window = update(scorer, time_s, values)
        seen.append((time_s, values.copy(), window))
        return window

    monkeypatch.setattr(FleetScorer, "update", spy)
    yield seen


def fast_tick(number: int, servers: tuple[str, ...] = SERVERS) -> Rows:
    """A tick every ten seconds, after what `trained` has learnt."""
    time_ms = at_ms(0) + number * FAST_MS
    return rows_of(servers, [time_ms] * len(servers), usual(0, time_ms=time_ms)[: len(servers)])


def restarted(detector: FleetDetector) -> FleetDetector:
    """A new detector that goes on from a checkpoint of one."""
    again = FleetDetector()
    snapshot = Snapshot(next_sequence=1, verdicts_until=0, detector=detector.state(), waiting=())
    again.restore(checkpoint.decode(written(snapshot)).detector)
    return again


def test_a_broken_server_is_one_finding_that_names_its_metrics() -> None:
    shown = Shown()
    shown.go_on(20)
    assert shown.findings == []
    shown.go_on(2, broken=True)
    (opened,) = shown.findings
    assert (opened.server_id, opened.detector, opened.end_ms) == ("server-0", "departure", None)
    assert (opened.start_ms, opened.peak_ms) == (at_ms(20), at_ms(20))
    assert opened.id == finding_id("server-0", "departure", at_ms(20))
    assert 0.5 < opened.score < 1
    assert {part.metric for part in opened.contributions[:4]} == set(BROKEN_METRICS)
    assert len(opened.contributions) <= 10
    first = opened.contributions[0]
    assert (opened.metric, opened.value) == (first.metric, first.value) == (first.metric, 97.0)
    assert (opened.expected_low, opened.expected_high) == (first.expected_low, first.expected_high)
    assert 30 < opened.expected_low < 40 < opened.expected_high < 55
    scores = [part.score for part in opened.contributions]
    assert scores == sorted(scores, reverse=True)
    assert 0 < scores[-1] < scores[0] < 1

    shown.go_on(8, broken=True)
    shown.go_on(QUIET_WINDOWS + 3)
    (closed,) = shown.findings
    assert closed.id == opened.id
    assert closed.end_ms == at_ms(31)  # the step back is abnormal, too
    assert closed.score >= opened.score


def test_a_finding_follows_its_peak() -> None:
    shown = Shown()
    shown.go_on(20)
    mild = fleet_tick(LEARN_TICKS + 20)
    mild.values[0, [METRICS.index(name) for name in BROKEN_METRICS]] = 65.0
    shown.show(mild)
    shown.tick += 1
    shown.go_on(0)
    (first,) = shown.findings
    shown.go_on(2, broken=True)
    (grown,) = shown.findings
    assert (grown.id, grown.start_ms, grown.peak_ms) == (first.id, at_ms(20), at_ms(21))
    assert grown.score > first.score
    assert grown.value == 97.0 > first.value == 65.0


def test_a_pause_does_not_end_a_finding() -> None:
    shown = Shown()
    shown.go_on(20)
    shown.go_on(3, broken=True)
    shown.go_on(QUIET_WINDOWS - 2)
    (opened,) = shown.findings
    assert opened.end_ms is None
    shown.go_on(3, broken=True)
    shown.go_on(QUIET_WINDOWS + 1)
    (closed,) = shown.findings
    assert closed.end_ms == at_ms(20 + 3 + QUIET_WINDOWS - 2 + 3 + 1)


def test_after_a_finding_there_is_rest() -> None:
    rest = REST_MS // TICK_MS
    shown = Shown()
    shown.go_on(20)
    shown.go_on(3, broken=True)
    shown.go_on(QUIET_WINDOWS + 1)
    (closed,) = shown.findings
    assert closed.end_ms is not None
    shown.go_on(3, broken=True)
    shown.go_on(rest)
    assert len(shown.findings) == 1
    shown.go_on(2, broken=True)
    assert len(shown.findings) == 2


def test_a_fleet_at_rest_makes_no_finding_and_learns_as_it_says() -> None:
    detector = FleetDetector()
    assert (detector.learned, detector.learned_of("server-0")) == (0.0, 0.0)
    for tick in range(720):
        assert show(detector, fleet_tick(tick)) == []
    assert detector.learned == pytest.approx(0.5, abs=0.01)
    late = (*SERVERS, "server-3")
    for tick in range(720, 1_500):
        assert show(detector, fleet_tick(tick, servers=late)) == []
    assert detector.learned_of("server-0") == 1.0
    assert detector.learned_of("server-3") == pytest.approx(780 / 1_440, abs=0.01)
    assert detector.learned == pytest.approx((3 + 780 / 1_440) / 4, abs=0.01)
    assert detector.learned_of("unknown") == 0.0


def test_nothing_is_found_while_learning() -> None:
    detector = FleetDetector()
    for tick in range(1_600):
        assert show(detector, fleet_tick(tick, broken=tick % 200 > 190)) == []


def test_constant_series_never_alarm(judged: list[Any]) -> None:
    detector = FleetDetector()
    for tick in range(LEARN_TICKS):
        values = np.full((3, len(METRICS)), 17.0)
        values[:, REQUESTS] = 1e9
        assert show(detector, rows_of(SERVERS, [T0_MS + tick * TICK_MS] * 3, values)) == []
    assert all((window.raw == 0).all() for _, _, window in judged)


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


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 6 * 40 - 1), max_size=4), seed=st.integers(0, 99))
def test_restarts_at_any_batch_change_no_score_and_no_finding(cuts: list[int], seed: int) -> None:
    def run(stops: set[int]) -> tuple[FleetDetector, dict[str, Anomaly]]:
        detector, found, random = trained(), {}, np.random.default_rng(seed)
        for number in range(6 * 40):
            if number in stops:
                detector = restarted(detector)
            rows = fast_tick(number)
            if 60 <= number < 120:
                rows.values[0, :6] += 60.0
            servers = np.array([True, number < 150, random.random() < 0.9])
            if number > 100:
                extra = rows_of(["late-1"], rows.times_ms[:1], rows.values[:1])
                found |= {one.id: one for one in show(detector, extra)}
            found |= {one.id: one for one in show(detector, rows.select(servers))}
        return detector, found

    whole, found = run(set())
    again, found_again = run(set(cuts))
    assert {one.detector for one in found.values()} == {"departure", "silence"}
    assert found_again == found
    same_state(again.state(), whole.state())
    assert again.learned == whole.learned


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


def test_a_value_that_is_none_does_not_spoil_its_minute(judged: list[Any]) -> None:
    detector = FleetDetector()
    for number, value in enumerate((1.0, np.inf, 2.0, -1e300, np.nan, 3.0, 0.0, 0.0)):
        values = np.full((1, len(METRICS)), value)
        show(detector, rows_of(["a"], [T0_MS + number * FAST_MS], values), T0_MS + number * FAST_MS + 5_000)
    np.testing.assert_array_equal(judged[0][1][:-2], 2.0)


def test_servers_and_series_beyond_the_bounds_are_refused_and_told_once(
    caplog: pytest.LogCaptureFixture, judged: list[Any]
) -> None:
    detector = FleetDetector(limits=Limits(servers=2, series=len(METRICS) + 5))
    for tick in range(4):
        values = usual(tick, 4)
        values[1:] += 1e6
        show(detector, rows_of(["a", "b", "c", "d"], [T0_MS + tick * TICK_MS] * 4, values))
    assert detector.unwatched_rows == 2 * 4
    state = detector.state()
    assert state.texts["servers"] == ("a", "b")
    assert state.arrays["sizes"].tolist() == [len(METRICS), 5]
    assert state.arrays["series.origin"].max() < 1e7
    np.testing.assert_array_less(1e5, state.arrays["series.origin"][-5:])
    assert judged[-1][1][:10].max() < 100.0  # nobody's cell took what was refused
    assert caplog.text.count("Limits.servers") == caplog.text.count("Limits.series") == 1


def test_after_a_restart_a_tick_is_still_taken_by_slices() -> None:
    detector = restarted(trained())
    show(detector, fleet_tick(LEARN_TICKS))
    columns = detector.columns_of(METRIC_SET)
    cells = detector._registry.cells_of(detector._registry.streams(columns, SERVERS), len(columns))
    assert cells == slice(1, 3 * len(METRICS) + 1)


def test_streams_are_bounded_and_those_not_in_use_are_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    detector = FleetDetector(limits=Limits(streams=500))
    for number in range(900):
        metric_set = MetricSet((Metric(name="x"), Metric(name="y", labels=(("v", str(number % 450)),))))
        time_ms = T0_MS + number * 1_000
        show(detector, rows_of(["a"], [time_ms], [[1.0, 2.0]], metric_set), metric_set=metric_set)
    assert 60 <= len(detector.state().arrays["streams.server"]) < 300
    assert detector.unwatched_rows == 0
    detector = FleetDetector(limits=Limits(streams=20))
    for number in range(30):
        metric_set = MetricSet((Metric(name=f"x{number}"),))
        show(detector, rows_of(["a"], [T0_MS + number * 1_000], [[1.0]], metric_set), metric_set=metric_set)
    assert detector.unwatched_rows == 10
    assert caplog.text.count("Limits.streams") == 1


def test_servers_and_series_silent_for_a_week_are_forgotten_and_the_others_go_on() -> None:
    shown, alone = Shown(), Shown()
    shown.go_on(20)
    alone.go_on(20)
    shown.go_on(2, broken=True)  # server-0 has an open finding
    other = MetricSet((*METRIC_SET.metrics[:6], Metric(name="new")))
    for tick in range(24 * 8):
        time_ms = at_ms(30) + tick * 3_600_000
        rows = rows_of(["server-2"], [time_ms], [[*usual(tick)[2, :6], 1.0]], other)
        shown.found |= {one.id: one for one in show(shown.detector, rows, metric_set=other)}
    state = shown.detector.state()
    assert state.texts["servers"] == ("server-2",)
    assert set(state.texts["names"]) == {"", *METRICS[:6], "new"}
    assert state.arrays["sizes"].tolist() == [7]
    assert state.arrays["series.count"].min() > 100
    assert state.open_findings == ()
    assert [one.end_ms is not None for one in shown.findings] == [True] * len(shown.findings)
    assert shown.findings[0].server_id == "server-0"
    again = restarted(shown.detector)
    rows = rows_of(SERVERS, [at_ms(30) + FORGET_AFTER_MS + 2 * 86_400_000] * 3, usual(1))
    show(again, rows)
    assert again.state().texts["servers"] == ("server-2", "server-0", "server-1")


def test_a_hole_in_the_tail_is_no_anomaly() -> None:
    shown = Shown()
    shown.go_on(20)
    shown.tick += 90
    shown.go_on(60)
    assert shown.findings == []


def filling_tick(number: int) -> Rows:
    """A tick every ten seconds; from the tenth minute on server-2's disk fills, to 97 % in four hours."""
    rows = fast_tick(number)
    rows.values[2, DISK] = 40.0 + 57.0 * min(max(number - 60, 0) / (6 * 240), 1.0)
    return rows


@pytest.mark.parametrize("stops", [(), (500, 1_000), (60, 700, 701, 1_480)])
def test_a_disk_that_fills_is_foreseen_whatever_restarts_and_comes_between(stops: tuple[int, ...]) -> None:
    detector, found = trained(), {}
    for number in range(6 * 260):
        if number in stops:
            detector = restarted(detector)
        if number == 650:  # a server more: all get other places
            show(detector, rows_of(["late-1"], [at_ms(0) + number * FAST_MS], usual(0, 1)))
        found |= {one.id: one for one in show(detector, filling_tick(number))}
    (foreseen,) = [one for one in found.values() if one.detector == "prediction"]
    assert (foreseen.server_id, foreseen.metric, foreseen.end_ms) == ("server-2", "disk_usage", None)
    assert foreseen.id == finding_id("server-2", "prediction", foreseen.start_ms)
    limit_ms = at_ms(10) + round((95.0 - 40.0) / 57.0 * 240) * TICK_MS
    assert limit_ms - foreseen.start_ms >= 120 * TICK_MS, "two hours before"
    assert foreseen.score == 1.0
    assert detector.foresight is not None
    listed, watched = detector.foresight.of(["server-0", "server-2", "nobody"])
    assert (watched, [one.server_id for one in listed]) == (2, ["server-2", "server-0"])
    assert listed[0].probability == 1.0


def test_what_is_foreseen_is_told_of_all_servers_each_minute() -> None:
    detector = trained()
    assert detector.foresight is None
    end = 6 * 200
    for number in range(end):
        show(detector, filling_tick(number))
    assert detector.foresight is not None
    (prediction,), watched = detector.foresight.of(SERVERS, 0.5)
    assert watched == 3
    limit_ms = at_ms(10) + round((95.0 - 40.0) / 57.0 * 240) * TICK_MS
    assert prediction.low_ms is not None and prediction.high_ms is not None
    assert prediction.low_ms <= limit_ms <= prediction.high_ms
    assert prediction.computed_ms == at_ms(199)


def test_wide_and_many_servers_do_not_make_a_wide_table() -> None:
    sizes = [5_000] + [3] * 20_000
    scorer = FleetScorer(sizes)
    values = np.random.default_rng(1).standard_normal(sum(sizes))
    window = scorer.update(0.0, values)
    assert window.score.shape == (20_001,)
    assert scorer.learned().shape == (20_001,)


def _without(name: str) -> Any:
    return lambda arrays: arrays.pop(name)


def _longer(name: str) -> Any:
    return lambda arrays: arrays.update({name: np.append(arrays[name], arrays[name][..., -1:], axis=-1)})


def _typed(name: str) -> Any:
    return lambda arrays: arrays.update({name: arrays[name].astype(np.complex128)})


def _other_owner(arrays: dict[str, Any]) -> None:
    arrays["cells.server"][3] = 2


def _beyond(arrays: dict[str, Any]) -> None:
    arrays["cells.name"][3] = 1_000


@pytest.mark.parametrize("damage", [_without, _longer, _typed])
def test_arrays_that_do_not_fit_are_refused(damage: Any) -> None:
    good = trained_state()
    for name in good.arrays:
        arrays = {key: array.copy() for key, array in good.arrays.items()}
        damage(name)(arrays)
        wrong = DetectorState(detector="fleet", arrays=arrays, texts=good.texts, open_findings=())
        detector = FleetDetector()
        with pytest.raises(ValueError, match=r"array|series|sizes|name|counters|server"):
            detector.restore(wrong)
        assert detector.state().texts["servers"] == ()


@pytest.mark.parametrize("damage", [_other_owner, _beyond])
def test_arrays_that_contradict_each_other_are_refused(damage: Any) -> None:
    good = trained_state()
    arrays = {key: array.copy() for key, array in good.arrays.items()}
    damage(arrays)
    with pytest.raises(ValueError, match=r"refers|series"):
        FleetDetector().restore(DetectorState(detector="fleet", arrays=arrays, texts=good.texts, open_findings=()))


def test_open_findings_of_nobody_are_refused() -> None:
    good = trained_state()
    shown = Shown()
    shown.go_on(2)
    shown.go_on(2, broken=True)
    (opened,) = shown.findings
    texts = {**good.texts, "servers": ("x", "y", "z")}
    with pytest.raises(ValueError, match="nobody"):
        FleetDetector().restore(
            DetectorState(detector="fleet", arrays=good.arrays, texts=texts, open_findings=(opened,))
        )
