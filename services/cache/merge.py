"""What two replicas know of one server, joined.

Every replica takes rows, and what it knows of a server may hold something that another one lacks: a row, a descriptor,
a removal. Joining keeps the newest of each part, so whoever joins in whatever order ends with the same:

    life         the later one wins whole: a removal voids every earlier state, an admission every earlier removal; but
                 a record of a later revision than the one that was deleted tells of an admission
    descriptor   the one given last
    details      of the later revision of the record
    samples      of each metric set the one measured last, as `order_of` has it
    status       of the side that has the newer samples; of the later judgement where both have the same; judged anew
                 where each side has something newer

What must stay true: `join` is the same in either order but for the objects it is made of, joining again changes
nothing, and a joined state that is not simply one of the two has a later stamp than both.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from fleet.health import HealthRules, judge
from fleet.model import MetricSet, ServerDetails
from services.cache.model import Removal, Sample, ServerState, Stored, newest_headline

SAMPLE_LIFETIME_MS: Final = 300_000
"""A set that its server has stopped reporting, while it reports others, is dropped after this."""


def join(mine: Stored, theirs: Stored, *, now_ms: int, writer: str, rules: HealthRules) -> Stored:
    """What both know together.

    Args:
        mine: what this replica knows.
        theirs: what another one wrote.
        now_ms: our clock, for the stamp of what is new.
        writer: this replica.
        rules: of health.

    Returns:
        A value of the version of `theirs` when theirs holds all of it; `mine`, or something newer, otherwise.
    """
    if mine.version == theirs.version:
        return mine
    stamp = max(now_ms, mine.stamp + 1, theirs.stamp + 1)
    if mine.life != theirs.life or isinstance(mine, Removal) or isinstance(theirs, Removal):
        later, earlier = (theirs, mine) if _rank(theirs) >= _rank(mine) else (mine, theirs)
        if isinstance(later, Removal) and isinstance(earlier, ServerState) and is_restored(earlier.details, later):
            return replace(earlier, life=later.life + 1, stamp=stamp, writer=writer)
        return theirs if later is theirs else replace(mine, stamp=stamp, writer=writer)
    return _joined(mine, theirs, stamp, writer, rules)


def in_local_time(
    joined: ServerState,
    mine: Stored | None,
    known_set: Callable[[str], MetricSet | None],
    now_ms: int | None,
    now_s: float,
) -> ServerState:
    """A state that others had a part in, on this replica's monotonic clock; news in it count as heard now.

    Args:
        joined: the state.
        mine: what was known here before.
        known_set: the metric set of an id, where rows named it here: with units and kinds.
        now_ms: our clock, from which samples are as old as they are; None: as old as if they had come now.
        now_s: our monotonic clock.
    """
    before = {sample.set_id: sample for sample in mine.samples} if isinstance(mine, ServerState) else {}
    samples: list[Sample] = []
    heard_s = mine.heard_s if isinstance(mine, ServerState) else now_s
    for sample in joined.samples:
        kept = before.get(sample.set_id)
        if kept is not None and (kept.time_ms, kept.received_ms) == (sample.time_ms, sample.received_ms):
            samples.append(kept)
            continue
        if kept is None or sample.order > kept.order:
            heard_s = now_s
        age_s = max(0, now_ms - sample.received_ms) / 1_000 if now_ms is not None else 0.0
        samples.append(_named(replace(sample, received_s=now_s - age_s), known_set))
    return replace(joined, samples=tuple(samples), heard_s=heard_s)


def _named(sample: Sample, known_set: Callable[[str], MetricSet | None]) -> Sample:
    """A restored sample under the set that its sender uses, where that is known."""
    metric_set = known_set(sample.origin) if sample.restored else None
    if metric_set is None:
        return sample
    values = sample.values
    if metric_set.keys != sample.metric_set.keys:
        by_key = dict(zip(sample.metric_set.keys, values.tolist(), strict=True))
        values = np.array([by_key.get(key, math.nan) for key in metric_set.keys], np.float64)
    return replace(sample, metric_set=metric_set, values=values, restored=False, origin="")


def is_restored(details: ServerDetails, removal: Removal) -> bool:
    """Whether what is recorded of a server is from after the removal."""
    return 0 < removal.revision < details.revision


def _rank(known: Stored) -> tuple[int, bool, str]:
    """Which of two lives wins; of an admission and a removal in the same millisecond the removal."""
    return known.life, isinstance(known, Removal), known.version


def _joined(mine: ServerState, theirs: ServerState, stamp: int, writer: str, rules: HealthRules) -> ServerState:
    later = theirs if theirs.version > mine.version else mine
    samples, i_have_news, they_have_news = _samples(mine, theirs)
    my_description = (mine.described, str(mine.descriptor))
    their_description = (theirs.described, str(theirs.descriptor))
    described = theirs if their_description >= my_description else mine
    my_record, their_record = _record(mine), _record(theirs)
    recorded = theirs if their_record >= my_record else mine
    if i_have_news and they_have_news:
        status = judge(later.status, *newest_headline(samples), rules)
    elif i_have_news or they_have_news:
        status = (mine if i_have_news else theirs).status
    else:
        status = later.status
    joined = replace(
        described,
        status=status,
        observed_ms=samples[-1].time_ms if samples else None,
        received_ms=samples[-1].received_ms if samples else None,
        heard_s=mine.heard_s,
        samples=samples,
        details=recorded.details,
    )
    nothing_of_mine = (
        not i_have_news
        and my_description <= their_description
        and my_record <= their_record
        and status == theirs.status
    )
    if nothing_of_mine and theirs.version:
        return replace(joined, stamp=theirs.stamp, writer=theirs.writer)
    nothing_of_theirs = (
        not they_have_news
        and their_description <= my_description
        and their_record <= my_record
        and status == mine.status
    )
    if nothing_of_theirs and mine.version > theirs.version:
        return mine
    return replace(joined, stamp=stamp, writer=writer)


def _record(state: ServerState) -> tuple[object, ...]:
    """Orders what is recorded; of one revision windows that have ended may be told or not."""
    details = state.details
    return details.revision, details.maintenance, details.labels, details.has_notes


def _samples(mine: ServerState, theirs: ServerState) -> tuple[tuple[Sample, ...], bool, bool]:
    """The newest sample of each set, the newest last, and whether either side has one that the other lacks."""
    i_have_news = they_have_news = False
    joined = {sample.set_id: sample for sample in mine.samples}
    their_ids = {sample.set_id for sample in theirs.samples}
    newest_ms = max((sample.received_ms for sample in (*mine.samples, *theirs.samples)), default=0)
    for theirs_one in theirs.samples:
        mine_one = joined.get(theirs_one.set_id)
        if mine_one is not None and mine_one.order > theirs_one.order:
            i_have_news = True
        elif mine_one is None or mine_one.order < theirs_one.order:
            joined[theirs_one.set_id] = theirs_one
            they_have_news |= newest_ms - theirs_one.received_ms < SAMPLE_LIFETIME_MS
        elif mine_one.received_ms != theirs_one.received_ms and theirs.version > mine.version:
            joined[theirs_one.set_id] = theirs_one  # two rows of the same time: the one that was taken later
    for set_id, sample in list(joined.items()):
        if newest_ms - sample.received_ms >= SAMPLE_LIFETIME_MS:
            del joined[set_id]
        elif set_id not in their_ids:
            i_have_news = True
    ordered = sorted(joined.values(), key=lambda sample: (sample.order, sample.received_ms, sample.set_id))
    return tuple(ordered), i_have_news, they_have_news
