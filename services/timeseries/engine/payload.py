"""The container of a payload: a header, a directory, and parts that are each checked by themselves.

Drawn in docs/formats/block.md. What is in the parts is the business of a version: 1 is block.py's, 2 frame.py's. What
must stay true: a payload that is found under another cohort is refused, and so is a part that is read from a wrong
place or is not, bit for bit, what was written. A part is read and checked with the directory and its own bytes alone.
"""

import struct
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from isal.isal_zlib import crc32  # zlib's checksum at five times the speed: 0.3 us for 4 KiB
from numpy.typing import NDArray

_HEADER: Final = struct.Struct("<B3sI")  # version, reserved, checksum of what follows up to the end of the directory
_SHAPE: Final = struct.Struct("<II")  # rows, columns
_FIXED_BYTES: Final = _HEADER.size + _SHAPE.size
_RESERVED: Final = bytes(3)
_CHECKSUM: Final = struct.Struct("<I")  # of the rest of a part, seeded with the part's index


_OPENED_BYTES: Final = 400  # of the objects of an Opened, without what its arrays hold


class CorruptBlockError(ValueError):
    """A block, or one of its columns, that is not what was written."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opened:
    """What reading a payload begins with: kept, it spares that the next time.

    Attributes:
        version: of the payload.
        rows: how many there are.
        offsets: of the parts, with the end as last.
        times_ms: of the rows.
        distinct: whether the times ascend without equals.
        sequences: gives those of the rows; few reads need them, and a block's are decompressed each time.
        key_bytes: what that holds in memory.
    """

    version: int
    rows: int
    offsets: "array[int]"
    times_ms: NDArray[np.int64]
    distinct: bool
    sequences: Callable[[], NDArray[np.int64]]
    key_bytes: int

    @property
    def bytes(self) -> int:
        """About how much memory it takes."""
        return _OPENED_BYTES + self.times_ms.nbytes + 4 * len(self.offsets) + self.key_bytes


def assemble(version: int, cohort_id: int, rows: int, columns: int, parts: Sequence[bytes]) -> bytes:
    """The payload of some parts."""
    offsets = np.empty(len(parts) + 1, "<u4")
    offsets[0] = at = _HEADER.size + _SHAPE.size + 4 * len(offsets)
    pieces = []
    for index, part in enumerate(parts):
        pieces.append(_CHECKSUM.pack(crc32(part, index)))
        pieces.append(part)
        offsets[index + 1] = at = at + _CHECKSUM.size + len(part)
    described = _SHAPE.pack(rows, columns) + offsets.tobytes()
    return b"".join((_HEADER.pack(version, _RESERVED, _described(described, cohort_id)), described, *pieces))


def read_directory(
    read: Callable[[int, int], bytes], version: int, cohort_id: int, columns: int, parts_of: Callable[[int], int]
) -> tuple[int, "array[int]"]:
    """How many rows there are, and the offsets of the parts with the end as last.

    `read(offset, length)`; `parts_of(rows)`: how many parts so many rows are in.
    """
    head = read(0, _FIXED_BYTES)
    if len(head) != _FIXED_BYTES:
        raise CorruptBlockError("shorter than its directory")
    found_version, reserved, expected = _HEADER.unpack_from(head)
    rows, found_columns = _SHAPE.unpack_from(head, _HEADER.size)
    parts = parts_of(rows)
    size = _FIXED_BYTES + 4 * (parts + 1)
    head += read(_FIXED_BYTES, size - _FIXED_BYTES)
    if len(head) != size:
        raise CorruptBlockError("shorter than its directory")
    if found_version != version or reserved != _RESERVED:
        raise CorruptBlockError(f"version {found_version} is not {version}")
    if found_columns != columns or _described(memoryview(head)[_HEADER.size :], cohort_id) != expected:
        raise CorruptBlockError("the checksum of the directory does not match")
    offsets = array("I", head[size - 4 * (parts + 1) :])  # 4 bytes each, and its items are ints: one takes 0.03 us
    if sys.byteorder == "big":
        offsets.byteswap()
    return rows, offsets


def checked(part: bytes | memoryview, index: int) -> memoryview:
    """What was put in as part `index`."""
    if len(part) < _CHECKSUM.size:
        raise CorruptBlockError(f"part {index} is shorter than its checksum")
    body = memoryview(part)[_CHECKSUM.size :]
    if _CHECKSUM.unpack_from(part) != (crc32(body, index),):
        raise CorruptBlockError(f"the checksum of part {index} does not match")
    return body


def _described(described: bytes | memoryview, cohort_id: int) -> int:
    """The checksum of what describes the parts; the cohort counts, so that a payload is no other's."""
    return crc32(described, crc32(struct.pack("<q", cohort_id)))
