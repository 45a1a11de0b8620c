"""Falls are counted by the rows' own times, and only those of a server of its own."""

from typing import Any

import numpy as np
import pytest

from services.analytics.prediction import parameters as p
from services.analytics.prediction.falls import Falls
from tests.analytics.prediction.made import MINUTE_MS

T0_MS = 1_700_000_040_000
STEADY = 3
"""Servers that are always there, beside the one that is looked at."""


def heard(minutes: int, is_there: Any, interval_ms: int = 10_000, falls: Falls | None = None) -> list[float]:
    """How often server 0 fell lately, minute by minute; `is_there` says at which times it sends."""
    falls = falls or Falls()
    counts = []
    for minute in range(minutes):
        for time_ms in range(T0_MS + minute * MINUTE_MS, T0_MS + (minute + 1) * MINUTE_MS, interval_ms):
            servers = [0] * bool(is_there((time_ms - T0_MS) // interval_ms)) + list(range(1, STEADY + 1))
            falls.hear(np.array(servers), np.full(len(servers), time_ms))
        counts.append(float(falls.close_minute(STEADY + 1)[0]))
    return counts


@pytest.mark.parametrize("interval_ms", [10_000, 60_000])
def test_a_server_that_flaps_falls_at_each_turn(interval_ms: int) -> None:
    counts = heard(90, lambda tick: tick < 12 or tick // 6 % 2, interval_ms)
    assert max(counts[: 12 * interval_ms // MINUTE_MS]) == 0
    assert max(counts) >= p.FALLS[0][1]


def test_single_missing_rows_are_no_falls() -> None:
    assert max(heard(60, lambda tick: tick % 10)) == 0
    assert max(heard(60, lambda tick: tick % 10 > 1)) == 0


def test_an_outage_is_one_fall_and_is_forgotten_after_hours() -> None:
    counts = heard(300, lambda tick: not 60 <= tick < 180)
    assert max(counts) == 1.0
    assert counts[40] > 0.8
    assert counts[-1] < 0.05


def test_another_interval_is_not_flapping() -> None:
    counts = heard(120, lambda tick: tick < 60 or tick % 6 == 0)
    assert max(counts) == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_a_server_that_sends_when_it_likes_does_not_fall(seed: int) -> None:
    sends = set(np.cumsum(np.random.default_rng(seed).geometric(0.2, 400)).tolist())
    assert max(heard(300, sends.__contains__)) < p.FALLS[0][1] / 2


def test_where_all_fall_at_once_nobody_has_fallen() -> None:
    falls = Falls()
    for minute in range(100):
        if minute >= 10 and minute // 5 % 2:
            continue
        for second in range(0, 60, 10):
            falls.hear(np.arange(4), np.full(4, T0_MS + minute * MINUTE_MS + 1_000 * second))
        assert falls.close_minute(4).max() == 0


def test_rows_that_come_again_change_nothing() -> None:
    once, again = Falls(), Falls()
    for place in range(40):
        time_ms = T0_MS + 10_000 * (place + 12 * (place > 20))
        for falls, times in ((once, 1), (again, 3)):
            for _ in range(times):
                falls.hear(np.array([0]), np.array([time_ms]))
        again.hear(np.array([0]), np.array([time_ms - 30_000]))
    assert once.close_minute(1).tolist() == again.close_minute(1).tolist() == [1.0]


def test_it_goes_on_from_what_was_saved_with_servers_in_other_places() -> None:
    falls = Falls()
    heard(30, lambda tick: tick < 12 or tick // 6 % 2, falls=falls)
    count = falls.close_minute(4)
    again = Falls.of_arrays(falls.arrays(4), 4)
    again.rearrange(np.array([3, 0]))
    assert again.close_minute(2).tolist() == pytest.approx([0.0, count[0] * p.FALLS_DECAY])
    with pytest.raises(ValueError, match="array"):
        Falls.of_arrays(falls.arrays(4), 5)
