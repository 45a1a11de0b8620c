"""An excerpt: a copy of some days of a store, in use or not, for a reader that opens it as a store and deletes it.

It is made as a backup is, and for the same reasons (`backup`), but only of the partitions of points that may have one
of the days; of roll-ups there are none, so it answers queries of points only. What must stay true: every row of these
days that was acknowledged before it began is in it; of other days a replay takes nothing that is in a block, though
the journal may still have it.
"""

from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

import apsw
import numpy as np

from runtime.sqlite import Transaction, fetch
from services.timeseries.archive.backup import TierCopy, copy_journal
from services.timeseries.archive.manifest import JOURNAL_NAME, Progress, tier_files
from services.timeseries.engine.database import DAMAGED, connect_read_only
from services.timeseries.engine.engine import Engine
from services.timeseries.engine.partition import day_of
from services.timeseries.engine.settings import DAY_MS, EngineSettings
from services.timeseries.engine.tiers import RAW, TIERS

_UNLIMITED: Final = 1 << 62
READING: Final = EngineSettings(
    maintenance_interval_s=1e6,  # nothing is closed, merged or swept: it would only be work
    max_series=_UNLIMITED,
    max_points=_UNLIMITED,
    max_scanned_points=_UNLIMITED,
    scan_cells=4_000_000,
)
"""For the engine on the copy. Queries are of one server and day, and their results are not held: limits would only
refuse; but so many cells are in memory at once, 32 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """What `copy_range` copied.

    Attributes:
        days: since the epoch, that blocks may have rows of.
        left_out: partitions of the range that cannot be read or are gone.
        missing: all that are gone, with their days.
    """

    days: set[int]
    left_out: list[str]
    missing: dict[str, range] = field(default_factory=dict)


def copy_range(folder: Path, target: Path, days: range, progress: Progress) -> Excerpt:
    """Copies a moment of the store in `folder`, which may be in use, to the empty `target`: the partitions of points
    that may have one of these days, and all that is in no partition yet. It opens as a store; nothing of it is synced.

    Raises OSError, `apsw.Error`.
    """
    journal = copy_journal(folder, target, progress)
    _, others = partitions_of(folder, days)
    tier = TierCopy(folder, target, RAW, journal, progress)
    tier.copy(without=others)
    missing = tier.missing()
    tier.left_out += [name for name, gone in missing.items() if gone.start < days.stop and days.start < gone.stop]
    _, last_sequence = journal.finish(())
    _forget(target / JOURNAL_NAME, {day for gone in others.values() for day in gone}, last_sequence)
    found: set[int] = set()
    for name in tier.copied:
        try:
            with closing(connect_read_only(target / name)) as partition:
                spans = fetch(partition, "SELECT DISTINCT first_ms / ?1, last_ms / ?1 FROM blocks", (DAY_MS,))
        except DAMAGED:
            (target / name).unlink()
            tier.left_out.append(name)
        else:
            found.update(day for first, last in spans for day in range(first, last + 1))
    return Excerpt(days=found, left_out=tier.left_out, missing=missing)


def partitions_of(folder: Path, days: range) -> tuple[list[str], dict[str, range]]:
    """The partitions of points that may have one of these days, as paths in the store's folder; and the others, each
    with the days that it may have: it ends at the latest where the next begins."""
    starts = {day: name for name in tier_files(folder, TIERS[RAW]) if (day := day_of(Path(name))) is not None}
    wanted: list[str] = []
    others: dict[str, range] = {}
    for first, following in pairwise([*sorted(starts), 1 << 62]):
        having = range(first, min(following, first + TIERS[RAW].sparse_days))
        if having.start < days.stop and days.start < having.stop:
            wanted.append(starts[first])
        else:
            others[starts[first]] = having
    return wanted, others


def _forget(journal: Path, days: set[int], last_sequence: int) -> None:
    """Notes in a copy that these days went, so that a replay does not bring back what the journal still has of them."""
    with closing(apsw.Connection(str(journal))) as copy:
        copy.pragma("synchronous", 0)
        with Transaction(copy):
            gone = [(day, last_sequence) for day in sorted(days)]
            copy.executemany("INSERT OR REPLACE INTO evictions VALUES (?, ?, 1)", gone)


async def journaled_days(engine: Engine) -> set[int]:
    """The days of all rows that the journal keeps: those that are in no block yet are among them."""
    days: set[int] = set()
    last = engine.last_sequence
    if engine.first_sequence <= last:
        async for batch in engine.tail(engine.first_sequence):
            if batch.rows is not None:
                days.update(np.unique(batch.rows.times_ms // DAY_MS).tolist())
            if batch.sequence >= last:
                break
    return days
