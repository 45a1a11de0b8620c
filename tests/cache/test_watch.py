"""The watch stream: a snapshot, then what changed, for readers of any speed."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from openmanager.cache.v1 import cache_pb2
from runtime.clock import ManualClock
from runtime.errors import ResourceExhausted
from services.cache import state as state_module
from services.cache import watch as watch_module
from services.cache.watch import WATCH_INTERVAL_S, Watchers
from services.cache.wire import Encoder
from tests.cache.samples import HEADLINE, T0, World, rows_of, set_of
from tests.harness import eventually


class Watched(World):
    """A world with watchers, whose every change is told to them."""

    def __init__(self) -> None:
        super().__init__()
        self.pace = ManualClock()
        self.watchers = Watchers(self.live, Encoder(), self.pace)

    def change(self, server_id: str, cpu: float) -> None:
        self.clock.advance(0.001)
        self.report(server_id, cpu)
        self.watchers.notify()

    def remove(self, server_id: str) -> None:
        self.live.remove([server_id])
        self.watchers.notify()

    async def read(self, stream: AsyncGenerator[bytes, None]) -> cache_pb2.WatchServersResponse:
        """The next message; time passes by itself."""
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        self.pace.advance(WATCH_INTERVAL_S)
        async with asyncio.timeout(5):
            return cache_pb2.WatchServersResponse.FromString(await waiting)


@pytest.fixture
def world() -> Watched:
    return Watched()


def cpu_of(message: cache_pb2.WatchServersResponse) -> dict[str, float]:
    return {state.descriptor.server_id: state.samples[0].values[0] for state in message.states}


async def test_the_first_message_is_everything_and_the_next_ones_what_changed(world: Watched) -> None:
    world.change("a", 1)
    world.change("b", 2)
    async with aclosing(world.watchers.watch()) as stream:
        first = await world.read(stream)
        assert first.snapshot
        assert cpu_of(first) == {"a": 1, "b": 2}
        assert (first.version.epoch, first.version.sequence) == ("e1", 2)
        assert [found.id for found in first.metric_sets] == [HEADLINE.id]
        world.change("b", 3)
        second = await world.read(stream)
        assert not second.snapshot
        assert cpu_of(second) == {"b": 3}
        assert second.version.sequence == second.states[0].sequence == 3
        assert not second.metric_sets


async def test_an_empty_fleet_is_a_snapshot_too(world: Watched) -> None:
    async with aclosing(world.watchers.watch()) as stream:
        first = await world.read(stream)
        assert (first.snapshot, len(first.states), first.version.sequence) == (True, 0, 0)


async def test_a_reader_that_pauses_gets_the_latest_of_each_server_once(world: Watched) -> None:
    world.change("quiet", 0)
    async with aclosing(world.watchers.watch()) as stream:
        await world.read(stream)
        for cpu in range(1, 101):
            world.change("a", cpu % 70)
            world.change("b", cpu % 50)
        message = await world.read(stream)
        assert cpu_of(message) == {"a": 100 % 70, "b": 100 % 50}
        assert message.version.sequence == world.live.sequence
        world.change("a", 7)
        assert cpu_of(await world.read(stream)) == {"a": 7}


async def test_removals_are_told_and_a_server_that_comes_back_is_a_state(world: Watched) -> None:
    world.change("a", 1)
    world.change("b", 1)
    async with aclosing(world.watchers.watch()) as stream:
        await world.read(stream)
        world.remove("a")
        message = await world.read(stream)
        assert (list(message.removed_server_ids), len(message.states)) == (["a"], 0)
        world.change("b", 2)
        world.remove("b")
        message = await world.read(stream)
        assert (list(message.removed_server_ids), len(message.states)) == (["b"], 0)
        world.clock.advance(1)
        world.rows(rows_of(HEADLINE, {"a": (5, 1, 1)}, world.clock.now_ms()), admit_removed=True)
        world.watchers.notify()
        message = await world.read(stream)
        assert (list(message.removed_server_ids), cpu_of(message)) == ([], {"a": 5})


async def test_a_set_is_sent_once_and_with_the_first_state_that_needs_it(world: Watched) -> None:
    world.change("a", 1)
    other = set_of("x")
    async with aclosing(world.watchers.watch()) as stream:
        await world.read(stream)
        sent = []
        for step in range(2):
            world.rows(rows_of(other, {"b": (1,)}, T0 + step))
            world.watchers.notify()
            sent.append([found.id for found in (await world.read(stream)).metric_sets])
        assert sent == [[other.id], []]


async def test_watchers_that_keep_up_share_the_same_bytes(world: Watched) -> None:
    world.change("a", 1)
    async with aclosing(world.watchers.watch()) as one, aclosing(world.watchers.watch()) as other:
        await asyncio.gather(anext(one), anext(other))
        world.change("a", 2)
        waiting = asyncio.gather(anext(one), anext(other))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        world.pace.advance(WATCH_INTERVAL_S)
        first, second = await waiting
        assert first is second


async def test_a_burst_of_changes_is_one_message(world: Watched) -> None:
    async with aclosing(world.watchers.watch()) as stream:
        await anext(stream)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        world.change("a", 1)
        await eventually(lambda: world.pace.sleepers == 1)
        for server_id in "bcd":
            world.change(server_id, 1)
        assert not waiting.done()
        world.pace.advance(WATCH_INTERVAL_S)
        message = cache_pb2.WatchServersResponse.FromString(await waiting)
        assert sorted(cpu_of(message)) == ["a", "b", "c", "d"]
        world.pace.advance(60)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        world.change("a", 2)
        await eventually(waiting.done)  # after a pause nothing waits


async def test_a_large_snapshot_comes_in_parts_and_leaves_nothing_out(
    world: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(50):
        world.change(f"s{index}", index)
    monkeypatch.setattr(watch_module, "MAX_WATCH_MESSAGE_BYTES", 1_000)
    async with aclosing(world.watchers.watch()) as stream:
        messages = [await world.read(stream)]
        world.change("s0", 99)
        while messages[-1].version.sequence < world.live.sequence:
            messages.append(await world.read(stream))
    assert len(messages) > 3
    assert [message.snapshot for message in messages] == [True] + [False] * (len(messages) - 1)
    assert all(message.ByteSize() < 1_500 for message in messages)
    known: dict[str, float] = {}
    for message in messages:
        known |= cpu_of(message)
    assert known == {f"s{index}": float(index) for index in range(50)} | {"s0": 99}


async def test_a_watcher_that_missed_forgotten_removals_starts_over(
    world: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "MAX_REMOVED_SERVERS", 1)
    for server_id in "abc":
        world.change(server_id, 1)
    async with aclosing(world.watchers.watch()) as stream:
        await world.read(stream)
        world.remove("a")
        world.remove("b")
        message = await world.read(stream)
        assert message.snapshot
        assert list(cpu_of(message)) == ["c"]


async def test_a_watcher_is_not_told_everything_anew_whenever_more_are_removed_than_are_remembered(
    world: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway has every deleted server removed whenever it is told everything, and would be for ever."""
    monkeypatch.setattr(state_module, "MAX_REMOVED_SERVERS", 2)
    world.change("here", 1)
    async with aclosing(world.watchers.watch()) as stream:
        snapshots = 0
        for _ in range(4):
            message = await world.read(stream)
            snapshots += message.snapshot
            for server_id in "abcd":  # none is there
                world.remove(server_id)
            if message.version.sequence == world.live.sequence:
                break
        assert snapshots == 1
        assert message.version.sequence == world.live.sequence, "nothing is left to be told"


async def test_watchers_are_bounded_and_leaving_makes_room(world: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "MAX_WATCHERS", 1)
    stream = world.watchers.watch()
    await anext(stream)
    with pytest.raises(ResourceExhausted, match="MAX_WATCHERS"):
        await anext(world.watchers.watch())
    await stream.aclose()
    assert len(world.watchers) == 0
    async with aclosing(world.watchers.watch()) as again:
        await anext(again)
