"""A week ahead of real machines, hour by hour, beside "as 24 hours before".

From each origin eight weeks are known and the week after is forecast. An error is the mean absolute error of that week
over the mean absolute difference of hours 24 apart in those eight weeks (MASE). A series' error is the mean over its
origins; what is told is the median over the series; the ratio is of the two medians. Beside it stand the ratio of the
medians over all forecasts, and the median of the series' own ratios, which says more of one series and is higher.

What must stay true: both forecast from the same hours and are divided by the same number; a series counts with 3
origins or more; coverage counts every hour that was measured, of all series and origins.
"""

from typing import Any, Final

import numpy as np

from bench.analytics import recordings
from bench.analytics.limits import between
from bench.analytics.recordings import BITBRAINS, NOT_THERE, Floats
from bench.analytics.size import Bench
from bench.api.judged import Judged, absent, judge
from bench.peers import BenchError
from services.analytics.forecasting.forecast import forecast

ROW: Final = "forecast"
DAY, HORIZON, HISTORY = 24, 168, 56 * 24
KNOWN_SHARE: Final = 0.5
"""Of the hours before and after an origin must have been measured."""
MIN_ORIGINS: Final = 3
TIMES_NAIVE: Final = 0.80
COVERS: Final = {"80 %": (0.74, 0.88), "95 %": (0.88, 0.98)}
ROUNDING: Final = 1e-9
"""Of the scale: a constant series is inside an interval of no width."""


def measure(bench: Bench) -> dict[str, Any]:
    """Errors of both and coverage, by series."""
    if bench.data is None or not (bench.data / BITBRAINS).is_file():
        return {"absent": NOT_THERE}
    names, hours = recordings.machine_hours(bench.data)
    origins = list(range(hours.shape[1] - HORIZON, HISTORY - 1, -bench.size.origin_hours))[: bench.size.origins]
    bench.say(f"{ROW}: {len(names)} series of {hours.shape[1]:,} hours, {len(origins)} origins")
    cells: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number, origin in enumerate(origins, 1):
        history, truth = hours[:, origin - HISTORY : origin], hours[:, origin : origin + HORIZON]
        usable = np.isfinite(history).mean(axis=1) >= KNOWN_SHARE
        usable &= np.isfinite(truth).mean(axis=1) >= KNOWN_SHARE
        chosen = np.flatnonzero(usable)
        for place, cell in zip(chosen, _cells(history[chosen], truth[chosen]), strict=True):
            cells[names[place]].append(cell)
        bench.say(f"{ROW}: origin {number} of {len(origins)}, {len(chosen)} series")
    kept = {name: of_series for name, of_series in cells.items() if len(of_series) >= MIN_ORIGINS}
    if not kept:
        raise BenchError(f"no series has {MIN_ORIGINS} origins")
    return _result(kept, len(names))


def _cells(history: Floats, truth: Floats) -> list[dict[str, float]]:
    """Of each series from one origin: both errors, and how many hours there were inside of which interval."""
    found, naive = forecast(history, HORIZON), as_24_hours_before(history, HORIZON)
    scale = np.nanmean(np.abs(history[:, DAY:] - history[:, :-DAY]), axis=1)
    known, slack = np.isfinite(truth), ROUNDING * scale[:, None]
    inside80 = known & (truth >= found.low80 - slack) & (truth <= found.high80 + slack)
    inside95 = known & (truth >= found.low95 - slack) & (truth <= found.high95 + slack)
    with np.errstate(divide="ignore", invalid="ignore"):
        ours = np.nanmean(np.abs(found.value - truth), axis=1) / scale
        theirs = np.nanmean(np.abs(naive - truth), axis=1) / scale
    columns = {
        "ours": np.where(scale > 0, ours, np.nan),
        "naive": np.where(scale > 0, theirs, np.nan),
        "hours": known.sum(axis=1),
        "80 %": inside80.sum(axis=1),
        "95 %": inside95.sum(axis=1),
    }
    return [{name: float(values[row]) for name, values in columns.items()} for row in range(len(history))]


def as_24_hours_before(history: Floats, hours: int) -> Floats:
    """The last value measured at each hour of the day; the median of all where there is none."""
    days = history[:, history.shape[1] % DAY :].reshape(len(history), -1, DAY)
    last = days[:, -1]
    for before in range(days.shape[1] - 2, -1, -1):
        last = np.where(np.isnan(last), days[:, before], last)
    last = np.where(np.isnan(last), np.nanmedian(history, axis=1)[:, None], last)
    return np.tile(last, -(-hours // DAY))[:, :hours]


def _result(kept: dict[str, list[dict[str, float]]], series: int) -> dict[str, Any]:
    cells = [cell for of_series in kept.values() for cell in of_series]
    means = {
        who: np.array([np.mean([cell[who] for cell in of_series]) for of_series in kept.values()])
        for who in ("ours", "naive")
    }
    moving = np.isfinite(means["ours"]) & (means["naive"] > 0)
    measured = sum(cell["hours"] for cell in cells)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.array([cell["ours"] for cell in cells]) / np.array([cell["naive"] for cell in cells])
    return {
        "series": len(kept),
        "series_with_an_error": int(moving.sum()),
        "series_left_out": series - len(kept),
        "origins": [min(map(len, kept.values())), max(map(len, kept.values()))],
        "forecasts": len(cells),
        "mase": float(np.median(means["ours"][moving])),
        "mase_naive": float(np.median(means["naive"][moving])),
        "mase_of_forecasts": float(np.nanmedian([cell["ours"] for cell in cells])),
        "mase_naive_of_forecasts": float(np.nanmedian([cell["naive"] for cell in cells])),
        "median_ratio": float(np.median(means["ours"][moving] / means["naive"][moving])),
        "median_ratio_of_forecasts": float(np.median(ratios[np.isfinite(ratios)])),
        "better": float(np.mean(means["ours"][moving] < means["naive"][moving])),
        "covers": {share: sum(cell[share] for cell in cells) / measured for share in COVERS},
        "by_series": {
            name: [float(means["ours"][place]), float(means["naive"][place])] for place, name in enumerate(kept)
        },
    }


def judged(found: dict[str, Any]) -> list[Judged]:
    """The error beside the yardstick's, and each interval."""
    work = "bitbrains-20, CPU and memory, 7 days ahead"
    if "absent" in found:
        return [absent(ROW, work, found["absent"])]
    low, high = found["origins"]
    by_forecast = found["mase_of_forecasts"] / found["mase_naive_of_forecasts"]
    remark = (
        f"{found['series_with_an_error']} series, {low} to {high} origins; medians of all forecasts {by_forecast:.2f}x;"
        f" median of the series' own ratios {found['median_ratio']:.2f}x; better on {found['better']:.0%}; aim 0.70x"
    )
    error = judge(
        ROW,
        f"{work}, MASE",
        "as 24 h before",
        "MASE",
        [found["mase"]],
        [found["mase_naive"]],
        TIMES_NAIVE,
        at_most=True,
        remark=remark,
    )
    covers = [
        between(ROW, f"{work}, hours inside {share}", "share", found["covers"][share], *bounds)
        for share, bounds in COVERS.items()
    ]
    return [error, *covers]
