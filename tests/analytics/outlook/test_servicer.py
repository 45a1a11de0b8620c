"""One metric of one server: what is read, what is answered, and what makes no sense."""

import asyncio
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from fleet.codec import ms_from_duration, ms_from_timestamp, timestamp_from_ms
from fleet.model import MetricKind
from openmanager.fleet.v1 import history_pb2, outlook_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb
from runtime.errors import InvalidArgument, NotFound, ResourceExhausted
from services.analytics.outlook import servicer as module
from services.analytics.outlook.servicer import OutlookServicer
from services.analytics.outlook.tally import Tally
from services.analytics.outlook.workers import MAX_WORKING
from tests.analytics.outlook.histories import (
    DAY_MS,
    HOUR_MS,
    NOW_MS,
    PERCENT,
    Parts,
    growing,
    hours_of,
    noise,
    on_histories,
)
from tests.harness import eventually

WEB = "web-01"
HOUR_END_MS = NOW_MS // HOUR_MS * HOUR_MS + HOUR_MS


def servicer_of(parts: Parts) -> OutlookServicer:
    return OutlookServicer(parts.source, parts.workers, parts.clock, Tally())


async def trend(parts: Parts, metric: str = "m", server_id: str = WEB, **more: Any) -> outlook_pb2.Trend:
    request = pb.GetTrendRequest(server_id=server_id, metric=metric, **more)
    return checked((await servicer_of(parts).GetTrend(request, None)).trend)


async def capacity(parts: Parts, metric: str = "m", server_id: str = WEB, **more: Any) -> outlook_pb2.Capacity:
    request = pb.ForecastCapacityRequest(server_id=server_id, metric=metric, **more)
    return checked((await servicer_of(parts).ForecastCapacity(request, None)).capacity)


async def forecast(parts: Parts, metric: str = "m", server_id: str = WEB, **more: Any) -> outlook_pb2.Forecast:
    request = pb.ForecastMetricRequest(server_id=server_id, metric=metric, **more)
    return checked((await servicer_of(parts).ForecastMetric(request, None)).forecast)


def checked(message: Any) -> Any:
    """No answer has a number that is none."""
    assert all(math.isfinite(number) for number in numbers(message)), message
    return message


def numbers(message: Message) -> Iterator[float]:
    for field, value in message.ListFields():
        for one in value if field.is_repeated else (value,):
            if isinstance(one, Message):
                yield from numbers(one)
            elif isinstance(one, float):
                yield one


def days_ago(days: float) -> Any:
    return timestamp_from_ms(NOW_MS - round(days * DAY_MS))


async def test_a_year_of_a_metric() -> None:
    async with on_histories() as parts:
        hours = hours_of(400)
        day = 5 * np.sin(2 * np.pi * (hours - hours[-1]) / 24)
        parts.fake.keep(WEB, "m", growing(400, 0.1, 60) + day, **PERCENT)
        found = await trend(parts)
        assert found.level == pytest.approx(59.6, abs=0.5)
        assert found.slope_low < 0.1 < found.slope_high
        assert found.slope_per_day == pytest.approx(0.1, rel=0.01)
        assert (found.direction, found.significance > 1.96) == (outlook_pb2.TREND_DIRECTION_RISING, True)
        assert (found.unit, found.is_rate, found.coverage, found.days) == ("%", False, 1.0, 365)
        assert ms_from_duration(found.resolution) == HOUR_MS
        assert (len(found.daily), len(found.weekly)) == (24, 168)
        assert max(found.daily) == pytest.approx(5, abs=0.5)
        highest = (NOW_MS // HOUR_MS + 6) % 24  # a quarter of a day after the last hour
        assert int(np.argmax(found.daily)) == highest
        assert int(np.argmax(found.weekly)) % 24 == highest
        assert ms_from_timestamp(found.start_time) == (NOW_MS - 365 * DAY_MS) // HOUR_MS * HOUR_MS
        assert ms_from_timestamp(found.end_time) == NOW_MS
        assert ms_from_timestamp(found.data_end_time) == NOW_MS, "the hour is not over"
        assert found.year_over_year.change == pytest.approx(36.4, abs=0.5)
        assert found.year_over_year.share == pytest.approx(36.4 / found.year_over_year.then, rel=0.05)
        (query,) = parts.fake.queries
        assert (ms_from_duration(query.step), list(query.metrics)) == (HOUR_MS, ["m"])
        assert query.start_time.seconds % 3600 == 0, "an hour is read from one roll-up"


async def test_what_lies_before_the_window_is_none_of_its_trend() -> None:
    async with on_histories() as parts:
        parts.fake.keep(WEB, "m", np.concatenate([np.full(200 * 24, 90.0), np.full(100 * 24, 10.0)]))
        found = await trend(parts, start_time=days_ago(50), end_time=days_ago(10))
        assert (found.level, found.slope_per_day, list(found.changes)) == (10.0, 0.0, [])
        assert found.coverage > 0.99 and 39 <= found.days <= 40
        assert ms_from_timestamp(found.data_end_time) == NOW_MS - 10 * DAY_MS
        later = await trend(parts, start_time=days_ago(50), end_time=days_ago(-1))
        assert ms_from_timestamp(later.data_end_time) == NOW_MS
        (change,) = (await trend(parts)).changes
        assert (change.before, change.after) == (pytest.approx(90), pytest.approx(10))
        assert abs(ms_from_timestamp(change.time) - (HOUR_END_MS - 100 * DAY_MS)) <= DAY_MS


async def test_gaps_count_as_not_covered() -> None:
    async with on_histories() as parts:
        values = growing(100, 0.1, 50)
        values[::2] = math.nan
        parts.fake.keep(WEB, "m", values)
        found = await trend(parts, start_time=days_ago(100))
        assert found.coverage == pytest.approx(0.5, abs=0.01)
        assert found.slope_per_day == pytest.approx(0.1, rel=0.05)
        assert not found.HasField("year_over_year")


async def test_a_day_with_a_gap_behind_it_has_no_profile_of_zeros() -> None:
    async with on_histories() as parts:
        day = 50 + 20 * np.sin(2 * np.pi * hours_of(1) / 24)
        parts.fake.keep(WEB, "m", [*day, *[math.nan] * 36, day[12]])
        found = await trend(parts)
        assert (list(found.daily), list(found.weekly)) == ([], [])
        parts.fake.keep(WEB, "m", [*day, *[math.nan] * 36, *day[12:]])
        found = await trend(parts)
        assert (len(found.daily), len(found.weekly)) == (24, 168)


async def test_of_a_young_series_what_is_not_known_is_absent() -> None:
    async with on_histories() as parts:
        parts.fake.keep(WEB, "m", [41.0])
        found = await trend(parts)
        assert (found.level, found.days) == (41.0, 1)
        assert not found.HasField("slope_per_day") and not found.HasField("significance")
        assert (found.direction, list(found.daily)) == (outlook_pb2.TREND_DIRECTION_UNSPECIFIED, [])
        ahead = await forecast(parts)
        assert list(ahead.values) == [41.0] * (7 * 24) and list(ahead.low80) == []
        young = await capacity(parts, limit=50)
        assert young.reason == outlook_pb2.CAPACITY_REASON_TOO_YOUNG and not young.HasField("level")


async def test_values_too_large_for_a_measurement_are_none() -> None:
    async with on_histories() as parts:
        signs = (-1.0) ** hours_of(30)
        parts.fake.keep(WEB, "m", 1.7e308 * signs)
        for found in (await trend(parts), await forecast(parts)):
            assert not found.HasField("backtest" if isinstance(found, outlook_pb2.Forecast) else "level")
        assert (await capacity(parts, limit=9)).reason == outlook_pb2.CAPACITY_REASON_NO_DATA
        values = 50 + noise(len(signs))
        values[100] = 1.7e308
        parts.fake.keep(WEB, "some", values)
        assert (await trend(parts, "some")).level == pytest.approx(50, abs=2)
        assert np.array((await forecast(parts, "some")).values) == pytest.approx(50, abs=5)


async def test_of_a_counter_the_rate_is_judged() -> None:
    async with on_histories() as parts:
        parts.fake.keep(WEB, "m_total", growing(60, 1, 100), unit="By", kind=MetricKind.COUNTER)
        answers = [
            await trend(parts, "m_total"),
            await capacity(parts, "m_total", limit=150),
            await forecast(parts, "m_total"),
        ]
        assert {(answer.unit, answer.is_rate) for answer in answers} == {("By/s", True)}
        assert {query.aggregation for query in parts.fake.queries} == {history_pb2.AGGREGATION_RATE}


async def test_without_measurements_the_answer_says_so() -> None:
    async with on_histories() as parts:
        parts.fake.keep(WEB, "m", growing(30, 1, 50), ago=500 * 24)
        parts.fake.keep("web-02", "other", [1.0])
        assert (await trend(parts, end_time=timestamp_from_ms(-DAY_MS))).coverage == 0.0, "before 1970 nothing was"
        for server_id in (WEB, "web-02"):  # it ended long ago; the server never had it
            found = await trend(parts, server_id=server_id)
            assert (found.coverage, found.days, found.HasField("level")) == (0.0, 0, False)
            assert (await capacity(parts, server_id=server_id, limit=9)).reason == outlook_pb2.CAPACITY_REASON_NO_DATA
            assert list((await forecast(parts, server_id=server_id)).times) == []


async def test_a_metric_is_found_by_its_identity_or_by_a_name_that_is_its_own() -> None:
    async with on_histories() as parts:
        for mount in ("/", "/data"):
            parts.fake.keep(WEB, "disk", growing(9, 1, 50), labels=(("mount", mount),))
        parts.fake.keep(WEB, "both", growing(9, 1, 70))
        parts.fake.keep(WEB, "both", growing(9, 1, 20), labels=(("a", "b"),))
        parts.fake.keep(WEB, "one", growing(9, 1, 70), labels=(("a", "b"),))
        assert (await trend(parts, 'disk{mount="/"}')).metric == 'disk{mount="/"}'
        assert (await trend(parts, "both")).metric == "both"
        assert (await trend(parts, "one")).metric == 'one{a="b"}'
        for call in (trend, capacity, forecast):
            with pytest.raises(InvalidArgument, match="/data") as caught:
                await call(parts, "disk")
            assert (caught.value.field, caught.value.reason) == ("metric", "METRIC_AMBIGUOUS")


async def test_what_could_not_be_asked_is_told() -> None:
    async with on_histories() as parts:
        parts.fake.keep(WEB, "m", growing(9, 1, 50))
        parts.fake.incomplete = ["replica-2"]
        for call in (trend, forecast):
            assert list((await call(parts)).incomplete) == ["replica-2"]
        assert list((await capacity(parts, limit=90)).incomplete) == ["replica-2"]


async def test_a_date_lies_between_low_and_high_and_growth_brings_it_nearer() -> None:
    async with on_histories() as parts:
        parts.fake.keep(WEB, "m", growing(120, 0.25, 80), **PERCENT)
        found = await capacity(parts)
        low, date, high = (ms_from_timestamp(time) for time in (found.low, found.date, found.high))
        assert low < date < high and not found.HasField("reason")
        assert (date - NOW_MS) / DAY_MS == pytest.approx(40, abs=1)
        assert (found.limit, found.level) == (90.0, pytest.approx(80, abs=0.5))
        assert found.rate_per_day == pytest.approx(0.25, rel=0.02)
        assert (found.probability_within_30_days, found.probability_within_90_days) == (0.0, 1.0)
        assert (found.backtest.trials, found.backtest.coverage > 0.5) == (4, True)
        assert ms_from_timestamp(found.data_end_time) == NOW_MS, "the hour is not over"
        faster = await capacity(parts, limit=90, growth=1.0)
        assert (ms_from_timestamp(faster.date) - NOW_MS) / DAY_MS == pytest.approx(20, abs=1)
        assert faster.rate_per_day == found.rate_per_day and faster.growth == 1.0
        assert parts.fake.queries[0].start_time.ToMilliseconds() == (NOW_MS - 400 * DAY_MS) // HOUR_MS * HOUR_MS


async def test_a_limit_is_reached_from_above_too() -> None:
    async with on_histories() as parts:
        parts.fake.keep(WEB, "free", growing(60, -2, 50))
        found = await capacity(parts, "free", limit=10, falling=True)
        assert (ms_from_timestamp(found.date) - NOW_MS) / DAY_MS == pytest.approx(20, abs=1)
        assert found.rate_per_day == pytest.approx(-2, rel=0.05)
        assert (await capacity(parts, "free", limit=90)).reason == outlook_pb2.CAPACITY_REASON_AWAY_FROM_LIMIT


@pytest.mark.parametrize(
    ("values", "ago", "reason"),
    [
        (growing(6, 1, 50), 0, "TOO_YOUNG"),
        (growing(60, 1, 95), 0, "PAST_LIMIT"),
        (growing(60, 0, 50), 0, "FLAT"),
        (growing(60, -1, 50), 0, "AWAY_FROM_LIMIT"),
        (growing(60, 0.01, 50, noisy=0.01), 0, "TOO_FAR"),
        (growing(60, 1, 50), 8 * 24, "SILENT"),
        (growing(60, 1, 50), 401 * 24, "NO_DATA"),
    ],
)
async def test_where_there_is_no_date_there_is_a_reason(values: Any, ago: int, reason: str) -> None:
    async with on_histories() as parts:
        parts.fake.keep(WEB, "m", values, ago=ago)
        found = await capacity(parts, limit=90)
        assert outlook_pb2.CapacityReason.Name(found.reason) == f"CAPACITY_REASON_{reason}"
        assert found.HasField("reason") and not found.HasField("date") and not found.HasField("low")


async def test_a_date_that_came_while_nothing_was_measured_is_none() -> None:
    async with on_histories() as parts:
        parts.fake.keep(WEB, "m", growing(60, 1, 88), ago=4 * 24, **PERCENT)  # it was full two days ago, or was not
        found = await capacity(parts)
        assert (found.reason, found.HasField("date")) == (outlook_pb2.CAPACITY_REASON_SILENT, False)
        assert not found.HasField("low") and not found.HasField("high")
        assert (found.level, found.rate_per_day) == (pytest.approx(88, abs=1), pytest.approx(1, rel=0.05))
        for level, date_is_now in ((86.2, True), (85.8, False)):
            parts.fake.keep(WEB, "m", growing(60, 1, level), ago=4 * 24, **PERCENT)
            found = await capacity(parts)
            low, date, high = (ms_from_timestamp(time) for time in (found.low, found.date, found.high))
            assert NOW_MS == low <= date < high, "it may be full by now"
            assert (date == NOW_MS) == date_is_now


async def test_a_limit_has_to_be_said_but_for_metrics_in_percent() -> None:
    async with on_histories() as parts:
        parts.fake.keep(WEB, "disk_usage", growing(30, 0.5, 50))  # by its name, where there is no unit
        parts.fake.keep(WEB, "memory_usage", growing(30, 1e6, 8e9))  # its values say that it is in bytes
        parts.fake.keep(WEB, "cores", growing(30, 1, 350), **PERCENT)  # of several cores together
        parts.fake.keep(WEB, "bytes", growing(30, 1, 50), unit="By")
        assert (await capacity(parts, "disk_usage")).limit == 90
        assert (await capacity(parts, "cores", limit=400)).HasField("date")
        assert (await capacity(parts, "memory_usage", limit=9e9)).limit == 9e9
        for metric, more in (
            ("bytes", {}),
            ("disk_usage", {"falling": True}),
            ("disk_usage", {"limit": 100.5}),
            ("disk_usage", {"limit": -1}),
            ("disk_usage", {"limit": math.nan}),
            ("bytes", {"limit": math.inf}),
        ):
            with pytest.raises(InvalidArgument) as caught:
                await capacity(parts, metric, **more)
            assert caught.value.field == "limit", more


async def test_what_comes_next() -> None:
    async with on_histories() as parts:
        hours = hours_of(120)
        parts.fake.keep(WEB, "m", 50 + 20 * np.sin(2 * np.pi * hours / 24) + noise(len(hours)), **PERCENT)
        found = await forecast(parts)
        assert found.times[0] == HOUR_END_MS / 1000 and len(found.times) == len(found.values) == 7 * 24
        expected = 50 + 20 * np.sin(2 * np.pi * (len(hours) + hours_of(7)) / 24)
        assert np.abs(np.array(found.values) - expected).max() < 2
        columns = [np.array(getattr(found, name)) for name in ("low95", "low80", "values", "high80", "high95")]
        assert (np.diff(columns, axis=0) >= 0).all()
        assert found.backtest.trials >= 3 and 0.6 < found.backtest.coverage80 < 1 and found.backtest.mase < 1
        assert found.methods and ms_from_duration(found.backtest.horizon) == 7 * DAY_MS
        weeks = await forecast(parts, horizon=Duration(seconds=90 * 86_400), step=Duration(seconds=86_400))
        assert np.diff(weeks.times).tolist() == [86_400.0] * 89
        assert np.array(weeks.values) == pytest.approx(50, abs=3)


async def test_more_history_would_not_change_a_forecast() -> None:
    async with on_histories() as parts:
        parts.fake.keep(WEB, "m", 50 + 20 * np.sin(2 * np.pi * hours_of(400) / 24) + noise(400 * 24))
        for days in (1, 7, 30):
            horizon = Duration(seconds=days * 86_400)
            some = await forecast(parts, horizon=horizon)
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(module, "forecast_days", lambda _: 400)
                assert await forecast(parts, horizon=horizon) == some
        read = [NOW_MS - ms_from_timestamp(query.start_time) for query in parts.fake.queries]
        assert read[0] < 80 * DAY_MS < read[4] < 160 * DAY_MS < read[5]


async def test_steps_of_a_part_of_an_hour_are_read_as_such() -> None:
    async with on_histories() as parts:
        parts.fake.keep(WEB, "m", 50 + noise(30 * 288), step_ms=300_000)
        found = await forecast(parts, horizon=Duration(seconds=7_200), step=Duration(seconds=300))
        assert ms_from_duration(parts.fake.queries[0].step) == 300_000
        assert np.diff(found.times).tolist() == [300.0] * 23
        assert np.mean(np.array(found.high80) - np.array(found.low80)) > 1.5, "as wide as what is measured, not hours"


FAR = Duration(seconds=731 * 86_400)
BAD: list[tuple[Any, dict[str, Any], str]] = [
    (call, more, field)
    for call in (trend, capacity, forecast)
    for more, field in (({"server_id": ""}, "server_id"), ({"metric": ""}, "metric"), ({"metric": "nope"}, "metric"))
]
BAD = [(call, more | ({"limit": 9} if call is capacity else {}), field) for call, more, field in BAD]
BAD += [
    (capacity, {"metric": "nope"}, "metric"),
    (trend, {"start_time": days_ago(1), "end_time": days_ago(2)}, "start_time"),
    (trend, {"start_time": days_ago(1), "end_time": days_ago(1)}, "start_time"),
    (trend, {"start_time": days_ago(-1)}, "start_time"),
    (trend, {"start_time": days_ago(1831)}, "start_time"),
    (trend, {"end_time": {"seconds": 1 << 60}}, "end_time"),
    (trend, {"start_time": {"seconds": -(1 << 60)}}, "start_time"),
    (capacity, {"limit": 9, "growth": -1}, "growth"),
    (capacity, {"limit": 9, "growth": math.nan}, "growth"),
    (capacity, {"limit": 9, "growth": math.inf}, "growth"),
    (forecast, {"horizon": FAR}, "horizon"),
    (forecast, {"horizon": Duration(seconds=-1)}, "horizon"),
    (forecast, {"horizon": Duration(seconds=1 << 40)}, "horizon"),
    (forecast, {"horizon": Duration(seconds=60)}, "horizon"),
    (forecast, {"step": Duration(seconds=5_000)}, "step"),
    (forecast, {"step": Duration(seconds=60)}, "step"),
    (forecast, {"step": Duration(seconds=-3_600)}, "step"),
    (forecast, {"horizon": Duration(seconds=700 * 86_400), "step": Duration(seconds=600)}, "step"),
]


@pytest.mark.parametrize(("call", "more", "field"), BAD, ids=lambda value: getattr(value, "__name__", str(value)[:40]))
async def test_what_makes_no_sense_is_refused_with_its_field(call: Any, more: dict[str, Any], field: str) -> None:
    async with on_histories() as parts:
        parts.fake.keep(WEB, "m", growing(9, 1, 50))
        with pytest.raises(InvalidArgument) as caught:
            await call(parts, **more)
        assert caught.value.field == field


async def test_a_server_that_never_reported_is_not_found() -> None:
    async with on_histories() as parts:
        parts.fake.keep(WEB, "m", [1.0])
        for call in (trend, forecast):
            with pytest.raises(NotFound) as caught:
                await call(parts, server_id="web-09")
            assert (caught.value.reason, caught.value.field) == ("SERVER_UNKNOWN", "server_id")


async def test_who_leaves_ends_the_query_and_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[object] = []
    monkeypatch.setattr(module, "capacity_of", lambda *args: computed.append(args))
    async with on_histories() as parts:
        parts.fake.keep(WEB, "m", growing(9, 1, 50))
        parts.fake.gate.clear()
        calls = [asyncio.create_task(capacity(parts, limit=90)) for _ in range(MAX_WORKING + 3)]
        await eventually(lambda: parts.fake.running == MAX_WORKING)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        await eventually(lambda: parts.fake.running == 0)
        assert computed == [] and len(parts.fake.queries) == MAX_WORKING


async def test_so_many_wait_and_one_more_is_refused() -> None:
    async with on_histories(max_calls=6) as parts:
        parts.fake.keep(WEB, "m", growing(9, 1, 50))
        parts.fake.gate.clear()
        calls = [asyncio.create_task(trend(parts)) for _ in range(6)]
        await eventually(lambda: parts.fake.running == MAX_WORKING)
        with pytest.raises(ResourceExhausted) as caught:
            await trend(parts)
        assert (caught.value.reason, caught.value.retry_after_s) == ("TOO_MANY_WAITING", 1.0)
        parts.fake.gate.set()
        assert len({(await call).level for call in calls}) == 1
        assert (await trend(parts)).days == 9


async def test_the_mathematics_runs_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    for name in ("trend_of", "capacity_of", "forecast_of"):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, real=real: threads.append(threading.current_thread()) or real(*args)
        )
    async with on_histories() as parts:
        parts.fake.keep(WEB, "m", growing(9, 1, 50))
        await trend(parts)
        await capacity(parts, limit=90)
        await forecast(parts)
        assert len(threads) == 3 and threading.main_thread() not in threads
