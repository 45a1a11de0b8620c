"""What can be wrong with one block: its columns, its rows, what it is listed with, and, of roll-ups, the fields.

What must stay true: a block as the engine writes it has nothing wrong, whatever the points were (infinities,
subnormals, one sample, counters that fall); each column that a reader would leave out is named.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import apsw
import numpy as np
from numpy.typing import NDArray

from fleet.model import MetricKind
from services.timeseries.engine.block import BlockReader
from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.frame import FrameReader
from services.timeseries.engine.partition import BlockGoneError, BlockInfo, Partition
from services.timeseries.engine.rollup import FIELDS, GENERATION_SHIFT, Field
from services.timeseries.engine.settings import DAY_MS
from services.timeseries.engine.tiers import RAW, TIERS

_log = logging.getLogger(__name__)
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Listed(NamedTuple):
    """A block's row in its partition, but for the payload."""

    id: int
    cohort_id: int
    first_ms: int
    last_ms: int
    rows: int
    points: int
    min_sequence: int
    max_sequence: int


LISTED: Final = "id, cohort, first_ms, last_ms, row_count, points, min_sequence, max_sequence"


@dataclass(slots=True)
class BlockCheck:
    """Checks blocks of one partition.

    Attributes:
        partition: whose blocks they are.
        level: its tier.
        days: its days.
        blocked: by (cohort, day) the sequence up to which rows of points may be in blocks.
        last_sequence: the journal's.
        points: found in undamaged columns so far; in roll-ups, buckets of metrics.
    """

    partition: Partition
    level: int
    days: range
    blocked: Mapping[tuple[int, int], int]
    last_sequence: int
    points: int = 0

    def faults(self, cohort: Cohort, listed: Listed) -> Iterator[str]:
        """What is wrong with a block."""
        columns = len(cohort.stored_set.metric_set) * (1 if self.level == RAW else FIELDS)
        info = BlockInfo(
            id=listed.id, life=0, first_ms=listed.first_ms, last_ms=listed.last_ms, rows=listed.rows, bytes=0
        )
        try:
            reader = self.partition.reader(info, cohort, columns)
        except (ValueError, apsw.Error) as error:
            self.partition.done()
            yield f"all columns: {error}"
            return
        except BlockGoneError:  # in the transaction that lists it: the file contradicts itself
            yield "all columns: it is listed and cannot be found"
            return
        yield from self._columns(_columns(reader, columns), cohort, listed)
        if reader.rows != listed.rows:
            yield f"it has {reader.rows} rows, not {listed.rows}"
        try:
            times, sequences = reader.keys()
        except Exception as error:
            yield f"times and sequences: {error}"
            return
        if not 0 < len(times) == len(sequences) == reader.rows:
            yield f"it has {len(times)} times and {len(sequences)} sequences for {reader.rows} rows"
            return
        yield from self._rows(times, sequences, listed)

    def _columns(self, columns: list[Floats | None], cohort: Cohort, listed: Listed) -> Iterator[str]:
        """What is wrong with the values, metric by metric."""
        metric_set, width = cohort.stored_set.metric_set, 1 if self.level == RAW else FIELDS
        for place, (metric, key) in enumerate(zip(metric_set.metrics, metric_set.keys, strict=True)):
            of_metric = columns[place * width : (place + 1) * width]
            names = [key] if self.level == RAW else [f"{key} {field.name}" for field in Field]
            for name, column in zip(names, of_metric, strict=True):
                if column is None:
                    yield f"column {name}: it is not what was written (checksum or encoding)"
            there = [column for column in of_metric if column is not None]
            self.points += _count(of_metric[0]) if of_metric[0] is not None else 0
            if self.level != RAW and len(there) == FIELDS:
                gauge = metric.kind is MetricKind.GAUGE
                for what in _contradictions(there, TIERS[self.level].width_ms, gauge=gauge):
                    yield f"metric {key}: {what}"
        cells = [_count(column) for column in columns if column is not None]
        if len(cells) == len(columns) and sum(cells) != listed.points:
            yield f"it has {sum(cells)} points, not {listed.points}"

    def _rows(self, times: Integers, sequences: Integers, listed: Listed) -> Iterator[str]:
        """What is wrong with times and sequences."""
        day_of = times // DAY_MS
        if ((day_of < self.days.start) | (day_of >= self.days.stop)).any():
            yield "it has rows of another day"
        width = TIERS[self.level].width_ms
        if self.level != RAW and (times % width).any():
            yield f"it has buckets that do not begin at a multiple of {width} ms"
        later = np.diff(times)
        if (later < 0).any() or (np.diff(sequences)[later == 0] < 0).any():
            yield "its rows are not sorted by time and sequence"
        if (int(times[0]), int(times[-1])) != (listed.first_ms, listed.last_ms):
            yield f"its times are not those it is listed with, {listed.first_ms} to {listed.last_ms}"
        low, high = int(sequences.min()), int(sequences.max())
        if (low, high) != (listed.min_sequence, listed.max_sequence) or low < 1:
            yield f"its sequences are not those it is listed with, {listed.min_sequence} to {listed.max_sequence}"
        if self.level != RAW and (made := high >> GENERATION_SHIFT) > self.last_sequence:
            yield f"it was made of sequence {made}, past the journal's end {self.last_sequence}"
        for day in np.unique(day_of).tolist() if self.level == RAW else ():
            high, through = int(sequences[day_of == day].max()), self.blocked.get((listed.cohort_id, day), 0)
            if high > through:
                yield f"its sequence {high} is past its head's blocked_through {through}"


def _columns(reader: BlockReader | FrameReader, columns: int) -> list[Floats | None]:
    """The values of all columns, None for those that cannot be read; at once, where all can."""
    try:
        found, damaged = reader.values(range(columns))
        if not damaged and all(len(column) == reader.rows for column in found):
            return list(found)
    except Exception:  # whatever a decoder makes of bytes that only look right
        _log.debug("a block is read column by column, for one cannot be read", exc_info=True)
    return [_column(reader, column) for column in range(columns)]


def _column(reader: BlockReader | FrameReader, place: int) -> Floats | None:
    """The values of a column; None: it cannot be read."""
    try:
        (values,), damaged = reader.values([place])
    except Exception:
        return None
    return None if damaged or len(values) != reader.rows else values


def _count(column: Floats) -> int:
    return int(np.count_nonzero(~np.isnan(column)))


def _contradictions(fields: Sequence[Floats], width_ms: int, *, gauge: bool) -> Iterator[str]:
    """In which way the fields of a metric do not fit together.

    SUM, and INCREASE of what is no gauge, may be absent where infinities cancel.
    """
    count, total, low, high, first, last, first_at, last_at, increase = fields
    there = ~np.isnan(count)
    exact = (low, high, first, last, first_at, last_at)
    gaps: Any = np.any([np.isnan(field) == there for field in exact], axis=0)
    strays = ~(np.isnan(total) & np.isnan(increase)) & ~there
    if gaps.any() or strays.any() or (gauge and not np.isnan(increase).all()):
        yield "it has fields without the others of their bucket"
    with np.errstate(invalid="ignore"):
        wrong = {
            "its counts are no numbers of points": ~((count >= 1) & (count == np.rint(count))),
            "its first or last value is not between its least and greatest": ~(
                (low <= first) & (first <= high) & (low <= last) & (last <= high)
            ),
            "its first and last time are not in their bucket": ~(
                (first_at >= 0) & (first_at <= last_at) & (last_at < width_ms)
            ),
        }
    for what, where in wrong.items():
        if (where & there & ~gaps).any():
            yield what
