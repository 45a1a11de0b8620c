"""The date a disk is full, on disks whose truth is known, beside predict_linear and the median slope.

An error is that of the time left, in parts of the true time left; what is told is the median over noises and seeds. A
disk that fills up and gets no date counts as an error of 1; a disk that does not and gets one is false.

What must stay true: the seeds are of this bench alone, from `FIRST_SEED` on: nothing was tuned on them.
"""

from typing import Any, Final

import numpy as np

from bench.analytics.disks import FLAT, KINDS, LIMIT, NOISES, Disk, disk, flat
from bench.analytics.limits import at_most
from bench.analytics.recordings import Floats
from bench.analytics.size import Bench
from bench.api.judged import Judged
from services.analytics.forecasting.capacity import DAY_MS, MAX_DAYS_AHEAD, exhaust

ROW: Final = "exhaustion"
FIRST_SEED: Final = 10_000
LIMITS: Final = {
    "linear": 0.05,
    "saw-tooth": 0.05,
    "weekly clean-up": 0.16,
    "some jumps": 0.21,
    "jumps": 0.21,
    "jumps once": 0.21,
    "rate change": 0.05,
}
NAMES: Final = {
    "some jumps": "jumps that go on, .2 to .45 of the growth",
    "jumps": "jumps that go on, .3 to .7 of the growth",
    "jumps once": "jumps that are over",
}
FALSE_SHARE: Final = 0.01
LINES: Final = {"6 h": 6, "7 d": 168}
"""What predict_linear draws its line through, in hours."""
SLOPE_DAYS: Final = (7, 14, 28)


def measure(bench: Bench) -> dict[str, Any]:
    """Errors by kind, and false dates."""
    kinds = {}
    for kind in KINDS:
        seeds = range(FIRST_SEED, FIRST_SEED + len(NOISES) * bench.size.seeds)  # each a course of its own
        disks = [disk(kind, seed, NOISES[seed % len(NOISES)]) for seed in seeds]
        kinds[kind] = _of_kind(disks)
        error, without = kinds[kind]["error"], kinds[kind]["without_date"]
        bench.say(f"{ROW}, {kind}: error {error:.3f}, {without} of {len(disks)} without a date")
    flats = [
        flat(kind, FIRST_SEED + seed, noise) for kind in FLAT for noise in NOISES for seed in range(bench.size.seeds)
    ]
    false = sum(exhaust(one.times_ms, one.values, LIMIT).date_ms is not None for one in flats)
    lines = {
        name: float(np.mean([predict_linear(one.values, hours) <= MAX_DAYS_AHEAD for one in flats]))
        for name, hours in LINES.items()
    }
    bench.say(f"{ROW}, flat: {false} of {len(flats)} get a date")
    return {"kinds": kinds, "flat": {"disks": len(flats), "false": false / len(flats), "predict_linear": lines}}


def _of_kind(disks: list[Disk]) -> dict[str, Any]:
    errors, held = [], []
    for one in disks:
        found = exhaust(one.times_ms, one.values, LIMIT)
        if found.date_ms is None or found.low_ms is None or found.high_ms is None:
            errors.append(1.0)
            continue
        date, low, high = ((when - one.times_ms[-1]) / DAY_MS for when in (found.date_ms, found.low_ms, found.high_ms))
        errors.append(abs(date - one.days_left) / one.days_left)
        held.append(low <= one.days_left <= high)
    lines = {
        name: float(np.median([_line_error(one, predict_linear(one.values, hours)) for one in disks]))
        for name, hours in LINES.items()
    }
    return {
        "disks": len(disks),
        "error": float(np.median(errors)),
        "without_date": len(disks) - len(held),
        "interval_holds": float(np.mean(held)) if held else float("nan"),
        "predict_linear": lines,
        "median_slope": float(np.median([_line_error(one, median_slope(one.values)) for one in disks])),
    }


def _line_error(one: Disk, left: float) -> float:
    return abs(left - one.days_left) / one.days_left if np.isfinite(left) else 1.0


def predict_linear(values: Floats, hours: int) -> float:
    """Days until a straight line through the last so many hourly values, by least squares, is at LIMIT; infinite when
    it does not rise."""
    recent = values[-hours:]
    slope, now = np.polyfit(np.arange(1.0 - len(recent), 1.0), recent, 1)
    return max(float((LIMIT - now) / slope) / 24, 0.0) if slope > 0 else float("inf")


def median_slope(values: Floats) -> float:
    """Days until the median of the median slopes of 7, 14 and 28 days of daily peaks is at LIMIT: the method that the
    limits of this row were set by."""
    days = values[len(values) % 24 :].reshape(-1, 24)
    peaks = np.quantile(days, 0.98, axis=1)
    slopes = []
    for count in SLOPE_DAYS:
        recent = peaks[-count:]
        first, second = np.triu_indices(len(recent), 1)
        slopes.append(np.median((recent[second] - recent[first]) / (second - first)))
    slope = float(np.median(slopes))
    return max((LIMIT - float(peaks[-1])) / slope, 0.0) if slope > 0 else float("inf")


def judged(found: dict[str, Any]) -> list[Judged]:
    """Each kind, and those that do not fill up."""
    lines = []
    for kind, limit in LIMITS.items():
        one = found["kinds"][kind]
        remark = f"{_beside(one)}; 80 % interval holds {one['interval_holds']:.0%}"
        if one["without_date"]:
            remark += f"; {one['without_date']} of {one['disks']} without a date"
        lines.append(
            at_most(ROW, f"days left, {NAMES.get(kind, kind)}", "relative error", one["error"], limit, remark=remark)
        )
    still = found["flat"]
    work = f"a date for a disk that does not fill up, {still['disks']} disks"
    return [*lines, at_most(ROW, work, "share", still["false"], FALSE_SHARE, remark=_beside(still))]


def _beside(one: dict[str, Any]) -> str:
    slope = f"median slope {one['median_slope']:.2f}; " if "median_slope" in one else ""
    return f"{slope}predict_linear " + ", ".join(f"{name} {value:.2f}" for name, value in one["predict_linear"].items())
