"""The mirror of the live state and what clients see of it: against a cache that is played, over real gRPC."""

import asyncio
import time
import weakref
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import pytest

from fleet.codec import metric_set_from_pb, metric_set_to_pb
from fleet.model import Metric, MetricSet
from gateway import changes, state
from gateway.__main__ import WATCHES
from gateway.entry import ServerEntry
from openmanager.fleet.v1 import metric_pb2, status_pb2
from openmanager.gateway.v1 import fleet_pb2, fleet_pb2_grpc
from runtime import deadline
from runtime.channel import Channel
from runtime.clock import ManualClock
from runtime.errors import InvalidArgument, NotFound, Unavailable
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from runtime.waiting import Waiting
from tests.gateway.played_fleet import CRITICAL, HEALTHY, NAN, PlayedCache, server_state, world
from tests.harness import eventually


async def test_before_the_first_snapshot_reads_say_so() -> None:
    async with world() as w:
        with pytest.raises(Unavailable):
            await w.list()


async def test_a_snapshot_and_changes_are_mirrored() -> None:
    async with world() as w:
        w.cache.send(server_state("b", 1, 2, 3, 4), server_state("a", 5, NAN, 7, 8), snapshot=True)
        await eventually(lambda: w.ids() == ["a", "b"])
        full = fleet_pb2.GetServerResponse.FromString((await w.get("a")).data).server
        assert dict(full.metrics) == {"cpu_usage": 5, "disk_usage": 7, "other": 8}, "NaN is no value"
        basic = (await w.page()).servers[0]
        assert dict(basic.metrics) == {"cpu_usage": 5, "disk_usage": 7}
        w.cache.send(server_state("a", 9, 9, 9, 9, status=CRITICAL), removed=("b",))
        await eventually(lambda: w.ids() == ["a"])
        assert await w.list(status=CRITICAL) == ["a"]
        assert await w.list(status=HEALTHY) == []
        with pytest.raises(NotFound):
            await w.get("b")


async def test_a_large_snapshot_comes_in_parts_and_drops_nobody_before_its_end() -> None:
    async with world() as w:
        w.cache.send(server_state("a", 1, 1, 1, 1), server_state("gone", 1, 1, 1, 1), snapshot=True)
        await eventually(lambda: w.snapshots == 1)
        w.cache.cut()
        w.cache.send(server_state("a", 2, 2, 2, 2), server_state("b", 2, 2, 2, 2), snapshot=True, continues=True)
        w.cache.send(server_state("d", 2, 2, 2, 2), removed=("b",), continues=True)
        await eventually(w.cache.messages.empty)
        assert (w.ids(), w.snapshots) == (["a", "gone"], 1)
        w.cache.send(server_state("a", 3, 3, 3, 3), server_state("c", 3, 3, 3, 3))
        await eventually(lambda: w.ids() == ["a", "c", "d"])
        assert w.snapshots == 2
        assert fleet_pb2.GetServerResponse.FromString((await w.get("a")).data).server.metrics["other"] == 3


async def test_half_a_snapshot_makes_what_is_shown_no_younger() -> None:
    clock = ManualClock()
    async with world(clock=clock) as w:
        w.cache.send(server_state("a", 1, 1, 1, 1), snapshot=True)
        await eventually(lambda: w.state.following)
        w.cache.cut()
        await eventually(lambda: _has_begun(w.cache, 2))
        clock.advance(600)
        w.cache.send(server_state("a", 2, 2, 2, 2), snapshot=True, continues=True)
        w.cache.cut()
        await eventually(lambda: _has_begun(w.cache, 3))
        assert (await w.page()).servers[0].metrics["cpu_usage"] == 1
        assert w.context.trailers == {"age": "600"}


async def test_a_snapshot_that_begins_anew_before_its_end_shows_nobody_of_what_was_sent_before() -> None:
    async with world() as w:
        w.cache.send(server_state("a", 1, 1, 1, 1), server_state("gone", 1, 1, 1, 1), snapshot=True, continues=True)
        w.cache.skip(20_000)  # so many were removed that the cache does not say whom
        w.cache.send(server_state("a", 2, 2, 2, 2), snapshot=True, continues=True)
        w.cache.send(server_state("b", 2, 2, 2, 2))
        await eventually(w.caught_up)
        assert (w.ids(), w.snapshots) == (["a", "b"], 1)


async def test_sets_that_no_server_has_any_more_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MAX_UNUSED_METRICS", 20)
    kept: list[weakref.ref[MetricSet]] = []

    def decoded(pb: metric_pb2.MetricSet) -> MetricSet:
        made = metric_set_from_pb(pb)
        kept.append(weakref.ref(made))
        return made

    monkeypatch.setattr(state, "metric_set_from_pb", decoded)
    async with world() as w:
        w.cache.send(server_state("silent", 1, 1, 1, 1), server_state("a"), snapshot=True)
        for step in range(100):
            metric_set = MetricSet((Metric(name=f"of_{step}"),))
            server = server_state("a")
            server.samples.add(metric_set_id=metric_set.id, values=[step])
            begins = w.cache.subscriptions + 1
            message = w.cache.message(server)
            message.metric_sets.append(metric_set_to_pb(metric_set))
            w.cache.messages.put_nowait(message)
            await eventually(w.caught_up)
            if not w.state.following:  # it begins anew
                await eventually(partial(_has_begun, w.cache, begins))
                whole = w.cache.message(server_state("silent", 1, 1, 1, 1), server, snapshot=True)
                whole.metric_sets.append(metric_set_to_pb(metric_set))
                w.cache.messages.put_nowait(whole)
                await eventually(lambda: w.state.following)
            full = fleet_pb2.GetServerResponse.FromString((await w.get("a")).data).server
            assert dict(full.metrics) == {f"of_{step}": step}
            assert sum(one() is not None for one in kept) <= 2 * 5 + 20 + 1
        assert 1 < w.cache.subscriptions < 10


def _has_begun(cache: PlayedCache, subscription: int) -> bool:
    return cache.subscriptions == subscription and cache.watchers == 1


async def test_while_the_cache_is_away_the_last_state_is_served() -> None:
    async with world() as w:
        w.cache.send(server_state("a", 1, 1, 1, 1), snapshot=True)
        await eventually(lambda: w.state.following)
        w.cache.cut()
        await eventually(lambda: not w.state.following)
        assert w.ids() == ["a"]


async def test_who_has_no_time_left_does_not_keep_the_others_from_what_the_cache_says() -> None:
    async with world(clock=ManualClock()) as w:
        w.cache.refuses_watchers = True
        w.cache.answer = w.cache.message(server_state("a"))
        for _ in range(3):
            token = deadline.current.set(deadline.CallDeadline(time.monotonic()))
            await w.state.refresh()
            deadline.current.reset(token)
        await w.state.refresh()
        assert w.ids() == ["a"]


async def test_who_goes_on_and_hears_nothing_new_takes_no_place_of_those_who_wait() -> None:
    async with world() as w, AsyncExitStack() as stack:
        w.cache.send(server_state("a"), snapshot=True)
        await eventually(lambda: w.state.known)
        service = bind("openmanager.gateway.v1.FleetService", w.servicer)
        server = GrpcServer([service], Interception(waiting=Waiting(1, setting="S", watchers=WATCHES)))
        channel = await stack.enter_async_context(Channel(await server.start("127.0.0.1:0")))
        stack.push_async_callback(server.stop, 0)
        stub = fleet_pb2_grpc.FleetServiceStub(channel.grpc)
        watch = stub.WatchFleet(fleet_pb2.WatchFleetRequest(after_version=w.state.version))
        await eventually(lambda: len(w.servicer._changes) == 1)
        answer = await stub.GetFleetSummary(fleet_pb2.GetFleetSummaryRequest())
        assert answer.summary.total == 1
        watch.cancel()


async def test_a_slow_watcher_gets_the_latest_and_every_server() -> None:
    async with world() as w:
        w.cache.send(server_state("a", 1, 1, 1, 1), server_state("b", 1, 1, 1, 1), snapshot=True)
        await eventually(lambda: w.state.known)
        async with w.watch() as watch:
            first = await watch.next()
            assert (first.snapshot, len(first.servers)) == (True, 2)
            for value in range(2, 50):
                w.cache.send(server_state("a", value, 1, 1, 1))
            w.cache.send(server_state("b", 7, 1, 1, 1))
            await eventually(w.caught_up)
            late = await watch.next()
            values = {server.id: server.metrics["cpu_usage"] for server in late.servers}
            assert (late.snapshot, values) == (False, {"a": 49.0, "b": 7.0})


async def test_a_filtered_watcher_sees_a_server_leave() -> None:
    async with world() as w:
        w.cache.send(server_state("a", environment="x"), server_state("b", environment="y"), snapshot=True)
        await eventually(lambda: w.state.known)
        async with w.watch(environment="x") as watch:
            assert [server.id for server in (await watch.next()).servers] == ["a"]
            w.cache.send(server_state("b", environment="y"))  # of no interest
            await eventually(w.caught_up)
            w.cache.send(server_state("a", environment="y"))
            message = await watch.next()
            assert ([one.id for one in message.removed], list(message.servers)) == (["a"], [])
            w.cache.send(server_state("b", environment="x"))
            assert [server.id for server in (await watch.next()).servers] == ["b"]
            w.cache.send(removed=("b",))
            assert [one.id for one in (await watch.next()).removed] == ["b"]


async def test_who_saw_elsewhere_what_was_missed_here_is_given_everything_anew() -> None:
    async with world() as w:
        w.cache.send(server_state("a", environment="y"), server_state("b", environment="x"), snapshot=True)
        await eventually(lambda: w.state.known)
        before = w.state.version
        w.cache.cut()
        w.cache.skip(1)  # "a" went to x, and
        w.cache.skip(1)  # "new" came there: another gateway told that
        seen_elsewhere = f"e-{w.cache.sequence}"
        w.cache.skip(1)  # "new" is gone
        w.cache.send(server_state("b", environment="x"), server_state("a", environment="y"), snapshot=True)
        await eventually(w.caught_up)
        async with w.watch(environment="x", after_version=seen_elsewhere) as watch:
            message = await watch.next()
            assert message.snapshot and set(watch.known) == {"b"}
        for known in (before, w.state.version):  # who saw all of it here, or how it is now, goes on
            async with w.watch(environment="x", after_version=known) as watch:
                w.cache.send(server_state("b", environment="x"))
                assert not (await watch.next()).snapshot


async def test_who_saw_elsewhere_a_server_that_came_and_went_between_two_messages_is_not_left_with_it() -> None:
    """A gateway that is behind is told of both in one message; another one told its watchers of each."""
    async with world() as w:
        w.cache.send(server_state("a"), snapshot=True)
        await eventually(lambda: w.state.known)
        before = w.state.version
        w.cache.skip(1)  # "new" came
        seen_elsewhere = f"e-{w.cache.sequence}"
        w.cache.send(removed=("new",))
        w.cache.send(server_state("a"))
        await eventually(w.caught_up)
        async with w.watch(after_version=seen_elsewhere) as watch:
            watch.known["new"] = fleet_pb2.Server(id="new")
            await watch.next()
            assert set(watch.known) == {"a"}
        for known in (before, w.state.version):
            async with w.watch(after_version=known) as watch:
                w.cache.send(server_state("a"))
                assert not (await watch.next()).snapshot


async def test_stretches_that_were_missed_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MAX_GAPS", 2)
    async with world() as w:
        for number in range(1, 6):
            w.cache.send(server_state("a"), snapshot=True)
            await eventually(lambda number=number: w.snapshots == number)
            w.cache.cut()
            w.cache.skip(5)
        (newest,) = w.state.all()
        assert [w.state.removed_after(newest.sequence - back) is None for back in (0, 1, 5, 6, 7, 12, 13)] == [
            *(False, True, True, False, True, False, True)
        ]


async def test_who_was_cut_off_goes_on_with_the_version_that_he_has() -> None:
    async with world() as w:
        w.cache.send(*(server_state(name, 1, 1, 1, 1) for name in "abc"), snapshot=True)
        await eventually(lambda: w.state.known)
        async with w.watch() as watch:
            await watch.next()
        w.cache.send(server_state("a", 2, 2, 2, 2), removed=("b",))
        await eventually(w.caught_up)
        async with w.watch(after_version=watch.version) as again:
            message = await again.next()
            assert ([one.id for one in message.servers], [one.id for one in message.removed]) == (["a"], ["b"])
            assert not message.snapshot and message.version == w.state.version
        for nothing in ("another-1", "0"):
            async with w.watch(after_version=nothing) as anew:
                assert (await anew.next()).snapshot and set(anew.known) == {"a", "c"}
        with pytest.raises(InvalidArgument) as fault:
            async with w.watch(after_version="nonsense") as never:
                await never.next()
        assert fault.value.field == "after_version"


async def test_who_lacks_removals_that_are_not_known_gets_everything() -> None:
    """As after a restart of the gateway: what went before nobody can say."""
    async with world() as w:
        w.cache.skip(10)
        w.cache.send(server_state("a", 1, 1, 1, 1), snapshot=True)
        await eventually(lambda: w.state.known)
        async with w.watch(after_version="e-5") as watch:
            assert (await watch.next()).snapshot
        async with w.watch(after_version=watch.version) as watch:
            w.cache.send(server_state("b", 1, 1, 1, 1))
            message = await watch.next()
            assert not message.snapshot and [server.id for server in message.servers] == ["b"]


async def test_a_cache_that_began_anew_has_everything_sent_anew() -> None:
    async with world() as w:
        w.cache.send(server_state("a", 1, 1, 1, 1), server_state("b", 1, 1, 1, 1), snapshot=True)
        await eventually(lambda: w.state.known)
        async with w.watch() as watch:
            await watch.next()
            w.cache.cut()
            w.cache.restart()
            w.cache.send(server_state("b", 5, 5, 5, 5), snapshot=True)
            message = await watch.next()
            assert message.snapshot and set(watch.known) == {"b"}


async def test_a_large_fleet_is_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MAX_WATCH_MESSAGE_BYTES", 100)
    async with world() as w:
        w.cache.send(*(server_state(f"s{number:02}", 1, 1, 1, 1) for number in range(20)), snapshot=True)
        await eventually(lambda: w.state.known)
        async with w.watch() as watch:
            first = await watch.next()
            assert first.snapshot and first.continues and 0 < len(first.servers) < 20
            w.cache.send(removed=("s00", "s19"))
            await eventually(w.caught_up)
            while (message := await watch.next()).continues:
                assert not message.snapshot
            assert set(watch.known) == {f"s{number:02}" for number in range(1, 19)}
            assert watch.version == w.state.version
        async with w.watch(after_version=watch.version) as watch:
            w.cache.send(server_state("s01", 2, 2, 2, 2))
            assert not (await watch.next()).snapshot


async def test_a_fleet_that_never_rests_is_sent_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a message is made the fleet goes on changing; the message is of the moment at which it was begun."""
    async with world() as w:
        w.cache.send(*(server_state(f"s{number:02}", 1, 1, 1, 1) for number in range(20)), snapshot=True)
        await eventually(lambda: w.state.known)
        version, make = w.state.version, ServerEntry.server

        def made_late(entry: ServerEntry, view: Any) -> bytes:
            w.state.sequence += 1
            return make(entry, view)

        monkeypatch.setattr(ServerEntry, "server", made_late)
        async with asyncio.timeout(30), w.watch() as watch:
            message = await watch.next()
        assert (message.version, len(message.servers), message.continues) == (version, 20, False)


async def test_watchers_who_want_the_same_share_the_bytes() -> None:
    async with world() as w:
        w.cache.send(*(server_state(name, 1, 1, 1, 1) for name in "abc"), snapshot=True)
        await eventually(lambda: w.state.known)
        streams = [w.servicer.WatchFleet(fleet_pb2.WatchFleetRequest(), None) for _ in range(5)]
        first = [await anext(stream) for stream in streams]
        assert all(message is first[0] for message in first)
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        w.cache.send(server_state("a", 2, 2, 2, 2))
        later = await asyncio.gather(*waiting)
        assert all(message is later[0] for message in later)
        for stream in streams:
            await stream.aclose()


async def test_equal_questions_share_the_answer_until_something_changes() -> None:
    async with world() as w:
        w.cache.send(server_state("a", 1, 1, 1, 1), server_state("b", 1, 1, 1, 1), snapshot=True)
        await eventually(lambda: w.state.known)
        answers = [await w.servicer.ListServers(fleet_pb2.ListServersRequest(), w.context) for _ in range(2)]
        other = await w.servicer.ListServers(fleet_pb2.ListServersRequest(role="web"), w.context)
        assert answers[0] is answers[1] is not other
        one = await w.get("b")
        assert one is await w.get("b")
        w.cache.send(server_state("a", 2, 2, 2, 2))
        await eventually(w.caught_up)
        later = await w.servicer.ListServers(fleet_pb2.ListServersRequest(), w.context)
        assert later is not answers[0] and later.etag != answers[0].etag
        assert one is await w.get("b"), "it did not change"
        assert (await w.get("a")).etag != one.etag


@pytest.mark.parametrize("asked", [{"view": 77}, {"status": 77}])
async def test_a_view_or_status_that_there_is_not_is_refused_and_nothing_is_kept_of_it(asked: dict[str, Any]) -> None:
    async with world() as w:
        w.cache.send(server_state("a", 1, 1, 1, 1), snapshot=True)
        await eventually(lambda: w.state.known)
        refusals = [lambda: w.page(**asked)]
        if "view" in asked:
            request = fleet_pb2.GetServerRequest(id="a", **asked)
            assert w.servicer.GetServer_at_once(request, None) is None
            refusals.append(lambda: w.servicer.GetServer(request, w.context))
            refusals.append(lambda: anext(w.servicer.WatchFleet(fleet_pb2.WatchFleetRequest(**asked), w.context)))
        for refused in refusals:
            with pytest.raises(InvalidArgument) as fault:
                await refused()
            assert fault.value.field == next(iter(asked))


async def test_while_the_subscription_is_broken_the_cache_is_asked_and_the_age_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state, "ASK_TIMEOUT_S", 20.0)
    clock = ManualClock()
    async with world(clock=clock) as w:
        w.cache.send(server_state("a", 1, 1, 1, 1), snapshot=True)
        await eventually(lambda: w.state.following)
        await w.get("a")
        assert w.context.trailers == {}, "it is current"
        w.cache.refuses_watchers = True
        w.cache.cut()
        await eventually(lambda: not w.state.following)
        w.cache.answer = w.cache.message(server_state("a", 2, 2, 2, 2), server_state("b", 2, 2, 2, 2))
        assert await w.list() == ["a", "b"]
        assert w.context.trailers == {"age": "0"}
        asked = w.cache.asked
        assert await w.list() == ["a", "b"] and w.cache.asked == asked, "it was asked a moment ago"
        w.cache.answer = None  # away altogether
        clock.advance(state.ASK_INTERVAL_S)
        assert await w.list() == ["a", "b"] and w.cache.asked > asked
        assert w.context.trailers == {"age": "1"}


async def test_an_answer_that_the_subscription_has_overtaken_takes_nobody_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "ASK_TIMEOUT_S", 20.0)
    async with world() as w:
        w.cache.send(server_state("a", 1, 1, 1, 1), snapshot=True)
        await eventually(lambda: w.state.following)
        w.cache.refuses_watchers = True
        w.cache.cut()
        await eventually(lambda: not w.state.following)
        w.cache.may_answer.clear()
        w.cache.answer = w.cache.message(server_state("a", 2, 2, 2, 2), server_state("gone", 2, 2, 2, 2))
        asked = asyncio.create_task(w.state.refresh())
        await eventually(lambda: w.cache.asked == 1)
        w.cache.send(server_state("a", 3, 3, 3, 3), snapshot=True)
        w.cache.refuses_watchers = False
        await eventually(w.caught_up)
        version = w.state.version
        w.cache.refuses_watchers = True
        w.cache.cut()
        await eventually(lambda: not w.state.following)
        w.cache.may_answer.set()
        await asked
        assert (w.state.version, w.ids()) == (version, ["a"])
        assert fleet_pb2.GetServerResponse.FromString((await w.get("a")).data).server.metrics["other"] == 3


async def test_the_summary_adds_up() -> None:
    async with world() as w:
        offline = status_pb2.SERVER_STATUS_OFFLINE
        w.cache.send(
            server_state("a"), server_state("b", status=CRITICAL), server_state("c", status=offline), snapshot=True
        )
        await eventually(lambda: w.state.known)
        answer = await w.servicer.GetFleetSummary(fleet_pb2.GetFleetSummaryRequest(), w.context)
        summary = fleet_pb2.GetFleetSummaryResponse.FromString(answer.data).summary
        assert (summary.total, summary.healthy, summary.warning, summary.critical, summary.offline) == (3, 1, 0, 1, 1)


async def test_pages_of_servers_follow_each_other() -> None:
    async with world() as w:
        w.cache.send(*(server_state(f"s{index}") for index in range(5)), snapshot=True)
        await eventually(lambda: w.state.known)
        first = await w.page(page_size=3)
        assert (len(first.servers), first.total_size) == (3, 5)
        assert await w.list(page_size=3, page_token=first.next_page_token) == ["s3", "s4"]
        with pytest.raises(InvalidArgument):
            await w.list(page_token=first.next_page_token, role="web")


async def test_while_bytes_are_made_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "TURN_S", 0.0)
    order: list[str] = []

    class Entry:
        def server(self, _view: object) -> bytes:
            order.append("made")
            return b""

    async def other() -> None:
        for _ in range(3):
            order.append("other")
            await asyncio.sleep(0)

    await asyncio.gather(changes.made([Entry(), Entry(), Entry()], fleet_pb2.SERVER_VIEW_FULL), other())
    assert order == ["made", "other"] * 3
