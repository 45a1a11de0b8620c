"""What the detector knows: saved and taken up again, bounded, forgotten, and refused when it does not fit."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.anomaly import Anomaly
from fleet.model import Metric, MetricSet
from services.analytics.detect import DetectorState
from services.analytics.fleet_detector import FORGET_AFTER_MS, FleetDetector
from services.analytics.registry import Limits
from tests.analytics.fakes import (
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
    trained_state,
    usual,
)


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 6 * 40 - 1), max_size=4), seed=st.integers(0, 99))
@pytest.mark.full
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


def test_of_servers_beyond_the_bounds_it_is_said_and_others_are_learnt() -> None:
    metric_set, servers = MetricSet((Metric(name="x"), Metric(name="y"))), ("a", "b", "c", "d")
    detector = FleetDetector(limits=Limits(series=3))
    for tick in range(120):
        if tick == 60:
            detector = restarted(detector, limits=Limits(series=2))
            assert detector.about().partly_judged == 0, "nobody has come yet"
        rows = rows_of(servers, [T0_MS + tick * 15 * TICK_MS] * 4, [[tick % 7, 1.0]] * 4, metric_set)
        show(detector, rows, metric_set=metric_set)
    assert [detector.is_partly_judged(one) for one in servers] == [False, True, True, True]
    assert (detector.about().partly_judged, detector.about().series) == (3, 3)
    assert detector.learned == 1.0, "of c and d nothing is ever learnt"
    assert [detector.learned_of(one) for one in servers] == [1.0, 1.0, 0.0, 0.0]
    later_ms = T0_MS + FORGET_AFTER_MS + 2 * 86_400_000
    for tick in range(2):  # a and b are forgotten, so that there is room
        rows = rows_of(("d",), [later_ms + tick * 60 * TICK_MS], [[1.0, 1.0]], metric_set)
        show(detector, rows, metric_set=metric_set)
    assert (detector.about().partly_judged, detector.about().series) == (0, 2)


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


def test_after_a_pause_of_over_a_week_everybody_is_watched_anew() -> None:
    """As after holidays: nobody sends for so long, and the last minute before is open until they do."""
    detector = FleetDetector()
    for tick in range(5):
        show(detector, fleet_tick(tick))
    detector = restarted(detector)
    for tick in range(8 * 1_440, 8 * 1_440 + 5):
        rows = fleet_tick(tick)
        show(detector, rows_of(["late-1"], rows.times_ms[:1], usual(tick, 1) + 1e6))
        show(detector, rows)
    detector = restarted(detector)
    state = detector.state()
    assert state.texts["servers"] == ("late-1", *SERVERS)
    assert state.arrays["sizes"].tolist() == [len(METRICS)] * 4
    assert (state.arrays["series.origin"][len(METRICS) :] < 1e5).all(), "nobody's rows are another one's"


def test_what_went_on_before_a_pause_of_over_a_week_did_not_go_on_in_it() -> None:
    shown = Shown()
    for minute in range(200):  # server-1 comes to its limit
        rows = fleet_tick(LEARN_TICKS + shown.tick, broken=minute >= 195)
        rows.values[1, METRICS.index("disk_usage")] = min(40.0 + 0.3 * minute, 97.0)
        shown.show(rows)
        shown.tick += 1
    open_before = {one.id: one for one in shown.findings if one.end_ms is None}
    assert {one.detector for one in open_before.values()} == {"departure", "prediction"}
    shown.tick += 8 * 1_440
    shown.go_on(2)
    for one in (shown.found[before] for before in open_before):
        assert one.end_ms is not None
        assert one.peak_ms < one.end_ms <= at_ms(200), one.detector


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


def test_a_clock_that_was_ahead_does_not_deafen_for_as_long() -> None:
    ahead_ms = 30 * 86_400_000
    shown = Shown()
    shown.go_on(20)
    shown.go_on(3, broken=True)
    assert [finding.end_ms for finding in shown.findings] == [None]
    shown.show(fleet_tick(LEARN_TICKS + shown.tick), now_ms=at_ms(shown.tick) + ahead_ms)
    shown.detector.take_scores()
    for tick in range(1, 30):
        shown.show(fleet_tick(LEARN_TICKS + shown.tick + tick))
        if tick == 5:
            shown.detector = restarted(shown.detector)
    assert len(shown.detector.take_scores()) >= 15
    assert all(finding.end_ms is not None for finding in shown.findings)


def test_a_clock_that_was_behind_for_a_while_costs_nothing_that_was_learnt() -> None:
    shown = Shown()
    shown.go_on(5)
    for minute in range(9):
        shown.detector.advance(minute * TICK_MS)
    shown.go_on(15)
    shown.go_on(3, broken=True)
    assert [finding.server_id for finding in shown.findings] == ["server-0"]
