"""Frames give back every bit, read no more than they must, and say so when they are not what was written."""

import zlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.timeseries.engine import block as block_module
from services.timeseries.engine.block import Block, BlockReader, build
from services.timeseries.engine.frame import FrameReader, encode_frame, group_columns
from services.timeseries.engine.head import Chunk
from services.timeseries.engine.payload import CorruptBlockError

COHORT = 3
NASTY = [0.0, -0.0, 5e-324, -2.2e-308, 1.7976931348623157e308, float("inf"), float("-inf"), 0.1, 1e16 + 2]
EDGES = [2.0**53 - 1, 2.0**53 + 2, 2.0**63, -(2.0**63), 1e22, 1e-9, 123_456_789_012.37, 4_503_599_627_370_496.5]
NAN_PAYLOADS = np.array([0x7FF8_0000_0000_0000, 0xFFF8_0000_0000_0001, 0x7FF0_0000_0000_0001], np.uint64).view(float)


def bits(values: NDArray[np.float64]) -> list[int]:
    """Bit patterns, with one pattern for every NaN."""
    return np.where(np.isnan(values), np.nan, values).view(np.int64).ravel().tolist()


def encode(values: NDArray[np.float64]) -> bytes:
    rows = len(values)
    return encode_frame(1_000 + np.arange(rows) * 10_000, np.arange(rows) + 1, values, COHORT)


def reader(payload: bytes, metrics: int, cohort: int = COHORT) -> FrameReader:
    return FrameReader(lambda offset, length: payload[offset : offset + length], cohort, metrics)


def assert_comes_back(values: NDArray[np.float64], payload: bytes) -> None:
    metrics = values.shape[1]
    columns, damaged = reader(payload, metrics).values(range(metrics))
    assert damaged == 0
    assert [column.shape for column in columns] == [(len(values),)] * metrics
    if metrics:
        assert bits(np.column_stack(columns)) == bits(values)


GROUP_COLUMNS = group_columns(24)
"""Of a frame of up to so many rows."""


def walk(rows: int, columns: int, digits: int = 2) -> NDArray[np.float64]:
    rng = np.random.default_rng(1)
    return np.round(rng.normal(50, 10, (rows, columns)).cumsum(axis=0), digits)


def in_columns(chunk: Chunk) -> list[Block]:
    """The same as a block of pcodec."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(block_module, "FRAME_ROWS", 0)
        return build(chunk, COHORT, 1_440, 2)


@st.composite
def columns(draw: st.DrawFn, rows: int) -> NDArray[np.float64]:
    """One column: anything, a decimal, a constant; with or without gaps."""
    anything = st.sampled_from(NASTY + EDGES) | st.floats(width=64)
    decimal = st.builds(
        lambda digits, number: number / 10.0**digits, st.just(draw(st.integers(0, 12))), st.integers(-(10**9), 10**9)
    )
    number = draw(st.sampled_from([anything, decimal, st.integers(-(2**63), 2**63).map(float)]))
    if draw(st.booleans()):
        column = np.full(rows, draw(number))
    else:
        column = np.array(draw(st.lists(number, min_size=rows, max_size=rows)))
    gaps = draw(st.lists(st.integers(0, rows - 1), max_size=rows) | st.just(list(range(rows))))
    column[gaps] = draw(st.sampled_from(NAN_PAYLOADS))
    return column


@st.composite
def tables(draw: st.DrawFn) -> NDArray[np.float64]:
    rows = draw(st.integers(1, 40))
    drawn = np.column_stack([draw(columns(rows)) for _ in range(draw(st.integers(1, 5)))])
    of_group = group_columns(rows)
    count = draw(st.sampled_from([drawn.shape[1], of_group, of_group + 1, 2 * of_group + 3]))
    return np.tile(drawn, (1, -(-count // drawn.shape[1])))[:, :count]


@settings(max_examples=100, deadline=None)
@given(tables(), st.data())
def test_every_bit_comes_back(values: NDArray[np.float64], data: st.DataObject) -> None:
    rows, metrics = values.shape
    times = np.sort(np.array(data.draw(st.lists(st.integers(-(2**62), 2**62), min_size=rows, max_size=rows))))
    sequences = np.array(data.draw(st.lists(st.integers(1, 2**62), min_size=rows, max_size=rows)))
    before = values.copy()
    payload = encode_frame(times, sequences, values, COHORT)
    assert values.tobytes() == before.tobytes(), "what is encoded is left as it was"
    assert_comes_back(values, payload)
    found = reader(payload, metrics).keys()
    assert (found[0].tolist(), found[1].tolist()) == (times.tolist(), sequences.tolist())
    wanted = sorted(data.draw(st.sets(st.integers(0, metrics - 1), max_size=4)))
    some, damaged = reader(payload, metrics).values(wanted)
    assert damaged == 0
    assert [bits(column) for column in some] == [bits(values[:, metric]) for metric in wanted]


@pytest.mark.parametrize(
    ("rows", "metrics"), [(1, 0), (5, 0), (1, 1), (2, 1), (3, 5_000), (9, 511), (1_440, 3), (720, 100)]
)
def test_any_shape_comes_back(rows: int, metrics: int) -> None:
    values = walk(rows, metrics)
    payload = encode(values)
    assert_comes_back(values, payload)
    assert reader(payload, metrics).rows == rows
    assert reader(payload, metrics).keys()[1].tolist() == list(range(1, rows + 1))


@pytest.mark.parametrize("value", NASTY + EDGES)
@pytest.mark.parametrize("around", [0.0, 2.5, float("nan")])
def test_one_odd_value_comes_back_among_others(value: float, around: float) -> None:
    values = np.full((7, 3), around)
    values[3, 1] = values[0, 2] = value
    assert_comes_back(values, encode(values))


def test_any_layout_in_memory_may_be_given() -> None:
    values = walk(24, 300)
    for given_as in (np.asfortranarray(values), np.repeat(values, 2, axis=1)[:, ::2], values[::-1][::-1]):
        assert encode(given_as) == encode(values)


class Counting:
    """Reads from memory and remembers what."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self.reads: list[tuple[int, int]] = []

    def __call__(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        return self.payload[offset : offset + length]


def test_one_metric_costs_the_directory_and_its_group() -> None:
    metrics = 4_000
    payload = encode(walk(24, metrics))
    read = Counting(payload)
    frame = FrameReader(read, COHORT, metrics)
    frame.values([2_345])
    assert len(read.reads) == 3
    groups = -(-metrics // GROUP_COLUMNS)
    assert sum(length for _, length in read.reads) < 1.3 * len(payload) / groups + 4 * groups + 20


def test_neighbouring_groups_are_read_at_once_and_others_alone() -> None:
    metrics = 6 * GROUP_COLUMNS
    read = Counting(encode(walk(24, metrics)))
    frame = FrameReader(read, COHORT, metrics)
    read.reads.clear()
    frame.values(range(metrics))
    assert len(read.reads) == 1
    read.reads.clear()
    found, _ = frame.values([1, GROUP_COLUMNS, GROUP_COLUMNS + 1, 4 * GROUP_COLUMNS - 1])
    assert len(found) == 4
    assert len(read.reads) == 2
    read.reads.clear()
    frame.keys()
    assert len(read.reads) == 1


def test_equal_constant_and_absent_columns_cost_next_to_nothing() -> None:
    metrics, rows = 500, 24
    rng = np.random.default_rng(2)
    base = walk(rows, metrics)
    alone = len(encode(base))
    offsets = rng.integers(0, 30_000, rows).astype(float)
    fields = [
        ("constant", np.full((rows, metrics), 30.0), 2),
        ("equal in all metrics", np.repeat(offsets[:, None], metrics, axis=1), 7),
        ("absent", np.full((rows, metrics), np.nan), 2),
        ("equal to the column before", base, 10),
    ]
    for name, field, limit in fields:
        both = np.stack((base, field), axis=2).reshape(rows, 2 * metrics)
        a_column = (len(encode(both)) - alone) / metrics
        assert a_column < limit, f"{name}: {a_column:.1f} bytes a column of {rows} rows"


@pytest.mark.parametrize("gap", [slice(0, 3), slice(10, 13), slice(21, 24)])
def test_a_gap_costs_its_bitmap_and_no_more(gap: slice) -> None:
    values = walk(24, 500)
    whole = len(encode(values))
    values[gap, ::2] = np.nan
    assert len(encode(values)) < whole + 250


def test_decimals_cost_less_than_two_bytes_and_than_in_a_block() -> None:
    values = walk(24, 511)
    chunk = Chunk(times_ms=np.arange(24) * 10_000, sequences=np.arange(24) + 1, values=values)
    (block,) = in_columns(chunk)
    assert len(encode(values)) < 2.0 * values.size
    assert len(encode(values)) < 0.7 * len(block.payload)


def small() -> tuple[NDArray[np.float64], bytes]:
    """Two groups of values, with gaps and with columns of bits."""
    values = walk(4, GROUP_COLUMNS + 5)
    values[1:3, 3] = np.nan
    values[:, 7] = np.pi * np.arange(4)
    return values, encode(values)


@pytest.mark.parametrize("flip", [0x01, *(pytest.param(bits, marks=pytest.mark.full) for bits in (0x40, 0xFF))])
def test_no_changed_byte_is_ever_read_as_a_value(flip: int) -> None:
    values, payload = small()
    metrics = values.shape[1]
    groups = [range(GROUP_COLUMNS), range(GROUP_COLUMNS, metrics)]
    noticed = 0
    for at in range(len(payload)):
        changed = bytearray(payload)
        changed[at] ^= flip
        try:
            frame = reader(bytes(changed), metrics)
            times, sequences = frame.keys()
            found, damaged = frame.values(range(metrics))
        except CorruptBlockError:
            noticed += 1
            continue
        assert (times.tolist(), sequences.tolist()) == ([1_000, 11_000, 21_000, 31_000], [1, 2, 3, 4])
        lost = [group for group in groups if all(np.isnan(found[metric]).all() for metric in group)]
        assert damaged == len(lost[0])
        assert len(lost) == 1
        for metric in set(range(metrics)) - set(lost[0]):
            assert bits(found[metric]) == bits(values[:, metric])
        noticed += 1
    assert noticed == len(payload)


def test_a_damaged_group_is_counted_for_the_columns_that_were_asked_for() -> None:
    values, payload = small()
    changed = payload[:-1] + bytes((payload[-1] ^ 1,))
    found, damaged = reader(changed, values.shape[1]).values([3, GROUP_COLUMNS, GROUP_COLUMNS + 4])
    assert damaged == 2
    assert bits(found[0]) == bits(values[:, 3])
    assert np.isnan(found[1]).all() and np.isnan(found[2]).all()


def test_what_is_cut_short_is_noticed() -> None:
    values, payload = small()
    metrics = values.shape[1]
    for length in range(len(payload)):
        try:
            frame = reader(payload[:length], metrics)
            frame.keys()
        except CorruptBlockError:
            continue
        assert frame.values(range(metrics))[1] in (5, metrics)


def test_foreign_and_zeroed_payloads_are_refused() -> None:
    values, payload = small()
    metrics = values.shape[1]
    chunk = Chunk(times_ms=np.arange(4), sequences=np.arange(4) + 1, values=values)
    (block,) = in_columns(chunk)
    for refused in (
        lambda: reader(payload, metrics, COHORT + 1),
        lambda: reader(payload, metrics + 1),
        lambda: reader(payload, metrics - 1),
        lambda: reader(bytes(len(payload)), metrics),
        lambda: reader(block.payload, metrics),
        lambda: BlockReader(lambda offset, length: payload[offset : offset + length], COHORT, metrics),
    ):
        with pytest.raises(CorruptBlockError):
            refused()


def test_a_group_that_lies_in_the_place_of_another_is_refused() -> None:
    values = np.tile(walk(6, GROUP_COLUMNS), (1, 2))
    payload = encode(values)
    ends = np.frombuffer(payload, "<u4", 4, 16).tolist()
    first, second = (payload[start:end] for start, end in pairwise(ends[1:]))
    assert first[4:] == second[4:], "the groups are equal but for the checksum"
    swapped = payload[: ends[1]] + second + first
    assert reader(swapped, values.shape[1]).values(range(values.shape[1]))[1] == 2 * GROUP_COLUMNS


def test_a_group_is_plain_deflate_that_the_standard_library_reads() -> None:
    _, payload = small()
    for start, end in pairwise(np.frombuffer(payload, "<u4", 4, 16).tolist()):
        assert len(zlib.decompress(payload[start + 4 : end], -zlib.MAX_WBITS)) > 3
