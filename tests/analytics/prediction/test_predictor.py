"""The reasons together: probabilities, shares, dates, and findings that open once and end."""

from typing import Any

import numpy as np
import pytest

from fleet.anomaly import Anomaly, Contribution, finding_id
from services.analytics.prediction import parameters as p
from services.analytics.prediction.course import DETECTOR, Course
from services.analytics.prediction.foresight import HORIZON_MS, Foresight, Kind
from services.analytics.prediction.predictor import Predictor
from tests.analytics.prediction.made import MINUTE, MINUTE_MS, NAMES, SERVERS, foretold, new_predictor

START_MS = MINUTE * MINUTE_MS


def at_rest() -> Any:
    """Values of all series, shape (servers, NAMES)."""
    return np.tile([50.0, 40.0, 0.5, 0.5], (len(SERVERS), 1))


class Played:
    """Servers at rest but for server b, of which a test says what it does; findings as the detector makes them."""

    def __init__(self) -> None:
        self.predictor = new_predictor()
        self.course = Course()
        self.course.rearrange(np.full(len(SERVERS), -1))
        self.minute = 0
        self.found: dict[str, Anomaly] = {}
        self.foresight: Foresight | None = None
        self.elsewhere: list[int] = []

    def go_on(self, minutes: int, **of_b: Any) -> Foresight:
        """Shows minutes; `disk` and `memory` climb by so much each, other words are values."""
        for _ in range(minutes):
            values = at_rest()
            for name, value in of_b.items():
                if name in NAMES:
                    values[1, NAMES.index(name)] = value(self.minute) if callable(value) else value
            raw = np.array([1.0, of_b.get("raw", 1.0), 1.0])
            falls = np.array([0.0, of_b.get("falls", 0.0), 0.0])
            self.foresight = foretold(self.predictor, self.minute, values, raw=raw, falls=falls)
            self.minute += 1
            changed = self.course.update(self.foresight, self.elsewhere, self.contributions)
            self.found |= {one.id: one for one in changed}
        assert self.foresight is not None
        return self.foresight

    def contributions(self, server: int) -> tuple[Contribution, ...]:
        assert self.foresight is not None
        size = len(SERVERS) * len(NAMES)
        return self.foresight.contributions(server, np.zeros(size), np.full(size, 60.0))

    @property
    def findings(self) -> list[Anomaly]:
        return sorted(self.found.values(), key=lambda one: one.start_ms)


def filling(since: int, per_minute: float = 0.25) -> Any:
    """A disk that fills from 50 %."""
    return lambda minute: min(50.0 + per_minute * (minute - since), 99.0)


def test_a_fleet_at_rest_is_foretold_nothing() -> None:
    foresight = Played().go_on(300)
    assert foresight.probability.tolist() == [0.0, 0.0, 0.0]
    predictions, watched = foresight.of([*SERVERS, "unknown", "a"])
    assert (len(predictions), watched) == (3, 3)
    assert all((one.probability, one.reasons, one.date_ms) == (0.0, (), None) for one in predictions)


def test_a_disk_that_fills_is_named_with_its_date() -> None:
    played = Played()
    played.go_on(100)
    foresight = played.go_on(75, disk=filling(100))
    (prediction,), watched = foresight.of(SERVERS, 0.1)
    assert (prediction.server_id, watched) == ("b", 3)
    assert prediction.probability == pytest.approx(0.9)
    (reason,) = prediction.reasons
    assert (reason.kind, reason.metric, reason.limit) == (Kind.SATURATION, "disk", p.LIMIT)
    assert reason.value == pytest.approx(68.5)
    assert reason.slope_per_hour == pytest.approx(15.0, rel=0.05)
    assert reason.share == 1.0
    limit_ms = START_MS + (100 + 180) * MINUTE_MS
    assert prediction.date_ms == reason.date_ms == pytest.approx(limit_ms, abs=10 * MINUTE_MS)
    assert prediction.low_ms is not None and prediction.high_ms is not None
    assert prediction.low_ms <= limit_ms <= prediction.high_ms
    assert prediction.computed_ms == START_MS + 175 * MINUTE_MS


def test_independent_reasons_add_up_and_share() -> None:
    played = Played()
    played.go_on(100)
    foresight = played.go_on(60, disk=filling(100), memory=filling(100), fails=9.0, drops=20.0, raw=6.0, falls=3.0)
    (prediction,), _ = foresight.of(["b"])
    kinds = {reason.kind: reason for reason in prediction.reasons}
    assert [reason.kind for reason in prediction.reasons].count(Kind.SATURATION) == 2, "both resources are named"
    assert set(kinds) == set(Kind)
    alone = [max(one.probability for one in prediction.reasons if one.kind is kind) for kind in Kind]
    assert prediction.probability == pytest.approx(1.0 - np.prod([1.0 - one for one in alone]))
    assert sum(reason.share for reason in prediction.reasons) == pytest.approx(1.0)
    errors = kinds[Kind.ERRORS]
    assert (errors.metric, errors.value, errors.limit) == ("drops", 20.0, 1.0)
    assert kinds[Kind.FLAPPING].value == 3.0
    assert kinds[Kind.ANOMALY_DENSITY].value > 0.9 > 0.2 > (kinds[Kind.ANOMALY_DENSITY].limit or 0.0)
    weights = [kinds[kind].share for kind in (Kind.FLAPPING, Kind.ANOMALY_DENSITY, Kind.ERRORS)]
    assert weights == sorted(weights, reverse=True)


def test_anomalies_and_errors_alone_are_told_but_make_no_finding() -> None:
    played = Played()
    played.go_on(100)
    foresight = played.go_on(60, fails=9.0, drops=20.0, raw=6.0)
    (prediction,), _ = foresight.of(SERVERS, 0.4)
    assert {reason.kind for reason in prediction.reasons} == {Kind.ANOMALY_DENSITY, Kind.ERRORS}
    assert played.findings == []


def test_anomalies_that_have_been_there_for_long_foretell_less() -> None:
    played = Played()
    early = played.go_on(60, raw=6.0).symptoms.anomalies[1]
    late = played.go_on(900, raw=6.0).symptoms.anomalies[1]
    assert early > 0.25
    assert late < 0.05


def test_predictions_are_listed_likeliest_first() -> None:
    predictor = new_predictor()
    for minute in range(60):
        values = at_rest()
        values[2, 0] = 50.0 + 0.3 * minute
        foresight = foretold(predictor, minute, values, falls=[0.0, 2.0, 0.0])
    listed, _ = foresight.of(["b", "a", "c"])
    assert [one.server_id for one in listed] == ["c", "b", "a"]
    assert [one.server_id for one in foresight.of(["c", "a"], 0.5)[0]] == ["c"]


def test_a_prediction_that_holds_is_one_finding() -> None:
    played = Played()
    played.go_on(100)
    played.go_on(250, disk=filling(100))
    (opened,) = played.findings
    assert (opened.server_id, opened.detector, opened.metric, opened.end_ms) == ("b", DETECTOR, "disk", None)
    assert opened.id == finding_id("b", DETECTOR, opened.start_ms)
    assert 100 < (opened.start_ms - START_MS) // MINUTE_MS <= 170, "nearly two hours before it is full"
    assert opened.score == 1.0, "it follows its peak: the disk is full"
    assert opened.value >= p.LIMIT
    assert (opened.expected_low, opened.expected_high) == (0.0, 60.0)
    assert [part.metric for part in opened.contributions] == ["disk"]
    before_ms = played.minute * MINUTE_MS + START_MS
    played.go_on(p.QUIET_MINUTES + 40)
    (closed,) = played.findings
    assert closed.end_ms is not None
    assert before_ms <= closed.end_ms <= before_ms + 30 * MINUTE_MS
    assert (closed.id, closed.revision) == (opened.id, opened.revision + 1)


def test_what_was_found_already_is_not_foreseen() -> None:
    played = Played()
    played.go_on(20)
    played.elsewhere = [1]
    played.go_on(5, falls=5.0)
    played.elsewhere = []
    played.go_on(HORIZON_MS // MINUTE_MS - 10, falls=5.0)
    assert played.findings == []
    played.go_on(30, falls=5.0)
    (finding,) = played.findings
    assert (finding.metric, finding.contributions) == ("", ())


def test_a_resource_on_its_way_is_foreseen_whatever_was_found() -> None:
    played = Played()
    played.elsewhere = [1]
    played.go_on(100)
    played.go_on(80, disk=filling(100))
    assert [one.metric for one in played.findings] == ["disk"]


@pytest.mark.parametrize("stop", [90, 112, 125, 300, 341])
def test_a_restart_goes_on_as_if_it_had_not_been(stop: int) -> None:
    def play(played: Played, end: int) -> None:
        while played.minute < end:
            if played.minute < 100 or played.minute >= 340:
                played.go_on(1, raw=5.0 if played.minute % 9 else 1.0)
            else:
                played.go_on(1, disk=filling(100), fails=7.0 if played.minute % 3 else 0.5)

    whole, first, second = Played(), Played(), Played()
    play(whole, 400)
    play(first, stop)
    second.predictor = Predictor.of_arrays(first.predictor.layout, first.predictor.arrays())
    second.course.restore(first.course.arrays(), len(SERVERS))
    second.course.open = dict(first.course.open)
    second.minute, second.found = stop, dict(first.found)
    play(second, 400)
    assert second.findings == whole.findings
    assert len(whole.findings) == 1
    assert whole.foresight is not None and second.foresight is not None
    assert second.foresight.of(SERVERS) == whole.foresight.of(SERVERS)
    for name, array in whole.predictor.arrays().items():
        np.testing.assert_array_equal(array, second.predictor.arrays()[name])


def test_servers_come_and_go_and_the_others_stay_as_they_were() -> None:
    played = Played()
    played.go_on(100)
    foresight = played.go_on(60, disk=filling(100), raw=6.0)
    (before,), _ = foresight.of(["b"])
    moved = new_predictor(("b", "new"))
    series = np.array([4, 5, 6, 7, -1, -1, -1, -1])
    again = played.predictor.rearranged(moved.layout, np.array([1, -1]), series)
    values = np.array([[66.0, 40.0, 0.5, 0.5], [90.0, 40.0, 0.5, 0.5]])
    (new, after), _ = foretold(again, 160, values, raw=[6.0, 1.0]).of(["b", "new"])[0][::-1], 2
    assert (new.server_id, new.probability, after.server_id) == ("new", 0.0, "b")
    assert after.probability == pytest.approx(before.probability, abs=0.02)
    assert {reason.kind for reason in after.reasons} == {reason.kind for reason in before.reasons}


def test_people_say_how_likely_is_likely() -> None:
    played = Played()

    def falls_again() -> int:
        """Findings that there are after an hour of rest, falling and rest."""
        played.go_on(60)
        played.go_on(10, falls=2.4)
        played.go_on(60)
        return len(played.findings)

    assert falls_again() == 1
    played.course.judge(1, is_real=False)
    assert falls_again() == 2, "so likely is likelier than that"
    played.course.judge(1, is_real=False)
    assert played.course.is_cautious.tolist() == [False, True, False]
    assert falls_again() == 2
    again = Course()
    again.restore(played.course.arrays(), len(SERVERS))
    played.course = again
    assert falls_again() == 2, "a restart forgets no verdict"
    for _ in range(3):
        played.course.judge(1, is_real=True)
    assert falls_again() == 3
    for _ in range(50):
        played.course.judge(1, is_real=False)
    before = len(played.findings)
    played.go_on(120, disk=filling(played.minute))
    assert len(played.findings) == before + 1, "who is as good as full is found, whatever was said"
