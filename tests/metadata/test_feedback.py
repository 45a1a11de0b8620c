"""What is kept of an interaction beside the contract, what people say of it later, and how it is found again."""

import asyncio
import math
import random
import signal
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from runtime.clock import SystemClock
from runtime.errors import InvalidArgument, NotFound, Unavailable
from services.metadata.interactions_local import LocalInteractions
from services.metadata.journal import Journal
from services.metadata.store import Interaction, InteractionFilter, MetadataStore, NewInteraction
from services.metadata.store_connection import Database
from services.metadata.store_migrate import load_migrations, migrate
from services.metadata.target import DatabaseTarget
from tests.harness import eventually
from tests.harness.postgres import PostgresServer
from tests.metadata.parts import Parts, opened
from tests.metadata.test_migrate import connect

WHOLE = NewInteraction(
    id="6b9f4c1e-2d3a-4f5b-8c7d-9e0f1a2b3c4d",
    session_id="s",
    query="why?",
    response="so",
    confidence=0.5,
    user_rating=2,
    model="small-1",
    prompt_hash="ab" * 32,
    prompt_tokens=12,
    response_tokens=0,
    latency_ms=1_234,
    server_ids=("web-1", "db-1"),
    anomaly_ids=("web-1/level/2026",),
    tags=("disk", "'; DROP TABLE ai_interactions; --"),
    correction="its disk",
    rating_comment="no",
)
SIX_PAGES = 25


async def pages(store: MetadataStore, filters: InteractionFilter, size: int) -> tuple[list[Interaction], set[int]]:
    """All that match, and the totals that were said on the way; a stale listing ends where the record would go on."""
    found: list[Interaction] = []
    totals, token = set(), ""
    while True:
        try:
            page = await store.list_interactions(filters, page_size=size, page_token=token)
        except Unavailable as error:
            assert error.reason == "OLDER_UNAVAILABLE"
            return found, totals
        found += page.items
        totals.add(page.total_size)
        if not (token := page.next_page_token):
            return found, totals


async def test_everything_comes_back_from_the_journal_and_from_postgresql(parts: Parts) -> None:
    recorded = await parts.store.record_interaction(WHOLE)
    for field in fields(NewInteraction):
        assert getattr(recorded, field.name) == getattr(WHOLE, field.name), field.name
    assert recorded.rate_time == recorded.correct_time == recorded.create_time
    assert await parts.store.get_interaction(WHOLE.id) == recorded
    await parts.all_inserted()
    assert await parts.store.get_interaction(WHOLE.id) == recorded
    assert (await parts.store.list_interactions(InteractionFilter())).items == (recorded,)
    bare = await parts.store.record_interaction(NewInteraction())
    await parts.all_inserted()
    assert await parts.store.get_interaction(bare.id) == bare
    async with parts.database.connection() as connection:
        found = await connection.fetchrow("SELECT * FROM ai_interactions WHERE id = $1", bare.id)
    absent = {name for name, value in found.items() if value is None}
    assert {"model", "tags", "server_ids", "correction", "rated_at", "session_id"} <= absent


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"model": "m" * 101}, "model"),
        ({"model": "a\0"}, "model"),
        ({"prompt_hash": "h" * 129}, "prompt_hash"),
        ({"prompt_hash": "\ud800"}, "prompt_hash"),
        ({"prompt_tokens": -1}, "prompt_tokens"),
        ({"response_tokens": -1}, "response_tokens"),
        ({"latency_ms": -1}, "latency"),
        ({"latency_ms": 86_400_001}, "latency"),
        ({"server_ids": ("a",) * 2}, "server_ids[1]"),
        ({"server_ids": ("",)}, "server_ids[0]"),
        ({"server_ids": tuple(map(str, range(101)))}, "server_ids"),
        ({"server_ids": ("a", "x" * 256)}, "server_ids[1]"),
        ({"anomaly_ids": ("x" * 513,)}, "anomaly_ids[0]"),
        ({"anomaly_ids": tuple(map(str, range(101)))}, "anomaly_ids"),
        ({"tags": ("t" * 65,)}, "tags[0]"),
        ({"tags": ("ok", "\0")}, "tags[1]"),
        ({"tags": tuple(map(str, range(51)))}, "tags"),
        ({"correction": "x" * 1_048_577}, "correction"),
        ({"rating_comment": "x" * 16_385, "user_rating": 1}, "rating_comment"),
        ({"rating_comment": "why"}, "rating_comment"),
    ],
)
async def test_bad_fields_are_refused_by_name(blind_store: MetadataStore, bad: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await blind_store.record_interaction(NewInteraction(**bad))  # type: ignore[arg-type]
    assert refused.value.field == field


NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"max_rating": 6}, "max_rating"),
        ({"max_rating": -1}, "max_rating"),
        ({"min_rating": 4, "max_rating": 3}, "max_rating"),
        ({"min_confidence": -0.1}, "min_confidence"),
        ({"min_confidence": math.nan}, "min_confidence"),
        ({"max_confidence": 2.0}, "max_confidence"),
        ({"min_confidence": 0.5, "max_confidence": 0.4}, "max_confidence"),
        ({"model": "m" * 101}, "model"),
        ({"tag": "t" * 65}, "tag"),
        ({"tag": "\0"}, "tag"),
        ({"server_id": "x" * 256}, "server_id"),
        ({"server_id": "\ud800"}, "server_id"),
        ({"start_time": NOON, "end_time": NOON - timedelta(seconds=1)}, "end_time"),
    ],
)
async def test_bad_filters_are_refused_by_name(blind_store: MetadataStore, bad: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await blind_store.list_interactions(InteractionFilter(**bad))  # type: ignore[arg-type]
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda store: store.rate_interaction("x", 3), "id"),
        (lambda store: store.rate_interaction(WHOLE.id, 0), "rating"),
        (lambda store: store.rate_interaction(WHOLE.id, 6), "rating"),
        (lambda store: store.rate_interaction(WHOLE.id, 3, "a\0b"), "comment"),
        (lambda store: store.rate_interaction(WHOLE.id, 3, "\ud800"), "comment"),
        (lambda store: store.rate_interaction(WHOLE.id, 3, "é" * 8_193), "comment"),
        (lambda store: store.correct_interaction("x", "so"), "id"),
        (lambda store: store.correct_interaction(WHOLE.id, ""), "correction"),
        (lambda store: store.correct_interaction(WHOLE.id, "\0"), "correction"),
        (lambda store: store.correct_interaction(WHOLE.id, "x" * 1_048_577), "correction"),
    ],
)
async def test_bad_judgements_are_refused_by_name(
    blind_store: LocalInteractions, call: Callable[[LocalInteractions], object], field: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await call(blind_store)  # type: ignore[misc]
    assert refused.value.field == field


def matches(one: Interaction, wanted: InteractionFilter) -> bool:
    """What the filters mean, said without SQL."""
    rating, confidence = one.user_rating, one.confidence
    return (
        wanted.session_id in {"", one.session_id}
        and (not wanted.min_rating or (rating is not None and rating >= wanted.min_rating))
        and (not wanted.max_rating or (rating is not None and rating <= wanted.max_rating))
        and (wanted.min_confidence is None or (confidence is not None and confidence >= wanted.min_confidence))
        and (wanted.max_confidence is None or (confidence is not None and confidence <= wanted.max_confidence))
        and wanted.model in {"", one.model}
        and (not wanted.tag or wanted.tag in one.tags)
        and (not wanted.server_id or wanted.server_id in one.server_ids)
        and (wanted.start_time is None or one.create_time >= wanted.start_time)
        and (wanted.end_time is None or one.create_time < wanted.end_time)
    )


def random_filter(rng: random.Random, made: list[Interaction]) -> InteractionFilter:
    some = {
        "session_id": rng.choice(["s0", "s1", "none"]),
        "min_rating": rng.randrange(0, 4),
        "max_rating": rng.randrange(3, 6),
        "min_confidence": rng.choice([0.0, 0.25]),
        "max_confidence": rng.choice([0.25, 0.75, 1.0]),
        "model": rng.choice(["m0", "m1", "m' OR true --"]),
        "tag": rng.choice(["t0", "t1", 'quote"', "none"]),
        "server_id": rng.choice(["a", "b", "none"]),
        "start_time": rng.choice(made).create_time,
        "end_time": made[-1].create_time - timedelta(microseconds=rng.randrange(2)),
    }
    chosen = rng.sample(sorted(some), rng.randrange(1, 4))
    return InteractionFilter(**{name: some[name] for name in chosen})  # type: ignore[arg-type]


async def test_filters_mean_the_same_to_postgresql_and_to_the_journal(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    rng = random.Random(7)
    target = await own_server.fresh_database()
    async with opened(target, tmp_path) as parts:
        store, made = parts.store, []
        for number in range(60):
            new = NewInteraction(
                session_id=rng.choice(["", "s0", "s1"]),
                query=str(number),
                confidence=rng.choice([None, 0.0, 0.25, 0.5, 1.0]),
                user_rating=rng.choice([None, 1, 3, 5]),
                model=rng.choice(["", "m0", "m1", "m' OR true --"]),
                tags=tuple(rng.sample(["t0", "t1", 'quote"', "t2"], rng.randrange(4))),
                server_ids=tuple(rng.sample(["a", "b"], rng.randrange(3))),
            )
            made.append(await store.record_interaction(new))
        for index in rng.sample(range(60), 20):
            made[index] = await store.rate_interaction(made[index].id, rng.randrange(1, 6), "later")
        asked = [InteractionFilter(), *(random_filter(rng, made) for _ in range(60))]

        async def all_right() -> None:
            hits = 0
            for filters in asked:
                expected = [one for one in reversed(made) if matches(one, filters)]
                found, totals = await pages(store, filters, 7)
                assert found == expected, filters
                assert totals <= {len(expected)}, filters
                hits += len(expected) not in {0, len(made)}
            assert hits > SIX_PAGES

        await parts.all_inserted()
        await all_right()
        own_server.stop(signal.SIGQUIT)
        for index in rng.sample(range(60), 20):
            made[index] = await store.rate_interaction(made[index].id, rng.randrange(1, 6), "while it was away")
        await all_right()


async def test_the_latest_rating_and_correction_count_and_all_are_kept(parts: Parts) -> None:
    store = parts.store
    made = await store.record_interaction(NewInteraction(query="why?"))
    for rating in (3, 5, 1):
        rated = await store.rate_interaction(made.id.upper(), rating, f"comment {rating}")
        assert (rated.user_rating, rated.rating_comment) == (rating, f"comment {rating}")
        assert await store.get_interaction(made.id) == rated
        assert (await store.list_interactions(InteractionFilter(min_rating=rating, max_rating=rating))).items == (
            rated,
        )
    corrected = await store.correct_interaction(made.id, "so")
    assert (corrected.correction, corrected.user_rating, corrected.query) == ("so", 1, "why?")
    without = await store.rate_interaction(made.id, 2)
    assert (without.rating_comment, without.correction) == ("", "so")
    await parts.all_inserted()
    assert await store.get_interaction(made.id) == without
    async with parts.database.connection() as connection:
        kept = await connection.fetch("SELECT rating, correction FROM ai_feedback ORDER BY created_at")
        contract = await connection.fetchval("SELECT user_rating FROM ai_interactions")
    assert [tuple(row) for row in kept] == [(3, None), (5, None), (1, None), (None, "so"), (2, None)]
    assert contract == 2
    with pytest.raises(NotFound) as unknown:
        await store.rate_interaction(str(uuid4()), 3)
    assert unknown.value.field == "id"


async def test_a_clock_that_was_set_back_lets_the_last_rating_count(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await parts.store.record_interaction(NewInteraction())
    await parts.store.rate_interaction(made.id, 1)
    monkeypatch.setattr(parts.store, "_next_us", lambda: 1_700_000_000_000_000)
    last = await parts.store.rate_interaction(made.id, 5)
    assert last.user_rating == 5
    await parts.all_inserted()
    assert await parts.store.get_interaction(made.id) == last


async def test_ratings_at_once_agree_on_one_that_is_the_latest(parts: Parts) -> None:
    made = await parts.store.record_interaction(NewInteraction())
    answers = await asyncio.gather(*(parts.store.rate_interaction(made.id, n % 5 + 1, str(n)) for n in range(50)))
    latest = max(answers, key=lambda one: one.rate_time or one.create_time)
    assert await parts.store.get_interaction(made.id) == latest
    await parts.all_inserted()
    assert await parts.store.get_interaction(made.id) == latest
    async with parts.database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM ai_feedback") == 50


async def test_what_only_the_database_has_cannot_be_rated_while_it_is_away(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    target = await own_server.fresh_database()
    async with opened(target, tmp_path) as parts:
        store = parts.store
        old = str(uuid4())
        async with parts.database.connection() as connection:
            await connection.execute("INSERT INTO ai_interactions (id, user_rating) VALUES ($1, 4)", old)
        assert (await store.rate_interaction(old, 3)).user_rating == 3
        made = await store.record_interaction(NewInteraction(query="before"))
        await parts.all_inserted()
        own_server.stop(signal.SIGQUIT)
        later = await store.record_interaction(NewInteraction(query="meanwhile"))
        for one in (made, later):
            rated = await store.rate_interaction(one.id, 5, "well")
            assert (await store.get_interaction(one.id)) == rated
            assert (await store.list_interactions(InteractionFilter(min_rating=5))).items[0] == rated
        with pytest.raises(Unavailable) as refused:
            await store.correct_interaction(old, "so")
        assert refused.value.reason == "OLDER_UNAVAILABLE"
        own_server.start()
        await parts.all_inserted()
        listed = await store.list_interactions(InteractionFilter(min_rating=5))
        assert [one.query for one in listed.items] == ["meanwhile", "before"]
        assert listed.stale_since is None
        assert (await store.get_interaction(old)).user_rating == 3


async def test_another_database_gets_ratings_too_and_none_twice(
    embedded_server: PostgresServer, debian_server: PostgresServer, tmp_path: Path
) -> None:
    first, second = await embedded_server.fresh_database(), await debian_server.fresh_database()
    async with opened(first, tmp_path) as parts:
        made = await parts.store.record_interaction(NewInteraction())
        for rating in (5, 2):
            await parts.store.rate_interaction(made.id, rating)
        latest = await parts.store.correct_interaction(made.id, "so")
        await parts.all_inserted()
    for target in (second, first):
        async with opened(target, tmp_path) as parts:

            async def all_there(parts: Parts = parts) -> bool:
                async with parts.database.connection() as connection:
                    return int(await connection.fetchval("SELECT count(*) FROM ai_feedback")) == 3

            await eventually(all_there)
            await parts.all_inserted()
            async with parts.database.connection() as connection:
                assert await connection.fetchval("SELECT user_rating FROM ai_interactions") == 2
            assert await parts.store.get_interaction(made.id) == latest


async def test_an_interaction_that_was_refused_gets_its_rating_when_it_is_taken(parts: Parts, tmp_path: Path) -> None:
    async with parts.database.connection() as connection:
        await connection.execute("ALTER TABLE ai_interactions ADD CONSTRAINT forbidden CHECK (query <> 'refused')")
    bad = await parts.store.record_interaction(NewInteraction(query="refused", user_rating=1, correction="first"))
    await parts.store.correct_interaction(bad.id, "second")
    rated = await parts.store.rate_interaction(bad.id, 4, "all the same")
    await parts.all_inserted()
    assert await parts.store.get_interaction(bad.id) == rated
    assert (await parts.store.list_interactions(InteractionFilter(min_rating=4))).items == (rated,)
    async with parts.database.connection() as connection:
        await connection.execute("ALTER TABLE ai_interactions DROP CONSTRAINT forbidden")

    def retry() -> list[str]:
        journal = Journal(tmp_path / "facts.db")
        try:
            return journal.retry([bad.id])
        finally:
            journal.close()

    assert await asyncio.to_thread(retry) == [bad.id]
    await parts.all_inserted()
    async with parts.database.connection() as connection:
        row = await connection.fetchrow("SELECT user_rating, rating_comment, correction FROM ai_interactions")
    assert tuple(row) == (4, "all the same", "second")
    assert await parts.store.get_interaction(bad.id) == rated


async def test_a_database_of_before_is_brought_up_to_date_with_its_rows(target: DatabaseTarget, tmp_path: Path) -> None:
    connection = await connect(target)
    await migrate(connection, load_migrations()[:2])
    old = str(uuid4())
    await connection.execute("INSERT INTO ai_interactions (id, query, user_rating) VALUES ($1, 'old', 4)", old)
    await connection.close()
    async with Database(target, clock=SystemClock()), opened(target, tmp_path) as parts:
        found = await parts.store.get_interaction(old)
        assert (found.query, found.user_rating, found.rate_time, found.tags) == ("old", 4, None, ())
        rated = await parts.store.rate_interaction(old, 1)
        await parts.all_inserted()
        assert (
            await parts.store.get_interaction(old) == rated == replace(found, user_rating=1, rate_time=rated.rate_time)
        )
