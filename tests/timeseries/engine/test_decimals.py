"""Decimals: a column is taken for integers over a power of ten only where every bit of it comes back."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.timeseries.engine.decimals import MAX_PLACES, floats, integers, places, split

NAN = float("nan")
ODD = [0.0, -0.0, NAN, float("inf"), -float("inf"), 5e-324, 2.0**53, 2.0**53 + 2, -(2.0**53), 0.1, 1 / 3, 123_456.789]


def fewest(column: list[float]) -> int:
    """The slow way: by exact fractions, rounded once."""

    def says(value: float, decimals: int) -> bool:
        if math.isnan(value):
            return True
        if math.isinf(value) or (value == 0 and math.copysign(1, value) < 0):
            return False
        whole = round(Fraction(value) * 10**decimals)
        return abs(whole) < 2**53 and float(Fraction(whole, 10**decimals)) == value

    return next((d for d in range(MAX_PLACES + 1) if all(says(value, d) for value in column)), -1)


@st.composite
def tables(draw: st.DrawFn) -> list[list[float]]:
    rows = draw(st.integers(1, 60))
    some = st.builds(lambda n, d: n / 10**d, st.integers(-(10**7), 10**7), st.integers(0, draw(st.integers(0, 7))))
    columns = []
    for _ in range(draw(st.integers(1, 6))):
        column = draw(st.lists(some, min_size=rows, max_size=rows))
        for at in draw(st.lists(st.integers(0, rows - 1), max_size=2)):
            column[at] = draw(st.sampled_from(ODD))
        columns.append(column)
    return columns


@settings(max_examples=200, deadline=None)
@given(tables())
def test_the_fewest_decimals_are_found_and_give_every_bit_back(columns: list[list[float]]) -> None:
    table = np.array(columns)
    found, whole = split(table)
    assert found.tolist() == places(table).tolist() == [fewest(column) for column in columns]
    for column, decimals, numbers in zip(table, found.tolist(), whole, strict=True):
        present = column[~np.isnan(column)]
        if decimals >= 0:
            assert floats(integers(present, decimals), decimals).tobytes() == present.tobytes()
            if len(present) == len(column):
                assert floats(numbers, decimals).tobytes() == column.tobytes()


def test_a_long_table_is_judged_as_a_short_one() -> None:
    """It is looked at in pieces."""
    rng = np.random.default_rng(1)
    table = np.round(rng.normal(0, 1_000, (90, 5_000)), 2) + 0.0  # no negative zero
    table[7, 4_321] = 1 / 3
    table[8, 4_321] = 0.1234
    table[9, 17] = -0.0
    table[10] = np.rint(table[10])
    table[11, 3_000:] = np.nan
    wanted = [2] * 90
    wanted[7], wanted[8], wanted[9], wanted[10] = -1, 4, -1, 0
    found, whole = split(table)
    assert found.tolist() == wanted
    assert floats(whole[0], 2).tobytes() == table[0].tobytes()
