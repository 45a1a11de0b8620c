"""What callers may ask for, and what it comes to where they say nothing.

What must stay true: whatever makes no sense is refused with its field before anything is read, but for limits: whether
one must be said depends on the metric, and only its history tells one in percent from one that goes beyond 100.
"""

import math
from dataclasses import dataclass
from typing import Final, Protocol

from google.protobuf.duration_pb2 import Duration

from fleet.codec import ms_from_duration, ms_from_timestamp
from openmanager.analytics.v1.capacity_pb2 import RankCapacityRequest
from openmanager.gateway.v1.analytics_pb2 import ForecastCapacityRequest, GetTrendRequest
from runtime.errors import InvalidArgument
from services.analytics.forecasting.capacity import MAX_DAYS_AHEAD
from services.analytics.forecasting.grid import HOUR_MS
from services.analytics.forecasting.percent import is_percent_name
from services.analytics.forecasting.steps import UnusableError, check_horizon
from services.analytics.outlook.measurements import Chosen

DAY_MS: Final = 24 * HOUR_MS
DEFAULT_WINDOW_MS: Final = 365 * DAY_MS
MAX_WINDOW_MS: Final = 5 * 366 * DAY_MS
"""As long as roll-ups are kept by default; 44,000 hours."""
DEFAULT_LIMIT: Final = 90.0
MAX_GROWTH: Final = 100.0
DEFAULT_WITHIN_MS: Final = 30 * DAY_MS
DEFAULT_HORIZON_MS: Final = 7 * DAY_MS
MIN_STEP_MS: Final = 5 * 60_000
"""What finer roll-ups have; of narrower steps only points could tell, which are kept for 30 days."""
MAX_STEPS: Final = 20_000
MIN_TIMESTAMP_S, MAX_TIMESTAMP_S = -62_135_596_800, 253_402_300_799
"""What a Timestamp may say; over gRPC it may be anything."""


HasLimit = ForecastCapacityRequest | RankCapacityRequest


class OfMetric(Protocol):
    """A request about one metric of one server."""

    server_id: str
    metric: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A limit and what is supposed; `limit` None: 90 where the metric is in percent."""

    limit: float | None
    falling: bool
    growth: float


def check_named(request: OfMetric) -> None:
    """Raises InvalidArgument where server or metric are not named."""
    if not request.server_id:
        raise InvalidArgument("name a server", field="server_id")
    check_metric(request.metric)


def check_metric(metric: str) -> None:
    """Raises InvalidArgument where the metric is not named."""
    if not metric:
        raise InvalidArgument("name a metric", field="metric")


def window_of(request: GetTrendRequest, now_ms: int) -> tuple[int, int]:
    """`[start_ms, end_ms)`; the start is taken down to the hour."""
    for name, time in (("start_time", request.start_time), ("end_time", request.end_time)):
        if not MIN_TIMESTAMP_S <= time.seconds <= MAX_TIMESTAMP_S:
            raise InvalidArgument("the time is outside of the years 1 to 9999", field=name)
    end_ms = ms_from_timestamp(request.end_time) if request.HasField("end_time") else now_ms
    start_ms = ms_from_timestamp(request.start_time) if request.HasField("start_time") else end_ms - DEFAULT_WINDOW_MS
    if start_ms >= end_ms:
        raise InvalidArgument("the window does not start before its end", field="start_time")
    if end_ms - start_ms > MAX_WINDOW_MS:
        raise InvalidArgument("the window is longer than five years", field="start_time")
    return start_ms // HOUR_MS * HOUR_MS, end_ms


def question_of(request: HasLimit) -> Question:
    """The question, as far as it can be judged without its metric."""
    limit = request.limit if request.HasField("limit") else None
    if limit is not None and not math.isfinite(limit):
        raise InvalidArgument("the limit is not a number", field="limit")
    if not -1 < request.growth <= MAX_GROWTH:
        raise InvalidArgument(f"growth is over -1 and at most {MAX_GROWTH:g}: 0.2 for 20 % more", field="growth")
    return Question(limit=limit, falling=request.falling, growth=request.growth)


def limit_of(question: Question, metric: Chosen) -> float:
    """The limit that is meant."""
    if question.limit is not None:
        return question.limit
    if question.falling or not says_percent(metric):
        raise InvalidArgument(
            f"say which limit: only metrics in percent that rise have one, {DEFAULT_LIMIT:g}", field="limit"
        )
    return DEFAULT_LIMIT


def check_within_percent(limit: float) -> None:
    """Raises InvalidArgument for a limit that a metric in percent cannot reach."""
    if not 0 <= limit <= 100:
        raise InvalidArgument("the metric is in percent: 0 to 100", field="limit")


def says_percent(metric: Chosen) -> bool:
    """Whether unit, or name where there is no unit, say that a metric is in percent."""
    return not metric.is_counter and (metric.unit == "%" or (not metric.unit and is_percent_name(metric.key)))


def within_of(duration: Duration) -> int:
    """Milliseconds of the span of a list."""
    return _span(duration, DEFAULT_WITHIN_MS, "within")


def horizon_of(horizon: Duration, step: Duration) -> tuple[int, int]:
    """Milliseconds of horizon and step of a forecast."""
    horizon_ms = _span(horizon, DEFAULT_HORIZON_MS, "horizon")
    step_ms = ms_from_duration(step) if (step.seconds, step.nanos) != (0, 0) else HOUR_MS
    try:
        check_horizon(horizon_ms, step_ms)
    except UnusableError as error:
        raise InvalidArgument(str(error), field=error.field) from None
    if step_ms < MIN_STEP_MS:
        raise InvalidArgument("a step is at least 5 minutes", field="step")
    if horizon_ms // step_ms > MAX_STEPS:
        raise InvalidArgument(f"the horizon has more than {MAX_STEPS} such steps", field="step")
    return horizon_ms, step_ms


def _span(duration: Duration, default_ms: int, name: str) -> int:
    span_ms = ms_from_duration(duration) if (duration.seconds, duration.nanos) != (0, 0) else default_ms
    if not 0 < span_ms <= MAX_DAYS_AHEAD * DAY_MS:
        raise InvalidArgument(f"is longer than nothing and at most {MAX_DAYS_AHEAD} days", field=name)
    return span_ms
