"""The calls of the public ``AnalyticsService`` that are about one metric of one server: decode, read, compute, encode.

The gateway forwards them as they are once it has found that the caller sees the server.
"""

from functools import partial
from typing import Final

import numpy as np

from openmanager.fleet.v1 import outlook_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb
from runtime.clock import Clock
from services.analytics.forecasting.capacity import HISTORY_DAYS, exhaust
from services.analytics.forecasting.grid import HOUR_MS
from services.analytics.forecasting.percent import stays_within_percent
from services.analytics.forecasting.steps import forecast_measurements
from services.analytics.forecasting.trend import COMPARED_DAYS, YEAR_DAYS, trend, year_over_year
from services.analytics.outlook import arguments
from services.analytics.outlook.answers import capacity_message, forecast_message, trend_message
from services.analytics.outlook.arguments import DAY_MS, Question
from services.analytics.outlook.measurements import Measurements, Source
from services.analytics.outlook.tally import Tally
from services.analytics.outlook.workers import Workers

PUBLIC_SERVICE: Final = "openmanager.gateway.v1.AnalyticsService"
SILENT_MS: Final = 7 * DAY_MS
"""Of a series that has said nothing for so long no date is given: nobody knows what it has done since."""
FORECAST_DAYS: Final = 78
"""Days that a forecast of up to a week is made from; a longer one from three times its horizon more."""


class OutlookServicer:
    """A part of ``openmanager.gateway.v1.AnalyticsService``."""

    def __init__(self, source: Source, workers: Workers, clock: Clock, tally: Tally) -> None:
        self._source = source
        self._workers = workers
        self._clock = clock
        self._tally = tally

    async def GetTrend(self, request: pb.GetTrendRequest, _context: object) -> pb.GetTrendResponse:
        arguments.check_named(request)
        now_ms = self._clock.now_ms()
        window = arguments.window_of(request, now_ms)
        year_before_ms = window[1] - (YEAR_DAYS + COMPARED_DAYS + 1) * DAY_MS
        read_from_ms = min(window[1], max(0, min(window[0], year_before_ms // HOUR_MS * HOUR_MS)))
        async with self._workers.place():
            metric = await self._source.metric(request.server_id, request.metric)
            measured = await self._source.read(request.server_id, metric, read_from_ms, window[1])
            return pb.GetTrendResponse(trend=await self._workers.run(partial(trend_of, measured, window, now_ms)))

    async def ForecastCapacity(
        self, request: pb.ForecastCapacityRequest, _context: object
    ) -> pb.ForecastCapacityResponse:
        arguments.check_named(request)
        question = arguments.question_of(request)
        now_ms = self._clock.now_ms()
        async with self._workers.place():
            metric = await self._source.metric(request.server_id, request.metric)
            measured = await self._source.read(request.server_id, metric, capacity_from(now_ms), now_ms)
            limit = arguments.limit_of(question, metric)  # after it is known that there is such a metric
            if is_in_percent(measured):
                arguments.check_within_percent(limit)
            answer = await self._workers.run(partial(capacity_of, measured, limit, question, now_ms))
            self._tally.add(answer)
            return pb.ForecastCapacityResponse(capacity=answer)

    async def ForecastMetric(self, request: pb.ForecastMetricRequest, _context: object) -> pb.ForecastMetricResponse:
        arguments.check_named(request)
        horizon_ms, step_ms = arguments.horizon_of(request.horizon, request.step)
        now_ms = self._clock.now_ms()
        start_ms = (now_ms - forecast_days(horizon_ms) * DAY_MS) // HOUR_MS * HOUR_MS
        async with self._workers.place():
            metric = await self._source.metric(request.server_id, request.metric)
            measured = await self._source.read(request.server_id, metric, start_ms, now_ms, min(step_ms, HOUR_MS))
            answer = await self._workers.run(partial(forecast_of, measured, horizon_ms, step_ms))
            self._tally.add(answer)
            return pb.ForecastMetricResponse(forecast=answer)


def trend_of(measured: Measurements, window: tuple[int, int], now_ms: int) -> outlook_pb2.Trend:
    """The trend of what lies in the window; what lies before it is for the year before."""
    inside = np.isfinite(measured.values) & (measured.times_ms >= window[0])
    if not inside.any():
        return trend_message(measured, window, None, None, now_ms)
    found = trend(measured.times_ms[inside], measured.values[inside])
    return trend_message(measured, window, found, year_over_year(measured.times_ms, measured.values), now_ms)


def capacity_from(now_ms: int) -> int:
    """Since when capacity wants to know a metric."""
    return (now_ms - HISTORY_DAYS * DAY_MS) // HOUR_MS * HOUR_MS


def capacity_of(measured: Measurements, limit: float, question: Question, now_ms: int) -> outlook_pb2.Capacity:
    """When the limit is reached."""
    end_ms, found = measured.data_end_ms, None
    if end_ms is None or end_ms > now_ms - SILENT_MS:
        found = exhaust(measured.times_ms, measured.values, limit, falling=question.falling, growth=question.growth)
    return capacity_message(
        measured, limit, falling=question.falling, growth=question.growth, found=found, now_ms=now_ms
    )


def is_in_percent(measured: Measurements) -> bool:
    """Whether the metric says that it is in percent, and was never beyond 0 to 100."""
    if not arguments.says_percent(measured.metric) or not stays_within_percent(measured.values):
        return False
    return measured.data_end_ms is not None or measured.metric.unit == "%"


def forecast_days(horizon_ms: int) -> int:
    """Days of history that tell as much about a horizon as any more: 56 of a profile and the back-tests before."""
    return min(max(FORECAST_DAYS, 57 + 3 * -(-horizon_ms // DAY_MS)), HISTORY_DAYS)


def forecast_of(measured: Measurements, horizon_ms: int, step_ms: int) -> outlook_pb2.Forecast:
    """What comes next."""
    there = np.isfinite(measured.values)
    if not there.any():
        return forecast_message(measured, step_ms, None)
    found = forecast_measurements(
        measured.times_ms[there],
        measured.values[there][:, None],
        horizon_ms=horizon_ms,
        step_ms=step_ms,
        percent=np.array([is_in_percent(measured)]),
    )
    return forecast_message(measured, step_ms, found)
