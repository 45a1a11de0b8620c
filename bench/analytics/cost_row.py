"""What a window and an hourly forecast of 10,220 series cost, in processor time of one core, and the scorer's state.

Processor time, of all threads of this process, and not time on the clock: the machine is shared. No series is constant
and none a copy of another.
"""

import resource
import statistics
import time
from typing import Any, Final

import numpy as np

from bench.analytics.limits import at_most
from bench.analytics.recordings import Floats
from bench.analytics.size import Bench
from bench.api.judged import Judged
from services.analytics.forecasting.forecast import forecast
from services.analytics.scoring.rates import Rates
from services.analytics.scoring.server import FleetScorer

ROW: Final = "cost"
SERVERS, METRICS = 20, 511
SERIES: Final = SERVERS * METRICS
WINDOW_LIMIT_MS, STATE_LIMIT_MB, FORECAST_LIMIT_S = 50.0, 150.0, 60.0
WARM_STEP_S, STEP_S = 300.0, 60.0
HISTORY_HOURS: Final = 11 * 168
"""Eight weeks and three more that back-tests look back over: more is passed over."""
HORIZON: Final = 168
BATCH: Final = 511
"""Series that are forecast at a time, a server's."""


def measure(bench: Bench) -> dict[str, Any]:
    """Of both."""
    return {"scoring": _scoring(bench), "forecasting": _forecasting(bench)}


def _scoring(bench: Bench) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    scorer, rates = FleetScorer([METRICS] * SERVERS), Rates(np.arange(SERIES) % 3 == 0)
    counters, time_s = np.zeros(SERIES), 0.0

    def values() -> Floats:
        noise = rng.standard_normal(SERIES)
        np.add(counters, 100 + 10 * noise, out=counters)
        return np.where(rates.is_counter, counters, noise)

    for _ in range(bench.size.warm_windows):
        time_s += WARM_STEP_S
        scorer.update(time_s, rates.update(time_s, values()))
    learned = float(scorer.learned().min())
    bench.say(f"{ROW}: {SERIES:,} series have learnt {learned:.0%} in {bench.size.warm_windows} windows")
    spent, clock = [], []
    for _ in range(bench.size.windows):
        time_s, row = time_s + STEP_S, values()
        started, began = time.process_time(), time.perf_counter()
        scorer.update(time_s, rates.update(time_s, row))
        spent.append(1e3 * (time.process_time() - started))
        clock.append(1e3 * (time.perf_counter() - began))
    state = scorer.nbytes + rates.state.nbytes
    found = {
        "windows": len(spent),
        "learned": learned,
        "mean_ms": statistics.fmean(spent),
        "highest_ms": max(spent),
        "clock_median_ms": statistics.median(clock),
        "state_mb": state / 1e6,
    }
    bench.say(f"{ROW}, scoring: {found['mean_ms']:.1f} ms a window, {found['state_mb']:.0f} MB")
    return found


def _forecasting(bench: Bench) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    series = bench.size.forecasts
    season = 50 + 10 * np.sin(np.arange(HISTORY_HOURS) * np.pi / 12)
    spent = clock = 0.0
    done = 0
    while done < series:
        count = min(BATCH, series - done)
        history = season + rng.standard_normal((count, HISTORY_HOURS))
        history[rng.random(history.shape) < 0.03] = np.nan
        started, began = time.process_time(), time.perf_counter()
        forecast(history, HORIZON)
        spent += time.process_time() - started
        clock += time.perf_counter() - began
        done += count
        if done == series or done % (5 * BATCH) == 0:
            bench.say(f"{ROW}, forecasting: {done:,} of {series:,} series in {spent:.1f} s")
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"series": series, "seconds": spent, "clock_s": clock, "peak_mb": peak_mb}


def judged(found: dict[str, Any]) -> list[Judged]:
    """Time of a window, state, time of the forecasts; fewer forecasts have less time."""
    scoring, ahead = found["scoring"], found["forecasting"]
    windows = f"highest {scoring['highest_ms']:.1f}, on the clock {scoring['clock_median_ms']:.1f} (median)"
    limit_s = FORECAST_LIMIT_S * ahead["series"] / SERIES
    each = f"{1e3 * ahead['seconds'] / ahead['series']:.1f} ms a series"
    return [
        at_most(
            ROW, f"scoring a window of {SERIES:,} series", "ms", scoring["mean_ms"], WINDOW_LIMIT_MS, remark=windows
        ),
        at_most(ROW, f"state of {SERIES:,} series", "MB", scoring["state_mb"], STATE_LIMIT_MB),
        at_most(ROW, f"forecasting {ahead['series']:,} series", "s", ahead["seconds"], limit_s, remark=each),
    ]
