"""Who follows the findings misses nothing."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from runtime.clock import ManualClock
from services.metadata.anomalies.model import Recorded
from services.metadata.anomalies.store import AnomalyStore, Told
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
