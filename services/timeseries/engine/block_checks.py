"""What can be wrong with one block: its columns, its rows, what it is listed with, and, of roll-ups, the fields.

What must stay true: a block as the engine writes it has nothing wrong, whatever the points were (infinities,
subnormals, one sample, counters that fall); each column that a reader would leave out is named.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import apsw
import numpy as np
from numpy.typing import NDArray

from fleet.model import MetricKind
from services.timeseries.engine.block import BlockReader
from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.partition import BlockInfo, Partition
from services.timeseries.engine.rollup import FIELDS, Field
from services.timeseries.engine.settings import DAY_MS
from services.timeseries.engine.tiers import RAW, TIERS, TierKind

Floats = NDArray[np.float64]


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
    """Checks blocks of one partition; `points`, in roll-ups buckets of metrics, counts those of undamaged columns."""

    partition: Partition
    level: int
    points: int = 0

    @property
    def _kind(self) -> TierKind:
        return TIERS[self.level]

    def faults(self, cohort: Cohort, listed: Listed, through: int) -> Iterator[str]:
        """What is wrong with a block, no row of which has a sequence above `through`."""
        fields = 1 if self.level == RAW else FIELDS
        info = BlockInfo(
            id=listed.id, life=0, first_ms=listed.first_ms, last_ms=listed.last_ms, rows=listed.rows, bytes=0
        )
        try:
            reader = self.partition.reader(info, cohort, fields * len(cohort.stored_set.metric_set))
        except (ValueError, apsw.Error) as error:
            self.partition.done()
            yield f"all columns: {error}"
            return
        yield from self._columns(reader, cohort, listed)
        if reader.rows != listed.rows:
            yield f"it has {reader.rows} rows, not {listed.rows}"
        if listed.max_sequence > through:
            what = "its head's blocked_through" if self.level == RAW else "the journal's end"
            yield f"its sequence {listed.max_sequence} is past {what} {through}"
        yield from self._rows(reader, listed)

    def _columns(self, reader: BlockReader, cohort: Cohort, listed: Listed) -> Iterator[str]:
        """What is wrong with the values, metric by metric."""
        cells, damaged = 0, False
        for place, (metric, key) in enumerate(
            zip(cohort.stored_set.metric_set.metrics, cohort.stored_set.metric_set.keys, strict=True)
        ):
            if self.level == RAW:
                columns, names = [_column(reader, place)], [key]
            else:
                columns = [_column(reader, place * FIELDS + field) for field in Field]
                names = [f"{key} {field.name}" for field in Field]
            for name, column in zip(names, columns, strict=True):
                if column is None:
                    damaged = True
                    yield f"column {name}: it is not what was written (checksum or encoding)"
            there = [column for column in columns if column is not None]
            cells += sum(_count(column) for column in there)
            self.points += _count(columns[0]) if columns[0] is not None else 0
            if self.level != RAW and len(there) == FIELDS:
                counter = metric.kind is MetricKind.COUNTER
                for what in _contradictions(there, self._kind.width_ms, counter=counter):
                    yield f"metric {key}: {what}"
        if not damaged and cells != listed.points:
            yield f"it has {cells} points, not {listed.points}"

    def _rows(self, reader: BlockReader, listed: Listed) -> Iterator[str]:
        """What is wrong with times and sequences."""
        try:
            times, sequences = reader.keys()
        except Exception as error:
            yield f"times and sequences: {error}"
            return
        if not 0 < len(times) == len(sequences) == reader.rows:
            yield f"it has {len(times)} times and {len(sequences)} sequences for {reader.rows} rows"
            return
        days = times // DAY_MS - self.partition.day
        if ((days < 0) | (days >= self._kind.span_days)).any():
            yield "it has rows of another day"
        if self.level != RAW and (times % self._kind.width_ms).any():
            yield f"it has buckets that do not begin at a multiple of {self._kind.width_ms} ms"
        later = np.diff(times)
        if (later < 0).any() or (np.diff(sequences)[later == 0] < 0).any():
            yield "its rows are not sorted by time and sequence"
        if (int(times[0]), int(times[-1])) != (listed.first_ms, listed.last_ms):
            yield f"its times are not those it is listed with, {listed.first_ms} to {listed.last_ms}"
        low, high = int(sequences.min()), int(sequences.max())
        if (low, high) != (listed.min_sequence, listed.max_sequence) or low < 1:
            yield f"its sequences are not those it is listed with, {listed.min_sequence} to {listed.max_sequence}"


def _column(reader: BlockReader, place: int) -> Floats | None:
    """The values of a column; None: it cannot be read."""
    try:
        (values,), damaged = reader.values([place])
    except Exception:  # whatever a decoder makes of bytes that only look right
        return None
    return None if damaged or len(values) != reader.rows else values


def _count(column: Floats) -> int:
    return int(np.count_nonzero(~np.isnan(column)))


def _contradictions(fields: Sequence[Floats], width_ms: int, *, counter: bool) -> Iterator[str]:
    """In which way the fields of a metric do not fit together.

    SUM, and INCREASE of a counter, may be absent where infinities cancel.
    """
    count, total, low, high, first, last, first_at, last_at, increase = fields
    there = ~np.isnan(count)
    exact = (low, high, first, last, first_at, last_at)
    gaps: Any = np.any([np.isnan(field) == there for field in exact], axis=0)
    strays = ~(np.isnan(total) & np.isnan(increase)) & ~there
    if gaps.any() or strays.any() or not (counter or np.isnan(increase).all()):
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
