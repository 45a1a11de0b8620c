"""How fast a series of daily peaks grows now: its line since the last change of rate, with jumps beside it.

What must stay true: the line is equivariant to scale and shift; what is not growth (a week, noise that wanders, single
jumps) does not make one; errors are those of correlated noise.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from services.analytics.forecasting.changes import Noise, Piece, noise_around, noise_of, pieces_of
from services.analytics.forecasting.daily import jumps_of, repeated, week_of
from services.analytics.forecasting.robust import Floats, median

SAME_RATE: Final = 3.0
"""Pieces whose slopes differ by fewer standard errors are one run."""
DOUBT: Final = 1.0
"""Whether one or two jumps go on cannot be known: of n of them the part n / (n + DOUBT) is counted. Where they do go
on, the median error of the date is .22 counting none and .20 so; where they were the last .02 and .07."""
TAKEN_BACK: Final = 0.5
"""Part of the growth that clean-ups must have undone for it to be in doubt."""
LEVEL_DAYS: Final = 7
"""The level is the median of what the line leaves of so many days."""
DISCONTINUITY: Final = 3.0
"""Deviations of a day by which a piece must begin away from the one before to have jumped."""
RECURRING_JUMPS: Final = 3
"""So many jumps in one direction, or more in any, are a habit that goes on; fewer happened and are over."""
HABIT_SHARE: Final = 0.1
"""The least part of how far the peaks have moved that is a habit's: else it is something else that they move by."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Growth:
    """A line through the newest days.

    Attributes:
        level: the line at the newest day.
        level_error: its standard error.
        rate: per day, with what jumps are taken to add.
        rate_error: its standard error.
        significance: standard errors that the rate without such additions is from 0, with its sign.
        step_variance: what jumps to come add to the variance of the level, per day ahead; 0 when there is no such
        habit. week: shape (7,), what each day of the week adds, from the day after the newest.
        noise: of a day around the line.
        start: the first day of the run.
        changes: the days on which the rate changed.
        jumps: the days with a jump.
        is_habit: whether jumps are what it grows by.
        is_taken_back: growth was undone by a clean-up before, and has not lasted longer since than it did then.
    """

    level: float
    level_error: float
    rate: float
    rate_error: float
    significance: float
    step_variance: float
    week: Floats
    noise: Noise
    start: int
    changes: tuple[int, ...]
    jumps: tuple[int, ...]
    is_habit: bool
    is_taken_back: bool


def growth_of(peaks: Floats) -> Growth:
    """The growth of daily peaks, NaN for gaps; at least one is none."""
    week = week_of(peaks)
    days = peaks - repeated(week, len(peaks))
    jumps = jumps_of(days)
    smooth = days - np.cumsum(jumps)
    pieces = pieces_of(smooth, noise_of(smooth))
    noise = noise_around(smooth, pieces)
    scale = math.sqrt(noise.long_run_variance)
    run, changes = _run(pieces, scale)
    rate = _pooled_slope(smooth, run)
    rate_error = scale / math.sqrt(sum(piece.spread for piece in run))
    newest = np.arange(max(run[-1].start, len(days) - LEVEL_DAYS), len(days))
    left = smooth[newest] - rate * (newest - len(days) + 1)
    level = (float(median(left)) if not np.isnan(left).all() else run[-1].level) + float(jumps.sum())
    start, step_variance = run[0].start, 0.0
    found = jumps + _discontinuities(pieces, noise)
    is_habit = _is_habit(found, days)
    if is_habit:
        rate, rate_error, step_variance = _jumping(days)
        start, changes = 0, ()
    significance = _significance(rate, rate_error)
    if not step_variance and found.any():
        rate += _added_by(found, rate)
        step_variance = float((found**2).sum()) / len(days) * _part_of(found) ** 2
        rate_error = math.hypot(rate_error, math.sqrt(step_variance / len(days)))
    return Growth(
        level=level,
        level_error=math.sqrt(noise.long_run_variance / max(len(newest), 1)),
        rate=rate,
        rate_error=rate_error,
        significance=significance,
        is_habit=is_habit,
        step_variance=step_variance,
        week=week,
        noise=noise,
        start=start,
        changes=changes,
        jumps=tuple(np.flatnonzero(found).tolist()),
        is_taken_back=_is_taken_back(found, rate, start),
    )


def _discontinuities(pieces: list[Piece], noise: Noise) -> Floats:
    """How far each piece begins from where the one before would be, where that is far; by its first day."""
    far = np.zeros(pieces[-1].end)
    for earlier, later in pairwise(pieces):
        step = later.first_level - earlier.level - (earlier.slope + later.slope) / 2
        if abs(step) > DISCONTINUITY * noise.deviation:
            far[later.start] = step
    return far


def _is_habit(jumps: Floats, days: Floats) -> bool:
    """Whether jumps will go on: three in one direction, or four, that are no small part of how the days move."""
    count = np.count_nonzero(jumps)
    one_way = abs(float(np.sign(jumps).sum())) == count
    many = count > RECURRING_JUMPS or (count == RECURRING_JUMPS and one_way)
    return bool(many and np.abs(jumps).sum() >= HABIT_SHARE * np.ptp(days[~np.isnan(days)]))


def _is_taken_back(jumps: Floats, rate: float, start: int) -> bool:
    """Whether jumps against the growth undo most of it, and the newest stretch is no longer than those before them."""
    against = np.flatnonzero(jumps * rate < 0)
    if not len(against):
        return False
    growth = abs(rate) * (len(jumps) - min(start, int(against[0])))
    stretches = np.diff([0, *against.tolist(), len(jumps)])
    undone = float(np.abs(jumps[against]).sum())
    return bool(undone > TAKEN_BACK * growth and stretches[-1] <= stretches[:-1].max())


def _added_by(jumps: Floats, rate: float) -> float:
    """What a few jumps are taken to add to growth, per day; those against it add nothing."""
    total = float(jumps.sum())
    return total / len(jumps) * _part_of(jumps) if total * rate > 0 else 0.0


def _part_of(jumps: Floats) -> float:
    """How much of a few jumps is taken to go on; see DOUBT."""
    count = int(np.count_nonzero(jumps))
    return count / (count + DOUBT)


def _significance(rate: float, error: float) -> float:
    if error > 0:
        return rate / error
    return math.copysign(math.inf, rate) if rate else 0.0


def _jumping(days: Floats) -> tuple[float, float, float]:
    """Rate, its standard error, and the variance of a day's step, of a series that moves by jumps."""
    there = np.flatnonzero(~np.isnan(days))
    span = int(there[-1] - there[0])
    rate = float((days[there[-1]] - days[there[0]]) / span)
    steps = np.diff(days[there]) - rate * np.diff(there)
    variance = float((steps**2).sum()) / span
    return rate, math.sqrt(variance / span), variance


def _run(pieces: list[Piece], scale: float) -> tuple[list[Piece], tuple[int, ...]]:
    """The newest pieces that share a rate, and the days on which the rate changed before."""
    run, changes = [pieces[-1]], []
    joined = True
    for earlier, later in zip(pieces[-2::-1], pieces[:0:-1], strict=True):
        error = scale * math.sqrt(1 / earlier.spread + 1 / later.spread)
        same = abs(earlier.slope - later.slope) <= SAME_RATE * error
        if not same:
            changes.append(later.start)
        joined = joined and same
        if joined:
            run.insert(0, earlier)
    return run, tuple(reversed(changes))


def _pooled_slope(days: Floats, run: list[Piece]) -> float:
    """Theil-Sen over all pairs of days that lie in the same piece."""
    pairs = []
    for piece in run:
        first, second = np.triu_indices(piece.end - piece.start, 1)
        part = days[piece.start : piece.end]
        pairs.append((part[second] - part[first]) / (second - first))
    slope = float(median(np.concatenate(pairs)))
    return 0.0 if math.isnan(slope) else slope
