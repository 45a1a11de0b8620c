"""Interactions found by their words and their meaning, and how well confidences agree with ratings."""

import asyncio
import bisect
import math
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.errors import FailedPrecondition, InvalidArgument, Unavailable
from services.metadata.embeddings import _INDEX_STATE, INDEX
from services.metadata.store import Calibration, Interaction, InteractionFilter, MetadataStore, NewInteraction
from tests.harness import eventually
from tests.harness.postgres import PostgresServer
from tests.metadata.parts import Parts, opened

ALL = InteractionFilter()


async def found(store: MetadataStore, words: str, filters: InteractionFilter = ALL) -> list[str]:
    return [one.query for one in (await store.search_interactions(words, filters)).items]


async def test_words_are_found_at_once_in_all_that_was_said(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    store, ship = parts.store, parts.facts._ship_batch

    async def slow() -> bool:
        await asyncio.sleep(0.1)
        return await ship()

    monkeypatch.setattr(parts.facts, "_ship_batch", slow)
    for query, response in (
        ("why is web-01 slow", "a backup runs"),
        ("Disk FULL on db_2", "delete old logs"),
        ("was ist mit Zürich", "die Platte ist voll"),
    ):
        made = await store.record_interaction(NewInteraction(query=query, response=response, model="m1"))
    await store.correct_interaction(made.id, "rotate the logs")
    assert await found(store, "backup") == ["why is web-01 slow"]
    assert await found(store, "logs") == ["was ist mit Zürich", "Disk FULL on db_2"]
    assert await found(store, "disk full") == ["Disk FULL on db_2"]
    assert await found(store, '"old logs"') == ["Disk FULL on db_2"]
    assert await found(store, "logs -rotate") == ["Disk FULL on db_2"]
    assert await found(store, "backup or zürich") == ["was ist mit Zürich", "why is web-01 slow"]
    assert await found(store, "web-01") == ["why is web-01 slow"]
    assert await found(store, "logs", InteractionFilter(model="m2")) == []
    for odd in ("!!!", "' OR 1=1; --", "a & | !( <-> :*", '"', "\\", "-", "or or or"):
        await found(store, odd)
    assert (await store.list_interactions(ALL)).total_size == 3


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda store: store.search_interactions("", ALL), "query"),
        (lambda store: store.search_interactions(" \n", ALL), "query"),
        (lambda store: store.search_interactions("a\0", ALL), "query"),
        (lambda store: store.search_interactions("\ud800", ALL), "query"),
        (lambda store: store.search_interactions("x" * (1 << 20), ALL), "query"),
        (lambda store: store.search_interactions("a", ALL, page_size=-1), "page_size"),
        (lambda store: store.search_interactions("a", ALL, page_token="x"), "page_token"),
        (lambda store: store.search_interactions("a", InteractionFilter(min_rating=9)), "min_rating"),
        (lambda store: store.similar_interactions(()), "embedding"),
        (lambda store: store.similar_interactions((0.0, 0.0)), "embedding"),
        (lambda store: store.similar_interactions((1.0, math.nan)), "embedding"),
        (lambda store: store.similar_interactions((1.0,) * 2_001), "embedding"),
        (lambda store: store.similar_interactions((1.0,), -1), "limit"),
        (lambda store: store.record_interaction(NewInteraction(embedding=(math.inf,))), "embedding"),
        (lambda store: store.record_interaction(NewInteraction(embedding=(0.0,))), "embedding"),
        (lambda store: store.calibration(ALL, bins=101), "bins"),
        (lambda store: store.calibration(ALL, bins=-1), "bins"),
        (lambda store: store.calibration(ALL, right_rating=6), "right_rating"),
        (lambda store: store.calibration(InteractionFilter(tag="\0")), "tag"),
    ],
)
async def test_bad_questions_are_refused_by_name(
    blind_store: MetadataStore, call: Callable[[MetadataStore], object], field: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await call(blind_store)  # type: ignore[misc]
    assert refused.value.field == field


async def test_a_rule_of_dashes_may_be_searched_for(parts: Parts) -> None:
    made = await parts.store.record_interaction(NewInteraction(query="the disk"))
    for words, is_found in (
        (f"disk {'-' * 80} the", True),
        (f"{'-' * 33}disk", False),
        (f"the{' -! (' * 33} full", True),
        (f"the {'- ' * 34}full", False),
        (f'"the {"-" * 40} disk"', True),
        (f"the{'-' * 33}disk", True),  # within a word they are no more than a space
        ("-" * 1_000, False),
    ):
        page = await parts.store.search_interactions(words, ALL)
        assert [one.id for one in page.items] == [made.id] * is_found, words


async def test_texts_of_any_words_are_kept_and_their_beginnings_found(parts: Parts) -> None:
    """A tsvector has a limit of its own, at which PostgreSQL would refuse what was acknowledged."""
    rng = random.Random(3)
    letters = "abcdefghijklmnopqrstuvwxyzäöüßéèñ漢字仮名書体"
    words = " ".join("".join(rng.choices(letters, k=rng.randrange(5, 9))) for _ in range(150_000))
    huge = words.encode()[: 1 << 20].decode(errors="ignore")
    for text in (huge, "x" * (1 << 20), "a " * (1 << 19), "漢 " * 200_000):
        await parts.store.record_interaction(NewInteraction(query=text, response="needle " + text[:300_000]))
    await parts.all_inserted()
    assert (await parts.facts.backlog()).refused == 0
    assert len(await found(parts.store, "needle")) == 4


async def test_search_has_pages(parts: Parts) -> None:
    async with parts.database.connection() as connection:
        await connection.execute(
            "INSERT INTO ai_interactions (query, created_at)"
            " SELECT CASE n % 3 WHEN 0 THEN 'disk ' ELSE 'load ' END || n,"
            " '2026-01-01T00:00:00Z'::timestamptz + n / 7 * interval '1 s' FROM generate_series(1, 600) AS n"
        )
    everything: list[Interaction] = []
    token, pages = "", 0
    while True:
        page = await parts.store.search_interactions("disk", ALL, page_size=30, page_token=token)
        everything += page.items
        pages += 1
        if not (token := page.next_page_token):
            break
        for other in ("load", "disk or load"):
            with pytest.raises(InvalidArgument):
                await parts.store.search_interactions(other, ALL, page_size=30, page_token=token)
    assert pages == 7
    assert sorted(one.query for one in everything) == sorted(f"disk {n}" for n in range(3, 601, 3))
    assert everything == sorted(everything, key=lambda one: (one.create_time, one.id), reverse=True)


def cosine(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return 1 - product / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


async def test_the_nearest_are_found_with_and_without_the_index(
    embedded_server: PostgresServer, tmp_path: Path
) -> None:
    rng = random.Random(11)
    target = await embedded_server.fresh_database()
    async with opened(target, tmp_path) as parts:
        store = parts.store
        with pytest.raises(FailedPrecondition, match="superuser of the database for CREATE EXTENSION"):
            await store.similar_interactions((1.0, 2.0))
        await embedded_server.execute("CREATE EXTENSION vector", database=target.options["database"])
        assert await store.similar_interactions((1.0, 2.0)) == []
        made = {}
        for _ in range(60):
            embedding = tuple(rng.gauss(0, 1) for _ in range(8))
            recorded = await store.record_interaction(NewInteraction(query="q", embedding=embedding))
            assert recorded.embedding == ()
            made[recorded.id] = embedding
        bare = await store.record_interaction(NewInteraction(query="has none"))
        wanted = tuple(rng.gauss(0, 1) for _ in range(8))
        expected = sorted(made, key=lambda one: cosine(made[one], wanted))

        async def right(limit: int) -> None:
            near = await store.similar_interactions(wanted, limit)
            assert [one.id for one, _ in near] == expected[: limit or 10]
            distances = [cosine(made[one.id], wanted) for one, _ in near]
            assert [distance for _, distance in near] == pytest.approx(distances, abs=1e-5)

        await right(0)

        async def indexed() -> bool:
            async with parts.database.connection() as connection:
                return bool(await connection.fetchval(_INDEX_STATE, INDEX, "%= 8)%"))

        await eventually(indexed)
        await right(60)
        async with parts.database.connection() as connection:  # of before the first, by somebody else
            await connection.execute("INSERT INTO ai_embeddings VALUES ($1, '{1, 2, 3}')", bare.id)
        await right(60)
        async with parts.database.connection() as connection, connection.transaction():
            await connection.execute("SET LOCAL enable_seqscan = off")
            size = len(wanted)
            plan = await connection.fetch(
                f"EXPLAIN SELECT interaction_id FROM ai_embeddings WHERE cardinality(embedding) = {size}"
                f" ORDER BY embedding::vector({size}) <=> $1::real[]::vector({size}) LIMIT 5",
                list(wanted),
            )
        assert INDEX in str(plan), "the question is put as the index has it"
        other = NewInteraction(embedding=(1.0,) * 9)
        for call in (store.similar_interactions((1.0,)), store.record_interaction(other)):
            with pytest.raises(InvalidArgument, match="the first that was recorded has 8") as refused:
                await call
            assert refused.value.field == "embedding"
    async with opened(target, tmp_path) as parts:  # after a restart, too
        with pytest.raises(InvalidArgument):
            await parts.store.record_interaction(NewInteraction(embedding=(1.0,)))


async def test_once_all_are_erased_embeddings_may_have_another_size(
    embedded_server: PostgresServer, tmp_path: Path
) -> None:
    target = await embedded_server.fresh_database()
    await embedded_server.execute("CREATE EXTENSION vector", database=target.options["database"])
    async with opened(target, tmp_path) as parts:
        store = parts.store

        async def indexed(size: int) -> bool:
            async with parts.database.connection() as connection:
                return bool(await connection.fetchval(_INDEX_STATE, INDEX, f"%= {size})%"))

        for size in (3, 2):
            embedding, other = (1.0,) * size, (1.0,) * (size + 5)
            made = await store.record_interaction(NewInteraction(session_id="s", embedding=embedding))
            with pytest.raises(InvalidArgument, match=f"the first that was recorded has {size}"):
                await store.record_interaction(NewInteraction(embedding=other))
            assert [one.id for one, _ in await store.similar_interactions(embedding)] == [made.id]
            await eventually(lambda size=size: indexed(size))  # type: ignore[misc]
            with pytest.raises(InvalidArgument):
                await store.similar_interactions(other)
            await store.erase_session("s")
            await parts.all_inserted()


async def test_while_the_database_is_away_embeddings_have_the_size_that_is_known(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    async with opened(await own_server.fresh_database(), tmp_path) as parts:
        await parts.store.record_interaction(NewInteraction(embedding=(1.0,)))
        own_server.stop(signal.SIGQUIT)
        with pytest.raises(InvalidArgument):
            await parts.store.record_interaction(NewInteraction(embedding=(1.0, 2.0)))
        await parts.store.record_interaction(NewInteraction(embedding=(2.0,)))
        own_server.start()


async def test_without_pgvector_embeddings_are_kept_and_the_way_to_it_is_told(
    debian_server: PostgresServer, tmp_path: Path
) -> None:
    target = await debian_server.fresh_database()
    async with opened(target, tmp_path) as parts:
        made = await parts.store.record_interaction(NewInteraction(query="q", embedding=(1.0, 0.5)))
        with pytest.raises(FailedPrecondition, match="pgvector") as refused:
            await parts.store.similar_interactions((1.0, 0.5))
        assert refused.value.reason == "PGVECTOR_MISSING"
        assert "CREATE EXTENSION" in refused.value.message or "install" in refused.value.message
        async with parts.database.connection() as connection:
            kept = await connection.fetchrow("SELECT interaction_id, embedding FROM ai_embeddings")
        assert (str(kept[0]), kept[1]) == (made.id, [1.0, 0.5])
        assert (await parts.store.probe()).down == "", "that says nothing of the database"


def oracle(rated: list[tuple[float, int]], bins: int, right: int) -> tuple[float, float]:
    edges = [number / bins for number in range(bins)]
    groups: dict[int, list[tuple[float, int]]] = {}
    for confidence, rating in rated:
        groups.setdefault(bisect.bisect_right(edges, confidence) - 1, []).append((confidence, rating))
    gaps = []
    for group in groups.values():
        accuracy = sum(rating >= right for _, rating in group) / len(group)
        gaps.append((len(group), abs(accuracy - sum(confidence for confidence, _ in group) / len(group))))
    return sum(size * gap for size, gap in gaps) / len(rated), max(gap for _, gap in gaps)


async def test_the_calibration_report_is_what_its_definition_says(parts: Parts) -> None:
    store = parts.store
    empty = await store.calibration(ALL)
    assert empty == Calibration(
        bins=(), expected_error=None, maximum_error=None, count=0, unrated=0, without_confidence=0
    )
    rng = random.Random(5)
    rated, last = [], None
    for number in range(120):
        confidence = rng.choice([None, 0.0, 1.0, 0.57, 0.3, 0.1 * 3, rng.random()])
        rating = rng.choice([None, 1, 2, 3, 4, 5])
        new = NewInteraction(confidence=confidence, user_rating=rating, model=f"m{number % 2}")
        last = await store.record_interaction(new)
        if confidence is not None and rating is not None:
            rated.append((confidence, rating, number % 2))
    assert last is not None
    for bins, right in ((0, 0), (100, 3), (1, 5), (7, 1)):
        report = await store.calibration(ALL, bins=bins, right_rating=right)
        expected = oracle([one[:2] for one in rated], bins or 10, right or 4)
        assert (report.expected_error, report.maximum_error) == pytest.approx(expected)
        assert report.count == len(rated) == sum(one.count for one in report.bins)
        assert report.unrated + report.without_confidence > 20
        for one in report.bins:
            assert one.low - 1e-9 <= one.mean_confidence <= one.high + 1e-9
            assert 1 <= one.mean_rating <= 5
            assert 0 <= one.accuracy <= 1
    of_one = await store.calibration(InteractionFilter(model="m1"))
    assert of_one.expected_error == pytest.approx(oracle([one[:2] for one in rated if one[2]], 10, 4)[0])
    await store.rate_interaction(last.id, 5)
    sure = await store.record_interaction(NewInteraction(confidence=1.0, user_rating=1, model="new"))
    assert (await store.calibration(InteractionFilter(model="new"))).expected_error == 1.0
    await store.rate_interaction(sure.id, 5)
    assert (await store.calibration(InteractionFilter(model="new"))).expected_error == 0.0, "the latest rating counts"


async def test_without_the_database_none_of_it_is_answered(own_server: PostgresServer, tmp_path: Path) -> None:
    target = await own_server.fresh_database()
    async with opened(target, tmp_path) as parts:
        store = parts.store
        await store.record_interaction(NewInteraction(query="before"))
        assert await found(store, "before") == ["before"]
        own_server.stop(signal.SIGQUIT)
        await store.record_interaction(NewInteraction(query="meanwhile"))
        for call in (
            lambda: store.search_interactions("before", ALL),
            lambda: store.similar_interactions((1.0,)),
            lambda: store.calibration(ALL),
        ):
            with pytest.raises(Unavailable):
                await call()
