"""Measurements in, a forecast for each step of a horizon out: what lies between callers with times and `forecast`.

What must stay true: steps begin where the measured hours end and follow one another without gaps; whoever asks for too
much is told which argument it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from services.analytics.forecasting.forecast import Forecasts, forecast
from services.analytics.forecasting.grid import HOUR_MS, hourly, rates
from services.analytics.forecasting.intervals import SHARES
from services.analytics.forecasting.robust import (
    DEVIATIONS_PER_MAD,
    Flags,
    Floats,
    Integers,
    median,
    normal_quantile,
    or_else,
)

MAX_HORIZON_MS: Final = 2 * 365 * 24 * HOUR_MS
MAX_STEPS: Final = 100_000


class UnusableError(ValueError):
    """An argument makes no sense; `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TimedForecasts:
    """Forecasts and the beginnings of their steps, shape (steps,); a value is of `[begin, begin + step)`."""

    times_ms: Integers
    forecasts: Forecasts


def check_horizon(horizon_ms: int, step_ms: int) -> None:
    """Raises UnusableError where no forecast is made for such steps."""
    if step_ms <= 0 or (step_ms % HOUR_MS and HOUR_MS % step_ms):
        raise UnusableError("step", "a step is hours, or a whole part of an hour such as 5m")
    if horizon_ms > MAX_HORIZON_MS:
        raise UnusableError("horizon", "a forecast beyond 2 years would be a guess")
    if horizon_ms < step_ms:
        raise UnusableError("horizon", "the horizon is shorter than a step")
    if horizon_ms // step_ms > MAX_STEPS:
        raise UnusableError("step", f"the horizon has more than {MAX_STEPS} such steps")


def forecast_measurements(
    times_ms: Integers,
    values: Floats,
    *,
    horizon_ms: int,
    step_ms: int = HOUR_MS,
    percent: Flags | None = None,
    counters: Sequence[int] = (),
) -> TimedForecasts:
    """Forecasts what was measured.

    Args:
        times_ms: shape (rows,), increasing; at least one.
        values: shape (rows, series); NaN where nothing was measured.
        horizon_ms, step_ms: how far, and in which steps.
        percent: as `forecast` takes it.
        counters: the series that only grow; their rates per second are forecast.

    Raises:
        UnusableError: the horizon is over two years, or a step is neither hours nor a part of one.
    """
    check_horizon(horizon_ms, step_ms)
    if counters:
        values = values.copy()
        for series in counters:
            values[:, series] = rates(times_ms, values[:, series])
    hours = hourly(times_ms, values)
    steps = horizon_ms // step_ms
    begins = hours.end_ms + step_ms * np.arange(steps, dtype=np.int64)
    if step_ms >= HOUR_MS:
        found = forecast(hours.values, steps, step_hours=step_ms // HOUR_MS, percent=percent)
        return TimedForecasts(times_ms=begins, forecasts=found)
    a_part = HOUR_MS // step_ms
    found = forecast(hours.values, -(-steps // a_part), percent=percent)
    return TimedForecasts(times_ms=begins, forecasts=_in_parts(found, a_part, steps, _within_hours(times_ms, values)))


def _within_hours(times_ms: Integers, values: Floats) -> Floats:
    """The standard deviation of measurements around the mean of their hour, from the last weeks; shape (series,)."""
    recent = times_ms > times_ms[-1] - 28 * 24 * HOUR_MS
    hours = times_ms[recent] // HOUR_MS
    place, sizes = np.unique(hours, return_inverse=True, return_counts=True)[1:]
    away = np.full((int(recent.sum()), values.shape[1]), np.nan)
    for series, column in enumerate(values[recent].T):
        there = np.isfinite(column)
        counts = np.bincount(place[there], minlength=len(sizes))
        means = np.bincount(place[there], column[there], minlength=len(sizes)) / np.maximum(counts, 1)
        away[:, series] = np.where(there & (counts[place] > 1), column - means[place], np.nan)
    return or_else(DEVIATIONS_PER_MAD * median(np.abs(away), 0), 0.0)


def _in_parts(found: Forecasts, a_part: int, steps: int, deviation: Floats) -> Forecasts:
    """Hourly forecasts for each part of an hour: the hour's value, its interval wider by how hours are scattered."""

    def repeated(hourly_values: Floats) -> Floats:
        return np.repeat(hourly_values, a_part, axis=1)[:, :steps]

    value = repeated(found.value)
    floor, ceiling = found.floor[:, None], found.ceiling[:, None]
    bounds = []
    for low, high, share in ((found.low80, found.high80, SHARES[0]), (found.low95, found.high95, SHARES[1])):
        more = normal_quantile((1 + share) / 2) * deviation[:, None]
        bounds.append(np.maximum(value - np.hypot(value - repeated(low), more), floor))
        bounds.append(np.minimum(value + np.hypot(repeated(high) - value, more), ceiling))
    low80, high80, low95, high95 = bounds
    return replace(found, value=value, low80=low80, high80=high80, low95=low95, high95=high95)
