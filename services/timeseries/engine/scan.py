"""The rows of one cohort in a range, from blocks and heads together, and the points of one series out of them.

What must stay true: the heads are looked at before the blocks (see `head.py`); equal times are resolved for each
series by sequence, after the cells without a value are gone; a damaged block or column is counted and left out, the
rest is answered; of a day that is evicted meanwhile a reader sees all, a part or nothing, and never an error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import apsw
import numpy as np
from numpy.typing import NDArray

from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.database import is_unreadable
from services.timeseries.engine.head import Chunk
from services.timeseries.engine.partition import (
    BlockGoneError,
    BlockInfo,
    Partition,
    PartitionGoneError,
    UnusablePartitionError,
)
from services.timeseries.engine.partitions import Partitions
from services.timeseries.engine.payload import CorruptBlockError
from services.timeseries.engine.rollup import FIELDS
from services.timeseries.engine.settings import DAY_MS, MAX_TIME_MS, MIN_TIME_MS
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import RAW

_LIST_BYTES: Final = 300
_INFO_BYTES: Final = 240
"""About what a list of blocks takes, and each block in it."""


class Part(NamedTuple):
    """Some rows of a cohort: of a block, sorted by time and sequence, or of a head, in the order of their sequences.

    Attributes:
        times_ms: of the rows.
        columns: the i-th wanted column's values, NaN where absent.
        distinct: whether the times ascend without equals.
        sequences: gives those of the rows; few need them, and a block's are decompressed then.
    """

    times_ms: NDArray[np.int64]
    columns: list[NDArray[np.float64]]
    distinct: bool
    sequences: Callable[[], NDArray[np.int64]]


class Frame:
    """Rows sorted by time and sequence; a column is NaN where it has no value.

    `distinct`: no two times are equal. `pieces[i]` are the arrays that follow each other in the i-th wanted column: who
    reads many series puts all of them together at once. Made once a server and query, so it is not frozen: 0.5 us
    instead of 2.
    """

    __slots__ = ("_sequences", "distinct", "pieces", "times_ms")

    def __init__(
        self,
        times_ms: NDArray[np.int64],
        pieces: list[list[NDArray[np.float64]]],
        distinct: bool,
        sequences: Callable[[], NDArray[np.int64]],
    ) -> None:
        self.times_ms = times_ms
        self.pieces = pieces
        self.distinct = distinct
        self._sequences = sequences

    @property
    def sequences(self) -> NDArray[np.int64]:
        """Of the rows; worked out each time, since a series of one cohort does not need them."""
        return self._sequences()

    def column(self, place: int) -> NDArray[np.float64]:
        """The values of the i-th wanted column."""
        pieces = self.pieces[place]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    @property
    def columns(self) -> list[NDArray[np.float64]]:
        """The values of every wanted column."""
        return [self.column(place) for place in range(len(self.pieces))]


@dataclass(slots=True, eq=False)
class Sources:
    """Where a cohort's rows of a range are in a tier: chunks of heads, and blocks by partition."""

    cohort: Cohort
    level: int
    partitions: Partitions
    columns: int
    start_ms: int
    end_ms: int
    chunks: list[Chunk]
    blocks: list[tuple[int, list[BlockInfo]]]
    rows: int = field(init=False)
    """At most so many."""

    def __post_init__(self) -> None:
        blocked = sum([info.rows for _, infos in self.blocks for info in infos])
        self.rows = blocked + sum([len(chunk.times_ms) for chunk in self.chunks])


def sources(store: Store, cohort: Cohort, start_ms: int, end_ms: int, level: int = RAW) -> Sources:
    """Finds the rows of `[start_ms, end_ms)` in a tier without reading them; the raw one's are in heads too."""
    return all_sources(store, [cohort], start_ms, end_ms, level)[0]


def all_sources(store: Store, cohorts: Sequence[Cohort], start_ms: int, end_ms: int, level: int = RAW) -> list[Sources]:
    """The same of several cohorts."""
    first_day, last_day = start_ms // DAY_MS, (end_ms - 1) // DAY_MS
    chunks: list[list[Chunk]] = [[] for _ in cohorts]
    if level == RAW:
        with store.lock:
            for of_cohort, cohort in zip(chunks, cohorts, strict=True):
                for of_day in store.heads.snapshot(cohort, first_day, last_day).values():
                    of_cohort.extend(of_day)
    partitions, fields = store.tiers[level].partitions, 1 if level == RAW else FIELDS
    days = partitions.days(first_day, last_day)
    found = []
    for of_cohort, cohort in zip(chunks, cohorts, strict=True):
        blocks = [(day, block_infos(store, partitions, day, cohort, start_ms, end_ms)) for day in days]
        columns = len(cohort.stored_set.columns) * fields
        found.append(Sources(cohort, level, partitions, columns, start_ms, end_ms, of_cohort, blocks))
    return found


def block_infos(
    store: Store, partitions: Partitions, day: int, cohort: Cohort, start_ms: int, end_ms: int, *, anew: bool = False
) -> list[BlockInfo]:
    """The blocks of one partition; none when it was evicted, none, counted, when it cannot be read.

    With `anew` they are listed from the file: a kept list lags behind it from a commit until the version changes.
    """
    version = partitions.version(day)
    if version is None:
        return []
    key = (partitions, day, version, cohort.id)
    listed = None if anew else store.listed.get(key)
    if listed is None:
        try:
            with partitions.lend(day, life=version[0]) as partition:
                listed = tuple(partition.infos(cohort.id, MIN_TIME_MS, MAX_TIME_MS + 1))
        except PartitionGoneError:
            return []
        except (UnusablePartitionError, apsw.IOError) as error:
            _leave_out(store, partitions, day, error)
            return []
        store.listed.put(key, listed, _LIST_BYTES + _INFO_BYTES * len(listed))
    return [info for info in listed if info.first_ms < end_ms and info.last_ms >= start_ms]


def _leave_out(store: Store, partitions: Partitions, day: int, error: Exception) -> None:
    """Counts a partition that cannot be read; a failure that may pass is the reader's to know of."""
    if not isinstance(error, UnusablePartitionError) and not is_unreadable(error):
        raise error
    store.faults.damage(f"partition of {partitions.name}", day, str(error))


def frame(store: Store, found: Sources, metrics: Sequence[int], check: Callable[[], None]) -> Frame:
    """Reads some columns (ascending). `check` is called between blocks and may raise to stop."""
    return frames(store, [(found, metrics)], check)[0]


def frames(store: Store, wanted: Sequence[tuple[Sources, Sequence[int]]], check: Callable[[], None]) -> list[Frame]:
    """Reads some columns (ascending) of cohorts of one tier; `check` is called between blocks and may raise to stop.

    A partition is lent, and a blob of it opened, once for all of them: 6 us a server less.
    """
    parts: list[list[Part]] = [[] for _ in wanted]
    of_files: dict[tuple[int, int], list[tuple[int, list[BlockInfo]]]] = {}
    for at, (found, _) in enumerate(wanted):
        for day, infos in found.blocks:
            if infos:
                of_files.setdefault((day, infos[0].life), []).append((at, infos))
    for (day, _), of_file in sorted(of_files.items()):
        listed = [(infos, *wanted[at]) for at, infos in of_file]
        read = _read_together(store, day, listed, check)
        for (at, _), of_cohort in zip(of_file, read, strict=False):
            parts[at] += of_cohort
        for at, infos in of_file[len(read) :]:
            parts[at] += read_blocks(store, day, infos, *wanted[at], check)
    for of_cohort, (found, metrics) in zip(parts, wanted, strict=True):
        for chunk in found.chunks:
            if part := _of_head(chunk, found, metrics):
                of_cohort.append(part)
    return [_merged(of_cohort, len(metrics)) for of_cohort, (_, metrics) in zip(parts, wanted, strict=True)]


def _of_head(chunk: Chunk, found: Sources, metrics: Sequence[int]) -> Part | None:
    """The rows of a head that lie in the range; None when there are none."""
    times = chunk.times_ms
    distinct = np.count_nonzero(times[1:] > times[:-1]) == len(times) - 1
    if distinct:
        low, high = times.searchsorted((found.start_ms, found.end_ms)).tolist()
        rows: slice | NDArray[np.bool_] = slice(low, high)
        count = high - low
    else:
        rows = (times >= found.start_ms) & (times < found.end_ms)
        count = np.count_nonzero(rows)
    if not count:
        return None
    columns = [chunk.values[rows, metric] for metric in metrics]
    return Part(times[rows], columns, distinct, lambda: chunk.sequences[rows])


def read_blocks(
    store: Store, day: int, infos: list[BlockInfo], found: Sources, metrics: Sequence[int], check: Callable[[], None]
) -> list[Part]:
    """The rows of some blocks of one partition that lie in the range.

    Where one of them has been merged into another since they were listed, those that are there now are read instead:
    they hold the same rows, and maybe some more, of which a reader sees each once anyhow. One that the file lists
    after it was not to be found there is damage, for no number is given twice.
    """
    partitions, lost = found.partitions, set[tuple[int, int]]()
    while infos:
        try:
            return _read_listed(store, day, infos, found, metrics, check)
        except BlockGoneError as gone:
            check()
            missing = (infos[0].life, gone.number)
            listed = block_infos(store, partitions, day, found.cohort, found.start_ms, found.end_ms, anew=True)
            if any((info.life, info.id) == missing for info in listed):
                store.faults.damage(f"block of {partitions.path(day).name}", gone.number, "it is listed, and not there")
                lost.add(missing)
            infos = [info for info in listed if (info.life, info.id) not in lost]
    return []


def _read_together(
    store: Store,
    day: int,
    listed: Sequence[tuple[list[BlockInfo], Sources, Sequence[int]]],
    check: Callable[[], None],
) -> list[list[Part]]:
    """The rows of the listed blocks of several cohorts in one partition, as far as nothing is in the way: what is left
    (a block that is gone, a file that cannot be read) is to be read cohort by cohort, which tells one from another."""
    read: list[list[Part]] = []
    infos, found, _ = listed[0]
    try:
        with found.partitions.lend(day, life=infos[0].life) as partition:
            for infos, found, metrics in listed:
                read.append(_parts_of(store, partition, infos, found, metrics, check))
    except (BlockGoneError, PartitionGoneError, UnusablePartitionError, apsw.IOError):
        return read
    return read


def _read_listed(
    store: Store, day: int, infos: list[BlockInfo], found: Sources, metrics: Sequence[int], check: Callable[[], None]
) -> list[Part]:
    parts: list[Part] = []
    try:
        with found.partitions.lend(day, life=infos[0].life) as partition:
            for info in infos:
                parts.extend(_parts_of(store, partition, [info], found, metrics, check))
    except PartitionGoneError:
        return []
    except (UnusablePartitionError, apsw.IOError) as error:
        _leave_out(store, found.partitions, day, error)
    return parts


def _parts_of(
    store: Store,
    partition: Partition,
    infos: Sequence[BlockInfo],
    found: Sources,
    metrics: Sequence[int],
    check: Callable[[], None],
) -> list[Part]:
    """The rows of blocks of one cohort; a damaged block or column is counted and left out."""
    parts = []
    for info in infos:
        check()
        try:
            part, damaged = _of_block(store, partition, info, found, metrics)
        except CorruptBlockError as error:
            store.faults.damage(f"block of {found.partitions.path(partition.day).name}", info.id, str(error))
            continue
        if damaged:
            what = f"{damaged} columns do not match their checksum"
            store.faults.damage(f"block of {found.partitions.path(partition.day).name}", info.id, what)
        parts.append(part)
    return parts


def _of_block(
    store: Store, partition: Partition, info: BlockInfo, found: Sources, metrics: Sequence[int]
) -> tuple[Part, int]:
    """The rows of a block that lie in the range, and how many of the columns were damaged."""
    key = (found.partitions, partition.day, partition.life, info.id)
    opened = store.opened.get(key)
    reader = partition.reader(info, found.cohort, found.columns, opened)
    if opened is None:
        opened = reader.open()
        store.opened.put(key, opened, opened.bytes)
    columns, damaged = reader.values(metrics)
    if info.first_ms >= found.start_ms and info.last_ms < found.end_ms:
        return Part(opened.times_ms, columns, opened.distinct, opened.sequences), damaged
    low, high = opened.times_ms.searchsorted((found.start_ms, found.end_ms)).tolist()
    inside = [column[low:high] for column in columns]
    return Part(opened.times_ms[low:high], inside, opened.distinct, lambda: opened.sequences()[low:high]), damaged


def _merged(parts: list[Part], columns: int) -> Frame:
    if not all(len(part.times_ms) for part in parts):
        parts = [part for part in parts if len(part.times_ms)]
    if not parts:
        empty = np.empty(0, np.int64)
        return Frame(empty, [[np.empty(0)] for _ in range(columns)], True, lambda: empty)
    if len(parts) == 1 and parts[0].distinct:
        times, whole, distinct, sequences = parts[0]
        return Frame(times, [[column] for column in whole], distinct, sequences)
    ascending = _ascending(parts)
    if not ascending and len(parts) > 1:
        parts.sort(key=lambda part: int(part.times_ms[0]))
        ascending = _ascending(parts)
    times = np.concatenate([part.times_ms for part in parts])
    pieces = [list(column) for column in zip(*[part.columns for part in parts], strict=True)]
    if ascending:
        return Frame(times, pieces, True, lambda: np.concatenate([part.sequences() for part in parts]))
    in_order = np.concatenate([part.sequences() for part in parts])
    order = np.lexsort((in_order, times))
    times, in_order = times[order], in_order[order]
    distinct = bool((times[1:] > times[:-1]).all())
    return Frame(times, [[np.concatenate(column)[order]] for column in pieces], distinct, lambda: in_order)


def _ascending(parts: list[Part]) -> bool:
    """Whether the times of all parts together ascend without equals."""
    end = -1
    for part in parts:
        if not part.distinct or part.times_ms[0] <= end:
            return False
        end = part.times_ms[-1]
    return True


def points(holders: Sequence[tuple[Frame, int]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The points of a series that lies in column `i` of each given frame: ascending distinct times, and values.

    The times are the frame's own array where the series has a value in each of its rows.
    """
    if len(holders) == 1:
        rows, column = holders[0]
        times, values, distinct = rows.times_ms, rows.column(column), rows.distinct
        present = values == values  # noqa: PLR0124  false where NaN
        if np.count_nonzero(present) != len(values):
            times, values = times[present], values[present]
    else:
        times, values, distinct = *_joined(holders), False
    if not distinct and len(times):
        newest = np.append(times[1:] != times[:-1], True)
        times, values = times[newest], values[newest]
    return times, values


def _joined(holders: Sequence[tuple[Frame, int]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The points of several frames, sorted by time and sequence."""
    parts = []
    for rows, column in holders:
        values = rows.column(column)
        present = ~np.isnan(values)
        parts.append((rows.times_ms[present], rows.sequences[present], values[present]))
    times, sequences, joined = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.lexsort((sequences, times))
    return times[order], joined[order]


def bucket_points(
    holders: Sequence[tuple[Frame, Sequence[int]]],
) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """The buckets of a series whose fields lie in some columns of each given frame, the first of which is absent only
    where there is no bucket: ascending distinct starts, and the fields."""
    parts = []
    for rows, columns in holders:
        present = ~np.isnan(rows.column(columns[0]))
        parts.append((rows.times_ms[present], rows.sequences[present], *(rows.column(c)[present] for c in columns)))
    starts, sequences, *fields = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if len(parts) > 1 or not holders[0][0].distinct:
        order = np.lexsort((sequences, starts))
        order = order[np.append(starts[order][1:] != starts[order][:-1], True)] if len(order) else order
        starts, fields = starts[order], [field[order] for field in fields]
    return starts, fields
