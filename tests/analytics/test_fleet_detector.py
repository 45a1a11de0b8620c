"""What the detector promises: it finds servers that are not as usual, and nothing else."""

from typing import Any

import numpy as np
import pytest

from fleet.anomaly import finding_id
from fleet.model import Rows
from services.analytics.fleet_detector import FleetDetector
from services.analytics.openings import QUIET_WINDOWS, REST_MS
from services.analytics.scoring.server import FleetScorer
from tests.analytics.fakes import (
    BROKEN_METRICS,
    FAST_MS,
    LEARN_TICKS,
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
    show,
    trained,
    usual,
)

REQUESTS = METRICS.index("requests_total")
DISK = METRICS.index("disk_usage")


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


def test_a_pause_in_which_nobody_was_heard_ends_a_finding() -> None:
    """As of a fleet of one server that is away: then there are no minutes in which it is not judged."""
    shown = Shown()
    shown.go_on(20)
    shown.go_on(3, broken=True)
    shown.tick += 300
    shown.go_on(5, broken=True)
    before, after = shown.findings
    assert (before.start_ms, before.end_ms) == (at_ms(20), at_ms(23))
    assert (after.end_ms, after.start_ms >= at_ms(323)) == (None, True)


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


@pytest.mark.full
def test_constant_series_never_alarm(judged: list[Any]) -> None:
    detector = FleetDetector()
    for tick in range(LEARN_TICKS):
        values = np.full((3, len(METRICS)), 17.0)
        values[:, REQUESTS] = 1e9
        assert show(detector, rows_of(SERVERS, [T0_MS + tick * TICK_MS] * 3, values)) == []
    assert all((window.raw == 0).all() for _, _, window in judged)


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
