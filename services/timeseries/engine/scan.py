"""The rows of one cohort in a range, from blocks and heads together, and the points of one series out of them.

What must stay true: the heads are looked at before the blocks (see `head.py`); equal times are resolved for each
series by sequence, after the cells without a value are gone; a damaged block or column is counted and left out, the
rest is answered; of a day that is evicted meanwhile a reader sees all, a part or nothing, and never an error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import apsw
import numpy as np
from numpy.typing import NDArray

from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.database import is_unreadable
from services.timeseries.engine.head import Chunk
from services.timeseries.engine.partition import (
    BlockGoneError,
    BlockInfo,
    PartitionGoneError,
    Partitions,
    UnusablePartitionError,
)
from services.timeseries.engine.payload import CorruptBlockError
from services.timeseries.engine.rollup import FIELDS
from services.timeseries.engine.settings import DAY_MS
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import RAW


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frame:
    """Rows sorted by time and sequence; `columns[i]` are the values of the i-th wanted column, NaN where absent."""

    times_ms: NDArray[np.int64]
    sequences: NDArray[np.int64]
    columns: list[NDArray[np.float64]]
    distinct: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sources:
    """Where a cohort's rows of a range are: chunks of heads, and blocks by day."""

    cohort: Cohort
    level: int
    partitions: Partitions
    columns: int
    start_ms: int
    end_ms: int
    chunks: list[Chunk]
    blocks: list[tuple[int, list[BlockInfo]]]

    @property
    def rows(self) -> int:
        """At most so many rows."""
        blocked = sum(info.rows for _, infos in self.blocks for info in infos)
        return blocked + sum(len(chunk.times_ms) for chunk in self.chunks)


def sources(store: Store, cohort: Cohort, start_ms: int, end_ms: int, level: int = RAW) -> Sources:
    """Finds the rows of `[start_ms, end_ms)` in a tier without reading them; the raw one's are in heads too."""
    first_day, last_day = start_ms // DAY_MS, (end_ms - 1) // DAY_MS
    by_day: dict[int, list[Chunk]] = {}
    if level == RAW:
        with store.lock:
            by_day = store.heads.snapshot(cohort, first_day, last_day)
    partitions, metrics = store.tiers[level].partitions, len(cohort.stored_set.metric_set)
    days = partitions.days(first_day, last_day)
    return Sources(
        cohort=cohort,
        level=level,
        partitions=partitions,
        columns=metrics if level == RAW else metrics * FIELDS,
        start_ms=start_ms,
        end_ms=end_ms,
        chunks=[chunk for chunks in by_day.values() for chunk in chunks],
        blocks=[(day, block_infos(store, partitions, day, cohort, start_ms, end_ms)) for day in days],
    )


def block_infos(
    store: Store, partitions: Partitions, day: int, cohort: Cohort, start_ms: int, end_ms: int
) -> list[BlockInfo]:
    """The blocks of one partition; none when it was evicted, none, counted, when it cannot be read."""
    try:
        with partitions.lend(day) as partition:
            return partition.infos(cohort.id, start_ms, end_ms)
    except PartitionGoneError:
        return []
    except (UnusablePartitionError, apsw.IOError) as error:
        _leave_out(store, partitions, day, error)
        return []


def _leave_out(store: Store, partitions: Partitions, day: int, error: Exception) -> None:
    """Counts a partition that cannot be read; a failure that may pass is the reader's to know of."""
    if not isinstance(error, UnusablePartitionError) and not is_unreadable(error):
        raise error
    store.faults.damage(f"partition of {partitions.name}", day, str(error))


Part = tuple[NDArray[np.int64], NDArray[np.int64], list[NDArray[np.float64]]]


def frame(store: Store, found: Sources, metrics: Sequence[int], check: Callable[[], None]) -> Frame:
    """Reads some columns (ascending). `check` is called between blocks and may raise to stop."""
    parts: list[Part] = []
    for day, infos in found.blocks:
        parts.extend(read_blocks(store, day, infos, found, metrics, check))
    for chunk in found.chunks:
        inside = (chunk.times_ms >= found.start_ms) & (chunk.times_ms < found.end_ms)
        rows: slice | NDArray[np.bool_] = slice(None) if inside.all() else inside
        columns = [chunk.values[:, metric][rows] for metric in metrics]
        parts.append((chunk.times_ms[rows], chunk.sequences[rows], columns))
    return _merged(parts, len(metrics))


def read_blocks(
    store: Store, day: int, infos: list[BlockInfo], found: Sources, metrics: Sequence[int], check: Callable[[], None]
) -> list[Part]:
    """The rows of some blocks of one partition that lie in the range.

    Where one of them has been merged into another since they were listed, those that are there now are read instead:
    they hold the same rows, and maybe some more, of which a reader sees each once anyhow.
    """
    while infos:
        try:
            return _read_listed(store, day, infos, found, metrics, check)
        except BlockGoneError:
            infos = block_infos(store, found.partitions, day, found.cohort, found.start_ms, found.end_ms)
    return []


def _read_listed(
    store: Store, day: int, infos: list[BlockInfo], found: Sources, metrics: Sequence[int], check: Callable[[], None]
) -> list[Part]:
    parts: list[Part] = []
    name = found.partitions.path(day).name
    try:
        with found.partitions.lend(day, life=infos[0].life) as partition:
            for info in infos:
                check()
                try:
                    reader = partition.reader(info, found.cohort, found.columns)
                    times, sequences = reader.keys()
                    columns, damaged = reader.values(metrics)
                except CorruptBlockError as error:
                    store.faults.damage(f"block of {name}", info.id, str(error))
                    continue
                if damaged:
                    store.faults.damage(f"block of {name}", info.id, f"{damaged} columns do not match their checksum")
                low, high = np.searchsorted(times, (found.start_ms, found.end_ms)).tolist()
                parts.append((times[low:high], sequences[low:high], [column[low:high] for column in columns]))
    except PartitionGoneError:
        return []
    except (UnusablePartitionError, apsw.IOError) as error:
        _leave_out(store, found.partitions, day, error)
    return parts


def _merged(parts: list[Part], columns: int) -> Frame:
    parts = sorted((part for part in parts if len(part[0])), key=lambda part: int(part[0][0]))
    if not parts:
        empty = np.empty(0, np.int64)
        return Frame(times_ms=empty, sequences=empty, columns=[np.empty(0)] * columns, distinct=True)
    times, sequences, merged = parts[0]
    if len(parts) > 1:
        times = np.concatenate([part[0] for part in parts])
        sequences = np.concatenate([part[1] for part in parts])
        merged = [np.concatenate([part[2][column] for part in parts]) for column in range(columns)]
    distinct = bool((times[1:] > times[:-1]).all())
    if not distinct:
        order = np.lexsort((sequences, times))
        times, sequences, merged = times[order], sequences[order], [column[order] for column in merged]
        distinct = bool((times[1:] > times[:-1]).all())
    return Frame(times_ms=times, sequences=sequences, columns=merged, distinct=distinct)


def points(holders: Sequence[tuple[Frame, int]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The points of a series that lies in column `i` of each given frame: ascending distinct times, and values."""
    parts = []
    for rows, column in holders:
        values = rows.columns[column]
        present = ~np.isnan(values)
        if present.all():
            parts.append((rows.times_ms, rows.sequences, values))
        else:
            parts.append((rows.times_ms[present], rows.sequences[present], values[present]))
    times, sequences, values = parts[0]
    distinct = holders[0][0].distinct
    if len(parts) > 1:
        times, sequences, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.lexsort((sequences, times))
        times, values, distinct = times[order], values[order], False
    if not distinct and len(times):
        newest = np.append(times[1:] != times[:-1], True)
        times, values = times[newest], values[newest]
    return times, values


def bucket_points(
    holders: Sequence[tuple[Frame, Sequence[int]]],
) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """The buckets of a series whose fields lie in some columns of each given frame, the first of which is absent only
    where there is no bucket: ascending distinct starts, and the fields."""
    parts = []
    for rows, columns in holders:
        present = ~np.isnan(rows.columns[columns[0]])
        parts.append((rows.times_ms[present], rows.sequences[present], *(rows.columns[c][present] for c in columns)))
    starts, sequences, *fields = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if len(parts) > 1 or not holders[0][0].distinct:
        order = np.lexsort((sequences, starts))
        order = order[np.append(starts[order][1:] != starts[order][:-1], True)] if len(order) else order
        starts, fields = starts[order], [field[order] for field in fields]
    return starts, fields
