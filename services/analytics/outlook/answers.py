"""Plain values of the mathematics -> messages.

What must stay true: what is not known (NaN) is absent, so that no answer has a number that is none; times and units are
those of the measurements; no date lies in the past.
"""

import math
from typing import Any, Final

import numpy as np

from fleet.codec import duration_from_ms, timestamp_from_ms
from openmanager.fleet.v1 import outlook_pb2 as pb
from services.analytics.forecasting.capacity import Exhaustion, Reason
from services.analytics.forecasting.grid import HOUR_MS
from services.analytics.forecasting.robust import Floats
from services.analytics.forecasting.steps import TimedForecasts
from services.analytics.forecasting.trend import Trend, YearOverYear
from services.analytics.outlook.measurements import Measurements

REASONS: Final = {
    Reason.NO_DATA: pb.CAPACITY_REASON_NO_DATA,
    Reason.TOO_YOUNG: pb.CAPACITY_REASON_TOO_YOUNG,
    Reason.PAST: pb.CAPACITY_REASON_PAST_LIMIT,
    Reason.FLAT: pb.CAPACITY_REASON_FLAT,
    Reason.FALLING_AWAY: pb.CAPACITY_REASON_AWAY_FROM_LIMIT,
    Reason.TOO_FAR: pb.CAPACITY_REASON_TOO_FAR,
    Reason.TOO_UNCERTAIN: pb.CAPACITY_REASON_TOO_UNCERTAIN,
}
_DIRECTIONS: Final = {0: pb.TREND_DIRECTION_NONE, 1: pb.TREND_DIRECTION_RISING, -1: pb.TREND_DIRECTION_FALLING}


def trend_message(
    measured: Measurements, window: tuple[int, int], found: Trend | None, year: YearOverYear | None, now_ms: int
) -> pb.Trend:
    """The answer; `found` None: nothing was measured in the window."""
    start_ms, end_ms = window
    message = pb.Trend(**_of(measured), start_time=timestamp_from_ms(start_ms), end_time=timestamp_from_ms(end_ms))
    if found is None:
        return message
    message.data_start_time.CopyFrom(timestamp_from_ms(found.start_ms))
    message.data_end_time.CopyFrom(timestamp_from_ms(min(found.end_ms, end_ms, now_ms)))
    if measured.resolution_ms:
        message.resolution.CopyFrom(duration_from_ms(measured.resolution_ms))
    inside = np.isfinite(measured.values) & (measured.times_ms >= start_ms)
    hours = len(np.unique(measured.times_ms[inside] // HOUR_MS))
    message.coverage = min(1.0, hours / math.ceil((end_ms - start_ms) / HOUR_MS))
    message.days = found.days
    _put(message, level=found.level, slope_per_day=found.slope, slope_low=found.slope_low, slope_high=found.slope_high)
    if message.HasField("slope_per_day"):
        message.significance = found.significance
        message.direction = _DIRECTIONS[found.direction]
    if found.has_profile:
        message.daily.extend(found.daily.tolist())
        message.weekly.extend(found.weekly.tolist())
    for change in found.changes:
        message.changes.add(
            time=timestamp_from_ms(change.time_ms),
            before=change.before,
            after=change.after,
            slope_before=change.slope_before,
            slope_after=change.slope_after,
        )
    if year is not None:
        message.year_over_year.now, message.year_over_year.then = year.now, year.then
        message.year_over_year.change = year.change
        _put(message.year_over_year, share=year.share)
    return message


def capacity_message(
    measured: Measurements,
    limit: float,
    *,
    falling: bool,
    growth: float,
    found: Exhaustion | None,
    now_ms: int,
) -> pb.Capacity:
    """The answer; `found` None: what was measured is too long ago. So it is where all of the interval has passed
    since: whether the limit was reached in it nobody has seen."""
    message = pb.Capacity(
        **_of(measured), limit=limit, falling=falling, growth=growth, compute_time=timestamp_from_ms(now_ms)
    )
    if measured.data_end_ms is not None:
        message.data_end_time.CopyFrom(timestamp_from_ms(min(measured.data_end_ms, now_ms)))
    if found is None:
        message.reason = pb.CAPACITY_REASON_SILENT
        return message
    if found.reason is not None:
        message.reason = REASONS[found.reason]
    elif found.high_ms is not None and found.high_ms < now_ms:
        message.reason = pb.CAPACITY_REASON_SILENT
    else:
        for name, time_ms in (("date", found.date_ms), ("low", found.low_ms), ("high", found.high_ms)):
            if time_ms is not None:
                getattr(message, name).CopyFrom(timestamp_from_ms(max(time_ms, now_ms)))
    _put(
        message,
        level=found.level,
        rate_per_day=found.rate_per_day,
        probability_within_30_days=found.within_30_days,
        probability_within_90_days=found.within_90_days,
    )
    message.changes.extend([timestamp_from_ms(time_ms) for time_ms in found.changes_ms])
    message.backtest.trials = found.backtest.trials
    _put(message.backtest, error=found.backtest.error, coverage=found.backtest.coverage)
    return message


def forecast_message(measured: Measurements, step_ms: int, found: TimedForecasts | None) -> pb.Forecast:
    """The answer; `found` None: nothing was measured."""
    message = pb.Forecast(**_of(measured), step=duration_from_ms(step_ms))
    if found is None:
        return message
    every = found.forecasts
    message.times.extend((found.times_ms / 1000).tolist())
    message.values.extend(every.value[0].tolist())
    for name in ("low80", "high80", "low95", "high95"):
        bound: Floats = getattr(every, name)[0]
        if np.isfinite(bound).all():
            getattr(message, name).extend(bound.tolist())
    message.methods.extend(every.methods[0])
    test = every.backtest
    message.backtest.trials = int(test.trials[0])
    message.backtest.horizon.CopyFrom(duration_from_ms(test.hours * HOUR_MS))
    _put(
        message.backtest,
        mase=float(test.mase[0]),
        mape=float(test.mape[0]),
        coverage80=float(test.cover80[0]),
        coverage95=float(test.cover95[0]),
    )
    return message


def _of(measured: Measurements) -> dict[str, Any]:
    """What all answers have of what they are about."""
    return {
        "server_id": measured.server_id,
        "metric": measured.metric.key,
        "unit": measured.metric.shown_unit,
        "is_rate": measured.metric.is_counter,
        "incomplete": measured.incomplete,
    }


def _put(message: Any, **values: float) -> None:
    """Sets the fields whose value is known."""
    for name, value in values.items():
        if math.isfinite(value):
            setattr(message, name, value)
