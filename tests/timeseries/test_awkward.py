"""Input that no sender should send, and some do: through the service, into blocks, and back after a restart."""

import math
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from fleet import validation
from fleet.codec import metric_set_to_pb, rows_to_pb
from fleet.model import Metric, MetricSet, Rows
from openmanager.fleet.v1 import metric_pb2
from openmanager.timeseries.v1 import timeseries_pb2
from runtime.channel import Channel
from runtime.clock import ManualClock
from runtime.errors import InvalidArgument
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from services.timeseries.engine import Engine, EngineSettings
from services.timeseries.servicer import TimeSeriesServicer
from tests.timeseries.engine.model import everything, last, metric_set, rows
from tests.timeseries.test_service import Service

DAY_MS, HOUR_MS = 86_400_000, 3_600_000
NOON = 19_700 * DAY_MS + DAY_MS // 2
SET = metric_set("cpu_usage", "memory_usage")
NAN, INF = float("nan"), float("inf")
SETTINGS = EngineSettings(sparse_points_a_day=0, maintenance_interval_s=1e9, journal_keep_s=0.0)


@asynccontextmanager
async def service(folder: Path, clock: ManualClock) -> AsyncIterator[Service]:
    async with Engine.open(folder, clock=clock, settings=SETTINGS) as engine:
        servicer = TimeSeriesServicer(engine, clock)
        server = GrpcServer([bind("openmanager.timeseries.v1.TimeSeriesService", servicer)], Interception())
        async with Channel(await server.start("127.0.0.1:0")) as channel:
            yield Service(engine, channel)
        await server.stop(0.5)


async def send(ours: Service, of_set: MetricSet, batch: Rows) -> timeseries_pb2.AppendResponse:
    return await ours.append(rows_to_pb(batch), metric_sets=[metric_set_to_pb(of_set)])


async def ask(ours: Service, metric: str, **fields: object) -> dict[str, list[tuple[int, float]]]:
    """The points of a metric of all time, by server; times in milliseconds."""
    query = {"start_time": {"seconds": 0}, "end_time": {"seconds": 9_000_000_000}, **fields}
    found: dict[str, list[tuple[int, float]]] = {}
    for message in await ours.query(metrics=[metric], **query):
        for series in message.series:
            times = [round(time * 1_000) for time in series.times]
            found.setdefault(series.server_id, []).extend(zip(times, series.values, strict=True))
    return found


def bits(values: Sequence[float]) -> list[bytes]:
    return [struct.pack("<d", value) for value in values]


async def test_a_clock_that_jumps_back_and_forth_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Our clock goes back two hours, then to 1970, then is right again; the sender's is right all the time."""
    clock, taken = ManualClock(NOON), []

    async def tick(ours: Service, ours_ms: int, theirs_ms: int) -> None:
        clock.set_now_ms(ours_ms)
        clock.advance(1.0)
        answer = await send(ours, SET, rows(SET, [("a", theirs_ms, [theirs_ms % 97, 1.0])]))
        reasons = [error.reason for error in answer.errors]
        if theirs_ms > clock.now_ms() + validation.MAX_AHEAD_MS:
            assert (answer.accepted_points, answer.rejected_points, reasons) == (0, 2, ["TIME_IN_FUTURE"])
        else:
            assert (answer.accepted_points, answer.rejected_points, reasons) == (2, 0, [])
            taken.append((theirs_ms, float(theirs_ms % 97)))

    async with service(tmp_path, clock) as ours:
        for number in range(4):
            await tick(ours, NOON + number * 1_000, NOON + number * 1_000)
        for number in range(4, 8):
            await tick(ours, NOON - 2 * HOUR_MS + number * 1_000, NOON + number * 1_000)
            await tick(ours, NOON - 2 * HOUR_MS + number * 1_000, NOON - 2 * HOUR_MS + number * 1_000)
        await ours.engine.maintain(everything=True)
    async with service(tmp_path, clock) as ours:
        await tick(ours, 0, NOON + 8_000)
        await tick(ours, 0, 5_000)
        await ours.engine.maintain(everything=True)
    clock.set_now_ms(NOON + 9_000)
    async with service(tmp_path, clock) as ours:
        for number in range(4, 12):
            await tick(ours, NOON + number * 1_000, NOON + number * 1_000)
        assert (await ask(ours, "cpu_usage"))["a"] == sorted(taken)
        clock.advance(SETTINGS.head_age_s)
        await ours.engine.maintain()
        status = await ours.engine.status()
        assert (status.head_points, status.points, status.damaged) == (0, 2 * len(taken), 0)
        assert ours.engine.first_sequence == ours.engine.last_sequence + 1, "nothing is pinned in the journal"
        assert (await ask(ours, "cpu_usage"))["a"] == sorted(taken)
        assert set((await last(ours.engine)).values()) == {
            (NOON + 11_000, float((NOON + 11_000) % 97)),
            (NOON + 11_000, 1.0),
        }


async def test_a_point_of_1970_is_kept_and_one_of_next_year_is_refused_alone(tmp_path: Path) -> None:
    clock, year_ms = ManualClock(NOON), 365 * DAY_MS
    times = [0, 1, NOON, NOON + HOUR_MS, NOON + HOUR_MS + 1, NOON + year_ms]
    async with service(tmp_path, clock) as ours:
        answer = await send(ours, SET, rows(SET, [("a", time, [1.0, float(time)]) for time in times]))
        assert [(error.row, error.reason) for error in answer.errors] == [(4, "TIME_IN_FUTURE"), (5, "TIME_IN_FUTURE")]
        assert (answer.accepted_points, answer.rejected_points) == (8, 4)
        wanted = [(time, float(time)) for time in times[:4]]
        assert await ask(ours, "memory_usage") == {"a": wanted}
        await ours.engine.maintain(everything=True)
        assert await ask(ours, "memory_usage") == {"a": wanted}
        by_day = await ask(ours, "memory_usage", step={"seconds": 86_400}, aggregation="AGGREGATION_COUNT")
        assert by_day == {"a": [(0, 2.0), (NOON - DAY_MS // 2, 2.0)]}, "54 years of gap cost nothing"
    assert sorted(path.stem for path in (tmp_path / "blocks").glob("*.db")) == ["1970-01-01", "2023-12-09"]


async def test_next_years_rows_in_the_engine_hold_nothing_back(tmp_path: Path) -> None:
    """The engine's own callers, such as an import, are not refused: blocks, sweeping and limits go on around it."""
    clock, year_ms = ManualClock(NOON), 365 * DAY_MS
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        for number in range(5):
            lines = [("a", NOON + number, [1.0, 2.0]), ("a", NOON + year_ms + number, [3.0, 4.0])]
            await engine.append(rows(SET, lines), metric_sets=(SET,))
        clock.advance(SETTINGS.head_age_s)
        await engine.maintain()
        status = await engine.status()
        assert (status.head_points, status.points) == (0, 20) and engine.first_sequence == 6
        assert [len(series) for series in (await everything(engine)).values()] == [10, 10]
        assert {time for time, _ in (await last(engine)).values()} == {NOON + year_ms + 4}


async def test_every_double_comes_back_and_nan_is_no_value(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    values = [INF, -INF, 0.0, -0.0, 5e-324, 1.7976931348623157e308, -1.7976931348623157e308, 0.1]
    odd_nan = struct.unpack("<d", struct.pack("<Q", 0xFFF8_0000_0000_0BAD))[0]
    lines = [("a", NOON + at, [value, (NAN, odd_nan)[at % 2]]) for at, value in enumerate(values)]
    async with service(tmp_path, clock) as ours:
        answer = await send(ours, SET, rows(SET, lines))
        assert answer.accepted_points == len(values), "NaN is none"
        only_nan = await send(ours, SET, rows(SET, [("b", NOON, [NAN, NAN])]))
        assert (only_nan.accepted_points, only_nan.rejected_points) == (0, 0)
        await send(ours, SET, rows(SET, [("a", NOON, [NAN, NAN])]))
    for everything_first in (False, True):
        async with service(tmp_path, clock) as ours:
            if everything_first:
                await ours.engine.maintain(everything=True)
            found = await ask(ours, "cpu_usage")
            assert found.keys() == {"a"} and bits([value for _, value in found["a"]]) == bits(values)
            assert await ask(ours, "memory_usage") == {}
            wanted = {
                "AVG": None,  # infinities that cancel
                "SUM": None,
                "MIN": -INF,
                "MAX": INF,
                "COUNT": 8.0,
                "FIRST": INF,
                "LAST": 0.1,
            }
            for name, value in wanted.items():
                windows = await ask(ours, "cpu_usage", step={"seconds": 60}, aggregation=f"AGGREGATION_{name}")
                assert windows == ({} if value is None else {"a": [(NOON, value)]}), name
            over = await ask(
                ours,
                "cpu_usage",
                step={"seconds": 60},
                aggregation="AGGREGATION_SUM",
                start_time={"seconds": NOON // 1_000, "nanos": 4_000_000},
            )
            assert math.isclose(over["a"][0][1], 0.1), "what is finite is summed"


LONG = "n" * 10_000
LONGEST = Metric(
    name="n" * validation.MAX_NAME_BYTES,
    unit="u" * validation.MAX_UNIT_BYTES,
    labels=tuple((f"{number:02d}" + "ä" * 511, "v" * validation.MAX_LABEL_BYTES) for number in range(32)),
)


@pytest.mark.parametrize(
    ("metric", "field"),
    [
        (Metric(name=""), "metrics[0].name"),
        (Metric(name=LONG), "metrics[0].name"),
        (Metric(name="m", unit=LONG), "metrics[0].unit"),
        (Metric(name="m", labels=((LONG, "v"),)), "metrics[0].labels"),
        (Metric(name="m", labels=(("pod", LONG),)), "metrics[0].labels"),
        (Metric(name="m", labels=(("", "v"),)), "metrics[0].labels"),
    ],
)
async def test_a_name_that_is_empty_or_of_10_kb_is_refused_by_its_field(
    tmp_path: Path, metric: Metric, field: str
) -> None:
    of_set = MetricSet((metric,))
    async with service(tmp_path, ManualClock(NOON)) as ours:
        with pytest.raises(InvalidArgument) as refused:
            await send(ours, of_set, rows(of_set, [("a", NOON, [1.0])]))
        assert refused.value.field == f"metric_sets[0].{field}" and len(refused.value.message) < 200
        assert ours.engine.last_sequence == 0


async def test_a_server_without_a_name_or_with_10_kb_of_it_is_refused_alone(tmp_path: Path) -> None:
    longest = "ö" * validation.MAX_SERVER_ID_CHARACTERS
    async with service(tmp_path, ManualClock(NOON)) as ours:
        answer = await send(ours, SET, rows(SET, [(name, NOON, [1.0, 2.0]) for name in ("", LONG, longest, "a")]))
        assert [(error.row, error.reason) for error in answer.errors] == [(0, "BAD_SERVER_ID"), (1, "BAD_SERVER_ID")]
        assert all(len(error.message) < 200 for error in answer.errors)
        assert (await ask(ours, "cpu_usage")).keys() == {longest, "a"}


async def test_the_longest_identity_comes_back_after_a_restart(tmp_path: Path) -> None:
    """67 KB of name and labels; and, in the engine, which checks nothing of it, names of 10 kB and empty ones."""
    of_set = MetricSet((LONGEST, *(Metric(name="m", labels=(("pod", f"{n}" * 1_000),)) for n in range(3))))
    careless = MetricSet((Metric(name=LONG), Metric(name=""), Metric(name="\0\n")))
    clock = ManualClock(NOON)
    async with service(tmp_path, clock) as ours:
        assert (await send(ours, of_set, rows(of_set, [("a", NOON, [1.0] * 4)]))).accepted_points == 4
        await ours.engine.append(rows(careless, [(LONG, NOON, [1.0, 2.0, 3.0])]), metric_sets=(careless,))
    async with service(tmp_path, clock) as ours:
        await ours.engine.maintain(everything=True)
        assert ours.engine.metric_set(of_set.id) == of_set and ours.engine.metric_set(careless.id) == careless
        assert (await ask(ours, LONGEST.name)) == {"a": [(NOON, 1.0)]}
        listed = [info.metric for info in await ours.engine.list_metrics("a")]
        assert sorted(listed, key=lambda metric: metric.key) == sorted(of_set.metrics, key=lambda metric: metric.key)
        found = await everything(ours.engine)
        assert [found[LONG, key] for key in (LONG, "", "\0\n")] == [[(NOON, 1.0)], [(NOON, 2.0)], [(NOON, 3.0)]]


@pytest.mark.full
async def test_100_000_metrics_in_one_set(tmp_path: Path) -> None:
    count = validation.MAX_SET_METRICS
    of_set = MetricSet(tuple(Metric(name=f"metric_{number}") for number in range(count)))
    clock, values = ManualClock(NOON), np.arange(count) / 8
    async with service(tmp_path, clock) as ours:
        for row in range(3):
            batch = Rows(
                metric_set_id=of_set.id,
                server_ids=("a",),
                times_ms=np.array([NOON + row], np.int64),
                values=(values + row)[None, :],
            )
            request = {"metric_sets": [metric_set_to_pb(of_set)]} if row == 0 else {}
            assert (await ours.append(rows_to_pb(batch), **request)).accepted_points == count
        one_more = metric_pb2.MetricSet(metrics=[metric_pb2.Metric(name=f"m{number}") for number in range(count + 1)])
        with pytest.raises(InvalidArgument, match="MAX_SET_METRICS"):
            await ours.append(metric_pb2.MetricBatch(), metric_sets=[one_more])
    async with service(tmp_path, clock) as ours:
        await ours.engine.maintain(everything=True)
        assert (await ours.engine.status()).points == 3 * count
        for number in (0, 777, count - 1):
            wanted = [(NOON + row, number / 8 + row) for row in range(3)]
            assert await ask(ours, f"metric_{number}") == {"a": wanted}
        assert len(await ours.engine.list_metrics()) == count
