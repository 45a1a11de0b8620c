"""Buckets whose points are gone: they must not be made anew of the few points that come later.

When a partition goes, its roll-ups are complete, and the journal notes up to which sequence it had taken rows
(`Store.ended`). A bucket that was made by then is frozen; one that was not there has no points at all, so points that
come for it later make it wholly, as an import of what is older than the retention does.

What must stay true: a row for a frozen bucket is refused before it is acknowledged, and one that slipped in beside the
eviction is never rolled up over the frozen bucket.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.timeseries.engine.catalog import Cohort
from services.timeseries.engine.rollup import GENERATION_SHIFT
from services.timeseries.engine.scan import frame, sources
from services.timeseries.engine.settings import DAY_MS
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import RAW, TIERS


def frozen_starts(store: Store, cohorts: Sequence[Cohort], level: int, start_ms: int, end_ms: int) -> NDArray[np.int64]:
    """The starts, ascending, of a server's buckets of a tier in a range that were made before their points went."""
    finer = store.tiers[level - 1]
    span = finer.kind.span_days
    first, last = start_ms // DAY_MS // span * span, (end_ms - 1) // DAY_MS
    with store.lock:
        ended = {day: through for day in range(first, last + 1, span) if (through := store.ended[level - 1].get(day))}
    if not ended:
        return np.empty(0, np.int64)
    found = [np.empty(0, np.int64)]
    for day, through in ended.items():
        low, high = max(start_ms, day * DAY_MS), min(end_ms, (day + span) * DAY_MS)
        for cohort in cohorts:
            rows = frame(store, sources(store, cohort, low, high, level), [], lambda: None)
            found.append(rows.times_ms[rows.sequences >> GENERATION_SHIFT <= through])
    return np.unique(np.concatenate(found))


def too_late(store: Store, server_ids: Sequence[str], times_ms: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows are for a bucket whose points are gone, on any tier."""
    late = np.zeros(len(times_ms), np.bool_)
    day_of = times_ms // DAY_MS
    with store.lock:
        ended = [np.array(sorted(days), np.int64) for days in store.ended]
        cohorts_of = {server_id: list(store.catalog.cohorts_of.get(server_id, ())) for server_id in set(server_ids)}
    servers = np.array(server_ids, dtype=object)
    for level in range(RAW + 1, len(TIERS)):
        width, span = TIERS[level].width_ms, TIERS[level - 1].span_days
        candidates = np.flatnonzero(np.isin(day_of // span * span, ended[level - 1]) & ~late)
        for server_id, day in sorted(set(zip(servers[candidates], day_of[candidates].tolist(), strict=True))):
            frozen = frozen_starts(store, cohorts_of[server_id], level, day * DAY_MS, (day + 1) * DAY_MS)
            rows = candidates[(servers[candidates] == server_id) & (day_of[candidates] == day)]
            late[rows] = np.isin(times_ms[rows] // width * width, frozen)
    return late
