"""Short blocks become long ones: fewer to open, and long columns compress better (`decimals`, `settings`: how much).

A cohort's blocks in a partition are merged when enough short ones are there, and all of them once the partition is
complete: its days are over, no head and no mark is left of it, no rows come for it. A single one is compressed once
more then, unless it is a frame, which would be the same again. What came late into a complete partition waits until it
is worth while.

What must stay true: what is replaced and what replaces it change places in one transaction of one file; a block that
cannot be read whole is left as it is, with its neighbours, and never tried again until the next start. Runs in the
upkeep thread.
"""

import logging
from collections.abc import Callable
from typing import Final

import apsw
import numpy as np

from services.timeseries.engine import block
from services.timeseries.engine.block import FRAME_ROWS
from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.head import Chunk
from services.timeseries.engine.partition import (
    BlockGoneError,
    BlockInfo,
    Closed,
    PartitionGoneError,
    Pile,
    UnusablePartitionError,
)
from services.timeseries.engine.payload import CorruptBlockError
from services.timeseries.engine.rollup import FIELDS
from services.timeseries.engine.settings import DAY_MS, MAX_TIME_MS
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import RAW, Tier

_log = logging.getLogger(__name__)
_WORTH_MERGING: Final = 8
"""Late rows are merged into a complete partition when they are at least one in so many."""


class Merger:
    """Merges what is due; `stopping` ends it between two cohorts."""

    def __init__(self, store: Store, stopping: Callable[[], bool]) -> None:
        self._store = store
        self._stopping = stopping
        self._left: set[tuple[int, int, int]] = set()

    def run(self, *, everything: bool = False) -> None:
        """Merges what is due, or all there is; a failure is noted and tried again the next time."""
        for tier in self._store.tiers:
            for day, piles in tier.partitions.piles().items():
                if self._stopping():
                    return
                try:
                    self._partition(tier, day, piles, everything=everything)
                except PartitionGoneError:
                    continue
                except (apsw.Error, UnusablePartitionError, OSError) as error:
                    self._store.faults.note(f"{tier.partitions.path(day).name} could not be merged: {error}")
                    _log.warning("blocks of day %d could not be merged, will try again", day, exc_info=error)

    def _partition(self, tier: Tier, day: int, piles: dict[int, Pile], *, everything: bool) -> None:
        complete = everything or self._is_complete(tier, day)
        wanted = [cohort_id for cohort_id, pile in piles.items() if complete or self._is_due(pile)]
        closed: list[Closed] = []
        life, merged = None, False
        for number, cohort_id in enumerate(wanted):
            if self._stopping():
                return
            found = self._merged(tier, day, cohort_id, piles[cohort_id], complete=complete, everything=everything)
            if found is not None:
                of_file, parts = found
                if closed and of_file != life:
                    return  # it was set aside meanwhile: the numbers of the blocks that were to go are others' now
                life = of_file
                closed.extend(parts)
            if closed and (len(closed) >= self._store.settings.close_group_heads or number + 1 == len(wanted)):
                tier.partitions.store(day, closed, self._store.clock.now_ms(), life=life)
                closed, merged = [], True
        if merged and complete:
            tier.partitions.compact(day)

    def _is_due(self, pile: Pile) -> bool:
        settings = self._store.settings
        return pile.blocks > 1 and (pile.short_rows >= settings.head_rows or pile.short_blocks >= settings.merge_blocks)

    def _is_complete(self, tier: Tier, day: int) -> bool:
        """Whether nothing is expected for a partition any more: its days are over for as long as a head lives, and no
        rows have come lately. What is imported or played back would be merged again with each block that closes: 234 ns
        a point instead of 88."""
        last = day + tier.partitions.span_of(day)
        store = self._store
        if store.clock.monotonic() - tier.partitions.stored_at(day) < store.settings.late_grace_s:
            return False
        if store.clock.now_ms() < last * DAY_MS + int(store.settings.head_age_s * 1_000):
            return False
        with store.lock:
            growing = tier.level == RAW and any(day <= head.day < last for head in store.heads)
            return not growing and not any(mark.day == day for mark in tier.marks)

    def _merged(
        self, tier: Tier, day: int, cohort_id: int, pile: Pile, *, complete: bool, everything: bool
    ) -> tuple[int, list[Closed]] | None:
        """What a cohort's blocks become, and the life of their file; None: they stay."""
        store, settings = self._store, self._store.settings
        if (tier.level, day, cohort_id) in self._left:
            return None
        with store.lock:
            cohort = store.catalog.cohorts_by_id.get(cohort_id)
        if cohort is None:  # a damaged journal does not name it any more: its blocks stay
            tier.partitions.settle(day, cohort_id)
            return None
        columns = len(cohort.stored_set.metric_set) * (1 if tier.level == RAW else FIELDS)
        rows_limit = max(1, min(settings.merged_rows, settings.scan_cells // columns))
        with tier.partitions.lend(day) as partition:
            infos = partition.infos(cohort_id, 0, MAX_TIME_MS + 1)
        if complete and not everything and not _worth_while(infos, pile, settings.merge_blocks):
            return None
        if not complete:
            infos = [info for info in infos if 2 * info.rows < settings.head_rows]
        runs = [run for run in _runs(infos, rows_limit) if len(run) > 1 or (complete and run[0].rows >= FRAME_ROWS)]
        if not runs:
            tier.partitions.settle(day, cohort_id)
            return None
        closed = []
        for run in runs:
            chunk = self._read(tier, day, cohort, columns, run)
            if chunk is None:
                self._left.add((tier.level, day, cohort_id))
                return None
            blocks = block.build(chunk, cohort_id, rows_limit, settings.merged_level if complete else None)
            replaced = [info.id for info in run]
            closed.append(Closed(cohort_id=cohort_id, blocks=blocks, replaces=replaced, final=complete))
        return runs[0][0].life, closed

    def _read(self, tier: Tier, day: int, cohort: Cohort, columns: int, infos: list[BlockInfo]) -> Chunk | None:
        """All rows of some blocks; None when one of them cannot be read whole."""
        times, sequences, values = [], [], []
        with tier.partitions.lend(day, life=infos[0].life) as partition:
            for info in infos:
                try:
                    reader = partition.reader(info, cohort, columns)
                    of_times, of_sequences = reader.keys()
                    found, damaged = reader.values(range(columns))
                except (CorruptBlockError, BlockGoneError) as error:
                    self._store.faults.damage(f"block of {tier.partitions.path(day).name}", info.id, str(error))
                    return None
                if damaged:
                    return None
                times.append(of_times)
                sequences.append(of_sequences)
                values.append(np.array(found))
        by_column = np.concatenate(values, axis=1)  # as the block wants them again
        return Chunk(times_ms=np.concatenate(times), sequences=np.concatenate(sequences), values=by_column.T)


def _worth_while(infos: list[BlockInfo], pile: Pile, many: int) -> bool:
    return pile.blocks >= many or pile.rows * _WORTH_MERGING >= sum(info.rows for info in infos)


def _runs(infos: list[BlockInfo], rows_limit: int) -> list[list[BlockInfo]]:
    """Neighbours in time that fit into one block together."""
    runs: list[list[BlockInfo]] = [[]]
    rows = 0
    for info in infos:
        if rows + info.rows > rows_limit:
            runs.append([])
            rows = 0
        runs[-1].append(info)
        rows += info.rows
    return [run for run in runs if run]
