"""Findings: recorded by detectors, remarked on by people, listed and followed, with PostgreSQL and without."""

import asyncio
import math
import random
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from fleet.anomaly import Anomaly, Contribution, finding_id
from runtime.clock import ManualClock, SystemClock
from runtime.errors import InvalidArgument, NotFound, Unavailable
from services.metadata.anomalies.model import Recorded
from services.metadata.anomalies.query import AnomalyFilter
from services.metadata.anomalies.store import AnomalyStore, Told
from tests.harness.postgres import PostgresServer
from tests.metadata.parts import Parts, opened
from tests.metadata.test_connection import QUICK

NOON_MS = 1_790_000_000_000
MINUTE_MS = 60_000
EVERYTHING = AnomalyFilter()
HITS = 12


def anomaly(server_id: str = "web-1", minute: int = 0, detector: str = "departure", **fields: object) -> Anomaly:
    start_ms = NOON_MS + minute * MINUTE_MS
    part = Contribution(metric="cpu_usage", value=99.5, expected_low=math.nan, expected_high=30.0, score=0.75)
    made = Anomaly(
        id=finding_id(server_id, detector, start_ms),
        server_id=server_id,
        metric="cpu_usage",
        start_ms=start_ms,
        end_ms=None,
        peak_ms=start_ms,
        score=0.5,
        value=math.inf,
        expected_low=-0.1,
        expected_high=0.1 + 0.2,
        detector=detector,
        contributions=(part, replace(part, metric='disk{path="C:\\"}', score=0.0)),
    )
    return replace(made, **fields)  # type: ignore[arg-type]


@pytest.fixture
async def store(parts: Parts) -> AnomalyStore:  # type: ignore[override]
    return await store_of(parts)


async def store_of(parts: Parts) -> AnomalyStore:
    return await AnomalyStore.opened(parts.database, parts.facts, SystemClock())


@asynccontextmanager
async def lagging(parts: Parts) -> AsyncIterator[None]:
    """PostgreSQL answers and takes nothing in."""
    async with parts.database.connection() as connection, connection.transaction():
        await connection.execute("LOCK TABLE anomalies, anomaly_remarks IN EXCLUSIVE MODE")
        yield


def shape(known: Recorded) -> str:
    """All of it, NaN equal to itself."""
    return repr(known)


async def listed(store: AnomalyStore, filters: AnomalyFilter = EVERYTHING, size: int = 25) -> list[Recorded]:
    """All that match; totals and staleness agree from page to page."""
    found: list[Recorded] = []
    totals, token = set(), ""
    while True:
        try:
            page = await store.listing(filters, page_size=size, page_token=token)
        except Unavailable as error:
            assert error.reason == "OLDER_UNAVAILABLE"
            return found
        found += page.items
        totals.add(page.total_size)
        if not (token := page.next_page_token):
            assert totals == {len(found)}
            return found


async def test_everything_comes_back_from_the_journal_and_from_postgresql(parts: Parts, store: AnomalyStore) -> None:
    told = anomaly()
    async with lagging(parts):
        await store.record([told])
        said = await store.remark(told.id, is_real=None, author="ada", comment="mine; '--")
        judged = await store.remark(told.id, is_real=False, author="bob", comment="")
        journal = [await store.get(told.id), *await listed(store)]
    await parts.all_inserted()
    both = [await store.get(told.id), *await listed(store)]
    async with parts.database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM anomalies") == 1
        assert await connection.fetchval("SELECT value FROM anomalies") is None
    assert said.acknowledged is not None
    assert said.verdict is None
    assert judged.verdict is not None
    assert (judged.acknowledged, judged.verdict.is_real, judged.verdict.author) == (said.acknowledged, False, "bob")
    expected = replace(judged, anomaly=replace(told, value=math.nan))
    assert {shape(one) for one in [*journal, *both]} == {shape(expected)}
    assert judged.changed_us == judged.verdict.time_us > said.acknowledged.time_us > said.told_us


@pytest.mark.parametrize("is_lagging", [True, False], ids=["journal", "postgresql"])
async def test_the_later_revision_holds_whatever_the_order_is(
    parts: Parts, store: AnomalyStore, is_lagging: bool
) -> None:
    first = anomaly()
    grown = first.changed(score=0.9, peak_ms=first.peak_ms + MINUTE_MS)
    over = first.changed(end_ms=first.start_ms + MINUTE_MS)
    over_later = grown.changed(end_ms=first.start_ms + 5 * MINUTE_MS)
    revisions = (first, grown, over, over_later)
    shown: list[Recorded] = []

    async def tell() -> None:
        for number, order in enumerate(permutations(range(4))):
            server_id = f"server-{number}"
            for place in order:
                one = revisions[place]
                await store.record(
                    [replace(one, server_id=server_id, id=finding_id(server_id, one.detector, one.start_ms))]
                )
            await store.record([replace(first, server_id=server_id, id=finding_id(server_id, "departure", NOON_MS))])

    if is_lagging:
        async with lagging(parts):
            await tell()
            shown = await listed(store)
    else:
        await tell()
        await parts.all_inserted()
        shown = await listed(store)
    assert len(shown) == 24
    for known in shown:
        assert known.anomaly is not None
        assert (known.anomaly.revision, known.anomaly.end_ms) == (3, over_later.end_ms), known


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"server_id": ""}, "server_id"),
        ({"server_id": "x" * 256}, "server_id"),
        ({"detector": "d" * 64}, "detector"),
        ({"id": "x"}, "id"),
        ({"start_ms": NOON_MS + 1}, "id"),
        ({"end_ms": NOON_MS - 1}, "end_time"),
        ({"end_ms": 1 << 60}, "end_time"),
        ({"peak_ms": -1}, "peak_time"),
        ({"score": 1.1}, "score"),
        ({"score": math.nan}, "score"),
        ({"metric": "a\0"}, "metric"),
        ({"revision": 0}, "revision"),
        ({"revision": 1 << 31}, "revision"),
        ({"contributions": anomaly().contributions * 6}, "contributions"),
    ],
)
async def test_what_no_detector_tells_is_refused_by_name(
    parts: Parts, store: AnomalyStore, bad: dict[str, object], field: str
) -> None:
    wrong = anomaly(**bad)  # type: ignore[arg-type]
    if field in {"server_id", "detector"}:
        wrong = replace(wrong, id=finding_id(wrong.server_id, wrong.detector, wrong.start_ms))
    with pytest.raises(InvalidArgument) as refused:
        await store.record([anomaly(minute=1), wrong])
    assert refused.value.field == f"anomalies[1].{field}"
    assert (await parts.facts.backlog()).waiting == 0


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"server_id": "x" * 256}, "server_id"),
        ({"detector": "d" * 64}, "detector"),
        ({"metric": "\0"}, "metric"),
        ({"min_score": -0.1}, "min_score"),
        ({"min_score": math.nan}, "min_score"),
        ({"start_us": 2, "end_us": 1}, "end_time"),
        ({"start_us": 1 << 62}, "start_time"),
        ({"server_ids": ("a",) * 20_001}, "server_ids"),
    ],
)
async def test_bad_filters_are_refused_by_name(store: AnomalyStore, bad: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await store.listing(AnomalyFilter(**bad))  # type: ignore[arg-type]
    assert refused.value.field == field


async def test_bad_remarks_are_refused_by_name(store: AnomalyStore) -> None:
    known = anomaly()
    await store.record([known])
    for anomaly_id, comment, field in (
        ("x", "", "id"),
        (known.id, "a\0", "comment"),
        (known.id, "é" * 8_193, "comment"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await store.remark(anomaly_id, is_real=True, author="ada", comment=comment)
        assert refused.value.field == field
    with pytest.raises(NotFound) as unknown:
        await store.remark("0" * 32, is_real=True, author="ada", comment="")
    assert unknown.value.field == "id"


def wanted(known: Recorded, filters: AnomalyFilter) -> bool:
    """What the filters mean, said once more."""
    one = known.anomaly
    assert one is not None
    verdict = "none" if known.verdict is None else "real" if known.verdict.is_real else "false"
    return all(
        (
            filters.server_id in {"", one.server_id},
            filters.server_ids is None or one.server_id in filters.server_ids,
            filters.start_us is None or one.end_ms is None or one.end_ms * 1_000 >= filters.start_us,
            filters.end_us is None or one.start_ms * 1_000 < filters.end_us,
            filters.detector in {"", one.detector},
            not filters.metric or any(part.metric == filters.metric for part in one.contributions),
            one.score >= filters.min_score,
            filters.open is None or filters.open == (one.end_ms is None),
            filters.acknowledged is None or filters.acknowledged == (known.acknowledged is not None),
            filters.verdict in {"", verdict},
        )
    )


def random_filter(rng: random.Random) -> AnomalyFilter:
    some: dict[str, object] = {
        "server_id": rng.choice(["a", "b", "none"]),
        "server_ids": rng.choice([(), ("a",), ("a", "c", "none")]),
        "start_us": (NOON_MS + rng.randrange(60) * MINUTE_MS) * 1_000,
        "end_us": (NOON_MS + rng.randrange(60, 90) * MINUTE_MS) * 1_000,
        "detector": rng.choice(["departure", "silence", "' OR true --"]),
        "metric": rng.choice(["cpu_usage", 'disk{path="C:\\"}', "none"]),
        "min_score": rng.choice([0.25, 0.5]),
        "open": rng.choice([True, False]),
        "acknowledged": rng.choice([True, False]),
        "verdict": rng.choice(["none", "real", "false"]),
    }
    return AnomalyFilter(**{name: some[name] for name in rng.sample(sorted(some), rng.randrange(1, 4))})  # type: ignore[arg-type]


class Scene:
    """Findings of three servers that begin, grow and end, and people who say something of them."""

    def __init__(self, store: AnomalyStore) -> None:
        self._store = store
        self._rng = random.Random(7)
        self.known: dict[str, Recorded] = {}
        self.asked = [EVERYTHING, *(random_filter(self._rng) for _ in range(24))]

    async def play(self, events: int) -> None:
        rng = self._rng
        for _ in range(events):
            ids = sorted(self.known)
            if len(ids) < 20 or rng.random() < 0.3:
                one = anomaly(
                    rng.choice("abc"), rng.randrange(90), rng.choice(["departure", "silence"]), value=1.0, metric="m"
                )
                if rng.random() < 0.3:
                    one = replace(one, contributions=one.contributions[:1], score=0.125)
                if one.id in self.known:
                    continue
                await self._tell(one)
            elif rng.random() < 0.5:
                one_id = rng.choice(ids)
                before = self.known[one_id].anomaly
                assert before is not None
                if before.end_ms is None:
                    await self._tell(before.changed(**rng.choice([{"score": 0.9}, {"end_ms": before.start_ms + 1}])))
            else:
                said = await self._store.remark(
                    rng.choice(ids), is_real=rng.choice([None, True, False]), author="ada", comment=str(rng.random())
                )
                assert said.anomaly is not None
                self.known[said.anomaly.id] = said

    async def _tell(self, one: Anomaly) -> None:
        await self._store.record([one])
        self.known[one.id] = await self._store.get(one.id)

    async def check(self) -> None:
        """Every listing and every single finding is as it was told."""
        hits = 0
        for filters in self.asked:
            expected = sorted(
                (one for one in self.known.values() if wanted(one, filters)), key=lambda one: one.place, reverse=True
            )
            found = await listed(self._store, filters)
            assert [shape(one) for one in found] == [shape(one) for one in expected], filters
            hits += len(expected) not in {0, len(self.known)}
        assert hits > HITS
        for one_id, one in self.known.items():
            assert shape(await self._store.get(one_id)) == shape(one)


async def test_listings_are_right_wherever_the_findings_are(own_server: PostgresServer, tmp_path: Path) -> None:
    target = await own_server.fresh_database()
    async with opened(target, tmp_path, bounds=QUICK) as parts:
        scene = Scene(await store_of(parts))
        await scene.play(120)
        await parts.all_inserted()
        async with lagging(parts):
            await scene.play(60)
            await scene.check()
        await scene.play(30)  # some here, some there
        await scene.check()
        await parts.all_inserted()
        own_server.stop(signal.SIGQUIT)
        await scene.play(30)
        await scene.check()
        own_server.start()
        await parts.all_inserted(20.0)
        await scene.check()


async def test_what_only_postgresql_has_is_said_to_be_missing(own_server: PostgresServer, tmp_path: Path) -> None:
    target = await own_server.fresh_database()
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
    async with opened(target, tmp_path / "before", bounds=QUICK) as parts:
        await (await store_of(parts)).record([anomaly(minute=1), anomaly(minute=2)])
        await parts.all_inserted()
    async with opened(target, tmp_path / "after", bounds=QUICK) as parts:
        store = await store_of(parts)
        assert len(await listed(store)) == 2
        own_server.stop(signal.SIGQUIT)
        with pytest.raises(Unavailable) as refused:
            await store.listing(EVERYTHING)
        assert refused.value.reason == "OLDER_UNAVAILABLE"
        with pytest.raises(Unavailable) as refused:
            await store.remark(anomaly(minute=1).id, is_real=True, author="ada", comment="")
        assert refused.value.reason == "OLDER_UNAVAILABLE"
        await store.record([anomaly(minute=3)])
        page = await store.listing(EVERYTHING)
        assert [one.anomaly and one.anomaly.start_ms for one in page.items] == [NOON_MS + 3 * MINUTE_MS]
        assert page.stale_since is not None
        assert page.next_page_token
        said = await store.remark(anomaly(minute=3).id, is_real=True, author="ada", comment="")
        async with aclosing(store.follow(0)) as told:
            assert [shape(one) for one in (await anext(told)).findings] == [shape(said)]
        own_server.start()
        await parts.all_inserted(20.0)
        page = await store.listing(EVERYTHING, page_size=1, page_token=page.next_page_token)
        assert [one.anomaly and one.anomaly.start_ms for one in page.items] == [NOON_MS + 2 * MINUTE_MS]


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


async def test_counts_by_detector(parts: Parts, store: AnomalyStore) -> None:
    told = [anomaly(minute=minute) for minute in range(4)]
    await store.record([*told, anomaly(detector="silence"), replace(told[1].changed(), end_ms=told[1].start_ms)])
    for number, is_real in enumerate((True, False, None)):
        await store.remark(told[number].id, is_real=is_real, author="ada", comment="")
    await store.remark(told[0].id, is_real=False, author="ada", comment="no, not real")
    counted = await store.count((NOON_MS + MINUTE_MS) * 1_000)
    assert counted == [
        {"detector": "departure", "found": 3, "open": 2, "acknowledged": 1, "said_real": 0, "said_false": 1}
    ]
    everything = await store.count(0)
    assert [(one["detector"], one["found"], one["said_false"]) for one in everything] == [
        ("departure", 4, 2),
        ("silence", 1, 0),
    ]
