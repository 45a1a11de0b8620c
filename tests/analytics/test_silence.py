"""The fast path for outages: who falls silent is found within seconds, once, and only while others go on."""

from collections.abc import Callable

import numpy as np
import pytest

from fleet.anomaly import Anomaly, finding_id
from services.analytics.fleet_detector import FleetDetector
from services.analytics.silence import REST_MS
from tests.analytics.fakes import T0_MS, rows_of, show, usual

TICK_MS = 10_000
Sends = Callable[[int], bool]


def always(_tick: int) -> bool:
    return True


class Fleet:
    """Servers that send at ticks, or do not; each in a batch of its own."""

    def __init__(self, *, silence_ms: int = 30_000, tick_ms: int = TICK_MS, **sends: Sends) -> None:
        self.detector = FleetDetector(silence_ms=silence_ms)
        self.tick_ms = tick_ms
        self.sends = sends
        self.tick = 0
        self.found: dict[str, Anomaly] = {}
        self.changes: list[tuple[int, Anomaly]] = []

    def play(self, ticks: int, delay_ms: int = 0) -> None:
        for _ in range(ticks):
            time_ms = T0_MS + self.tick * self.tick_ms
            for place, (server, sends) in enumerate(self.sends.items()):
                if sends(self.tick):
                    self.send(server, time_ms, time_ms + delay_ms + 10 * place)
            self.tick += 1

    def send(self, server: str, time_ms: int, now_ms: int) -> None:
        for one in show(self.detector, rows_of([server], [time_ms], usual(0, 1)), now_ms):
            self.found[one.id] = one
            self.changes.append((now_ms, one))

    def time_ms(self, tick: int) -> int:
        return T0_MS + tick * self.tick_ms


def test_a_server_that_falls_silent_is_found_and_ends_when_it_sends_again() -> None:
    fleet = Fleet(a=always, b=lambda tick: tick < 20 or tick >= 50)
    fleet.play(23)
    assert fleet.found == {}  # two rows are missing
    fleet.play(1)
    ((now_ms, opened),) = fleet.changes
    assert now_ms == fleet.time_ms(23)
    due_ms = fleet.time_ms(20) + 10  # when it was to be heard next
    assert opened.id == finding_id("b", "silence", due_ms)
    assert (opened.server_id, opened.detector, opened.metric) == ("b", "silence", "")
    assert (opened.start_ms, opened.end_ms, opened.contributions) == (due_ms, None, ())
    assert (opened.expected_low, opened.expected_high) == (0.0, 30.0)
    assert 30 < opened.value < 40
    assert 0.75 < opened.score < 0.8
    fleet.play(40)
    (closed,) = fleet.found.values()
    assert closed.id == opened.id
    assert closed.end_ms == fleet.time_ms(50) + 10
    assert closed.value == 310.0
    assert 0.95 < closed.score < 1


def test_it_takes_at_least_the_setting_and_three_intervals() -> None:
    patient = Fleet(silence_ms=120_000, a=always, b=lambda tick: tick < 20)
    patient.play(31)
    assert patient.found == {}
    patient.play(2)
    assert len(patient.found) == 1
    slow = Fleet(tick_ms=60_000, a=always, b=lambda tick: tick < 20)
    slow.play(23)
    assert slow.found == {}
    slow.play(1)
    assert len(slow.found) == 1
    quick = Fleet(tick_ms=1_000, a=always, b=lambda tick: tick < 20)
    quick.play(49)
    assert quick.found == {}
    quick.play(2)
    assert len(quick.found) == 1


def test_missing_ticks_are_no_outage() -> None:
    fleet = Fleet(a=always, b=lambda tick: tick % 10 != 3, c=lambda tick: tick % 17 not in (3, 4))
    fleet.play(200)
    assert fleet.found == {}


def test_a_server_that_is_late_now_and_then_is_not_steady() -> None:
    gaps = [*[1] * 20, 3, *[1] * 6, 6, *[1] * 30]
    fleet = Fleet(a=always, b=set(np.cumsum(gaps).tolist()).__contains__)
    fleet.play(sum(gaps) + 1)
    assert fleet.found == {}


def test_a_server_that_flaps_makes_one_finding() -> None:
    fleet = Fleet(a=always, b=lambda tick: tick < 30 or tick // 6 % 2 == 0)
    fleet.play(6 * 60)
    assert len(fleet.found) == 1


def test_a_server_that_flaps_and_then_dies_is_found_again() -> None:
    fleet = Fleet(a=always, b=lambda tick: (tick < 30 or tick // 6 % 2 == 0) and tick < 400)
    fleet.play(440)
    assert len(fleet.found) == 2


def test_a_server_that_is_away_for_long_has_rest_after_each_time() -> None:
    # 50 ticks away and 50 there, so that it is steady again each time
    fleet = Fleet(a=always, b=lambda tick: tick % 100 < 50)
    rest = REST_MS // TICK_MS
    fleet.play(rest + 80)
    assert len(fleet.found) == 1
    fleet.play(220)
    assert len(fleet.found) == 2


@pytest.mark.full
def test_a_server_that_sends_at_random_is_hardly_ever_missed() -> None:
    found = []
    for seed in range(6):  # 13 hours in all, a row every 50 s on average
        sends = set(np.cumsum(np.random.default_rng(seed).geometric(0.2, 200)).tolist())
        fleet = Fleet(a=always, b=sends.__contains__, c=lambda tick: tick < 5)
        fleet.play(800)
        found += list(fleet.found.values())
    assert len(found) <= 3
    assert {one.server_id for one in found} <= {"b"}


def test_a_hole_in_the_tail_is_nobodys_silence() -> None:
    fleet = Fleet(a=always, b=always, c=lambda tick: tick < 40, d=always)
    fleet.play(30)
    fleet.tick += 60  # nobody for ten minutes; c does not come back
    fleet.play(3)
    assert fleet.found == {}
    fleet.play(3)
    (found,) = fleet.found.values()
    assert found.server_id == "c"


def test_others_at_longer_intervals_are_no_hole() -> None:
    fleet = Fleet(a=lambda tick: tick % 6 == 0, b=lambda tick: tick < 100)
    fleet.play(130)
    (found,) = fleet.found.values()
    assert found.server_id == "b"


def test_rows_that_were_held_up_and_come_at_once_make_no_interval_of_milliseconds() -> None:
    fleet = Fleet(a=always, b=lambda tick: tick % 6 == 3)
    fleet.play(120)
    for place, tick in enumerate(range(123, 240, 6)):
        fleet.send("b", fleet.time_ms(tick), fleet.time_ms(239) + place)
    fleet.tick = 240
    fleet.play(60)
    assert fleet.found == {}


def test_rows_of_a_minute_sent_together_are_one_delivery() -> None:
    fleet = Fleet(a=always)
    for minute in range(40):
        for row in range(6):
            fleet.send("b", T0_MS + minute * 60_000 + row * 10_000, T0_MS + minute * 60_000 + 55_000)
        fleet.play(6)
    assert fleet.found == {}


def test_rows_that_come_again_do_not_keep_a_server_alive() -> None:
    fleet = Fleet(a=always, b=lambda tick: tick < 20)
    fleet.play(20)
    for _ in range(5):
        fleet.play(1)
        fleet.send("b", fleet.time_ms(19), fleet.time_ms(fleet.tick))
    assert len(fleet.found) == 1


def test_a_server_whose_clock_was_ahead_is_heard_once_it_is_right() -> None:
    fleet = Fleet(a=always)
    for ahead_ms in (3_000_000, 60_000):
        for tick in range(90):
            fleet.play(1)
            time_ms = fleet.time_ms(fleet.tick - 1)
            fleet.send("b", time_ms + (ahead_ms if tick < 40 else 0), time_ms + 20)
    assert fleet.found == {}


def test_a_server_whose_clock_is_ahead_all_the_time_has_the_interval_that_it_sends_at() -> None:
    fleet = Fleet(a=always)
    for tick in range(60):
        fleet.play(1)
        if tick < 30:
            fleet.send("b", fleet.time_ms(tick) + 3_000_000, fleet.time_ms(tick) + 20)
    (found,) = fleet.found.values()
    assert (found.server_id, found.start_ms, found.expected_high) == ("b", fleet.time_ms(30) + 20, 30.0)


@pytest.mark.parametrize("ahead_s", [300, 5 * 3_600])
def test_after_the_tails_clock_was_ahead_for_a_while_who_falls_silent_is_found(ahead_s: int) -> None:
    """The machine's clock was set back by hours: nobody's silence was found for as long."""
    fleet = Fleet(a=always, b=lambda tick: tick < 60)
    fleet.play(20)
    for first, ahead_ms in ((20, ahead_s * 1_000), (40, 0)):
        for tick in range(first, first + 20):
            for server in "ab":
                fleet.send(server, fleet.time_ms(tick) + ahead_ms, fleet.time_ms(tick) + ahead_ms)
    assert fleet.found == {}
    fleet.tick = 60
    fleet.play(4)
    ((now_ms, opened),) = fleet.changes
    assert (opened.server_id, opened.start_ms, now_ms) == ("b", fleet.time_ms(60), fleet.time_ms(63))
    assert fleet.detector.hears("a")


def test_a_silence_that_began_while_the_tails_clock_was_ahead_ends_after_it_is_set_right() -> None:
    fleet = Fleet(a=always, b=lambda tick: tick < 20)
    fleet.play(30)
    (opened,) = fleet.found.values()
    ahead_ms = 3_600_000
    fleet.send("a", fleet.time_ms(30) - ahead_ms, fleet.time_ms(30) - ahead_ms)
    fleet.send("b", fleet.time_ms(31) - ahead_ms, fleet.time_ms(31) - ahead_ms)
    (ended,) = fleet.found.values()
    assert ended.id == opened.id
    assert ended.end_ms is not None and ended.end_ms >= ended.peak_ms >= ended.start_ms
