"""The payload of a block: columns of one cohort, each compressed and checked by itself.

The layout is drawn in docs/formats/block.md. Column 0 is the times, column 1 the sequences, column 2 + c the values
of the cohort's metric c. What must stay true:

* every bit of a value comes back (signs of zero, subnormals, infinities); NaN means absent, so its bits do not matter;
* a column can be read with the directory and its own bytes alone, or those of the one earlier column that it equals,
  and is checked before it is decompressed;
* rows are sorted by time and sequence. An older row of an equal time stays only where it has a value that no newer
  one has, because its sequence must not change: a row of another cohort may lie between.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from fleet.model import count_points
from services.timeseries.engine.checksum import crc32
from services.timeseries.engine.decimals import floats, integers, split
from services.timeseries.engine.frame import FRAME_VERSION, FrameReader, encode_frame
from services.timeseries.engine.head import Chunk
from services.timeseries.engine.payload import CorruptBlockError, Opened, assemble, checked, read_directory

BLOCK_VERSION: Final = 1
FRAME_ROWS: Final = 128
"""A block of fewer rows is a frame, which is written several times as fast and is smaller; from there on what reading
one metric of many costs counts more (frame.py has the numbers)."""
QUICK_LEVEL: Final = 2
_SEEN_ROWS, _FEWEST_ROWS = 128, 3  # of which it is guessed how the differences scatter
TIMES, SEQUENCES, FIRST_VALUES = 0, 1, 2
_JOINED_GAP_BYTES: Final = 4_096  # columns so close are read at once: 4 KiB more cost 0.6 us

ABSENT, CONSTANT, PLAIN, PCODEC, DECIMAL, SAME = 0, 1, 2, 3, 4, 5
BITMAP: Final = 0x80
_INTEGERS: Final = np.dtype("<i8")
_FLOATS: Final = np.dtype("<f8")
_SAME_AS: Final = struct.Struct("<I")
_SAME_SIZE: Final = 4 + 1 + _SAME_AS.size  # checksum, encoding, the other column's index


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A payload and what its row in the partition says of it."""

    first_ms: int
    last_ms: int
    rows: int
    points: int
    min_sequence: int
    max_sequence: int
    payload: bytes


def build(chunk: Chunk, cohort_id: int, rows_limit: int, level: int | None = None) -> list[Block]:
    """The blocks of a chunk of a cohort: sorted, superseded and empty rows left out, of at most `rows_limit` rows, cut
    where the time changes: of rows of one time in one batch, which have one sequence, the place tells the later.

    `level`: pcodec's, which tries all that it can; None: the block will be merged, and what it would try is guessed.
    Measured on 720 rows of the bench's 460 columns that vary: 79 M values/s and 1.19 bytes a value instead of 29 and
    1.20 (level 1: 104 and 1.23; 4: 60 and 1.16); on 8,640 rows, which stay, level 8 tries its way to 1.04 at 21.
    """
    order = np.lexsort((chunk.sequences, chunk.times_ms))
    order = order[_kept(chunk.times_ms[order], chunk.values, order)]
    in_order = np.array_equal(order, np.arange(len(chunk.times_ms)))  # as nearly always: nothing is copied then
    in_time = chunk.times_ms if in_order else chunk.times_ms[order]
    blocks, end = [], 0
    while end < len(order):
        start, end = end, min(end + rows_limit, len(order))
        if end < len(order):
            changes = int(in_time.searchsorted(in_time[end]))
            end = changes if changes > start else end
        part = slice(start, end) if in_order else order[start:end]
        times, sequences, values = chunk.times_ms[part], chunk.sequences[part], chunk.values[part]
        if len(times) < FRAME_ROWS:
            payload = encode_frame(times, sequences, values, cohort_id)
        else:
            payload = _encode_columns(times, sequences, values, cohort_id, level)
        blocks.append(_described(times, sequences, values, payload))
    return blocks


def _described(
    times: NDArray[np.int64], sequences: NDArray[np.int64], values: NDArray[np.float64], payload: bytes
) -> Block:
    return Block(
        first_ms=int(times[0]),
        last_ms=int(times[-1]),
        rows=len(times),
        points=count_points(values),
        min_sequence=int(sequences.min()),
        max_sequence=int(sequences.max()),
        payload=payload,
    )


def _kept(times: NDArray[np.int64], values: NDArray[np.float64], order: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Which of the sorted rows say something: a value where no newer row of the same time has one."""
    absent: NDArray[np.bool_] = np.isnan(values)
    keep: NDArray[np.bool_] = ~np.logical_and.reduce(absent, axis=1)[order]
    same_as_next = np.append(times[1:] == times[:-1], False)
    covered = None
    for at in np.flatnonzero(same_as_next | np.append(False, same_as_next[:-1]))[::-1].tolist():
        here = ~absent[order[at]]
        if covered is None or not same_as_next[at]:
            covered = here
        else:
            keep[at] = bool((here & ~covered).any())
            covered = covered | here
    return keep


def _encode_columns(
    times: NDArray[np.int64],
    sequences: NDArray[np.int64],
    values: NDArray[np.float64],
    cohort_id: int,
    level: int | None,
) -> bytes:
    config = ChunkConfig(compression_level=QUICK_LEVEL if level is None else level)
    encoded = [_encode_whole(times, config), _encode_whole(sequences, config)]
    encoded.extend(_encode_values(np.ascontiguousarray(values.T), config, quick=level is None))
    parts = [bytes((encoding,)) + data for encoding, data in encoded]
    return assemble(BLOCK_VERSION, cohort_id, len(times), len(encoded), parts)


def _encode_values(by_column: NDArray[np.float64], config: Any, *, quick: bool) -> Iterator[tuple[int, bytes]]:
    """The columns (m x n); one that equals an earlier one, as roll-ups have hundreds of, only names it."""
    gaps = np.isnan(by_column.min(axis=1)).tolist()
    bits = by_column.view(np.int64)
    alike = (bits.min(axis=1) == bits.max(axis=1)).tolist()  # one bit pattern only, so that 0.0 and -0.0 differ
    of_decimals, whole = split(by_column)
    configs = _configs(whole, config) if quick else [config] * len(by_column)
    seen: dict[int, int] = {}
    for column, decimals in enumerate(of_decimals.tolist()):
        numbers = by_column[column]
        if alike[column]:
            yield (ABSENT, b"") if gaps[column] else (CONSTANT, numbers[:1].astype("<f8", copy=False).tobytes())
            continue
        first = seen.setdefault(crc32(numbers), column)
        if first != column and (bits[first] == bits[column]).all():
            yield SAME, _SAME_AS.pack(first + FIRST_VALUES)
        elif gaps[column]:
            yield _encode_gappy(numbers, ~np.isnan(numbers), decimals, config)
        elif decimals < 0:
            yield _encode_floats(numbers, decimals, config)
        else:
            yield _smaller(DECIMAL, _packed(whole[column], decimals, configs[column]), numbers)


def _configs(whole: NDArray[np.int64], config: Any) -> list[Any]:
    """How each column of integers (m x n) is best written: as it is, as its differences or as theirs, whichever
    scatters least in its first rows. pcodec finds that out by trying all, which takes three times what writing does."""
    if whole.shape[1] < _FEWEST_ROWS:
        return [config] * len(whole)
    number = whole[:, :_SEEN_ROWS].astype(np.float64)
    change = number[:, 1:] - number[:, :-1]
    scatters = [_scatter(number), _scatter(change), _scatter(change[:, 1:] - change[:, :-1])]
    level = config.compression_level
    deltas = [DeltaSpec.no_op(), DeltaSpec.try_consecutive(1), DeltaSpec.try_consecutive(2)]
    made = [ChunkConfig(compression_level=level, mode_spec=ModeSpec.classic(), delta_spec=delta) for delta in deltas]
    return [made[best] for best in np.argmin(scatters, axis=0).tolist()]


def _scatter(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean distance from the mean of each row."""
    apart = numbers - numbers.mean(axis=1, keepdims=True)
    found: NDArray[np.float64] = np.abs(apart, out=apart).mean(axis=1)
    return found


def _encode_gappy(
    numbers: NDArray[np.float64], present: NDArray[np.bool_], decimals: int, config: Any
) -> tuple[int, bytes]:
    held = numbers[present]
    if not len(held):
        return ABSENT, b""
    bits = held.view(np.int64)
    if (bits == bits[0]).all():
        encoding, data = CONSTANT, held[:1].astype("<f8", copy=False).tobytes()
    else:
        encoding, data = _encode_floats(held, decimals, config)
    return encoding | BITMAP, np.packbits(present, bitorder="little").tobytes() + data


def _encode_floats(numbers: NDArray[np.float64], decimals: int, config: Any) -> tuple[int, bytes]:
    if decimals < 0:
        return _smaller(PCODEC, standalone.simple_compress(numbers, config), numbers)
    return _smaller(DECIMAL, _packed(integers(numbers, decimals), decimals, config), numbers)


def _packed(whole: NDArray[np.int64], decimals: int, config: Any) -> bytes:
    packed: bytes = standalone.simple_compress(whole, config)
    return bytes((decimals,)) + packed


def _smaller(encoding: int, packed: bytes, numbers: NDArray[np.float64]) -> tuple[int, bytes]:
    """What was packed, or the numbers as they are where that is no longer."""
    if len(packed) < numbers.nbytes:
        return encoding, packed
    return PLAIN, numbers.astype("<f8", copy=False).tobytes()


def _encode_whole(numbers: NDArray[np.int64], config: Any) -> tuple[int, bytes]:
    if (numbers == numbers[0]).all():
        return CONSTANT, numbers[:1].astype("<i8", copy=False).tobytes()
    packed: bytes = standalone.simple_compress(np.ascontiguousarray(numbers), config)
    if len(packed) < numbers.nbytes:
        return PCODEC, packed
    return PLAIN, numbers.astype("<i8", copy=False).tobytes()


def open_payload(
    read: Callable[[int, int], bytes], cohort_id: int, metrics: int, opened: Opened | None = None
) -> "BlockReader | FrameReader":
    """A reader of a payload of any version; `opened`: what its `open` returned before. Raises CorruptBlockError."""
    version = (*read(0, 1), 0)[0] if opened is None else opened.version
    if version == FRAME_VERSION:
        return FrameReader(read, cohort_id, metrics, opened)
    return BlockReader(read, cohort_id, metrics, opened)


class BlockReader:
    """Reads columns of one payload through `read(offset, length)`, which may come from memory or from a file."""

    def __init__(
        self, read: Callable[[int, int], bytes], cohort_id: int, metrics: int, opened: Opened | None = None
    ) -> None:
        """`opened`: what `open` returned for this payload before; it is not read again then."""
        self._read = read
        if opened is None:
            columns = metrics + FIRST_VALUES
            self.rows, self._offsets = read_directory(read, BLOCK_VERSION, cohort_id, columns, lambda _: columns)
        else:
            self.rows, self._offsets = opened.rows, opened.offsets

    def keys(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The times and the sequences of the rows."""
        opened = self.open()
        return opened.times_ms, opened.sequences()

    def open(self) -> Opened:
        """The directory and the times."""
        start, middle, end = self._offsets[TIMES : SEQUENCES + 2]
        data = self._read(start, end - start)
        times = _decode(data[: middle - start], TIMES, self.rows, _INTEGERS)
        sequences = data[middle - start :]
        checked(sequences, SEQUENCES)
        return Opened(
            version=BLOCK_VERSION,
            rows=self.rows,
            offsets=self._offsets,
            times_ms=times,
            distinct=bool((times[1:] > times[:-1]).all()),
            sequences=lambda: _decode(sequences, SEQUENCES, self.rows, _INTEGERS),
            key_bytes=len(sequences),
        )

    def values(self, metrics: Sequence[int]) -> tuple[list[NDArray[np.float64]], int]:
        """The columns of metrics (ascending) and how many were damaged; a damaged one comes back as all absent."""
        found: list[NDArray[np.float64]] = []
        damaged = 0
        if len(metrics) == 1:  # as most reads do: nothing to group and to cut apart
            index = metrics[0] + FIRST_VALUES
            start, end = self._offsets[index : index + 2]
            try:
                return [self._value(self._read(start, end - start), index)], 0
            except CorruptBlockError:
                return [np.full(self.rows, np.nan)], 1
        for run in self._runs(metrics):
            base = self._offsets[run[0]]
            data = memoryview(self._read(base, self._offsets[run[-1] + 1] - base))
            for index in run:
                part = data[self._offsets[index] - base : self._offsets[index + 1] - base]
                try:
                    found.append(self._value(part, index))
                except CorruptBlockError:
                    damaged += 1
                    found.append(np.full(self.rows, np.nan))
        return found, damaged

    def _value(self, part: bytes | memoryview, index: int) -> NDArray[np.float64]:
        """One column of values, out of its own bytes or those of the column it equals."""
        if len(part) == _SAME_SIZE and part[4] == SAME:
            (other,) = _SAME_AS.unpack_from(checked(part, index), 1)
            if not FIRST_VALUES <= other < index:
                raise CorruptBlockError(f"column {index} names a column that is no earlier one")
            index, (start, end) = other, self._offsets[other : other + 2]
            part = memoryview(self._read(start, end - start))
            if len(part) == _SAME_SIZE and part[4] == SAME:
                raise CorruptBlockError(f"column {index} names another, and is named by one")
        return _decode(part, index, self.rows, _FLOATS)

    def _runs(self, metrics: Sequence[int]) -> list[list[int]]:
        """Groups columns that lie close together."""
        runs: list[list[int]] = []
        for metric in metrics:
            index = metric + FIRST_VALUES
            if runs and self._offsets[index] - self._offsets[runs[-1][-1] + 1] <= _JOINED_GAP_BYTES:
                runs[-1].append(index)
            else:
                runs.append([index])
        return runs


def _decode(data: bytes | memoryview, index: int, rows: int, kind: "np.dtype[Any]") -> NDArray[Any]:
    part = checked(data, index)
    if not part:
        raise CorruptBlockError(f"column {index} has no encoding")
    encoding = part[0]
    if encoding == DECIMAL:  # most columns of values
        return floats(standalone.simple_decompress(bytes(part[2:])), part[1])
    body = part[1:]
    if encoding == ABSENT:
        return np.full(rows, np.nan)
    if not encoding & BITMAP:
        return _decode_numbers(body, encoding, rows, kind)
    bitmap = (rows + 7) // 8
    present = np.unpackbits(np.frombuffer(body[:bitmap], np.uint8), count=rows, bitorder="little").view(np.bool_)
    numbers = np.full(rows, np.nan)
    numbers[present] = _decode_numbers(body[bitmap:], encoding & ~BITMAP, int(np.count_nonzero(present)), kind)
    return numbers


def _decode_numbers(body: memoryview, encoding: int, rows: int, kind: "np.dtype[Any]") -> NDArray[Any]:
    if encoding == CONSTANT:
        return np.full(rows, np.frombuffer(body, kind, 1)[0])
    if encoding == PLAIN:
        return np.frombuffer(body, kind, rows)
    if encoding == PCODEC:
        numbers: NDArray[Any] = standalone.simple_decompress(bytes(body))
        return numbers
    if encoding == DECIMAL:
        return floats(standalone.simple_decompress(bytes(body[1:])), body[0])
    raise CorruptBlockError(f"encoding {encoding} is not known")
