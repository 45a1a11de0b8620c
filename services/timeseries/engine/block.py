"""The payload of a block: columns of one cohort, each compressed and checked by itself.

The layout is drawn in docs/formats/block.md. Column 0 is the times, column 1 the sequences, column 2 + c the values
of the cohort's metric c. What must stay true:

* every bit of a value comes back (signs of zero, subnormals, infinities); NaN means absent, so its bits do not matter;
* a column can be read with the directory and its own bytes alone, and is checked before it is decompressed;
* rows are sorted by time and sequence. An older row of an equal time stays only where it has a value that no newer
  one has, because its sequence must not change: a row of another cohort may lie between.
"""

import struct
import sys
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pcodec import ChunkConfig, standalone

from services.timeseries.engine.head import Chunk

BLOCK_VERSION: Final = 1
TIMES, SEQUENCES, FIRST_VALUES = 0, 1, 2
_HEADER: Final = struct.Struct("<B3xI")  # version, checksum of what follows up to the end of the directory
_SHAPE: Final = struct.Struct("<II")  # rows, columns
_COLUMN: Final = struct.Struct("<IB")  # crc32 of the encoding and the data, seeded with the column's index; encoding
_OPENED_BYTES: Final = 400  # of the objects of an Opened, without what its arrays hold
_JOINED_GAP_BYTES: Final = 4_096  # columns so close are read at once: 4 KiB more cost 0.6 us

ABSENT, CONSTANT, PLAIN, PCODEC = 0, 1, 2, 3
BITMAP: Final = 0x80


class CorruptBlockError(ValueError):
    """A block, or one of its columns, that is not what was written."""


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


def build(chunk: Chunk, cohort_id: int, level: int, rows_limit: int) -> list[Block]:
    """The blocks of a chunk of a cohort: sorted, superseded and empty rows left out, cut after `rows_limit` rows."""
    order = np.lexsort((chunk.sequences, chunk.times_ms))
    order = order[_kept(chunk.times_ms[order], chunk.values, order)]
    blocks = []
    for start in range(0, len(order), rows_limit):
        part = order[start : start + rows_limit]
        blocks.append(_encode(chunk.times_ms[part], chunk.sequences[part], chunk.values[part], cohort_id, level))
    return blocks


def _kept(times: NDArray[np.int64], values: NDArray[np.float64], order: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Which of the sorted rows say something: a value where no newer row of the same time has one."""
    present: NDArray[np.bool_] = ~np.isnan(values)
    said: NDArray[np.bool_] = np.logical_or.reduce(present, axis=1)
    keep = said[order]
    same_as_next = np.append(times[1:] == times[:-1], False)
    covered = None
    for at in np.flatnonzero(same_as_next | np.append(False, same_as_next[:-1]))[::-1].tolist():
        here = present[order[at]]
        if covered is None or not same_as_next[at]:
            covered = here
        else:
            keep[at] = bool((here & ~covered).any())
            covered = covered | here
    return keep


def _encode(
    times: NDArray[np.int64], sequences: NDArray[np.int64], values: NDArray[np.float64], cohort_id: int, level: int
) -> Block:
    rows, metrics = values.shape
    config = ChunkConfig(compression_level=level)
    by_column = np.ascontiguousarray(values.T)
    absent: NDArray[np.bool_] = np.isnan(by_column)
    gappy: NDArray[np.bool_] = np.logical_or.reduce(absent, axis=1)
    gaps, alike = gappy.tolist(), _alike(by_column).tolist()
    encoded = [_encode_numbers(times, config, alike=bool(times[0] == times[-1]))]
    encoded.append(_encode_numbers(sequences, config, alike=bool((sequences == sequences[0]).all())))
    for column in range(metrics):
        if not gaps[column]:
            encoded.append(_encode_numbers(by_column[column], config, alike=alike[column]))
        else:
            encoded.append(_encode_gappy(by_column[column], ~absent[column], config))
    return Block(
        first_ms=int(times[0]),
        last_ms=int(times[-1]),
        rows=rows,
        points=int(absent.size - np.count_nonzero(absent)),
        min_sequence=int(sequences.min()),
        max_sequence=int(sequences.max()),
        payload=_assemble(cohort_id, rows, encoded),
    )


def _alike(by_column: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which columns hold one bit pattern only, so that 0.0 and -0.0 differ."""
    bits = by_column.view(np.int64)
    alike: NDArray[np.bool_] = (bits == bits[:, :1]).all(axis=1)
    return alike


def _encode_numbers(numbers: NDArray[Any], config: Any, *, alike: bool) -> tuple[int, bytes]:
    if alike:
        return CONSTANT, numbers[:1].astype(numbers.dtype.newbyteorder("<"), copy=False).tobytes()
    packed: bytes = standalone.simple_compress(np.ascontiguousarray(numbers), config)
    if len(packed) < numbers.nbytes:
        return PCODEC, packed
    return PLAIN, numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).tobytes()


def _encode_gappy(numbers: NDArray[np.float64], present: NDArray[np.bool_], config: Any) -> tuple[int, bytes]:
    held = numbers[present]
    if not len(held):
        return ABSENT, b""
    encoding, data = _encode_numbers(held, config, alike=bool(_alike(held[None, :])[0]))
    return encoding | BITMAP, np.packbits(present, bitorder="little").tobytes() + data


def _assemble(cohort_id: int, rows: int, encoded: Sequence[tuple[int, bytes]]) -> bytes:
    columns = len(encoded)
    parts = []
    offsets = np.empty(columns + 1, "<u4")
    offsets[0] = _HEADER.size + _SHAPE.size + 4 * (columns + 1)
    for index, (encoding, data) in enumerate(encoded):
        tail = bytes((encoding,)) + data
        parts.append(struct.pack("<I", zlib.crc32(tail, index)) + tail)
        offsets[index + 1] = offsets[index] + len(parts[-1])
    directory = offsets.tobytes()
    described = _SHAPE.pack(rows, columns) + directory
    return _HEADER.pack(BLOCK_VERSION, _checksum(described, cohort_id)) + b"".join((described, *parts))


def _checksum(described: bytes | memoryview, cohort_id: int) -> int:
    """Of what follows the checksum up to the end of the directory; the cohort counts, so that a block is no other's."""
    return zlib.crc32(described, zlib.crc32(struct.pack("<q", cohort_id)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opened:
    """What reading any column of a block begins with, checked; worth keeping, since a block never changes.

    Attributes:
        rows: how many.
        offsets: where in the payload each column begins, and the end.
        times_ms: of the rows (int64).
        distinct: whether no two times are equal.
    """

    rows: int
    offsets: "array[int]"
    times_ms: NDArray[np.int64]
    distinct: bool
    _sequences: bytes

    @property
    def sequences(self) -> NDArray[np.int64]:
        """Of the rows; decompressed each time, since few reads need them."""
        return _decode(self._sequences, SEQUENCES, self.rows, np.dtype("<i8"))

    @property
    def bytes(self) -> int:
        """About how much memory it takes."""
        return _OPENED_BYTES + self.times_ms.nbytes + 4 * len(self.offsets) + len(self._sequences)


class BlockReader:
    """Reads columns of one payload through `read(offset, length)`, which may come from memory or from a file."""

    def __init__(
        self, read: Callable[[int, int], bytes], cohort_id: int, metrics: int, opened: Opened | None = None
    ) -> None:
        """`opened`: what `open` returned for this payload before; it is not read again then."""
        self._read = read
        if opened is None:
            self.rows, self._offsets = _directory(read, cohort_id, metrics + FIRST_VALUES)
        else:
            self.rows, self._offsets = opened.rows, opened.offsets

    def keys(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The times and the sequences of the rows."""
        opened = self.open()
        return opened.times_ms, opened.sequences

    def open(self) -> Opened:
        """The directory and the times."""
        start, middle, end = self._offsets[TIMES : SEQUENCES + 2]
        data = self._read(start, end - start)
        times = _decode(data[: middle - start], TIMES, self.rows, np.dtype("<i8"))
        sequences = data[middle - start :]
        _check(sequences, SEQUENCES)
        distinct = bool((times[1:] > times[:-1]).all())
        return Opened(rows=self.rows, offsets=self._offsets, times_ms=times, distinct=distinct, _sequences=sequences)

    def values(self, metrics: Sequence[int]) -> tuple[list[NDArray[np.float64]], int]:
        """The columns of metrics (ascending) and how many were damaged; a damaged one comes back as all absent."""
        found: list[NDArray[np.float64]] = []
        damaged = 0
        for run in self._runs(metrics):
            base = self._offsets[run[0]]
            data = memoryview(self._read(base, self._offsets[run[-1] + 1] - base))
            for index in run:
                part = data[self._offsets[index] - base : self._offsets[index + 1] - base]
                try:
                    found.append(_decode(part, index, self.rows, np.dtype("<f8")))
                except CorruptBlockError:
                    damaged += 1
                    found.append(np.full(self.rows, np.nan))
        return found, damaged

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


def _directory(read: Callable[[int, int], bytes], cohort_id: int, columns: int) -> tuple[int, "array[int]"]:
    """How many rows a payload has, and where its columns begin and end."""
    directory_at = _HEADER.size + _SHAPE.size
    head = read(0, directory_at + 4 * (columns + 1))
    if len(head) != directory_at + 4 * (columns + 1):
        raise CorruptBlockError("shorter than its directory")
    version, checksum = _HEADER.unpack_from(head)
    rows, found = _SHAPE.unpack_from(head, _HEADER.size)
    if version != BLOCK_VERSION:
        raise CorruptBlockError(f"version {version} is not {BLOCK_VERSION}")
    if found != columns or _checksum(memoryview(head)[_HEADER.size :], cohort_id) != checksum:
        raise CorruptBlockError("the checksum of the directory does not match")
    offsets = array("I", head[directory_at:])  # 4 bytes each, and its items are ints: reading one takes 0.03 us
    if sys.byteorder == "big":
        offsets.byteswap()
    return rows, offsets


def _check(data: bytes | memoryview, index: int) -> int:
    """The encoding of a column whose checksum matches."""
    if len(data) < _COLUMN.size:
        raise CorruptBlockError(f"column {index} is shorter than its header")
    checksum, encoding = _COLUMN.unpack_from(data)
    if zlib.crc32(memoryview(data)[4:], index) != checksum:
        raise CorruptBlockError(f"the checksum of column {index} does not match")
    return int(encoding)


def _decode(data: bytes | memoryview, index: int, rows: int, kind: "np.dtype[Any]") -> NDArray[Any]:
    encoding = _check(data, index)
    body = memoryview(data)[_COLUMN.size :]
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
    raise CorruptBlockError(f"encoding {encoding} is not known")
