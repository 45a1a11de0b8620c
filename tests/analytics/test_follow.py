"""Following the tail over real gRPC: every row once, in order, whatever happens to the stream."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.model import Rows
from runtime.channel import Channel
from runtime.clock import SystemClock
from runtime.errors import FailedPrecondition, InvalidArgument, OpenManagerError, Unavailable
from runtime.tasks import Backoff, run_forever
from services.analytics import follow
from services.analytics.core import Analysis
from services.analytics.follow import MAX_PART_ROWS, TailFollower, parts_of
from services.analytics.outbox import Outbox
from tests.analytics.fakes import (
    METRICS,
    SECRET,
    FakeTimeSeries,
    at_ms,
    fleet_ticks,
    rows_of,
    same_state,
    serving,
    show,
    trained,
)
from tests.harness import eventually

FAST = Backoff(initial_s=0.01, max_s=0.05)


class Following:
    """An analysis that follows a fake."""

    def __init__(self, fake: FakeTimeSeries, channel: Channel) -> None:
        self.fake = fake
        self.analysis = Analysis(trained(), Outbox(), SystemClock())
        self.follower = TailFollower(channel, self.analysis)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(run_forever("tail", self.follower.follow, FAST))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def seen(self, sequence: int) -> None:
        await eventually(lambda: self.analysis.next_sequence == sequence + 1)

    async def listening(self) -> None:
        await eventually(lambda: self.fake.streams == 1)

    def asked_again(self, times: int) -> bool:
        return len(self.fake.asked) > times


@pytest.fixture
async def following() -> AsyncIterator[Following]:
    fake = FakeTimeSeries()
    async with serving(fake) as address, Channel(address, secret=SECRET) as channel:
        yield Following(fake, channel)


def same_as(following: Following, ticks: list[Rows]) -> None:
    """Whether what is known is what a detector knows that was shown these ticks, each once."""
    detector = trained()
    for rows in ticks:
        show(detector, rows)
    same_state(following.analysis.detector.state(), detector.state())


async def test_without_a_place_it_starts_from_now(following: Following) -> None:
    ticks = fleet_ticks(6)
    for rows in ticks[:3]:
        following.fake.append(rows)
    async with following.running():
        await following.listening()
        for rows in ticks[3:]:
            following.fake.append(rows)
        await following.seen(6)
    assert following.fake.asked == [0]
    assert following.analysis.counters.rows == 9
    assert following.analysis.counters.lost_batches == 0


async def test_streams_that_break_cost_no_row_and_double_none(following: Following) -> None:
    following.analysis.pass_to(1)
    async with following.running():
        for number, rows in enumerate(fleet_ticks(120), start=1):
            following.fake.append(rows)
            if number % 20 == 0:
                await following.seen(number)
                following.fake.break_streams()
                await eventually(functools.partial(following.asked_again, number // 20))
        await following.seen(120)
    assert following.fake.asked == [1, 21, 41, 61, 81, 101, 121]
    same_as(following, fleet_ticks(120))
    assert following.analysis.counters.lost_batches == 0
    assert len(following.analysis.outbox) == 2


async def test_a_lost_stretch_of_the_tail_is_told(following: Following, caplog: pytest.LogCaptureFixture) -> None:
    for rows in fleet_ticks(50):
        following.fake.append(rows)
    following.fake.swept = 40
    following.analysis.pass_to(11)
    async with following.running():
        await following.seen(50)
        assert following.analysis.counters.lost_batches == 30
        assert "begins at sequence 41, 11 was asked for" in caplog.text
        following.fake.append(fleet_ticks(51)[50])
        await following.seen(51)
    assert following.analysis.counters.lost_batches == 30
    assert following.analysis.counters.rows == 33


async def test_batches_that_come_again_are_passed_over(following: Following) -> None:
    following.fake.resent = 2
    following.analysis.pass_to(4)
    for rows in fleet_ticks(5):
        following.fake.append(rows)
    async with following.running():
        await following.seen(5)
    assert following.fake.asked == [4]
    assert following.analysis.counters.batches == 2
    same_as(following, fleet_ticks(5)[3:])


async def test_batches_without_rows_are_passed(following: Following) -> None:
    following.analysis.pass_to(1)
    async with following.running():
        following.fake.append(None)
        following.fake.append(fleet_ticks(1)[0])
        following.fake.append(None)
        await following.seen(3)
    assert following.analysis.counters.rows == 3


async def test_timeseries_that_is_away_is_found_again() -> None:
    fake = FakeTimeSeries()
    async with contextlib.AsyncExitStack() as stack:
        async with serving(fake) as address:
            channel = await stack.enter_async_context(Channel(address, secret=SECRET))
            following = Following(fake, channel)
            await stack.enter_async_context(following.running())
            await following.listening()
            fake.append(fleet_ticks(1)[0])
            await following.seen(1)
        fake.append(fleet_ticks(2)[1])
        async with serving(fake, address):
            await eventually(lambda: following.analysis.next_sequence == 3, within_s=30)
    assert following.analysis.counters.rows == 6


async def test_an_unreachable_peer_is_a_typed_error(following: Following) -> None:
    async with Channel("127.0.0.1:1", secret=SECRET) as nowhere:
        with pytest.raises(Unavailable):
            await TailFollower(nowhere, following.analysis).follow()


async def test_a_batch_that_cannot_be_judged_does_not_hold_up_the_others(
    following: Following, caplog: pytest.LogCaptureFixture
) -> None:
    following.analysis.pass_to(1)
    for rows in fleet_ticks(3):
        following.fake.append(rows)
    del following.fake.journal[1].batch.values[-1]
    with pytest.raises(InvalidArgument):
        await following.follower.follow()
    assert following.analysis.next_sequence == 2
    async with following.running():
        await following.seen(3)
    assert following.fake.asked == [1, 2]
    assert following.analysis.counters.skipped_batches == 1
    assert "batch 2 cannot be judged" in caplog.text


async def test_a_set_that_was_not_sent_is_asked_for_by_a_new_stream(following: Following) -> None:
    following.analysis.pass_to(1)
    following.fake.append(fleet_ticks(1)[0])
    following.fake.withhold_set = True
    with pytest.raises(FailedPrecondition):
        await following.follower.follow()
    following.fake.withhold_set = False
    async with following.running():
        await following.seen(1)
    assert following.analysis.counters.skipped_batches == 0
    assert following.analysis.counters.rows == 3


async def test_a_stream_with_too_many_sets_starts_over(following: Following, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "MAX_STREAM_SETS", 0)
    following.analysis.pass_to(1)
    following.fake.append(fleet_ticks(1)[0])
    with pytest.raises(OpenManagerError, match="MAX_STREAM_SETS"):
        await following.follower.follow()
    assert following.analysis.next_sequence == 1


async def test_another_journal_is_followed_from_now(following: Following, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_args: object) -> None:
        raise FailedPrecondition("the journal ends before", reason="SEQUENCE_AHEAD")

    following.fake.append(fleet_ticks(1)[0])
    following.analysis.pass_to(1)
    with monkeypatch.context() as patched:
        patched.setattr(following.follower, "_take", refuse)
        with pytest.raises(FailedPrecondition):
            await following.follower.follow()
    assert following.analysis.next_sequence == 0


async def test_many_rows_of_one_server_in_one_batch_are_taken_in_order(following: Following) -> None:
    random = np.random.default_rng(3)
    values = 30.0 + random.standard_normal((180, len(METRICS)))
    times = at_ms(1) + 1_000 * np.arange(180)
    order = random.permutation(180)
    following.analysis.pass_to(1)
    async with following.running():
        rows = rows_of(["web-1"] * 180, times[order].tolist(), values[order])
        following.fake.append(rows, received_ms=at_ms(1))
        await following.seen(1)
    detector = trained()
    for time_ms, row in zip(times.tolist(), values, strict=True):
        show(detector, rows_of(["web-1"], [time_ms], row), at_ms(1))
    same_state(following.analysis.detector.state(), detector.state())
    assert detector.untimely_rows == 0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 5)), max_size=30))
def test_parts_hold_each_row_once_and_each_server_in_order(rows: list[tuple[str, int]]) -> None:
    servers, times = [server for server, _ in rows], np.array([time for _, time in rows], np.int64)
    parts = parts_of(servers, times)
    assert sorted(index for part in parts for index in part.tolist()) == list(range(len(rows)))
    newest: dict[str, int] = {}
    for part in parts:
        names = [servers[index] for index in part]
        assert len(set(names)) == len(names)
        for index in part.tolist():
            assert times[index] >= newest.get(servers[index], 0)
            newest[servers[index]] = int(times[index])


def test_parts_are_bounded() -> None:
    assert [len(part) for part in parts_of(["a", "b", "c", "d", "e"], np.zeros(5, np.int64), 2)] == [2, 2, 1]
    assert [len(part) for part in parts_of(["a", "b"], np.zeros(2, np.int64), 0)] == [1, 1]
    count = 3 * MAX_PART_ROWS + 1
    parts = parts_of([f"s{number}" for number in range(count)], np.zeros(count, np.int64))
    assert [len(part) for part in parts] == [MAX_PART_ROWS] * 3 + [1]
