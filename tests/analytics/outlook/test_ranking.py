"""The list of a fleet: order, counts, memory, and what becomes of it when time is over or the caller leaves."""

import asyncio
import math
import threading
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from fleet.model import MetricKind
from openmanager.analytics.v1.capacity_pb2 import RankCapacityRequest, RankCapacityResponse
from openmanager.fleet.v1 import outlook_pb2 as pb
from runtime import deadline
from runtime.errors import InvalidArgument, ResourceExhausted, Unavailable
from services.analytics.outlook import ranking as module
from services.analytics.outlook.ranking import CapacityServicer
from services.analytics.outlook.tally import Tally
from tests.analytics.outlook.histories import PERCENT, Parts, growing, on_histories
from tests.harness import eventually

DAY_S = 86_400


async def rank(servicer: CapacityServicer, *server_ids: str, **more: Any) -> RankCapacityResponse:
    request = RankCapacityRequest(server_ids=server_ids, **({"metric": "disk_usage"} | more))
    return await servicer.RankCapacity(request, None)


def servicer_of(parts: Parts) -> CapacityServicer:
    return CapacityServicer(parts.source, parts.workers, parts.clock, Tally())


def named(answer: RankCapacityResponse) -> list[str]:
    return [capacity.server_id for capacity in answer.capacities]


def counts(answer: RankCapacityResponse) -> dict[str, int]:
    return {
        pb.CapacityReason.Name(count.reason).removeprefix("CAPACITY_REASON_"): count.series for count in answer.others
    }


def keep_fleet(parts: Parts) -> list[str]:
    """Full, in 10, in 20, in 100 days, flat, and young."""
    for name, values in {
        "full": growing(60, 1, 95),
        "soon": growing(60, 1, 80),
        "later": growing(60, 1, 70),
        "far": growing(60, 0.2, 70),
        "flat": growing(60, 0, 50),
        "young": growing(3, 1, 80),
    }.items():
        parts.fake.keep(name, "disk_usage", values, **PERCENT)
    return ["young", "flat", "later", "soon", "full", "far"]


async def test_the_soonest_come_first_and_the_others_are_counted() -> None:
    async with on_histories() as parts:
        fleet = keep_fleet(parts)
        parts.fake.keep("other", "cpu_usage", growing(60, 1, 50))
        answer = await rank(servicer_of(parts), *fleet, "other", "never-reported")
        assert named(answer) == ["full", "soon", "later"]
        assert answer.capacities[0].reason == pb.CAPACITY_REASON_PAST_LIMIT
        assert all(capacity.HasField("date") and capacity.limit == 90 for capacity in answer.capacities[1:])
        assert counts(answer) == {"UNSPECIFIED": 1, "FLAT": 1, "TOO_YOUNG": 1, "NO_DATA": 2}
        assert (answer.servers, answer.pending_servers) == (8, 0)
        wider = await rank(servicer_of(parts), *fleet, within=Duration(seconds=150 * DAY_S))
        assert named(wider) == ["full", "soon", "later", "far"]
        fewer = await rank(servicer_of(parts), *fleet, within=Duration(seconds=15 * DAY_S))
        assert named(fewer) == ["full", "soon"] and counts(fewer)["UNSPECIFIED"] == 2


async def test_putting_a_fleet_in_order_does_not_hold_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, real = list[threading.Thread](), module.ranked

    def watched(*arguments: Any) -> RankCapacityResponse:
        threads.append(threading.current_thread())
        return real(*arguments)

    monkeypatch.setattr(module, "ranked", watched)
    async with on_histories() as parts:
        assert named(await rank(servicer_of(parts), *keep_fleet(parts))) == ["full", "soon", "later"]
    assert threads and threading.main_thread() not in threads


async def test_each_set_of_labels_is_judged_for_itself() -> None:
    async with on_histories() as parts:
        for mount, now in (("/", 80), ("/data", 70)):
            parts.fake.keep("db-01", "disk_usage", growing(60, 1, now), labels=(("mount", mount),), **PERCENT)
        answer = await rank(servicer_of(parts), "db-01")
        assert [capacity.metric for capacity in answer.capacities] == [
            'disk_usage{mount="/"}',
            'disk_usage{mount="/data"}',
        ]
        assert answer.servers == 1
        exact = await rank(servicer_of(parts), "db-01", metric='disk_usage{mount="/data"}')
        assert [capacity.metric for capacity in exact.capacities] == ['disk_usage{mount="/data"}']


async def test_counters_are_judged_by_their_rates() -> None:
    async with on_histories() as parts:
        parts.fake.keep("a", "bytes_total", growing(60, 1, 80), unit="By", kind=MetricKind.COUNTER)
        (capacity,) = (await rank(servicer_of(parts), "a", metric="bytes_total", limit=90)).capacities
        assert (capacity.is_rate, capacity.unit) == (True, "By/s")


async def test_what_was_found_is_remembered_for_a_while() -> None:
    async with on_histories() as parts:
        fleet, servicer = keep_fleet(parts), servicer_of(parts)
        first = await rank(servicer, *fleet)
        asked = len(parts.fake.queries)
        parts.fake.keep("soon", "disk_usage", growing(60, 0, 50), **PERCENT)
        parts.clock.advance(59)
        assert await rank(servicer, *fleet) == first
        assert named(await rank(servicer, "soon")) == ["soon"], "another list of the same servers"
        assert len(parts.fake.queries) == asked
        await rank(servicer, *fleet, growth=0.5)
        await rank(servicer, *fleet, limit=91)
        assert len(parts.fake.queries) == 3 * asked, "other questions"
        parts.clock.advance(2)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(module, "work_s", lambda: 0.0)
            old = await rank(servicer, *fleet)
            assert (named(old), old.servers, old.pending_servers) == ([], 0, 6), "what is too old is not shown"
        assert named(await rank(servicer, *fleet)) == ["full", "later"]


async def test_of_many_servers_it_is_remembered_longer() -> None:
    async with on_histories() as parts:
        fleet, servicer = keep_fleet(parts), servicer_of(parts)
        many = [*fleet, *(f"server-{number}" for number in range(194))]
        parts.fake.servers.update(many)
        await rank(servicer, *many)
        asked = len(parts.fake.queries)
        parts.clock.advance(99)
        await rank(servicer, *many)
        assert len(parts.fake.queries) == asked
        parts.clock.advance(2)
        await rank(servicer, *many)
        assert len(parts.fake.queries) == 2 * asked


async def test_a_list_that_cannot_be_remembered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 7)
    async with on_histories() as parts:
        servers = [f"db-{number}" for number in range(4)]
        for server_id in servers:
            for mount in ("/", "/data"):
                parts.fake.keep(server_id, "disk_usage", growing(60, 1, 80), labels=(("mount", mount),), **PERCENT)
        servicer = servicer_of(parts)
        for _ in range(2):
            with pytest.raises(ResourceExhausted, match="over 7 series") as refused:
                await rank(servicer, *servers)
            assert refused.value.reason == "MAX_SERVERS"
            parts.clock.advance(100)
        assert (await rank(servicer, *servers, metric='disk_usage{mount="/"}')).pending_servers == 0
        assert (await rank(servicer, *servers[:3])).pending_servers == 0
        assert (await rank(servicer, *servers[1:])).pending_servers == 0, "of another list some may go"


async def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 7)
    async with on_histories() as parts:
        fleet, servicer = keep_fleet(parts), servicer_of(parts)
        for growth in (0.0, 0.1, 0.2, 0.3, 0.3):
            answer = await rank(servicer, *fleet, growth=growth)
            assert (answer.servers, answer.pending_servers) == (6, 0)
            assert servicer._kept == sum(max(len(kept.found), 1) for kept in servicer._remembered.values()) <= 7
        for _ in range(3):  # found again, and not counted twice
            parts.clock.advance(100)
            await rank(servicer, *fleet, growth=0.3)
            assert servicer._kept == sum(max(len(kept.found), 1) for kept in servicer._remembered.values()) == 7


async def test_when_time_is_over_the_rest_is_pending_and_goes_on_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    real = module.capacity_of

    def slow(measured: Any, *more: Any) -> Any:
        computed.append(measured.server_id)
        return real(measured, *more)

    monkeypatch.setattr(module, "capacity_of", slow)
    async with on_histories() as parts:
        fleet, servicer = keep_fleet(parts), servicer_of(parts)
        monkeypatch.setattr(module, "SERVERS_TOGETHER", 1)
        hold = asyncio.Event()
        real_read = parts.source.read_many

        async def read_many(server_ids: Any, *more: Any) -> Any:
            if server_ids == [fleet[3]] and not hold.is_set():
                await asyncio.sleep(60)
            return await real_read(server_ids, *more)

        monkeypatch.setattr(parts.source, "read_many", read_many)
        monkeypatch.setattr(module, "work_s", lambda: 2.0)  # the three take milliseconds
        first = await rank(servicer, *fleet)
        assert (first.servers, first.pending_servers) == (3, 3)
        assert named(first) == ["later"] and computed == fleet[:3]
        hold.set()
        monkeypatch.setattr(module, "work_s", lambda: 20.0)
        second = await rank(servicer, *fleet)
        assert (second.servers, second.pending_servers) == (6, 0)
        assert named(second) == ["full", "soon", "later"] and computed == fleet


async def test_it_works_for_a_part_of_the_time_that_its_caller_has() -> None:
    assert module.work_s() == module.MAX_WORK_S
    now_s = asyncio.get_running_loop().time
    for left_s, work_s in ((10.0, 7.0), (60.0, 30.0), (-1.0, 0.0)):
        begun_s = now_s()
        token = deadline.current.set(deadline.CallDeadline(begun_s + left_s))
        try:
            found_s = module.work_s()
            assert work_s - (now_s() - begun_s) <= found_s <= work_s
        finally:
            deadline.current.reset(token)


async def test_who_leaves_stops_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    monkeypatch.setattr(module, "capacity_of", lambda measured, *_: computed.append(measured.server_id))
    async with on_histories() as parts:
        fleet, servicer = keep_fleet(parts), servicer_of(parts)
        parts.fake.gate.clear()
        call = asyncio.create_task(rank(servicer, *fleet))
        await eventually(lambda: parts.fake.running == 1)
        call.cancel()
        await asyncio.wait({call})
        await eventually(lambda: parts.fake.running == 0)
        parts.fake.gate.set()
        assert computed == [] and not servicer._one_at_a_time.locked()


async def test_lists_are_made_one_after_another_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    async with on_histories() as parts:
        fleet, servicer = keep_fleet(parts), servicer_of(parts)
        parts.fake.gate.clear()
        calls = [asyncio.create_task(rank(servicer, *fleet)) for _ in range(3)]
        await eventually(lambda: servicer._waiting == 3)
        with pytest.raises(ResourceExhausted) as caught:
            await rank(servicer, *fleet)
        assert caught.value.reason == "TOO_MANY_WAITING"
        parts.fake.gate.set()
        answers = [named(await call) for call in calls]
        assert answers == [["full", "soon", "later"]] * 3
        assert len(parts.fake.queries) == -(-len(fleet) // module.SERVERS_TOGETHER), "made once"


async def test_what_could_not_be_asked_is_told_and_a_store_that_is_away_is_an_error() -> None:
    async with on_histories() as parts:
        fleet, servicer = keep_fleet(parts), servicer_of(parts)
        parts.fake.incomplete = ["replica-2"]
        assert list((await rank(servicer, *fleet)).incomplete) == ["replica-2"]

        async def away(*_: Any) -> Any:
            raise Unavailable("timeseries is not reachable")

        parts.source.read_many = away  # type: ignore[method-assign]
        with pytest.raises(Unavailable):
            await rank(servicer, *fleet, growth=0.5)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"metric": ""}, "metric"),
        ({"metric": "nope"}, "metric"),
        ({"limit": math.nan}, "limit"),
        ({"limit": 101}, "limit"),
        ({"metric": "bytes"}, "limit"),
        ({"falling": True}, "limit"),
        ({"growth": -1}, "growth"),
        ({"growth": 1000}, "growth"),
        ({"within": Duration(seconds=731 * DAY_S)}, "within"),
        ({"within": Duration(seconds=-1)}, "within"),
    ],
)
async def test_what_makes_no_sense_is_refused_with_its_field(more: dict[str, Any], field: str) -> None:
    async with on_histories() as parts:
        keep_fleet(parts)
        parts.fake.keep("full", "bytes", np.ones(300), unit="By")
        for server_ids in (("full",), ()):
            with pytest.raises(InvalidArgument) as caught:
                await rank(servicer_of(parts), *server_ids, **more)
            assert caught.value.field == field


async def test_too_many_servers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SERVERS", 5)
    async with on_histories() as parts:
        fleet = keep_fleet(parts)
        with pytest.raises(ResourceExhausted) as caught:
            await rank(servicer_of(parts), *fleet)
        assert caught.value.reason == "MAX_SERVERS"
        assert (await rank(servicer_of(parts), *fleet[:5])).servers == 5
