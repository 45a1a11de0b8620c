"""Findings: recorded by detectors, remarked on by people, listed and followed, with PostgreSQL and without."""

import asyncio
import math
import signal
from contextlib import aclosing
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from fleet.anomaly import finding_id
from runtime.clock import ManualClock
from runtime.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable
from services.metadata.anomalies.model import Recorded
from services.metadata.anomalies.query import MAX_SERVERS, AnomalyFilter
from services.metadata.anomalies.store import AnomalyStore
from services.metadata.target import DatabaseTarget
from tests.harness.postgres import PostgresServer
from tests.metadata.anomaly_parts import (
    EVERYTHING,
    MINUTE_MS,
    NOON_MS,
    Scene,
    anomaly,
    lagging,
    listed,
    shape,
    store_of,
)
from tests.metadata.parts import Parts, opened


@pytest.fixture
async def store(parts: Parts) -> AnomalyStore:  # type: ignore[override]
    return await store_of(parts)


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


async def test_listings_are_right_wherever_the_findings_are(own_server: PostgresServer, tmp_path: Path) -> None:
    target = await own_server.fresh_database()
    async with opened(target, tmp_path) as parts:
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
        await parts.all_inserted()
        await scene.check()


async def test_what_only_postgresql_has_is_said_to_be_missing(own_server: PostgresServer, tmp_path: Path) -> None:
    target = await own_server.fresh_database()
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
    async with opened(target, tmp_path / "before") as parts:
        await (await store_of(parts)).record([anomaly(minute=1), anomaly(minute=2)])
        await parts.all_inserted()
    async with opened(target, tmp_path / "after") as parts:
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
            first, last = await anext(told), await anext(told)
            assert [shape(one) for one in first.findings] == [shape(said)]
            assert (first.continues, last.findings, last.continues, last.is_partial) == (True, (), False, True)
            own_server.start()
            await parts.all_inserted()
            async with asyncio.timeout(20.0):
                rest = await anext(told)  # who was told a part is told all as soon as it can be read
            assert (rest.is_snapshot, rest.is_partial, len(rest.findings)) == (True, False, 3)
        page = await store.listing(EVERYTHING, page_size=1, page_token=page.next_page_token)
        assert [one.anomaly and one.anomaly.start_ms for one in page.items] == [NOON_MS + 2 * MINUTE_MS]


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


async def test_what_is_said_later_counts_also_after_a_clock_that_was_far_ahead(
    target: DatabaseTarget, tmp_path: Path
) -> None:
    told = anomaly()
    for days, is_real in ((3, True), (0, False)):
        folder = tmp_path / str(days)  # the journal remembers a day
        folder.mkdir()
        async with opened(target, folder) as parts:
            clock = ManualClock(NOON_MS + days * 86_400_000)
            store = await AnomalyStore.opened(parts.database, parts.facts, clock)
            await store.record([told])
            await parts.all_inserted()
            said = await store.remark(told.id, is_real=is_real, author="ada", comment="")
            assert said.verdict is not None
            assert said.verdict.is_real is is_real
            await parts.all_inserted()
            assert (await store.get(told.id)).verdict == said.verdict


def test_findings_of_more_servers_than_can_be_asked_about_are_refused_as_what_it_is() -> None:
    ids = tuple(map(str, range(MAX_SERVERS + 1)))
    assert AnomalyFilter(server_ids=ids[1:]).checked()
    with pytest.raises(ResourceExhausted, match="name an environment or a role") as refused:
        AnomalyFilter(server_ids=ids).checked()
    assert (refused.value.reason, refused.value.field) == ("MAX_SERVERS", None)
