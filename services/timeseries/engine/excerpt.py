"""An excerpt: a copy of some days of a store, in use or not, for a reader that opens it as a store and deletes it.

It is made as a backup is, and for the same reasons (`backup`), but only of the partitions of points that may have one
of the days; of roll-ups there are none, so it answers queries of points only. What must stay true: every row of these
days that was acknowledged before it began is in it; of other days a replay takes nothing that is in a block, though
the journal may still have it.
"""

import contextlib
import datetime
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import apsw

from services.timeseries.engine.backup import copy_files
from services.timeseries.engine.database import DAMAGED, Transaction, connect_read_only, fetch
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.manifest import JOURNAL_NAME, Progress, store_files
from services.timeseries.engine.partition import EPOCH
from services.timeseries.engine.settings import DAY_MS

_POINTS: Final = "blocks"
_LONGEST_DAYS: Final = 64
"""No partition has more days."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """What `copy_range` copied: days (since the epoch) that blocks may have rows of, and unreadable partitions."""

    days: set[int]
    left_out: list[str]


def copy_range(folder: Path, target: Path, days: range, progress: Progress) -> Excerpt:
    """Copies a moment of the store in `folder`, which may be in use, to the empty `target`: the partitions of points
    that may have one of these days, and all that is in no partition yet. It opens as a store; nothing of it is synced.

    Raises OSError, `apsw.Error`.
    """
    others: set[int] = set()

    def choose(folder: Path) -> list[str]:
        wanted, unwanted = partitions_of(folder, days)
        others.update(unwanted)
        return wanted

    copied, left_out = copy_files(folder, target, choose, progress)
    _forget(target / JOURNAL_NAME, others)
    found: set[int] = set()
    for name in copied:
        try:
            with closing(connect_read_only(target / name)) as partition:
                spans = fetch(partition, "SELECT DISTINCT first_ms / ?1, last_ms / ?1 FROM blocks", (DAY_MS,))
        except DAMAGED:
            (target / name).unlink()
            left_out.append(name)
        else:
            found.update(day for first, last in spans for day in range(first, last + 1))
    return Excerpt(days=found, left_out=left_out)


def partitions_of(folder: Path, days: range) -> tuple[list[str], set[int]]:
    """The partitions of points that may have one of these days, as paths in the store's folder, and the days of the
    others. One is named by its first day and ends at the latest where the next begins."""
    starts = {}
    for name in store_files(folder):
        if Path(name).parent.name == _POINTS:
            with contextlib.suppress(ValueError):  # not a partition's name
                starts[(datetime.date.fromisoformat(Path(name).stem) - EPOCH).days] = name
    wanted: list[str] = []
    others: set[int] = set()
    for first, following in pairwise([*sorted(starts), 1 << 62]):
        end = min(following, first + _LONGEST_DAYS)
        if first < days.stop and days.start < end:
            wanted.append(starts[first])
        else:
            others.update(range(first, end))
    return wanted, others


def _forget(journal: Path, days: set[int]) -> None:
    """Notes in a copy that these days went, so that a replay does not bring back what the journal still has of them."""
    with closing(Journal(journal, may_create=False)) as opened:
        last = opened.last_sequence
    with closing(apsw.Connection(str(journal))) as copy:
        copy.pragma("synchronous", 0)
        with Transaction(copy):
            copy.executemany("INSERT OR REPLACE INTO evictions VALUES (?, ?, 1)", [(day, last) for day in sorted(days)])
