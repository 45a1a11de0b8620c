"""What people say of findings moves what is found later, once; and what metadata takes for open is ended in the end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from fleet.anomaly import Anomaly, anomaly_to_pb, finding_id
from fleet.codec import timestamp_from_us
from fleet.model import Rows
from openmanager.fleet.v1 import anomaly_pb2
from openmanager.metadata.v1 import anomaly_pb2 as pb
from runtime.channel import Channel
from runtime.clock import ManualClock
from runtime.errors import Unavailable
from services.analytics.openings import QUIET_WINDOWS, REST_MS
from services.analytics.scoring.verdicts import BARS, LEAST_WEIGHT, Verdicts
from services.analytics.verdicts import VerdictFollower
from tests.analytics.fakes import (
    BROKEN_METRICS,
    LEARN_TICKS,
    METRICS,
    SECRET,
    TICK_MS,
    FakeMetadata,
    Shown,
    at_ms,
    fleet_tick,
    restarted,
    same_state,
    serving,
)
from tests.analytics.test_checkpoint import batches, fed, found, new_analysis
from tests.analytics.test_silence import Fleet, always
from tests.harness import eventually

REST_TICKS = QUIET_WINDOWS + REST_MS // TICK_MS + 5


def ill(tick: int, value: float, server: int = 0) -> Rows:
    """The fleet with one server whose metrics are all the same height."""
    rows = fleet_tick(LEARN_TICKS + tick)
    rows.values[server, [METRICS.index(name) for name in BROKEN_METRICS]] = value
    return rows


def incident(shown: Shown, value: float, server: int = 0) -> Anomaly | None:
    """Three minutes of it, after a long rest: what is found, if anything."""
    shown.go_on(REST_TICKS)
    before = set(shown.found)
    for _ in range(3):
        shown.show(ill(shown.tick, value, server))
        shown.tick += 1
    shown.go_on(QUIET_WINDOWS + 2)
    new = [shown.found[one] for one in shown.found.keys() - before]
    assert len(new) <= 1
    return new[0] if new else None


def test_a_false_finding_is_not_found_again_and_a_larger_one_is() -> None:
    shown = Shown()
    mild = incident(shown, 60.0)
    assert mild is not None
    assert incident(shown, 60.0) is not None, "without a verdict it is found again"
    shown.detector.judge(mild, is_real=False)
    assert incident(shown, 60.0) is None
    assert incident(shown, 60.0, server=2) is not None, "of another server nothing was said"
    assert incident(shown, 300.0) is not None
    shown.detector = restarted(shown.detector)
    assert incident(shown, 60.0) is None, "a restart forgets no verdict"


def test_a_real_finding_gives_back_what_was_taken() -> None:
    shown = Shown()
    mild = incident(shown, 60.0)
    assert mild is not None
    shown.detector.judge(mild, is_real=False)
    assert incident(shown, 60.0) is None
    for _ in range(6):
        shown.detector.judge(mild, is_real=True)
    assert incident(shown, 60.0) is not None


def test_verdicts_have_their_bounds_and_no_effect_where_there_are_none() -> None:
    verdicts = Verdicts(2, 4)
    assert (verdicts.bars == 1).all()
    assert (verdicts.weights == 1).all()
    for _ in range(50):
        verdicts.false(0, [1, 2], 1e9)
        verdicts.real(1, [3])
    assert verdicts.bars.tolist() == [BARS[1], BARS[0]]
    assert verdicts.weights.tolist() == [1.0, LEAST_WEIGHT, LEAST_WEIGHT, 1.0]
    verdicts.false(1, [], 0.0)
    assert BARS[0] < verdicts.bars[1] < 1


def test_a_verdict_of_nobody_watched_or_of_another_detector_changes_nothing() -> None:
    shown = Shown()
    mild = incident(shown, 60.0)
    assert mild is not None
    before = shown.detector.state()
    shown.detector.judge(replace(mild, server_id="nobody"), is_real=False)
    shown.detector.judge(replace(mild, detector="crystal ball"), is_real=False)
    same_state(shown.detector.state(), before)
    shown.detector.judge(mild, is_real=False)
    with pytest.raises(AssertionError):
        same_state(shown.detector.state(), before)


def test_who_may_be_silent_for_longer_is_found_later() -> None:
    fleet = Fleet(a=always, b=lambda tick: tick % 400 < 100 or tick % 400 >= 105)
    fleet.play(400)
    (opened,) = fleet.found.values()
    fleet.detector.judge(opened, is_real=False)
    assert fleet.detector.about().raised == 1
    fleet.play(400)
    assert len(fleet.found) == 1, "silent for as long as when it was no fault"
    fleet.sends["b"] = lambda tick: tick < 900
    fleet.play(150)
    assert len(fleet.found) == 2
    for _ in range(8):
        fleet.detector.judge(opened, is_real=True)
    fleet.sends["b"] = lambda tick: (tick - 950) % 400 < 300 or (tick - 950) % 400 >= 305
    fleet.play(700)
    assert len(fleet.found) == 3


def told(version: int, *findings: pb.FollowAnomaliesResponse | Any, snapshot: bool = False) -> Any:
    return pb.FollowAnomaliesResponse(version=version, snapshot=snapshot, anomalies=findings)


def judged(finding: Anomaly, is_real: bool, at_us: int) -> anomaly_pb2.Anomaly:
    message = anomaly_to_pb(finding)
    message.verdict = anomaly_pb2.ANOMALY_VERDICT_REAL if is_real else anomaly_pb2.ANOMALY_VERDICT_FALSE
    message.verdict_remark.time.CopyFrom(timestamp_from_us(at_us))
    return message


@asynccontextmanager
async def following(analysis: Any) -> AsyncIterator[FakeMetadata]:
    """An analysis that follows a played metadata, as the process does."""
    fake = FakeMetadata()
    async with serving(fake) as address, Channel(address, secret=SECRET) as channel:
        follower = VerdictFollower(channel, analysis)

        async def follow() -> None:
            while True:
                try:
                    await follower.follow()
                except Unavailable:
                    await asyncio.sleep(0.01)

        task = asyncio.create_task(follow())
        yield fake
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def bars(analysis: Any) -> list[float]:
    array: np.ndarray[Any, Any] = analysis.detector.state().arrays["verdicts.servers.bar"]
    return [float(bar) for bar in array]


async def test_each_verdict_counts_once_also_over_restarts() -> None:
    analysis = await fed(60)
    (finding,) = found(analysis).values()
    async with following(analysis) as fake:
        fake.to_tell.put_nowait(told(1_000, judged(finding, False, 900), snapshot=True))  # said before anybody followed
        await eventually(lambda: analysis.verdicts_until == 1_000)
        assert bars(analysis) == [1.0, 1.0, 1.0]
        fake.to_tell.put_nowait(told(2_000, judged(finding, False, 1_500)))
        await eventually(lambda: analysis.verdicts_until == 2_000)
        once = bars(analysis)
        assert once[0] > 1.0
        fake.to_tell.put_nowait(told(3_000, judged(finding, False, 1_500)))  # the finding changed, not the verdict
        await eventually(lambda: analysis.verdicts_until == 3_000)
        assert bars(analysis) == once
        fake.to_tell.put_nowait(None)
        await eventually(lambda: fake.followed_from == [0, 3_000])
    again = new_analysis()
    again.restore(await analysis.snapshot())
    async with following(again) as fake:
        fake.to_tell.put_nowait(told(3_000, judged(finding, False, 1_500), snapshot=True))
        fake.to_tell.put_nowait(told(4_000, judged(finding, True, 3_500)))
        await eventually(lambda: again.verdicts_until == 4_000)
        assert fake.followed_from == [3_000]
    assert 1.0 < bars(again)[0] < once[0]


async def test_what_is_open_in_metadata_only_is_ended_once_the_tail_has_come_so_far() -> None:
    analysis = await fed(25)  # a finding of server-0 goes on
    ((here_id, here),) = found(analysis).items()
    analysis.outbox.acknowledge([here])
    lost = replace(here, id=finding_id("server-1", "departure", 5), server_id="server-1", start_ms=5, peak_ms=60_005)
    others = replace(lost, id=finding_id("elsewhere", "departure", 5), server_id="elsewhere")
    cast("ManualClock", analysis._clock).set_now_ms(at_ms(24))
    version = 5_000  # an old one: nothing was said since
    async with following(analysis) as fake:
        message = told(version, *(anomaly_to_pb(one) for one in (here, lost, others)), snapshot=True)
        fake.to_tell.put_nowait(message)
        await eventually(lambda: analysis.verdicts_until == version)
    ended_at: list[int] = []
    for batch in batches(31)[25:]:
        await analysis.apply(batch)
        if lost.id in found(analysis) and not ended_at:
            ended_at.append(batch.received_ms)
    assert ended_at == [at_ms(26)], "two minutes behind the list, not before"
    ended = found(analysis)[lost.id]
    assert (ended.end_ms, ended.revision) == (120_005, lost.revision + 1)
    assert others.id not in found(analysis), "it may be another analytics that finds it"
    assert here_id in analysis.detector.open_ids()


async def test_what_ended_between_two_lists_of_a_stream_is_not_ended_again() -> None:
    """Metadata lists what goes on once more in the same stream, when its database is back."""
    analysis = await fed(25)
    ((_, here),) = found(analysis).items()
    analysis.outbox.acknowledge([here])
    over, lost = (
        replace(here, id=finding_id(server, "departure", 5), server_id=server, start_ms=5, peak_ms=60_005)
        for server in ("server-1", "server-2")
    )
    cast("ManualClock", analysis._clock).set_now_ms(at_ms(24))
    async with following(analysis) as fake:
        fake.to_tell.put_nowait(told(5_000, *map(anomaly_to_pb, (over, lost)), snapshot=True))
        fake.to_tell.put_nowait(told(6_000, anomaly_to_pb(over.changed(end_ms=70_000))))
        fake.to_tell.put_nowait(told(6_000, anomaly_to_pb(lost), snapshot=True))
        fake.to_tell.put_nowait(told(7_000))
        await eventually(lambda: analysis.verdicts_until == 7_000)
    for batch in batches(31)[25:]:
        await analysis.apply(batch)
    assert found(analysis).keys() - {here.id} == {lost.id}


async def test_a_server_that_is_heard_here_is_not_silent_whoever_misses_it() -> None:
    """Its rows went to another replica while this one was away, and the analytics there waits for more of them."""
    analysis = await fed(25)
    ((_, here),) = found(analysis).items()
    analysis.outbox.acknowledge([here])
    at = at_ms(20)
    missed, over, elsewhere = (
        replace(
            here, id=finding_id(server, "silence", at), server_id=server, detector="silence", start_ms=at, peak_ms=at
        )
        for server in ("server-1", "server-2", "elsewhere")
    )
    departure = replace(missed, id=finding_id("server-1", "departure", at), detector="departure")
    cast("ManualClock", analysis._clock).set_now_ms(at_ms(24))
    async with following(analysis) as fake:
        fake.to_tell.put_nowait(told(5_000, snapshot=True))
        changed = (missed, over, elsewhere, departure)
        fake.to_tell.put_nowait(told(6_000, *(anomaly_to_pb(one) for one in changed)))
        fake.to_tell.put_nowait(told(7_000, anomaly_to_pb(over.changed(end_ms=at + 50_000))))
        await eventually(lambda: analysis.verdicts_until == 7_000)
    for batch in batches(31)[25:]:
        await analysis.apply(batch)
    told_since = found(analysis).keys() - {here.id}
    assert told_since == {missed.id}
    assert found(analysis)[missed.id].end_ms == at + 60_000


async def test_silence_of_a_server_that_is_gone_does_not_go_on_for_ever_where_who_found_it_lost_its_memory() -> None:
    analysis = await fed(25)
    ((_, here),) = found(analysis).items()
    analysis.outbox.acknowledge([here])
    start_ms = at_ms(0)
    gone = replace(
        here, id=finding_id("gone", "silence", start_ms), server_id="gone", detector="silence", start_ms=start_ms
    )
    departure = replace(gone, id=finding_id("gone", "departure", start_ms), detector="departure")
    analysis.take_going_on([gone, departure])
    (batch,) = batches(26)[25:]
    ended_on: list[int] = []
    for day in range(1, 10):
        await analysis.apply(replace(batch, sequence=100 + day, received_ms=start_ms + day * 86_400_000))
        if gone.id in found(analysis) and not ended_on:
            ended_on.append(day)
    assert ended_on == [8], "whoever else has found it ends it after a week"
    assert found(analysis)[gone.id].end_ms == max(gone.start_ms, gone.peak_ms + 60_000)
    assert departure.id not in found(analysis)
