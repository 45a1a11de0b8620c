"""Blocks and journal payloads give back every bit, and say so when they cannot."""

import struct
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.timeseries.engine import batch as batch_codec
from services.timeseries.engine import block as block_module
from services.timeseries.engine.block import Block, BlockReader, CorruptBlockError, build
from services.timeseries.engine.head import Chunk

NASTY = [0.0, -0.0, 5e-324, -2.2e-308, 1.7976931348623157e308, float("inf"), float("-inf"), float("nan"), 0.1, 1e16 + 2]
COHORT = 3


@pytest.fixture(autouse=True, scope="module")
def no_frames() -> Iterator[None]:
    """Few rows would become a frame."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(block_module, "FRAME_ROWS", 0)
        yield


def bits(values: NDArray[np.float64]) -> list[int]:
    """Bit patterns, with one pattern for every NaN."""
    return np.where(np.isnan(values), np.nan, values).view(np.int64).tolist()


def reader(block: Block, metrics: int, payload: bytes | None = None) -> BlockReader:
    data = block.payload if payload is None else payload
    return BlockReader(lambda offset, length: data[offset : offset + length], COHORT, metrics)


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    number = st.sampled_from(NASTY) | st.floats(width=64) | st.integers(-1000, 1000).map(float)
    kind = st.one_of(
        st.just(None), number.map(lambda one: [one] * rows), st.lists(number, min_size=rows, max_size=rows)
    )
    values = np.column_stack([draw(kind) or [np.nan] * rows for _ in range(columns)]).astype(np.float64)
    times = draw(st.lists(st.integers(0, 1 << 43), min_size=rows, max_size=rows))
    sequences = sorted(draw(st.lists(st.integers(1, 1 << 40), min_size=rows, max_size=rows)))
    return Chunk(times_ms=np.array(times, np.int64), sequences=np.array(sequences, np.int64), values=values)


def resolved(chunk: Chunk) -> dict[tuple[int, int], int]:
    """(time, column) to the bits of the newest value, the slow way."""
    found = {}
    for time, values in zip(chunk.times_ms.tolist(), chunk.values, strict=True):
        for column, value in enumerate(bits(values)):
            if not np.isnan(values[column]):
                found[time, column] = value
    return found


@settings(max_examples=150, deadline=None)
@given(chunks(), st.integers(1, 50))
def test_a_chunk_comes_back_bit_by_bit(chunk: Chunk, rows_limit: int) -> None:
    metrics = chunk.values.shape[1]
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for block in build(chunk, COHORT, rows_limit, 2):
        times, sequences = reader(block, metrics).keys()
        columns, damaged = reader(block, metrics).values(range(metrics))
        assert damaged == 0
        assert len(times) == block.rows <= rows_limit
        assert (block.first_ms, block.last_ms) == (times[0], times[-1])
        assert block.points == sum(int((~np.isnan(column)).sum()) for column in columns)
        for column, values in enumerate(columns):
            alone, _ = reader(block, metrics).values([column])
            assert bits(alone[0]) == bits(values)
            for time, sequence, value, number in zip(times, sequences, bits(values), values, strict=True):
                if not np.isnan(number):
                    key = (int(time), column)
                    found[key] = max(found.get(key, (0, 0)), (int(sequence), value), key=lambda pair: pair[0])
    if len(set(chunk.sequences.tolist())) == len(chunk.sequences):
        assert {key: value for key, (_, value) in found.items()} == resolved(chunk)


def test_signs_of_zero_are_kept_in_a_column_of_zeros() -> None:
    values = np.array([[0.0, -0.0], [-0.0, -0.0], [0.0, -0.0]])
    chunk = Chunk(times_ms=np.arange(3), sequences=np.arange(3) + 1, values=values)
    (block,) = build(chunk, COHORT, 1_440, 2)
    columns, _ = reader(block, 2).values([0, 1])
    assert [bits(column) for column in columns] == [bits(values[:, 0]), bits(values[:, 1])]


def test_a_re_sent_row_goes_only_when_newer_rows_have_all_its_values() -> None:
    nan = float("nan")
    values = np.array([[1.0, 1.0, nan], [nan, 2.0, nan], [3.0, nan, nan], [nan, nan, 4.0]])
    chunk = Chunk(times_ms=np.zeros(4, np.int64), sequences=np.arange(4) + 1, values=values)
    (block,) = build(chunk, COHORT, 1_440, 2)
    assert reader(block, 3).keys()[1].tolist() == [2, 3, 4], "row 1 is superseded by 2 and 3 together"


def test_what_is_constant_or_absent_costs_almost_nothing() -> None:
    values = np.full((720, 511), np.nan)
    values[:, ::2] = 4.25
    chunk = Chunk(times_ms=np.arange(720) * 10_000, sequences=np.arange(720) + 1, values=values)
    (block,) = build(chunk, COHORT, 1_440, 2)
    assert len(block.payload) < 511 * 18 + 400
    assert block.points == 720 * 256


def sample() -> tuple[Block, NDArray[np.float64]]:
    rng = np.random.default_rng(1)
    values = np.round(rng.normal(50, 10, (100, 5)).cumsum(axis=0), 2)
    chunk = Chunk(times_ms=np.arange(100) * 10_000, sequences=np.arange(100) + 1, values=values)
    return build(chunk, COHORT, 1_440, 2)[0], values


def test_no_flipped_byte_is_ever_read_as_a_value() -> None:
    block, values = sample()
    for at in range(0, len(block.payload), 3):
        payload = bytearray(block.payload)
        payload[at] ^= 0x40
        try:
            columns, damaged = reader(block, 5, bytes(payload)).values(range(5))
            times, _ = reader(block, 5, bytes(payload)).keys()
        except CorruptBlockError:
            continue
        assert damaged == 1 or at in (1, 2, 3), at  # the reserved bytes mean nothing
        assert times.tolist() == (np.arange(100) * 10_000).tolist()
        for column, found in enumerate(columns):
            assert np.isnan(found).all() or bits(found) == bits(values[:, column])


def test_what_was_opened_is_checked_and_reads_the_same_without_its_directory() -> None:
    block, values = sample()
    opened = reader(block, 5).open()
    assert (opened.rows, opened.distinct, opened.times_ms.tolist()) == (100, True, (np.arange(100) * 10_000).tolist())
    assert opened.sequences().tolist() == (np.arange(100) + 1).tolist()
    read: list[int] = []

    def columns_only(offset: int, length: int) -> bytes:
        read.append(length)
        return block.payload[offset : offset + length]

    columns, damaged = BlockReader(columns_only, COHORT, 5, opened).values([1, 3])
    assert damaged == 0 and [bits(column) for column in columns] == [bits(values[:, 1]), bits(values[:, 3])]
    assert len(read) == 1, "one read for two columns that lie close together, and no directory"
    for at in range(opened.offsets[1], opened.offsets[2]):
        payload = bytearray(block.payload)
        payload[at] ^= 0x01
        with pytest.raises(CorruptBlockError):  # at once, though the sequences may never be asked for
            reader(block, 5, bytes(payload)).open()


def test_zeroed_pages_and_foreign_blocks_are_refused() -> None:
    block, _ = sample()
    with pytest.raises(CorruptBlockError):
        reader(block, 5, bytes(len(block.payload)))
    with pytest.raises(CorruptBlockError):
        reader(block, 4)
    with pytest.raises(CorruptBlockError):
        BlockReader(lambda offset, length: block.payload[offset : offset + length], COHORT + 1, 5)
    for cut in (0, 5, 30, len(block.payload) - 1):
        with pytest.raises(CorruptBlockError):
            short = reader(block, 5, block.payload[:cut])
            if not short.values(range(5))[1]:
                short.keys()
            else:
                raise CorruptBlockError("a column is counted as damaged")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 1 << 43)), max_size=9), st.integers(0, 4), st.data()
)
def test_a_journal_payload_comes_back_bit_by_bit(
    keys: list[tuple[int, int]], columns: int, data: st.DataObject
) -> None:
    count = len(keys) * columns
    numbers = data.draw(st.lists(st.sampled_from(NASTY), min_size=count, max_size=count))
    batch = batch_codec.Batch(
        np.array([server for server, _ in keys], np.uint32),
        np.array([time for _, time in keys], np.int64),
        np.array(numbers, np.float64).reshape(len(keys), columns),
    )
    payload = batch_codec.encode(batch)
    found = batch_codec.decode(payload)
    assert found.servers.tolist() == batch.servers.tolist()
    assert found.times_ms.tolist() == batch.times_ms.tolist()
    assert found.values.tobytes() == batch.values.tobytes()
    at = data.draw(st.integers(4, len(payload) - 1))
    broken = bytearray(payload)
    broken[at] ^= 1
    with pytest.raises(batch_codec.CorruptBatchError):
        batch_codec.decode(bytes(broken))
    with pytest.raises(batch_codec.CorruptBatchError):
        batch_codec.decode(payload[:-1] if keys else payload[:8])
    with pytest.raises(batch_codec.CorruptBatchError):
        batch_codec.decode(struct.pack("<B", 9) + payload[1:])
