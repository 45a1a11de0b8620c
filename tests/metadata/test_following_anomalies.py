"""Who follows the findings misses nothing."""

import asyncio
import signal
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from fleet.codec import us_from_timestamp
from openmanager.metadata.v1 import anomaly_pb2 as pb
from runtime.clock import ManualClock
from runtime.errors import Unavailable
from runtime.limits import MAX_MESSAGE_BYTES
from services.metadata.anomalies.model import Recorded
from services.metadata.anomalies.servicer import AnomalyStoreServicer
from services.metadata.anomalies.store import AnomalyStore, Told
from tests.harness import eventually
from tests.harness.postgres import PostgresServer
from tests.metadata.anomaly_parts import (
    NOON_MS,
    Scene,
    anomaly,
    lagging,
    shape,
    store_of,
)
from tests.metadata.parts import Parts, opened


@pytest.fixture
async def store(parts: Parts) -> AnomalyStore:  # type: ignore[override]
    return await store_of(parts)


class Follower:
    """Somebody who follows the findings, and what he knows of them."""

    def __init__(self, store: AnomalyStore, after: int = 0) -> None:
        self._told = store.follow(after)
        self.version = after
        self.known: dict[str, Recorded] = {}
        self.is_partial = False

    async def take(self) -> Told:
        told = await anext(self._told)
        self.version = told.version
        self.is_partial |= told.is_partial
        self.known |= {one.anomaly.id: one for one in told.findings if one.anomaly is not None}
        return told

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20.0):
            while not condition():
                await self.take()

    async def close(self) -> None:
        await self._told.aclose()


def same(follower: Follower, known: dict[str, Recorded], ids: Sequence[str]) -> Callable[[], bool]:
    return lambda: all(shape(follower.known.get(one, Recorded())) == shape(known[one]) for one in ids)


async def test_followers_miss_nothing(parts: Parts, store: AnomalyStore) -> None:
    scene = Scene(store)
    await scene.play(60)
    follower = Follower(store)
    snapshot = await follower.take()
    goes_on = {one for one, known in scene.known.items() if known.anomaly is not None and known.anomaly.end_ms is None}
    assert snapshot.is_snapshot
    assert set(follower.known) == goes_on
    before = dict(scene.known)

    await asyncio.gather(*(scene.play(20) for _ in range(4)))  # at once with each other
    scene.known = {one: await store.get(one) for one in scene.known}
    changed = [one for one in scene.known if shape(scene.known[one]) != shape(before.get(one, Recorded()))]
    assert len(changed) > 20
    await follower.until(same(follower, scene.known, changed))
    version = follower.version
    await follower.close()

    before = dict(scene.known)
    async with lagging(parts):
        await scene.play(20)
        again = Follower(store, version)
        changed = [one for one in scene.known if shape(scene.known[one]) != shape(before.get(one, Recorded()))]
        assert len(changed) > 5
        await again.until(same(again, scene.known, changed))
        await again.close()
    await parts.all_inserted()
    other = Follower(store, version)
    await other.until(same(other, scene.known, changed))
    await other.close()


async def test_who_has_all_there_is_is_told_so_however_long_ago_the_last_change_was(
    parts: Parts, store: AnomalyStore
) -> None:
    """A gateway that starts asks for the last hour, and knows what goes on once it is told up to when."""
    await store.record([anomaly()])
    last_us = (await store.get(anomaly().id)).changed_us
    for later_us in (0, 1, 3_600_000_000):
        follower = Follower(store, last_us + later_us)
        async with asyncio.timeout(20.0):
            assert (await follower.take()).is_snapshot
            told = await follower.take()
        assert (told.is_snapshot, told.version, told.findings) == (False, last_us, [])
        if later_us < 2:
            await follower.close()
    await store.record([anomaly("web-2")])
    await follower.until(lambda: anomaly("web-2").id in follower.known)
    await follower.close()


@pytest.mark.parametrize("is_snapshot", [True, False])
async def test_large_findings_are_told_in_parts_that_go_over_the_wire(is_snapshot: bool) -> None:
    part = replace(anomaly().contributions[0], metric="m" * 100_000)
    large = [
        Recorded(anomaly=anomaly(minute=minute, contributions=(part,) * 10), told_us=1_000 + minute)
        for minute in range(24)
    ]

    class Played:
        async def follow(self, _after_us: int) -> AsyncGenerator[Told, None]:
            yield Told(version=1_023, findings=large, is_snapshot=is_snapshot, continues=is_snapshot)

    servicer = AnomalyStoreServicer(cast("AnomalyStore", Played()))
    messages = [one async for one in servicer.FollowAnomalies(pb.FollowAnomaliesRequest(), None)]
    assert len(messages) > 1 and max(one.ByteSize() for one in messages) < MAX_MESSAGE_BYTES
    assert [one.id for message in messages for one in message.anomalies] == [
        known.anomaly.id for known in large if known.anomaly is not None
    ]
    for message in messages:
        assert (message.snapshot, message.continues) == (is_snapshot, is_snapshot)
        assert message.version == (1_023 if is_snapshot else us_from_timestamp(message.anomalies[-1].update_time))


async def test_after_a_quiet_day_followers_are_told_what_is_found_while_postgresql_is_away(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    target = await own_server.fresh_database()
    async with opened(target, tmp_path) as parts:
        clock = ManualClock(NOON_MS)
        store = await AnomalyStore.opened(parts.database, parts.facts, clock)
        start = store.follow(0)
        began_us = (await anext(start)).version
        await start.aclose()
        clock.advance(3_600)
        await store.record([anomaly()])
        last_us = (await store.get(anomaly().id)).changed_us
        await parts.all_inserted()
        clock.advance(25 * 3_600)
        own_server.stop(signal.SIGQUIT)
        await store.record([anomaly("web-2")])
        follower = Follower(store, last_us)
        await follower.until(lambda: anomaly("web-2").id in follower.known and follower.version > last_us)
        await follower.close()
        behind = Follower(store, began_us)
        with pytest.raises(Unavailable) as refused:  # what changed an hour later may have left the journal
            await behind.until(lambda: behind.version > began_us)
        assert refused.value.reason == "OLDER_UNAVAILABLE"


async def test_a_clock_that_was_set_back_hides_nothing_from_followers(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    target = await own_server.fresh_database()
    async with opened(target, tmp_path) as parts:
        clock = ManualClock(NOON_MS)
        store = await AnomalyStore.opened(parts.database, parts.facts, clock)
        await store.record([anomaly()])
        follower = Follower(store)
        await follower.take()
        await follower.close()
        earlier = ManualClock(NOON_MS - 3_600_000)
        restarted = await AnomalyStore.opened(parts.database, parts.facts, earlier)
        again = Follower(restarted, follower.version)
        await again.take()
        await restarted.record([anomaly(minute=1)])
        await again.until(lambda: anomaly(minute=1).id in again.known)
        await again.close()


@pytest.mark.parametrize("is_away", [False, True])
async def test_a_clock_that_was_set_back_for_longer_than_the_journal_goes_back_hides_nothing_from_followers(
    own_server: PostgresServer, tmp_path: Path, *, is_away: bool
) -> None:
    target = await own_server.fresh_database()
    (tmp_path / "later").mkdir()
    async with opened(target, tmp_path) as parts:
        store = await AnomalyStore.opened(parts.database, parts.facts, ManualClock(NOON_MS))
        await store.record([anomaly()])
        follower = Follower(store)
        await follower.take()
        await follower.close()
        await parts.all_inserted()
    if is_away:
        own_server.stop()
    async with opened(target, tmp_path / "later") as parts:  # whose journal has nothing of it any more
        restarted = await AnomalyStore.opened(parts.database, parts.facts, ManualClock(NOON_MS - 3_600_000))
        if is_away:
            own_server.start()
            await parts.all_inserted()
            await eventually(lambda: parts.database.usable)
        again = Follower(restarted, follower.version)
        await again.take()
        await restarted.record([anomaly(minute=1)])
        await again.until(lambda: anomaly(minute=1).id in again.known)
        await again.close()
