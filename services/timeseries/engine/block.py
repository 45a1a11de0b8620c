"""The payload of a block: columns of one cohort, each compressed and checked by itself.

The layout is drawn in docs/formats/block.md. Column 0 is the times, column 1 the sequences, column 2 + c the values
of the cohort's metric c. What must stay true:

* every bit of a value comes back (signs of zero, subnormals, infinities); NaN means absent, so its bits do not matter;
* a column can be read with the directory and its own bytes alone, and is checked before it is decompressed;
* rows are sorted by time and sequence. An older row of an equal time stays only where it has a value that no newer
  one has, because its sequence must not change: a row of another cohort may lie between.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pcodec import ChunkConfig, standalone

from services.timeseries.engine.head import Chunk
from services.timeseries.engine.payload import CorruptBlockError, assemble, checked, read_directory

BLOCK_VERSION: Final = 1
TIMES, SEQUENCES, FIRST_VALUES = 0, 1, 2
_JOINED_GAP_BYTES: Final = 4_096  # columns so close are read at once: 4 KiB more cost 0.6 us

ABSENT, CONSTANT, PLAIN, PCODEC = 0, 1, 2, 3
BITMAP: Final = 0x80


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
        payload=assemble(
            BLOCK_VERSION, cohort_id, rows, len(encoded), [bytes((encoding,)) + data for encoding, data in encoded]
        ),
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


class BlockReader:
    """Reads columns of one payload through `read(offset, length)`, which may come from memory or from a file."""

    def __init__(self, read: Callable[[int, int], bytes], cohort_id: int, metrics: int) -> None:
        columns = metrics + FIRST_VALUES
        self.rows, self._offsets = read_directory(read, BLOCK_VERSION, cohort_id, columns, columns)
        self._read = read

    def keys(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The times and the sequences of the rows."""
        start, middle, end = self._offsets[TIMES : SEQUENCES + 2]
        data = memoryview(self._read(start, end - start))
        times = _decode(data[: middle - start], TIMES, self.rows, np.dtype("<i8"))
        return times, _decode(data[middle - start :], SEQUENCES, self.rows, np.dtype("<i8"))

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


def _decode(data: bytes | memoryview, index: int, rows: int, kind: "np.dtype[Any]") -> NDArray[Any]:
    part = checked(data, index)
    if not part:
        raise CorruptBlockError(f"column {index} has no encoding")
    encoding, body = part[0], part[1:]
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
