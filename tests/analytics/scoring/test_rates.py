"""Counters as rates."""

import numpy as np
import pytest

from services.analytics.scoring.rates import MAX_SPAN_S, Rates


def test_a_counter_becomes_a_rate_and_a_gauge_passes() -> None:
    rates = Rates(np.array([True, False]))
    np.testing.assert_array_equal(rates.update(0.0, np.array([100.0, 7.0])), [np.nan, 7.0])
    np.testing.assert_array_equal(rates.update(60.0, np.array([160.0, 5.0])), [1.0, 5.0])


def test_a_reset_is_no_value() -> None:
    rates = Rates(np.array([True]))
    given = [0.0, 600.0, 1200.0, 30.0, 630.0]
    found = [float(rates.update(60.0 * place, np.array([value]))[0]) for place, value in enumerate(given)]
    np.testing.assert_array_equal(found, [np.nan, 10.0, 10.0, np.nan, 10.0])


def test_over_a_missing_sample_the_rate_is_of_the_longer_time() -> None:
    rates = Rates(np.array([True]))
    found = [float(rates.update(60.0 * place, np.array([value]))[0]) for place, value in enumerate([0, np.nan, 120])]
    np.testing.assert_array_equal(found, [np.nan, np.nan, 1.0])


def test_over_a_long_silence_there_is_none() -> None:
    rates = Rates(np.array([True]))
    rates.update(0.0, np.array([1.0]))
    assert np.isnan(rates.update(MAX_SPAN_S + 1, np.array([2.0]))[0])
    assert rates.update(MAX_SPAN_S + 2, np.array([3.0]))[0] == 1.0


def test_restored_it_goes_on() -> None:
    rates, again = Rates(np.array([True, False])), Rates(np.array([False, False]))
    rates.update(0.0, np.array([5.0, 5.0]))
    again.restore(rates.arrays())
    np.testing.assert_array_equal(again.update(10.0, np.array([25.0, 1.0])), [2.0, 1.0])
    with pytest.raises(ValueError, match="is_counter"):
        again.restore({})
